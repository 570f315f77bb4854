"""Figures: the curves of a run, and the weight that each objective gives to a gradient.

What it does    draws runs/<name>/curves.png from a run's metrics.jsonl, which train.py does with
                every checkpoint; and figures/objectives.png.
Not here        the metrics (train.py). docs/metrics.md says what each of them is.
Run it alone    python -m evaluation.figures RUN …     curves.png of these runs
                python -m evaluation.figures           figures/objectives.png, which git tracks
Where to fork   PANELS names what is drawn of a run.
"""
import gc
import sys
from pathlib import Path

from evaluation.tables import main_score
from objectives import SHOWN, gradient_weight
from plumbing.files import read_rows

OBJECTIVES_FIGURE = Path(__file__).resolve().parent.parent / "figures" / "objectives.png"
PANELS = {"reward": ["reward_mean", "validation_reward"],
          "accuracy and format": ["accuracy", "format_rate", "validation_accuracy"],
          "completion length, tokens": ["length_mean", "length_finished"],
          "ratio, last epoch": ["ratio_p1", "ratio_p50", "ratio_p99"]}


def draw_curves(folder):
    """Write curves.png into a run's folder. Raises OSError and ValueError where it has no rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    points = {key: ([], []) for keys in PANELS.values() for key in keys}  # steps, values
    for row in read_rows(folder / "metrics.jsonl"):
        for key in points.keys() & row.keys():
            points[key][0].append(row["step"])
            points[key][1].append(row[key])
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PANELS.items()):
        for key, style in zip(keys, ("-", "--", ":")):
            if points[key][0]:
                axis.plot(*points[key], style, label=key,
                          marker="o" if key.startswith("validation") else None, markersize=4)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)
    gc.collect()  # a figure holds itself; some 15 MiB would wait for a collection


def draw_objectives(path=OBJECTIVES_FIGURE):
    """Draw what each objective multiplies A·∇log π by, against the ratio, for either sign of A."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    grid = [i / 200 for i in range(2, 480)]
    styles = [("black", ":"), ("#d55e00", "--"), ("0.3", (0, (1, 3))), ("#0072b2", "-"),
              ("#56b4e9", "-."), ("#009e73", (0, (5, 1, 1, 1, 1, 1))),
              ("#cc79a7", (0, (1, 1))), ("#e69f00", (0, (8, 2)))]
    for axis, sign in zip(axes, (1.0, -1.0)):
        for (name, objective), (color, line) in zip(SHOWN.items(), styles):
            axis.plot(grid, gradient_weight(objective, grid, sign), color=color, linestyle=line,
                      label=name, linewidth=2)
        axis.set(title=f"advantage {'> 0' if sign > 0 else '< 0'}", xlabel="ratio  r = π / π_old")
        axis.axvline(1, color="0.85", zorder=0)
    axes[0].set_ylabel("weight on A·∇log π")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center",
                  ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_accuracy(summaries, path):
    """Accuracy against temperature with 95 % intervals, a panel per set, a line per model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sets = list(dict.fromkeys(s["data"] for s in summaries))
    models = list(dict.fromkeys(s["model"] for s in summaries))
    temperatures = sorted({s["temperature"] for s in summaries})
    span = temperatures[-1] - temperatures[0] or 1.0
    figure, panels = plt.subplots(1, len(sets), figsize=(1.5 + 3.5 * len(sets), 3.6), sharey=True,
                                  squeeze=False, layout="constrained")
    for data, panel in zip(sets, panels[0]):
        for i, model in enumerate(models):
            found = sorted((s for s in summaries if (s["data"], s["model"]) == (data, model)),
                           key=lambda s: s["temperature"])
            key = main_score(found)
            y = [s[key] for s in found]
            low, high = zip(*(s[f"{key}_interval"] for s in found))
            errors = [[max(v - a, 0) for v, a in zip(y, low)],
                      [max(b - v, 0) for v, b in zip(y, high)]]
            x = [s["temperature"] + 0.01 * span * (i - (len(models) - 1) / 2) for s in found]
            panel.errorbar(x, y, errors, fmt="o-", capsize=3, markersize=4, label=model)
        panel.set(title=f"{data} ({key})", xlabel="temperature", ylim=(-0.02, 1.02),
                  xticks=temperatures,
                  xlim=(temperatures[0] - 0.1 * span, temperatures[-1] + 0.1 * span))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("accuracy, 95 % intervals")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    if not sys.argv[1:]:
        draw_objectives()
        print(f"wrote {OBJECTIVES_FIGURE}")
    for run in map(Path, sys.argv[1:]):
        try:
            draw_curves(run)
        except (OSError, ValueError) as e:
            sys.exit(f"error: {e}; expected the folder of a run")
        print(f"wrote {run / 'curves.png'}")


if __name__ == "__main__":
    main()

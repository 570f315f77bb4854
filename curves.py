"""The curves of a run: reward, accuracy, length and ratios against the step.

What it does    draws runs/<name>/curves.png from its metrics.jsonl; train.py does so with every
                checkpoint.
What it leaves  the metrics to train.py; README.md says what each of them is.
Run it alone    python curves.py runs/tiny-pspo-s0 …
Where to fork   PANELS names what is drawn.
"""
import gc
import json
import sys
from pathlib import Path

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
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
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


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:] or ["runs/tiny-pspo-s0"]):
        try:
            draw_curves(run)
        except (OSError, ValueError) as e:
            sys.exit(f"error: {e}; expected the folder of a run")
        print(f"wrote {run / 'curves.png'}")

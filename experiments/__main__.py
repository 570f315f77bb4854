"""Run the experiments and draw what they found: python -m experiments [NAME …]

What it does    trains every cell of cells.py with every seed, one process a core; each finished run
                is a row of results.jsonl, and a row that is there is not run again. Then it draws
                the figures and prints the Markdown tables, which takes seconds.
What it leaves  the cells to cells.py, training to train.py, intervals to intervals.py.
Run it alone    python -m experiments --draw      figures and tables of the recorded rows only
"""
import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from experiments.cells import EXPERIMENTS, FIVE, SEEDS
from experiments.run import run_cell
from intervals import over_seeds

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES = HERE / "results.jsonl", HERE.parent / "figures"


# ------------------------------------------------------------------ running

def run_missing(names, n_jobs):
    """Run what is not in results.jsonl yet, the seeds of every cell in turn."""
    done = {(row["flags"], row["seed"]) for row in recorded()}
    cells = dict.fromkeys((flags, seed) for name in names for seed in SEEDS.get(name, FIVE)
                          for flags in EXPERIMENTS[name].values())
    missing = [cell for cell in cells if cell not in done]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE,
                            capture_output=True, text=True).stdout.strip()
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_jobs, maxtasksperchild=20) as pool, open(RESULTS, "a") as file:
        for row in tqdm(pool.imap_unordered(run_cell, missing), total=len(missing),
                        desc="runs", unit="run"):
            file.write(json.dumps({**row, "commit": commit}) + "\n")
            file.flush()


def recorded():
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


# ------------------------------------------------------------------ tables and figures

def values(rows, flags, key="test_strict"):
    """The seeds' values of a cell, in the order of the seeds."""
    found = {row["seed"]: row.get(key) for row in rows if row["flags"] == flags}
    return [found[seed] for seed in sorted(found) if found[seed] is not None]


def with_interval(x, form="{:.1%}"):
    """"mean ± sd [interval]" of the seeds."""
    if not x:
        return "–"
    if len(x) == 1:
        return form.format(x[0]) + " (1 seed)"
    mean, interval = over_seeds(x)
    text = form.format(mean) + " ± " + form.format(statistics.stdev(x))
    return text + ("" if interval is None else " [{}, {}]".format(*map(form.format, interval)))


def table(rows, cells):
    """A Markdown table of cells: accuracy and what the last steps looked like."""
    lines = ["| arm | seeds | greedy strict accuracy: mean ± sd [95 % interval] | KL(old‖new) | "
             "share a 0.2 clip removes | gradient norm |", "|---|---:|---|---:|---:|---:|"]
    for label, flags in cells.items():
        x, rest = values(rows, flags), []
        for key, form in (("kl_old_new", "{:.1e}"), ("clip_removed", "{:.1%}"),
                          ("gradient_norm", "{:.2f}")):
            found = values(rows, flags, key)
            rest.append(form.format(statistics.fmean(found)) if found else "–")
        lines.append(f"| {label} | {len(x)} | {with_interval(x)} | {' | '.join(rest)} |")
    return "\n".join(lines)


def draw_bars(rows, cells, path, title):
    """Every seed as a dot, the mean and its interval as a bar: one line an arm."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cells = {label: values(rows, flags) for label, flags in cells.items()}
    cells = {label: x for label, x in cells.items() if x}
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(cells) + 1.2), layout="constrained")
    for y, (label, x) in enumerate(cells.items()):
        axis.plot(x, [y] * len(x), "o", color="0.6", markersize=4)
        mean, interval = over_seeds(x) if len(x) > 1 else (x[0], None)
        axis.plot([mean], [y], "|", color="black", markersize=14, markeredgewidth=2)
        if interval:
            axis.plot(interval, [y, y], color="#0072b2", linewidth=2, zorder=0)
    axis.set(yticks=range(len(cells)), yticklabels=list(cells), xlim=(0, 1), title=title,
             xlabel="greedy strict accuracy on 200 test problems after the last step")
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_reuse(rows, cells, path):
    """Accuracy against epochs, a panel for each learning rate, a line for each arm."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    split = {tuple(label.split(" | ")): flags for label, flags in cells.items()}
    rates = list(dict.fromkeys(times for _, _, times in split))
    figure, axes = plt.subplots(1, len(rates), figsize=(10, 3.4), sharey=True,
                                layout="constrained")
    styles = [("#d55e00", "--", "s"), ("0.5", ":", "o"), ("#0072b2", "-", "^"),
              ("black", "-.", "D")]
    arms = list(dict.fromkeys(arm for arm, _, _ in split))
    for axis, times in zip(axes, rates):
        for shift, (arm, (color, line, marker)) in enumerate(zip(arms, styles)):
            points = [(int(epochs) * 1.05 ** (shift - 1.5), values(rows, flags))
                      for (a, epochs, t), flags in split.items() if a == arm and t == times]
            points = [(e, *over_seeds(x)) for e, x in points if len(x) > 1]
            if points:
                epochs, means, intervals = zip(*points)
                halves = [0 if i is None else m - i[0] for m, i in zip(means, intervals)]
                axis.errorbar(epochs, means, halves, color=color, linestyle=line, marker=marker,
                              capsize=3, label=arm)
        axis.set(xscale="log", xticks=[1, 2, 4, 8], xticklabels=["1", "2", "4", "8"], ylim=(0, 1),
                 title=f"learning rate × {times}", xlabel="epochs per rollout")
        axis.minorticks_off()
    axes[0].set_ylabel("greedy strict accuracy")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(names):
    rows = recorded()
    if not rows:
        sys.exit(f"{RESULTS} holds no row yet; run without --draw first")
    for name in names:
        cells = EXPERIMENTS[name]
        print(f"\n### {name}\n\n{table(rows, cells)}")
        if name == "reuse":
            draw_reuse(rows, cells, FIGURES / "reuse.png")
        else:
            draw_bars(rows, cells, FIGURES / f"{name}.png", name)
        print(f"\nwrote {FIGURES / name}.png")


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--draw", action="store_true", help="only from what is recorded")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    unknown = set(args.names) - EXPERIMENTS.keys()
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    names = args.names or list(EXPERIMENTS)
    if not args.draw:
        run_missing(names, args.jobs)
    draw(names)


if __name__ == "__main__":
    main()

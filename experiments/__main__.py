"""Run the experiments and report what they found: python -m experiments [NAME …]

What it does    trains every cell of cells.py with every seed, one process a core; each finished run
                is a row of results.jsonl, and a row that is there is not run again. Then it prints
                the tables, puts them in README.md and experiments/README.md and draws the figures,
                which takes seconds. With another file of rows it only prints the tables.
Not here        the cells (cells.py), a run (run.py), tables and figures (report.py).
Run it alone    python -m experiments --draw      tables and figures of the recorded rows only
                python -m experiments --results mine.jsonl    all of it again, into a new file
"""
import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from experiments import replay, report, run
from experiments.cells import EXPERIMENTS, seeds
from plumbing.files import read_rows
from plumbing.hub import keep_freed_memory
from plumbing.run import git

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"


def missing(names, rows):
    """The (flags, seed) of these experiments without a row, the seeds of every cell in turn; bf16
    last, which leaves its process twice as large, and slower for all that comes after."""
    done = {(row["flags"], row["seed"]) for row in rows}
    cells = dict.fromkeys((flags, seed) for name in names
                          for label, flags in EXPERIMENTS[name].items()
                          for seed in seeds(name))
    return sorted((cell for cell in cells if cell not in done),
                  key=lambda cell: ("bf16" in cell[0], cell[1]))


def recorded(path):
    """The rows of a results file, none where there is no file; ends the process where a line is
    damaged."""
    try:
        return read_rows(path) if path.exists() else []
    except ValueError as e:
        sys.exit(f"error: {e} (a run cut off while it wrote?); remove the line, and the run is "
                 "made again")


def runner(cell):
    """What makes the row of a cell: a function of another module than this one, which the processes
    do not have."""
    return replay.run_cell if cell[0].startswith(("--replay", "--live")) else run.run_cell


def run_all(cells, path, n_jobs):
    """Run these cells; each adds its row to the file when it ends."""
    commit = git("rev-parse", "--short", "HEAD") + "-changed" * bool(
        git("status", "--porcelain", "-uno", "--", ".", ":!experiments/results.jsonl"))
    with ProcessPoolExecutor(n_jobs, multiprocessing.get_context("spawn"),
                             initializer=keep_freed_memory) as pool, open(path, "a") as file:
        running = [pool.submit(runner(cell), cell) for cell in cells]
        try:
            for done in tqdm(as_completed(running), total=len(cells), desc="runs", unit="run"):
                file.write(json.dumps({**done.result(), "commit": commit}) + "\n")
                file.flush()
        finally:  # where one could not be run: end without the others
            pool.shutdown(wait=False, cancel_futures=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS) + "; all without one")
    add("--draw", action="store_true", help="only from what is recorded")
    add("--results", type=Path, default=RESULTS, help="the file of rows")
    add("--jobs", type=int, default=os.cpu_count(), help="processes, one thread each")
    args = parser.parse_args()
    unknown = set(args.names) - EXPERIMENTS.keys()
    if unknown:
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are "
                     f"{', '.join(EXPERIMENTS)}")
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; expected 1 or more")
    names = args.names or list(EXPERIMENTS)
    cells = missing(names, recorded(args.results))
    if cells and not args.draw:
        run_all(cells, args.results, args.jobs)
    rows = recorded(args.results)
    if not rows:
        sys.exit(f"error: {args.results} holds no row yet; run without --draw first")
    for name in names:
        print(f"\n{name}\n\n{report.table(rows, name)}")
    print(f"\n{report.cost(rows)}")
    if args.results.resolve() == RESULTS:
        for page in (report.README, report.FRONT_PAGE):
            report.write_readme(rows, page)
        report.draw_figures(rows)


if __name__ == "__main__":
    main()

"""One run of one cell: train it in a folder that goes away, test its last weights, keep a row.

What it does    calls train.main with the cell's flags and evaluate.answer on the test problems.
What it leaves  which cells there are to cells.py, which of them are still to run to __main__.py.
Where to fork   what a row holds.
"""
import contextlib
import io
import os
import statistics
import tempfile
import time

import torch

import train
from checkpoint import checkpoints, read_rows
from evaluate import answer, summarise
from experiments.cells import BASE
from model import Qwen2
from rewards import load_problems
from settings import read_settings

LAST = 10  # steps at the end of a run whose metrics are averaged
MEANS = ["kl_old_new", "gradient_norm", "clip_removed", "ratio_outside", "entropy", "length_mean",
         "truncated", "reward_mean", "effective_sample_size"]



def run_cell(cell):
    """Train one cell with one seed: its row. cell: (flags, seed)."""
    torch.set_num_threads(1)
    flags, seed = cell
    began, here, failed = time.process_time(), os.getcwd(), None
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                s, run = read_settings([*BASE.split(), *flags.split(), "--seed", str(seed),
                                        "--name", "run"])
                try:
                    train.train(s, run)
                except SystemExit as e:  # a gradient that is not finite
                    failed = str(e)
                metrics = read_rows(run / "metrics.jsonl")
                found = checkpoints(run)
                scores = summarise(answer(Qwen2.from_pretrained(found[-1]),
                                          load_problems("tiny", "test"), progress=None), 1)
        finally:
            os.chdir(here)
    tail = [row for row in metrics[-LAST:] if row["step"] > 0]
    means = {key: statistics.fmean(row[key] for row in tail if key in row)
             for key in MEANS if any(key in row for row in tail)}
    validation = [[row["step"], row["validation_accuracy"]] for row in metrics
                  if "validation_accuracy" in row]
    return {"flags": flags, "seed": seed, "test_strict": scores["strict"],
            "test_flexible": scores["flexible"], "validation": validation,
            "optimizer_steps": metrics[-1].get("optimizer_steps"),
            "skipped_steps": metrics[-1].get("skipped_steps"), **means, "failed": failed,
            "cpu_seconds": round(time.process_time() - began, 1)}

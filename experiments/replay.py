"""How far α moves a run: the same recorded rollouts, trained on with another α.

What it does    trains once with α = 0 and keeps every rollout; trains again with other α's on the
                same rollouts; compares the weights, as a share of the distance travelled. Of live
                runs, which sample for themselves, it names the first token that differs.
What it leaves  training itself to train.py.
Run it alone    python -m experiments.replay        prints a table; a minute for each run
Where to fork   `compare` takes any two sets of flags.
"""
import contextlib
import copy
import io
import os
import tempfile

import torch

import train
from experiments.cells import BASE
from settings import read_settings

STEPS = (1, 2, 5, 10, 20, 50, 100)


def trained(flags, rollouts=None):
    """Train with these flags: (start weights, {step: weights}, its rollouts). rollouts: those of
    another run, to be trained on instead of sampling; a list of (Rollout, rows)."""
    made, weights = [], {}
    sample_and_grade, update = train.sample_and_grade, train.update

    def replayed(run, s, step, chosen):
        found = sample_and_grade(run, s, step, chosen) if rollouts is None else rollouts[step - 1]
        made.append(copy.deepcopy(found))
        return copy.deepcopy(found)

    def watched(run, minibatches, s):
        if not weights:
            weights[0] = flat(run.model)
        seen = update(run, minibatches, s)
        if len(made) in STEPS:
            weights[len(made)] = flat(run.model)
        return seen
    here, quiet = os.getcwd(), io.StringIO()
    train.sample_and_grade, train.update = replayed, watched
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), \
                contextlib.redirect_stderr(quiet):
            os.chdir(folder)
            try:
                train.train(*read_settings([*BASE.split(), "--validate-every", "1000",
                                            *flags.split(), "--name", "run"]))
            finally:
                os.chdir(here)
    finally:
        train.sample_and_grade, train.update = sample_and_grade, update
    return weights, made


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def distances(weights, others):
    """{step: |θ' − θ| / |θ − θ_start|} of two runs from one start."""
    return {step: ((others[step] - weights[step]).norm()
                   / (weights[step] - weights[0]).norm()).item()
            for step in weights.keys() & others.keys() if step}


def first_difference(rollouts, others):
    """(step, completion, token) where two runs' samples first differ, counted from 1; or None."""
    for step, ((a, _), (b, _)) in enumerate(zip(rollouts, others), 1):
        for c, (x, y) in enumerate(zip(a.completions, b.completions), 1):
            for t in range(max(len(x), len(y))):
                if x[t:t + 1] != y[t:t + 1]:
                    return step, c, t + 1
    return None


ARMS = {"AdamW": "", "AdamW, limit 0.1 always active": "--max-grad-norm 0.1",
        "AdamW, no limit": "--max-grad-norm 1e9", "AdamW, KL term β 0.1": "--beta 0.1",
        "SGD, no limit": "--optimizer sgd --learning-rate 0.01 --max-grad-norm 1e9"}


def main():
    torch.set_num_threads(1)
    print("| optimizer | α | " + " | ".join(f"step {n}" for n in STEPS) + " | live: first token "
          "that differs |\n|---|---|" + "---:|" * len(STEPS) + "---|")
    for name, flags in ARMS.items():
        weights, rollouts = trained(f"--alpha 0 {flags}")
        for alpha in (0.1, 0.5, 0.9):
            others, _ = trained(f"--alpha {alpha} {flags}", rollouts)
            found = distances(weights, others)
            where = None
            if alpha == 0.1:
                _, live = trained(f"--alpha {alpha} {flags}")
                where = first_difference(rollouts, live)
            print(f"| {name} | {alpha} | " + " | ".join(f"{found[n]:.1e}" for n in STEPS)
                  + (f" | step {where[0]}, completion {where[1]}, token {where[2]} |" if where
                     else " | none |" if alpha == 0.1 else " | |"), flush=True)


if __name__ == "__main__":
    main()

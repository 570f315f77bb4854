"""What is run: every cell of every experiment, as flags.

What it does    names the experiments, and of each the arms (rows of its table) and what varies.
Not here        running (run.py, replay.py), tables and figures (report.py), what the flags mean
                (plumbing/settings.py; those of experiments only: run.py, replay.py).
Where to fork   a new arm is a line in ARMS; a new experiment an entry of EXPERIMENTS; a new
                objective a function, as log_pspo is.

The model, problems and steps are those of `python train.py` on a laptop: 0.6M parameters, 100
rollouts of 8 prompts × 8 completions, AdamW, learning rate 1e-5 at first and 0 at the end. Those of
the experiments smollm2… are of `python train.py --model smollm2`, 20 rollouts of 8 × 8, and run on
a GPU where there is one.
"""
import torch

from objectives import OBJECTIVES, pspo
from plumbing.settings import PRESETS

BASE = ("--model tiny --device cpu --dtype fp32 --threads 1 --test-problems 0 --validate-every 20 "
        "--checkpoint-every 1000 --keep 1")
RATE = 1e-5  # the embedded model's own learning rate
ALPHAS = (0.05, 0.1, 0.3, 0.5, 0.9)
# nats: the sd at which 24 % of tokens leave |r − 1| ≤ 0.1, as the rounding of bf16 makes them do at
# the widths of Qwen2.5-0.5B (with random weights)
NOISE = 0.085


def log_pspo(ratio, advantage, alpha=0.1):
    """A variant of our own, tried here and not kept: A·log((1 − α)·r + α).

    Its weight on A·∇log π is (1 − α)·r / ((1 − α)·r + α): below 1, unlike that of `pspo`, and
    nowhere 0, unlike that of `clip`. α in [0, 1]; at 0 it is REINFORCE without a ratio.
    """
    return pspo(ratio, torch.ones_like(ratio), alpha).log() * advantage


OBJECTIVES["log_pspo"] = log_pspo

ARMS = {
    "clip ε 0.1": "--objective clip --epsilon-low 0.1 --epsilon-high 0.1",
    "clip ε 0.2": "--objective clip",
    "DAPO clip 0.2, 0.28": "--objective clip --epsilon-high 0.28",
    "noclip (α 0)": "--objective noclip",
    "pspo α 0.1": "--objective pspo",
    "pspo α 0.5": "--objective pspo --alpha 0.5",
    "log_pspo α 0.1": "--objective log_pspo",
    "log_pspo α 0.5": "--objective log_pspo --alpha 0.5",
    "cispo r ≤ 2": "--objective cispo --ratio-max 2",
    "sapo": "--objective sapo",
    "scopic τ 4": "--objective scopic",
    "GSPO": "--objective clip --ratio-level sequence --reduction sequence "
            "--epsilon-low 3e-4 --epsilon-high 4e-4",
}
FOUR = ("clip ε 0.2", "noclip (α 0)", "pspo α 0.1", "log_pspo α 0.1")
NOISY = ("clip ε 0.1", "clip ε 0.2", "noclip (α 0)", "pspo α 0.1")
EPOCHS, TIMES = (1, 2, 4, 8, 16), (1, 3, 10)  # of the grid: passes over a rollout, rate ×
FIFTH = 5  # "on the way" is at the end of the first of so many parts of a run
SMOLLM2 = "--model smollm2 --validate-every 4"  # 4: a fifth of its steps
AGES = ((0, 1), (0, 3), (0, 10), (2, 3), (8, 1), (8, 3), (8, 10))  # steps ago, rate ×


def seeds(name):
    """Of an experiment: five; three in grids; six of the larger model's two epochs; ten where
    some runs collapse and others do not."""
    return range({"stress": 10, "reuse": 3, "smollm2": 6}.get(name, 5))


def reuse(epochs, times):
    """Flags for so many passes over a rollout and so many times the learning rate."""
    return f" --epochs {epochs} --learning-rate {RATE * times:g}"


def stale(arm, steps, times):
    """Flags for an arm with 2 epochs and rollouts of so many steps ago."""
    return ARMS[arm] + reuse(2, times) + (f" --stale {steps}" if steps else "")


def smollm2(epochs, arms):
    """{label: flags} of a pretrained model in bf16: these arms, so many passes over a rollout."""
    rate = PRESETS["smollm2"]["learning_rate"]
    return {f"{arm} | {epochs} | {rate:g}":
            f"{SMOLLM2} {ARMS[arm]} --epochs {epochs} --learning-rate {rate:g} --dtype bf16"
            for arm in arms}


# name -> {label of a cell: flags}
EXPERIMENTS = {
    "mild": {
        **{arm: ARMS[arm] + reuse(2, 1) for arm in (
            "clip ε 0.1", "clip ε 0.2", "noclip (α 0)", "pspo α 0.1", "log_pspo α 0.1")},
        "noclip, one pass": ARMS["noclip (α 0)"] + reuse(1, 1) + " --steps 200",
        "clip ε 0": "--objective clip --epsilon-low 0 --epsilon-high 0" + reuse(2, 1)},
    "stress": {arm: flags + reuse(8, 10) for arm, flags in ARMS.items()},
    "replay": {  # each α against α = 0 on the same rollouts, and against what the rule names
        "AdamW, δ 1e-15, no limit": "--replay --adam-epsilon 1e-15 --max-grad-norm 1e9",
        "AdamW, δ 1e-8, no limit": "--replay --max-grad-norm 1e9",
        "AdamW, limit 0.05": "--replay --max-grad-norm 0.05",
        "AdamW, limit 1 (the default)": "--replay",
        "AdamW, KL term β 0.1, no limit": "--replay --beta 0.1 --max-grad-norm 1e9",
        "SGD, no limit": "--replay --optimizer sgd --learning-rate 0.003 --max-grad-norm 1e9"},
    "live": {"α 0.1 against 0": "--live"},
    "alpha": {"α 0": ARMS["noclip (α 0)"] + reuse(2, 1), **{
        f"α {alpha}": (ARMS["pspo α 0.1"] if alpha == 0.1 else f"--objective pspo --alpha {alpha}")
        + reuse(2, 1) for alpha in ALPHAS}},
    "stale": {f"{arm} | {steps} | {times}": stale(arm, steps, times)
              for steps, times in AGES for arm in FOUR},
    "where": {f"{arm} | {steps} | {times}": stale(arm, steps, times) + " --where --stop-after 20"
              for steps, times in AGES for arm in ("clip ε 0.2", "noclip (α 0)")},
    "token": {f"{label} | {times}": stale(arm, 8, times) + flags
              for times in (1, 3) for label, arm, flags in (
                  ("all", "clip ε 0.2", ""),
                  ("good answers' first", "clip ε 0.2", " --unclipped others"),
                  ("all but good answers' first", "clip ε 0.2", " --unclipped first"),
                  ("every answer's first", "clip ε 0.2", " --unclipped every-later"),
                  ("all but every answer's first", "clip ε 0.2", " --unclipped every-first"),
                  ("none", "noclip (α 0)", ""))},
    "noise": {
        **{f"{arm} | fp32": ARMS[arm] + reuse(2, 1) for arm in NOISY},
        **{f"{arm} | noise": ARMS[arm] + reuse(2, 1) + f" --noise {NOISE}" for arm in NOISY},
        **{f"{arm} | bf16": ARMS[arm] + reuse(2, 1) + " --dtype bf16"
           for arm in ("clip ε 0.1", "noclip (α 0)")}},
    "hopeless": {
        "base model": "--hopeless --learning-rate 0 --steps 1",
        "paper's reward": "--hopeless --reward paper",
        "paper's reward, A not scaled": "--hopeless --reward paper --advantage-scale none",
        "ours": "--hopeless --reward correct"},
    "reuse": {f"{arm} | {epochs} | {times}": ARMS[arm] + reuse(epochs, times)
              for epochs in EPOCHS for times in TIMES for arm in FOUR},
    "smollm2": smollm2(2, ("clip ε 0.2", "noclip (α 0)", "pspo α 0.1")),
    "smollm2_reuse": smollm2(8, NOISY),
}

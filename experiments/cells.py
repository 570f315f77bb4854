"""What is run: every cell of every experiment, as flags of train.py.

What it does    names the experiments, and of each the arms (rows of its table) and what varies.
What it leaves  running and drawing to __main__.py; what the flags mean to settings.py.
Where to fork   a new arm is a line in ARMS; a new experiment an entry of EXPERIMENTS.

The model, problems and steps are those of `python train.py` on a laptop: 0.6M parameters, 100
rollouts of 8 prompts × 8 completions, AdamW, learning rate 1e-5 at first and 0 at the end.
"""
BASE = ("--model tiny --device cpu --dtype fp32 --threads 1 --test-problems 0 --validate-every 20 "
        "--checkpoint-every 1000 --keep 1")
RATE = 1e-5  # the embedded model's own learning rate
SEEDS = range(5)

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


def reuse(epochs, times):
    """Flags for so many passes over a rollout and so many times the learning rate."""
    return f" --epochs {epochs} --learning-rate {RATE * times:g}"


# name -> {label of a cell: flags}
EXPERIMENTS = {
    "mild": {
        **{arm: ARMS[arm] + reuse(2, 1) for arm in (
            "clip ε 0.1", "clip ε 0.2", "noclip (α 0)", "pspo α 0.1", "log_pspo α 0.1")},
        "noclip, one pass": ARMS["noclip (α 0)"] + reuse(1, 1) + " --steps 200",
        "clip ε 0": "--objective clip --epsilon-low 0 --epsilon-high 0" + reuse(2, 1)},
    "stress": {arm: flags + reuse(8, 10) for arm, flags in ARMS.items()},
    "reuse": {f"{arm} | {epochs} | {times}": ARMS[arm] + reuse(epochs, times)
              for times in (1, 3, 10) for epochs in (1, 2, 4, 8) for arm in FOUR},
}

"""How far α moves a run: the same recorded rollouts, trained on with another α.

What it does    `replay` trains with α = 0 and keeps every rollout; trains again with other α's on
                the same rollouts; compares the weights, as a share of the distance travelled. It
                also trains with α = 0 and the settings that the rule names for an α, which should
                give the same weights. `live` names the first token in which two runs that sample
                for themselves differ.
Not here        training itself (train.py), the settings (cells.py).
Where to fork   `equal_run` is the rule; `trained` takes any flags.
"""
import time
from unittest import mock

import torch

import train
from experiments.cells import ALPHAS, BASE
from experiments.run import aside
from plumbing.settings import read_settings

STEPS = 10  # of the 100 that the schedule is made for


def settings_of(flags):
    """train.py's settings with these flags (a list)."""
    return read_settings([*BASE.split(), "--validate-every", "1000", *flags, "--name", "run"])


def trained(flags, rollouts=None):
    """Train with these flags (a list): (its weights before and after, its rollouts, the share of
    optimizer steps whose gradient met the limit). rollouts: those of another run, to be trained on
    instead of sampling."""
    made, weights, norms = [], [], []
    sample, update = train.sample, train.update

    def replayed(run, args, step, chosen):
        made.append(rollouts[step - 1] if rollouts else sample(run, args, step, chosen))
        return made[-1]

    def watched(run, minibatches, args, seen):
        if len(made) == 1:
            weights.append(flat(run.model))
        update(run, minibatches, args, seen)
        norms.extend(seen.norms)
        if len(made) == (args.stop_after or args.steps):
            weights.append(flat(run.model))
    with aside(), mock.patch.multiple(train, sample=replayed, update=watched):
        s, folder = settings_of(flags)
        train.train(s, folder)
    limited = [norm.item() > s.max_grad_norm for norm in norms]
    return weights, made, sum(limited) / max(len(limited), 1)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def distance(weights, others):
    """|θ' − θ| / |θ − θ_start| of two runs from one start; weights: as of `trained`."""
    (start, end), (_, other) = weights, others
    return ((other - end).norm() / (end - start).norm()).item()


def equal_run(flags, alpha):
    """The flags of the run without smoothing that makes the same weights as one with α.

    With c = 1 − α, PSPO's gradient is c·g. A gradient-norm limit L cuts c·g as L/c cuts g. AdamW
    moves by η·m/(√v + δ), where m and √v scale with c: δ counts as δ/c. SGD's rate η counts as
    c·η. A KL term that shares the loss, β·k, counts as β/c. Nothing else knows c.
    """
    with aside():
        s, _ = settings_of(flags)
    c = 1 - alpha
    flags = [*flags, "--alpha", "0", "--beta", str(s.beta / c),
             "--max-grad-norm", str(s.max_grad_norm / c)]
    if s.optimizer == "sgd":
        return [*flags, "--learning-rate", str(s.learning_rate * c)]
    return [*flags, "--adam-epsilon", str(s.adam_epsilon / c)]


def replay(flags):
    """{"distance": {α: of α = 0}, "rule": {α: of the run that the rule names}, "limited": {α: share
    of optimizer steps at the gradient-norm limit}} after STEPS steps."""
    flags = [*flags, "--stop-after", str(STEPS)]
    base, rollouts, limited = trained([*flags, "--alpha", "0"])
    row = {"distance": {}, "rule": {}, "limited": {"0": limited}}
    for alpha in ALPHAS:
        weights, _, row["limited"][str(alpha)] = trained([*flags, "--alpha", str(alpha)], rollouts)
        row["distance"][str(alpha)] = distance(base, weights)
        same, *_ = trained(equal_run(flags, alpha), rollouts)
        row["rule"][str(alpha)] = distance(same, weights)
    return row


def live(flags):
    """Where a run with α 0.1 first samples another token than one with α 0, counted from 1 (None
    where it never does), and the share of completions that are the same."""
    (_, zero, _), (_, tenth, _) = (trained([*flags, "--alpha", alpha]) for alpha in ("0", "0.1"))
    same = [x == y for pair in zip(zero, tenth) for x, y in zip(*map(completions, pair))]
    return {"first_difference": first_difference(zero, tenth), "same": sum(same) / len(same)}


def completions(rollout):
    """The completions of all groups, in one list."""
    return [ids for group in rollout.completions for ids in group]


def first_difference(rollouts, others):
    """(step, completion, token) where two runs' samples first differ, counted from 1; or None."""
    for step, pair in enumerate(zip(rollouts, others), 1):
        for c, (x, y) in enumerate(zip(*map(completions, pair)), 1):
            for t in range(max(len(x), len(y))):
                if x[t:t + 1] != y[t:t + 1]:
                    return step, c, t + 1
    return None


def run_cell(cell):
    """As in run.py, of a cell with --replay or --live: its row."""
    torch.set_num_threads(1)
    began, (which, *flags) = time.process_time(), cell[0].split()
    row = {"--replay": replay, "--live": live}[which]([*flags, "--seed", str(cell[1])])
    return {"flags": cell[0], "seed": cell[1], **row,
            "cpu_seconds": round(time.process_time() - began, 1)}

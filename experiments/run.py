"""One run of one cell: train it in a folder that goes away, test its last weights, keep a row.

What it does    calls train.train with the cell's flags, then answers the test problems.
                Flags of its own: --stale, --noise and --unclipped put something in train.py's
                place, --where looks on, --hopeless makes problems that cannot be solved.
Not here        which cells there are (cells.py), which of them are still to run (__main__.py),
                cells with --replay or --live (replay.py).
Where to fork   what a row holds: `run_cell`.
"""
import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

import plumbing.run
import train
from evaluate import answer_problems
from evaluation.style import style
from experiments.cells import BASE, FIFTH
from model import Qwen2
from objectives import clip_removes, noclip, policy_loss
from plumbing.checkpoint import checkpoints
from plumbing.files import read_rows
from plumbing.hub import give_memory_back
from plumbing.metrics import exact_log_probs
from plumbing.problems import SETS, TINY, prompt_order
from plumbing.run import describe_run
from plumbing.settings import read_settings
from rewards import load_problems
from train import remember_old_policy

LAST = 10  # steps at the end of a run whose metrics are averaged
MEANS = ["kl_old_new", "gradient_norm", "clip_removed", "ratio_outside", "entropy", "length_mean",
         "truncated", "reward_mean", "effective_sample_size", "ratio_p1", "ratio_p99"]
TESTED = ["strict", "flexible", "format", "leakage", "n_tokens"]  # means over test problems
WATCHED = 10  # every so many steps rounding is measured
NEVER = 1_000_003  # a gold that no completion gives


def special_flags():
    """What experiments change beside the flags of train.py."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--stale", type=int, default=0, help="train on rollouts of the model so many steps ago")
    add("--noise", type=float, default=0.0, help="sd of what is added to log-probs, nats")
    add("--where", action="store_true", help="record which tokens a clip takes its share from")
    add("--unclipped", choices=["first", "others", "every-first", "every-later"],
        help="no clip on good answers' first tokens; all but those; every answer's; every later")
    add("--hopeless", action="store_true", help="train on problems whose gold no one gives")
    return parser


@contextlib.contextmanager
def aside():
    """An empty folder to work in that goes away afterwards, nothing on the console, no figures."""
    here, quiet = os.getcwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), \
            contextlib.redirect_stderr(quiet), \
            mock.patch.object(plumbing.run, "draw_curves", lambda folder: None):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


# ------------------------------------------------------------------ what takes train.py's place

def stale(steps):
    """`sample`, but what a step trains on was sampled so many steps before it (by the start model
    at first)."""
    fresh, waiting = train.sample, []

    def sample(run, args, step, chosen):
        first = 1 if step == 1 else step + steps  # step 1 also samples those of the next steps
        for ahead in range(first, step + steps + 1):
            chosen = prompt_order(len(run.problems), args.prompts_per_step, ahead, args.seed)
            waiting.append(fresh(run, args, ahead, chosen))
        return waiting.pop(0)
    return sample


def old_policy_as_sampled(run, minibatches, args):
    """`remember_old_policy` where the model has moved on since: the log-probs the sampler noted."""
    seen = remember_old_policy(run, minibatches, args)
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        micro.old_logp_M = micro.sampler_logp_M
    return seen


def noisy(sd, generator):
    """`policy_loss` with fresh noise on the new log-probs, once an update has moved them: what a
    rounding that every update draws anew does to ratios."""
    def noisy_policy_loss(logp_M, old_logp_M, *rest):
        if not logp_M.equal(old_logp_M):
            logp_M = logp_M + sd * torch.randn(logp_M.shape, generator=generator)
        return policy_loss(logp_M, old_logp_M, *rest)
    return noisy_policy_loss


def watched(update, sd, generator, found):
    """`update`, which every so many steps, after its last optimizer step, also computes the new
    ratios exactly, in fp32 and without noise; appends to `found` what clips at 0.1 and 0.2 would
    take of both."""
    def watched_update(run, minibatches, args, seen):
        micros = [micro for minibatch in minibatches for micro in minibatch]
        if (run.step + 1) % WATCHED or not micros:
            update(run, minibatches, args, seen)
            return

        def exact():
            return torch.cat([exact_log_probs(run.model, m, args.temperature) for m in micros])
        before_M = exact()
        update(run, minibatches, args, seen)
        exact_M = exact() - before_M
        rounded_M = torch.cat([run.model.completion_log_probs(m.batch, args.temperature)[0]
                               - m.old_logp_M for m in micros])
        rounded_M += sd * torch.randn(rounded_M.shape, generator=generator).to(rounded_M)
        found.append(noise_metrics(exact_M, rounded_M, torch.cat([m.advantage_M for m in micros]),
                                   torch.cat([m.weight_M for m in micros])))
    return watched_update


def where_clipped(total):
    """`policy_loss`, which adds to `total` the gradient's weight Σ w·|A|·r of the first token of
    answers with A > 0 and of all other tokens, and what a clip at 0.2 takes of both."""
    def watched_policy_loss(logp_M, old_logp_M, advantage_M, weight_M, sequence_M, *rest):
        ratio_M = (logp_M - old_logp_M).detach().exp()
        gradient_M = weight_M * advantage_M.abs() * ratio_M
        removed_M = clip_removes(ratio_M, advantage_M)
        first_M = first_tokens(sequence_M) & (advantage_M > 0)
        for name, tokens_M in (("first", first_M), ("others", ~first_M)):
            total["gradient_" + name] += gradient_M[tokens_M].sum().item()
            total["removed_" + name] += gradient_M[tokens_M & removed_M].sum().item()
        return policy_loss(logp_M, old_logp_M, advantage_M, weight_M, sequence_M, *rest)
    return watched_policy_loss


def first_tokens(sequence_M):
    """Which tokens are the first of their answer: bool."""
    first_M = torch.ones_like(sequence_M, dtype=torch.bool)
    first_M[1:] = sequence_M[1:] != sequence_M[:-1]
    return first_M


def partly_clipped(unclipped):
    """`policy_loss` with no clip on these tokens: "first" of answers with A > 0, all "others",
    "every-first" whatever its A, "every-later"."""
    def partly(logp_M, old_logp_M, advantage_M, weight_M, sequence_M, objective, *rest):
        every_M = first_tokens(sequence_M)
        good_M = every_M & (advantage_M > 0)
        free_M = {"first": good_M, "others": ~good_M,
                  "every-first": every_M, "every-later": ~every_M}[unclipped]

        def mixed(ratio_M, advantage_M):
            return torch.where(free_M, noclip(ratio_M, advantage_M),
                               objective(ratio_M, advantage_M))
        return policy_loss(logp_M, old_logp_M, advantage_M, weight_M, sequence_M, mixed, *rest)
    return partly


def noise_metrics(exact_M, rounded_M, advantage_M, weight_M):
    """Of log-ratios with and without rounding: its sd; for clips at 0.1 and 0.2 the share of tokens
    they would remove, the same without rounding, and the share of the gradient's weight Σ w·|A|·r
    that only rounding makes them remove."""
    metrics = {"noise_sd": (rounded_M - exact_M).std().item(),
               "moved_sd": exact_M.std().item()}
    gradient_M = weight_M * advantage_M.abs() * exact_M.exp()
    for limit in (0.1, 0.2):
        removed, wanted = (clip_removes(x.exp(), advantage_M, limit) for x in (rounded_M, exact_M))
        metrics |= {f"removed_{limit}": removed.double().mean().item(),
                    f"removed_exact_{limit}": wanted.double().mean().item(),
                    f"lost_{limit}": (gradient_M[removed & ~wanted].sum()
                                      / gradient_M.sum()).item()}
    return metrics


def write_hopeless():
    """hopeless.jsonl: the embedded training problems with a gold that no completion gives."""
    lines = (TINY / "train.jsonl").read_text().splitlines()
    Path("hopeless.jsonl").write_text("".join(
        json.dumps({"question": json.loads(line)["question"], "answer": f"#### {NEVER}"}) + "\n"
        for line in lines))
    return ["--data", "hopeless.jsonl"]


# ------------------------------------------------------------------ a run and its row

def run_cell(cell):
    """Train one cell with one seed and test its last weights: its row. cell: (flags, seed)."""
    torch.set_num_threads(1)
    give_memory_back()  # of the run before, or a process grows with every run
    began, failed, rounding = time.process_time(), None, []
    special, flags = special_flags().parse_known_args(cell[0].split())
    with aside(), contextlib.ExitStack() as changes:
        if special.hopeless:
            flags += write_hopeless()
        if "smollm2" in flags and torch.cuda.is_available():
            flags += ["--device", "cuda"]
        s, folder = read_settings([*BASE.split(), *flags, "--seed", str(cell[1]), "--name", "run"])
        changed, generator = {}, torch.Generator().manual_seed(s.seed)
        total = Counter()
        if special.stale:
            changed["sample"] = stale(special.stale)
            changed["remember_old_policy"] = old_policy_as_sampled
        if special.noise:
            changed["policy_loss"] = noisy(special.noise, generator)
        if special.noise or s.dtype == "bf16":
            changed["update"] = watched(train.update, special.noise, generator, rounding)
        if special.where:
            changed["policy_loss"] = where_clipped(total)
        if special.unclipped:
            changed["policy_loss"] = partly_clipped(special.unclipped)
        for name, function in changed.items():
            changes.enter_context(mock.patch.object(train, name, function))
        try:
            train.train(s, folder)
        except SystemExit as e:
            if "gradient norm" not in str(e):
                raise
            failed = str(e)
        metrics = read_rows(folder / "metrics.jsonl")
        samples = read_rows(folder / "samples.jsonl")
        answers = [] if failed else answer_problems(
            Qwen2.from_pretrained(checkpoints(folder)[-1], s.device),
            load_problems(s.data if s.data in SETS else "tiny", "test"), progress=None)
    steps = [row for row in metrics if row["step"] > 0]
    row = {"flags": cell[0], "seed": cell[1], "dtype": s.dtype,
           "device": describe_run(s)["device_name"]}
    if not failed:
        styled = [answer | style(answer["text"]) for answer in answers]
        row |= {"test_" + key: mean for key, mean in means(styled, TESTED).items()}
        row |= {key: metrics[-1].get(key) for key in ("optimizer_steps", "skipped_steps")}
        row |= means(steps[-LAST:], MEANS) | means(rounding, rounding[0] if rounding else [])
        row["on_the_way"] = means(steps[:len(steps) // FIFTH], MEANS)
    row["validation"] = [[seen["step"], seen["validation_accuracy"]] for seen in metrics
                         if "validation_accuracy" in seen]
    if special.hopeless and not failed:
        row |= what_was_learned(steps, samples, answers)
    if special.where and not failed:
        row |= {"first_share": total["gradient_first"] / (total["gradient_first"]
                                                          + total["gradient_others"]),
                **{"removed_" + name: total["removed_" + name] / total["gradient_" + name]
                   for name in ("first", "others")}}
    return {**row, "failed": failed, "cpu_seconds": round(time.process_time() - began, 1)}


def means(rows, keys):
    """The mean of each key over the rows that have it."""
    return {key: statistics.fmean(row[key] for row in rows if key in row)
            for key in keys if any(key in row for row in rows)}


def what_was_learned(steps, samples, answers):
    """Of a hopeless run: the share of groups with equal rewards; of the others that samples.jsonl
    holds the mean of the largest |advantage| (None without one); accuracy on the test problems
    whose gold has one digit."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample["step"], []).append(abs(sample["advantage"]))
    largest = [max(group) for group in groups.values() if any(group)]
    return {"equal_groups": statistics.fmean(row["equal_groups"] for row in steps),
            "largest_advantage": statistics.fmean(largest) if largest else None,
            "short_strict": statistics.fmean(row["strict"] for row in answers
                                             if len(row["gold"]) == 1)}

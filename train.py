"""GR-PSPO: sample → score → advantages → update → log, on one device or several.

What it does    reinforcement learning of a Qwen2.5 model on word problems with the smoothed,
                clipped or plain importance ratio, from the first prompt to the best checkpoint.
What it leaves  the objective to objectives.py, sampling to rollout.py, the network to model.py,
                the task to rewards.py, accuracy to evaluate.py.
Run it alone    python train.py --alpha 0.1            (laptop: the embedded default; GPU: Qwen2.5)
Where to fork   `train` is the loop; `update` is all that happens to one rollout. A new objective is
                a function in objectives.py, a new setting one line in plumbing/settings.py.

Deviations from the paper (arXiv:2509.21282) and its released recipe; objectives.py has two more:
  1. The reward is correctness plus 0.05 for a clean format (rewards.py says when); `--reward
     paper` is the authors'.
  2. top-p truncates the distribution that is sampled from; ratio and log-probabilities use the
     full softmax.
  3. With β = 0 a group whose rewards are all equal is not scored or trained on, since its gradient
     is zero; its tokens stay in the divisor. A minibatch of only such groups makes no optimizer
     step, while the schedule advances. (AdamW would still move by its momentum.)
  4. Old log-probabilities are computed by the trainer, not taken from the sampler.
  5. The weights are fp32 masters; bf16 is a dtype of computation only (logits included; their
     softmax is fp32).
  6. Prompts use our own system instruction.

Words, from large to small: a *step* is one rollout of P·G completions with its updates; an *epoch*
is one pass over the rollout; a *minibatch* is the groups of one optimizer step; a *micro-batch* is
what fits in memory at once (gradients add up); a *chunk* is what fits in the output head.
Axis letters: P prompts, G completions per prompt, B = P·G, M completion tokens of a micro-batch.
"""
import hashlib
import json
import math
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from evaluate import answer, grade, sample_answers, summarise
from evaluation.figures import draw_curves
from model import Qwen2
from objectives import (
    group_advantages,
    kl_k3,
    policy_loss,
    quantile,
    ratio_diagnostics,
    reduction_weights,
)
from plumbing import parallel
from plumbing.checkpoint import (
    checkpoints,
    copy_model,
    cut_rows,
    enter,
    newest_whole,
    save_checkpoint,
    set_aside,
)
from plumbing.engine import places_for
from plumbing.files import append_rows, read_json, write_json, write_whole
from plumbing.hub import is_out_of_memory, keep_freed_memory
from plumbing.problems import SETS, name_of
from plumbing.settings import chosen_objective, read_settings
from rewards import build_prompt, load_problems, reward
from rollout import FlatBatch, Rollout, flat_batch, generate

HERE = Path(__file__).resolve().parent
VALIDATION_STEP = -1  # the sampler's step counter for validation: never one of training
SAMPLE_GROUPS = 1  # chosen: groups per step written to samples.jsonl


# ------------------------------------------------------------------ the phases of a step

def prompt_order(n_problems, n, step, seed):
    """The problems of step 1, 2, …: each pass a new seeded shuffle, what does not fill a step left
    out. A list of n indices."""
    steps_per_pass = n_problems // n
    order = list(range(n_problems))
    random.Random(f"{seed}/{(step - 1) // steps_per_pass}").shuffle(order)
    start = (step - 1) % steps_per_pass * n
    return order[start:start + n]


@dataclass
class MicroBatch:
    """Whole groups that run forward and backward together, with what the loss needs per token."""
    batch: FlatBatch
    advantage_M: torch.Tensor
    weight_M: torch.Tensor
    sampler_logp_M: torch.Tensor
    old_logp_M: torch.Tensor = None
    reference_logp_M: torch.Tensor = None


def lay_out(rollout, advantage_PG, s, device):
    """The minibatches of a rollout, each a list of micro-batches; built once, used every epoch.

    The weights are those of all completions of a minibatch; groups without advantages are left out
    afterwards (deviation 3), of the others each process takes every n-th. Groups fill a micro-batch
    up to `tokens_per_microbatch`.
    """
    P, G, n = len(rollout.prompts), rollout.group_size, len(rollout.prompts) // s.minibatches
    length_B = torch.tensor([len(ids) for ids in rollout.completions])
    weight_B = torch.cat([reduction_weights(part_B, s.reduction, s.max_new_tokens)
                          for part_B in length_B.split(n * G)])
    minibatches = []
    for first in range(0, P, n):
        packs, n_tokens = [], 0  # the prompts of each micro-batch; the tokens of the last one
        trained = [p for p in range(first, first + n) if s.beta > 0 or advantage_PG[p].any()]
        for p in trained[parallel.rank()::parallel.n_processes()]:
            size = len(rollout.prompts[p]) + int(length_B[p * G:p * G + G].sum())
            if not packs or n_tokens + size > s.tokens_per_microbatch:
                packs.append([])
                n_tokens = 0
            packs[-1].append(p)
            n_tokens += size
        micros = [micro_batch(rollout, pack, advantage_PG.flatten(), weight_B, device)
                  for pack in packs]
        if s.fsdp:  # every pass is an exchange, so that each process makes as many
            micros += [idle_micro_batch(device) for _ in range(
                max(parallel.gather(len(micros))) - len(micros))]
        minibatches.append(micros)
    return minibatches


def idle_micro_batch(device):
    """A MicroBatch without a completion token: it runs, and adds nothing."""
    nothing = torch.empty(0, device=device)
    return MicroBatch(flat_batch([[0]], [[[]]], device), nothing, nothing, nothing)


def micro_batch(rollout, prompts, advantage_B, weight_B, device):
    """The MicroBatch of these prompts (indices) and all their completions."""
    G = rollout.group_size
    rows = [b for p in prompts for b in range(p * G, p * G + G)]
    batch = flat_batch([rollout.prompts[p] for p in prompts],
                       [rollout.completions[p * G:p * G + G] for p in prompts], device)
    length_R = torch.tensor(batch.lengths)

    def per_token(x_B):
        return x_B[rows].repeat_interleave(length_R).to(device)
    logps = [logp for b in rows for logp in rollout.logps[b]]
    return MicroBatch(batch, per_token(advantage_B), per_token(weight_B),
                      torch.tensor(logps, device=device))


def old_log_probs(run, minibatches, s):
    """Give every micro-batch the log-probs of the policy that sampled it, and of the reference.

    With one minibatch the first pass of the first epoch runs on that very policy: `update` takes
    them from there, which saves a pass. Both ways give the same numbers. Returns the entropies.
    """
    entropies = []
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        if s.minibatches > 1:
            micro.old_logp_M, entropy_M = run.model.completion_log_probs(
                micro.batch, s.temperature, entropy=True)
            entropies.append(entropy_M)
        if run.reference is not None:
            micro.reference_logp_M, _ = run.reference.completion_log_probs(
                micro.batch, s.temperature)
    return entropies


def update(run, minibatches, s):
    """All epochs over one rollout: loss, gradient, optimizer steps. Returns what it saw: entropies,
    log-ratios of the last epoch, KLs to the reference, gradient norms (lists of tensors)."""
    objective = chosen_objective(s)
    seen = SimpleNamespace(entropies=[], log_ratios=[], kls=[], norms=[])
    for epoch in range(s.epochs):
        for minibatch in minibatches:
            run.state["optimizer_steps"] += 1
            skipped = not parallel.anybody(minibatch)
            run.state["skipped_steps"] += skipped
            for micro in minibatch:
                first_pass = micro.old_logp_M is None

                def loss(logp, chunk):
                    old = logp.detach() if first_pass else micro.old_logp_M[chunk]
                    weight = micro.weight_M[chunk]
                    total, log_ratio = policy_loss(logp, old, micro.advantage_M[chunk], weight,
                                                   micro.batch.sequence_M[chunk], objective,
                                                   s.ratio_level)
                    if epoch == s.epochs - 1:
                        seen.log_ratios.append(log_ratio)
                    if run.reference is not None:
                        kl = kl_k3(logp, micro.reference_logp_M[chunk])
                        seen.kls.append(kl.detach())
                        total = total + s.beta * (weight * kl).sum()
                    return total

                logp_M, entropy_M = run.model.accumulate_gradients(micro.batch, s.temperature, loss,
                                                                   entropy=first_pass)
                if first_pass:
                    micro.old_logp_M = logp_M
                    seen.entropies.append(entropy_M)
            if not skipped:
                seen.norms.append(optimizer_step(run, s))
    if s.fsdp:
        refresh(run.policy, run.model)
    return seen


@torch.no_grad()
def refresh(policy, model):
    """Copy a sharded model's weights into the whole copy that samples."""
    for mine, sharded in zip(policy.parameters(), model.parameters(), strict=True):
        mine.copy_(parallel.whole(sharded))


def optimizer_step(run, s):
    """One optimizer step on the gradients of all processes; returns their norm before the limit.
    """
    parallel.sum_gradients(run.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.max_grad_norm)
    norm = parallel.whole(norm)
    if not norm.isfinite():
        raise FloatingPointError(f"the gradient norm is {norm.item()} (a lower --learning-rate or "
                                 "--max-grad-norm may help)")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(s, run.state["optimizer_steps"])
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def update_metrics(seen, minibatches, s):
    """Metrics over the tokens that all processes trained on; none where every group was equal."""
    everything = [micro for minibatch in minibatches for micro in minibatch]

    def of_all(tensors):
        mine = torch.cat(tensors).cpu() if tensors else torch.empty(0)
        return torch.cat(parallel.gather(mine))
    old_M = of_all([micro.old_logp_M for micro in everything])
    sampler_M = of_all([micro.sampler_logp_M for micro in everything])
    advantage_M = of_all([micro.advantage_M for micro in everything])
    weight_M = of_all([micro.weight_M for micro in everything])
    log_ratio_M, entropy_M, kl_M = map(of_all, (seen.log_ratios, seen.entropies, seen.kls))
    if not len(old_M):
        return {}
    gap_M, norms = (old_M - sampler_M).abs(), torch.stack(seen.norms)
    metrics = ratio_diagnostics(log_ratio_M, advantage_M, weight_M)
    if len(kl_M):
        metrics["kl_reference"] = kl_M.mean().item()
    return metrics | {
        "entropy": entropy_M.mean().item(),
        "sampler_gap_mean": gap_M.mean().item(), "sampler_gap_p99": quantile(gap_M, 0.99)[0],
        "gradient_norm": norms.mean().item(),
        "gradient_limited": (norms > s.max_grad_norm).double().mean().item()}


def learning_rate(s, optimizer_step):
    """Linear warm-up to the peak, then linear decay that reaches 0 one step after the last.

    optimizer_step: 1 is the first."""
    total = s.steps * s.epochs * s.minibatches
    rise = optimizer_step / max(s.warmup_steps, 1)
    fall = (total - optimizer_step + 1) / max(total - s.warmup_steps, 1)
    return s.learning_rate * max(min(rise, fall, 1.0), 0.0)


def exact_log_probs(model, micro, temperature):
    """The model's log-probs of a micro-batch in fp32, whatever it computes in."""
    dtype, precision = model.compute_dtype, torch.get_float32_matmul_precision()
    model.compute_dtype = torch.float32
    torch.set_float32_matmul_precision("highest")  # not TF32
    try:
        return model.completion_log_probs(micro.batch, temperature)[0]
    finally:
        model.compute_dtype = dtype
        torch.set_float32_matmul_precision(precision)


def noise_floor(model, micro, temperature):
    """Share of tokens whose probability leaves 1 ± 0.1 (and 0.2) times that of an fp32 computation.

    0 in fp32. In bf16 rounding alone moves ratios that far, and every update draws it anew; a clip
    then acts on noise. (Moving the weights by 1e-9 instead, as a smallest update, shows nothing for
    a published model: its weights lie on the bf16 grid, and the cast rounds the move away.)
    """
    rounded_M, _ = model.completion_log_probs(micro.batch, temperature)
    distance_M = ((rounded_M - exact_log_probs(model, micro, temperature)).exp() - 1).abs()
    return {f"noise_floor_{limit}": (distance_M > limit).double().mean().item()
            for limit in (0.1, 0.2)}


def clock(device):
    """Seconds, once the device has done what it was asked to."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------------------------ files of a run

def git(*words):
    """What git says of this folder; "" where it is no clone, or git not installed."""
    try:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        return ""


def describe_run(s):
    """What config.json holds beside the settings: commit, versions, device."""
    import transformers
    device = torch.cuda.get_device_name(s.device) if s.device.startswith("cuda") else "cpu"
    return {"commit": git("rev-parse", "HEAD") or None, "device_name": device,
            "processes": parallel.n_processes(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "transformers": transformers.__version__}}


def announce(s, run):
    """The arithmetic of the run, before any of it is computed, and its first prompt."""
    G, P = s.group_size, s.prompts_per_step
    n_parameters = sum(p.numel() for p in run.model.parameters())
    c = run.model.config
    kv_bytes = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    kv_bytes *= 2 if s.dtype == "bf16" else 4
    longest = max(map(len, run.prompts))

    def cache_gib(n_prompts, samples):
        rows, prompts = places_for(parallel.largest_share(n_prompts), samples, s.rollout_rows)
        return kv_bytes * (rows * s.max_new_tokens + prompts * longest) / 2**30
    optimizer_steps = s.epochs * s.minibatches
    print(f"data       {len(run.problems)} training problems, {len(run.validation)} for "
          f"validation; prompts of at most {longest} tokens")
    print(f"step       {P} prompts × {G} completions = {P * G}, at most "
          f"{P * G * s.max_new_tokens:,} new tokens; {s.epochs} epochs × {s.minibatches} "
          f"minibatches = {optimizer_steps} optimizer steps")
    print(f"run        {s.steps} steps = {s.steps * optimizer_steps} optimizer steps, "
          f"{s.steps * P / len(run.problems):.2f} passes over the training problems")
    state_bytes = (16 if s.optimizer == "adamw" else 8) * n_parameters
    if s.fsdp:  # a part of it, and the whole head with its gradient
        state_bytes = state_bytes / parallel.n_processes() + 8 * c["vocab_size"] * c["hidden_size"]
    # the copy that samples, which fp32 in one process shares with training; the reference
    copies = ["sampler's copy"] * (s.dtype == "bf16" or s.fsdp) + ["reference"] * (s.beta > 0)
    state_bytes += len(copies) * (2 if s.dtype == "bf16" else 4) * n_parameters
    held = ["weights", "gradients", *["AdamW state"] * (s.optimizer == "adamw"), *copies]
    print(f"memory     {state_bytes / 2**30:.2f} GiB for {', '.join(held)} of {n_parameters:,} "
          f"parameters{', in each process' * s.fsdp}; caches of {cache_gib(P, G):.2f} GiB while "
          f"sampling and {cache_gib(len(run.validation), s.validation_samples):.2f} in validation; "
          "activations on top")
    if optimizer_steps == 1 and s.objective != "noclip":
        print(f"warning    one optimizer step per rollout keeps every ratio at 1, where "
              f"{s.objective} is noclip up to a constant: raise --epochs or --minibatches",
              file=sys.stderr)
    first = run.prompts[prompt_order(len(run.prompts), P, 1, s.seed)[0]]
    print(f"prompt 1   {run.model.tokenizer.decode(first)!r}\n           {first}\n")


CONSOLE = {  # heading -> metric, format
    "step": ("step", "4d"), "reward": ("reward_mean", "7.3f"), "± s.e.": ("reward_se", "6.3f"),
    "correct": ("accuracy", "7.1%"), "format": ("format_rate", "6.1%"),
    "length": ("length_mean", "6.1f"), "cut": ("truncated", "6.1%"),
    "equal": ("equal_groups", "6.1%"), "r p1": ("ratio_p1", "5.2f"), "r p99": ("ratio_p99", "5.2f"),
    "KL": ("kl_old_new", "8.1e"), "entropy": ("entropy", "7.3f"), "|g|": ("gradient_norm", "6.3f"),
    "sample s": ("sample_s", "8.2f"), "update s": ("update_s", "8.2f"),
    "valid": ("validation_reward", "6.3f")}


def console_line(metrics=None):
    """One aligned line: these metrics, blank where one is missing; without any, the headings."""
    cells = []
    for heading, (key, form) in CONSOLE.items():
        cell = heading if metrics is None else format(metrics[key], form) if key in metrics else ""
        cells.append(cell.rjust(max(len(heading), int(form.split(".")[0].rstrip("d")))))
    return "  ".join(cells)


# ------------------------------------------------------------------ the run

def prepare(s, folder):
    """All that a run needs, as one namespace: model, policy (what samples: the model itself, or
    with --fsdp a whole copy in the dtype of computation), reference (None unless β > 0), optimizer,
    problems to train on with their prompts, validation and test problems, and where it stands:
    step, best (validation reward so far) and the best_step that had it, state (counters of
    optimizer steps), resumed, checkpoint (the last one, or None), problems_sha256.

    Raises ValueError and OSError for what is missing or does not fit, before anything is written.
    """
    checkpoint = newest_whole(folder) if s.resume else None
    policy = model = Qwen2.from_pretrained(checkpoint or s.model, "cpu" if s.fsdp else s.device,
                                           s.dtype)
    model.checkpoint_activations = s.checkpoint_activations
    if s.fsdp:
        parallel.shard(model, s.device)
    if s.compile:
        model.compile_layers()
    if s.fsdp:  # after any forward: it also puts the parts back in their places
        policy = model.for_sampling()
    reference = whole_model(s.model, s) if s.beta else None
    problems, validation, test = split_problems(s)
    problems_sha256 = hashlib.sha256(json.dumps([problems, validation, test]).encode()).hexdigest()
    prompts = [build_prompt(model.tokenizer, problem)
               for problem in tqdm(problems, desc="prompts", leave=False, delay=2)]
    longest = max(map(len, [*prompts, *(build_prompt(model.tokenizer, p) for p in validation)]))
    if longest + s.max_new_tokens > model.context:
        raise ValueError(f"the longest prompt has {longest} tokens and --max-new-tokens is "
                         f"{s.max_new_tokens}; the model's context holds {model.context}")
    optimizer = make_optimizer(model, s)
    run = SimpleNamespace(
        model=model, policy=policy, reference=reference, optimizer=optimizer, problems=problems,
        prompts=prompts, validation=validation, test=test, step=0, best=-math.inf, best_step=None,
        state={"optimizer_steps": 0, "skipped_steps": 0}, resumed=checkpoint is not None,
        checkpoint=checkpoint, problems_sha256=problems_sha256)
    if run.resumed:
        trainer = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True,
                             mmap=s.fsdp)  # of which each process takes its part
        optimizer.load_state_dict(parallel.distribute(trainer.pop("optimizer"),
                                                      list(model.parameters())))
        vars(run).update(trainer)  # step, best, best_step and state
    return run


def whole_model(path, s):
    """A model that is not trained: on the device in the dtype of computation only."""
    return Qwen2.from_pretrained(path, "cpu", s.dtype).for_sampling().to(s.device)


def make_optimizer(model, s):
    if s.optimizer == "sgd":  # plain: for experiments
        return torch.optim.SGD(model.parameters(), lr=s.learning_rate)
    return torch.optim.AdamW(model.parameters(), lr=s.learning_rate, betas=(0.9, 0.999),
                             eps=s.adam_epsilon, weight_decay=0.0, fused=True)


def try_largest_batch(run, s):
    """Run a full rollout, a validation and the largest micro-batch, so that memory ends now or not
    at all; where --tokens-per-microbatch was not given, choose it by the memory that is left.

    Every group has the longest prompt and completions of full length; room for AdamW's state is
    held meanwhile. Nothing stays but the samplers that CUDA keeps. Raises ValueError, with the
    flags that help.
    """
    G, prompt = s.group_size, max(run.prompts, key=len)
    group_tokens = len(prompt) + G * s.max_new_tokens
    share = parallel.largest_share(s.prompts_per_step)  # of a rollout
    n_groups = -(-share // s.minibatches)
    completion = (prompt * s.max_new_tokens)[:s.max_new_tokens]

    def peak_bytes(n):
        """Of a micro-batch of n groups, above what was there: forward and backward."""
        torch.cuda.reset_peak_memory_stats(s.device)
        before = torch.cuda.memory_allocated(s.device)
        batch = flat_batch([prompt] * n, [[completion] * G] * n, s.device)
        run.model.accumulate_gradients(batch, s.temperature, lambda logp, chunk: logp.sum(), True)
        return torch.cuda.max_memory_allocated(s.device) - before
    try:
        n_parameters = sum(p.numel() for p in run.model.parameters())
        n_parameters //= parallel.n_processes() if s.fsdp else 1
        has_state = run.optimizer.state or s.optimizer == "sgd"
        adamw_state = torch.empty(0 if has_state else 2 * n_parameters, device=s.device)
        generate(run.policy, [prompt] * share, G, s.max_new_tokens, s.temperature,
                 s.top_p, max_rows=s.rollout_rows)
        if s.validate_every <= s.steps:
            longest = max(run.validation, key=lambda problem: len(problem.question))
            _, n_problems = places_for(parallel.largest_share(len(run.validation)),
                                       s.validation_samples, s.rollout_rows)
            sample_answers(run.policy, [longest] * n_problems, s.validation_samples, s.temperature,
                           s.top_p, s.max_new_tokens, max_rows=s.rollout_rows, progress=None)
        peak_bytes(1)  # from now on the gradients are there
        torch.cuda.empty_cache()
        n_fit = s.tokens_per_microbatch and s.tokens_per_microbatch // group_tokens
        if n_fit is None:
            free_bytes = torch.cuda.mem_get_info(s.device)[0]
            n_fit = groups_that_fit(free_bytes, peak_bytes(1), peak_bytes(2))
        n = min(max(n_fit, 1), n_groups)
        peak_bytes(n)
        del adamw_state
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise ValueError(f"a rollout, a validation or a micro-batch: {in_words(e, s)}; a group "
                         f"needs {group_tokens} tokens") from e
    finally:
        run.optimizer.zero_grad()
    if s.tokens_per_microbatch is None:
        s.tokens_per_microbatch = group_tokens * min(parallel.gather(n))
        print(f"           micro-batches of {s.tokens_per_microbatch:,} tokens, for which there is "
              "room (--tokens-per-microbatch)")


def groups_that_fit(free_bytes, peak_of_one, peak_of_two):
    """How many groups a micro-batch can hold, from what one group and two take; a quarter of the
    memory stays free (chosen: groups of very unequal lengths are padded inside attention)."""
    bytes_per_group = max(peak_of_two - peak_of_one, 1)
    return int(0.75 * free_bytes - (peak_of_one - bytes_per_group)) // bytes_per_group


def split_problems(s):
    """(training, validation, test) problems, none in two of them.

    A set without a validation split gives some of its training problems, the same for every seed;
    a file, which has no splits, gives the test problems too.
    """
    train, test, source = load_problems(s.data, "train"), [], SETS.get(name_of(s.data))
    if source and "validation" in source.splits:
        validation = load_problems(s.data, "validation")[:s.validation_problems]
    else:
        random.Random("validation").shuffle(train)
        validation, train = train[:s.validation_problems], train[s.validation_problems:]
    if not source:  # `train` writes them to test.jsonl, for evaluate.py
        test, train = train[:s.test_problems], train[s.test_problems:]
    elif s.test_problems:
        test = load_problems(s.data, "test")[:s.test_problems]
    if len(train) < s.prompts_per_step:
        raise ValueError(f"{s.data} leaves {len(train)} training problems beside "
                         f"--validation-problems {s.validation_problems} and --test-problems "
                         f"{s.test_problems}; --prompts-per-step {s.prompts_per_step} needs that "
                         "many: lower these three, or give more problems")
    return train, validation, test


class GradingError(Exception):
    """A reward that is no number, or a grader that raised: an error of the code, not a zero."""


def graded(rollout, problems, tokenizer, s, step, first=0):
    """Rows as evaluate.grade makes them, with their reward. first: number of the first group, every
    n-th of which this process has."""
    rows = grade(rollout, problems, tokenizer)
    for i, row in enumerate(rows):
        group, sample = divmod(i, rollout.group_size)
        b = (first + group * parallel.n_processes()) * rollout.group_size + sample
        try:
            row["reward"] = reward(row["text"], row["gold"], row["finished"], s.reward,
                                   key=(s.seed, step, b))
        except Exception as e:
            raise GradingError(f"grading raised {e!r} on {row['problem']}, gold {row['gold']!r}, "
                               f"completion {row['text']!r:.2000}") from e
        if not math.isfinite(row["reward"]):
            raise GradingError(f"the reward is {row['reward']} for {row['problem']}, gold "
                               f"{row['gold']!r}, completion {row['text']!r:.2000}")
    return rows


def sample_and_grade(run, s, step, chosen):
    """The rollout of the chosen problems and its rows; each process makes every n-th group, all
    have all of them in the end."""
    first, n = parallel.rank(), parallel.n_processes()
    mine = chosen[first::n]
    rollout = Rollout([], [], [], [], s.group_size, 0.0)
    if mine:
        rollout = generate(run.policy, [run.prompts[i] for i in mine], s.group_size,
                           s.max_new_tokens, s.temperature, s.top_p, s.seed, step,
                           prompt_keys=mine, max_rows=s.rollout_rows,
                           progress=None if first else "sampling")
    rows = graded(rollout, [run.problems[i] for i in mine], run.model.tokenizer, s, step, first)
    if n == 1:
        return rollout, rows

    def by_group(x):
        return [x[i:i + s.group_size] for i in range(0, len(x), s.group_size)]
    own = rollout.prompts, *map(by_group, (rollout.completions, rollout.logps, rollout.finished,
                                           rows))
    prompts, *groups = map(parallel.interleave, zip(*parallel.gather(own)))
    completions, logps, finished, rows = ([x for group in part for x in group] for part in groups)
    seconds = max(parallel.gather(rollout.seconds))
    return Rollout(prompts, completions, logps, finished, s.group_size, seconds), rows


def reward_metrics(rollout, rows):
    """(reward_PG, metrics) of a whole rollout."""
    reward_PG = torch.tensor([row["reward"] for row in rows],
                             dtype=torch.float64).view(-1, rollout.group_size)
    finished = [row["n_tokens"] for row in rows if row["finished"]]
    return reward_PG, {
        "reward_mean": reward_PG.mean().item(),
        "reward_se": reward_PG.mean(1).std().nan_to_num().item() / len(reward_PG)**0.5,
        "accuracy": mean(row["flexible"] for row in rows),
        "format_rate": mean(row["format"] for row in rows),
        "length_mean": rollout.n_tokens / len(rows),
        "length_finished": mean(finished), "truncated": 1 - len(finished) / len(rows),
        "equal_groups": (reward_PG == reward_PG[:, :1]).all(1).double().mean().item(),
        "sample_s": rollout.seconds,
        "sample_tokens_per_s": rollout.n_tokens / max(rollout.seconds, 1e-9)}


def validate(run, s):
    """Mean reward and accuracy on the validation problems, sampled as in training; each process
    answers every n-th."""
    first, n = parallel.rank(), parallel.n_processes()
    problems, rows = run.validation[first::n], []
    if problems:
        rollout = sample_answers(run.policy, problems, s.validation_samples, s.temperature, s.top_p,
                                 s.max_new_tokens, s.seed, VALIDATION_STEP, s.rollout_rows,
                                 range(first, len(run.validation), n),
                                 None if first else "validation")
        rows = graded(rollout, problems, run.model.tokenizer, s, VALIDATION_STEP, first)
    rows = [row for part in parallel.gather(rows) for row in part]
    return {"validation_reward": math.fsum(row["reward"] for row in rows) / len(rows),
            "validation_accuracy": mean(row["flexible"] for row in rows),
            "validation_format_rate": mean(row["format"] for row in rows)}


def one_step(run, s, step):
    """Sample → score → advantages → update: (metrics, graded rows with their advantages)."""
    chosen = prompt_order(len(run.problems), s.prompts_per_step, step, s.seed)
    problems = [run.problems[i] for i in chosen]
    rollout, rows = sample_and_grade(run, s, step, chosen)
    reward_PG, metrics = reward_metrics(rollout, rows)
    advantage_PG = group_advantages(reward_PG, s.advantage_scale).float()
    minibatches = lay_out(rollout, advantage_PG, s, run.model.device)
    if step == 1 and any(minibatches):
        metrics |= noise_floor(run.model, next(filter(None, minibatches))[0], s.temperature)
    began = clock(s.device)
    entropies = old_log_probs(run, minibatches, s)
    scored = clock(s.device)
    try:
        seen = update(run, minibatches, s)
    except FloatingPointError as e:
        raise FloatingPointError(f"{e}; prompts {[p.id for p in problems]}") from e
    ended = clock(s.device)
    seen.entropies += entropies
    n_tokens = sum(parallel.gather(sum(len(micro.batch.ids_N) for minibatch in minibatches
                                       for micro in minibatch)))
    n_scored = n_tokens * ((s.minibatches > 1) + (run.reference is not None))
    metrics |= update_metrics(seen, minibatches, s) | run.state | {
        "learning_rate": learning_rate(s, run.state["optimizer_steps"]),
        "score_s": scored - began, "score_tokens_per_s": n_scored / max(scored - began, 1e-9),
        "update_s": ended - scored, "update_tokens_per_s": s.epochs * n_tokens / (ended - scored),
        "peak_memory_gib": max(parallel.gather(peak_memory_gib(s.device)))}
    for row, advantage in zip(rows, advantage_PG.flatten().tolist()):
        row |= {"step": step, "advantage": advantage}
    for row, problem in zip(rows[::s.group_size], problems):
        row["question"] = problem.question
    return metrics, rows


def begin(s, folder):
    """Prepare a run and its folder; ends the process, in one line, where that cannot be. Of several
    processes the first one writes and the others begin when it has."""
    torch.set_num_threads(s.threads)
    settings = dict(vars(s))
    try:
        s.device = parallel.start(s.device)
    except ValueError as e:
        sys.exit(f"error: {e}")
    first = parallel.rank() == 0
    if not first:
        sys.stdout = open(os.devnull, "w")
    print(f"run        {folder}: --model {s.model} --data {s.data} --objective {s.objective}, "
          f"{s.dtype} on {s.device}, seed {s.seed}"
          + f", {parallel.n_processes()} processes" * (parallel.n_processes() > 1))
    try:
        lock = enter(folder) if s.resume and first else None
        run = prepare(s, folder)
        announce(s, run)
        if run.model.on_cuda:
            try_largest_batch(run, s)
        s.tokens_per_microbatch = s.tokens_per_microbatch or 8192  # --device cpu beside a GPU
        if first:
            run.lock = lock or enter(folder)
            write_beginning(run, s, folder, settings)
        places = set(parallel.gather((run.step, run.resumed)))
    except Exception as e:
        reason = str(e) if isinstance(e, ValueError) else in_words(e, s)
        if reason is None:  # a mistake in the code: its traceback says more
            raise
        sys.exit(f"error: {reason}")
    if len(places) > 1:
        sys.exit(f"error: the processes do not find the same checkpoint in {folder}; it must lie "
                 "on a disk that all of them see alike")
    return run


def write_beginning(run, s, folder, settings):
    """What a run's folder holds before its next step; ValueError where another process began it."""
    if not s.resume:
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} was begun by another process meanwhile; choose another "
                             "--name")
        write_json(folder / "config.json", {"settings": settings, **describe_run(s),
                                            "problems_sha256": run.problems_sha256})
    elif read_json(folder / "config.json").get("problems_sha256") != run.problems_sha256:
        raise ValueError(f"--data {s.data} does not hold the problems that {folder} began with; "
                         "put them back, or start a new run with another --name")
    if run.resumed:
        print(f"resume     after step {run.step}")
        if run.checkpoint != checkpoints(folder)[-1]:  # the best may be of a step that is lost
            set_aside(folder / "best", move=False)
        if run.best_step == run.step:  # it was perhaps killed before it wrote best/
            copy_model(run.checkpoint, folder / "best")
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_rows(folder / name, run.step)
    elif s.resume:
        for name in ("best", "metrics.jsonl", "samples.jsonl"):  # of before a lost checkpoint?
            set_aside(folder / name)
    if run.test:
        write_whole(folder / "test.jsonl", "".join(
            json.dumps({"question": p.question, "answer": p.gold}) + "\n" for p in run.test))


def train(s, folder, stopping=()):
    """The run. Returns the exit code: 0, or 130 (Ctrl-C) and 143 (SIGTERM) where a signal, its
    number in `stopping`, cut it short."""
    run = begin(s, folder)
    first = parallel.rank() == 0
    logging = first and s.wandb
    if logging:
        import wandb
        wandb.init(project=s.wandb, name=s.name, dir=folder, config=vars(s))

    tqdm.write(console_line())
    validating = s.validate_every <= s.steps  # a run too short to reach a validation makes none
    start = 0 if validating and not run.resumed else run.step + 1
    last = min(s.steps, s.stop_after or s.steps)
    bar = tqdm(total=s.steps, desc="training", unit="step", initial=run.step, disable=not first)
    stop = False
    for step in range(start, last + 1):
        try:
            metrics, rows, improved = {}, [], False
            if step > 0:  # step 0 only validates the start model
                metrics, rows = one_step(run, s, step)
            if validating and (step % s.validate_every == 0 or step == s.steps):
                metrics |= validate(run, s)
                improved = metrics["validation_reward"] > run.best
            metrics, run.step = {"step": step, **metrics}, step
            if improved:
                run.best, run.best_step = metrics["validation_reward"], step
            stop = parallel.anybody(stopping)
            write_step(run, s, folder, metrics, rows, improved, stop or step == last)
            if stop or step == last:
                parallel.gather("written")  # torchrun ends the others soon after the first ends
        except Exception as e:
            reason = in_words(e, s)
            if reason is None:  # a mistake in the code: its traceback says more
                raise
            sys.exit(f"error: step {step}: {reason}\nlast checkpoint: {run.checkpoint}; go on with "
                     f"--resume --name {shlex.quote(s.name)}")
        tqdm.write(console_line(metrics))
        if logging:
            wandb.log(metrics, step=step)
        bar.update(step > 0)
        if stop:
            break
    bar.close()
    # before the processes part, and to make room for the models that are tested
    run.model = run.policy = run.reference = run.optimizer = None
    if run.step < s.steps:
        parallel.stop()
        print(f"stopped after step {run.step} of {s.steps}; go on with "
              f"--resume --name {shlex.quote(s.name)}")
        return 128 + (stopping or [signal.SIGTERM])[0] if stop else 0
    if first:
        if not validating:
            copy_model(run.checkpoint, folder / "best")
        try:
            finish(s, folder, run.test)
        except Exception as e:
            if not isinstance(e, (OSError, ValueError)) and not is_out_of_memory(e):
                raise
            advice = (f"; try again with --resume --name {shlex.quote(s.name)} --rollout-rows and "
                      f"less than {s.rollout_rows}" if is_out_of_memory(e) else "")
            sys.exit("error: the training is complete and saved, but not its test: "
                     f"{str(e)[:200]}{advice}")
    parallel.gather("finished")  # torchrun ends the others soon after the first ends
    parallel.stop()
    return 0


def write_step(run, s, folder, metrics, rows, improved, ending):
    """What a step leaves in the folder: its rows, a checkpoint when one is due, best/. Of several
    processes the first one writes."""
    saving = ending or improved or run.step % s.checkpoint_every == 0
    if saving:
        weights = parallel.collect(run.model.state_dict())
        trainer = {"optimizer": parallel.collect(run.optimizer.state_dict()), "step": run.step,
                   "best": run.best, "best_step": run.best_step, "state": run.state}
    if parallel.rank() > 0:
        return
    append_rows(folder / "metrics.jsonl", metrics)
    append_rows(folder / "samples.jsonl", *rows[:SAMPLE_GROUPS * s.group_size])
    if saving:
        run.checkpoint = save_checkpoint(folder, run.model, trainer, s.keep, weights)
        if improved:  # after its checkpoint, so that best/ is never of a step that was lost
            copy_model(run.checkpoint, folder / "best")
        draw_curves(folder)


def in_words(e, s):
    """What to tell the user of an exception within a step; None where its traceback says more."""
    if isinstance(e, (FloatingPointError, GradingError, OSError)):
        return str(e)
    if is_out_of_memory(e):
        return (f"out of memory ({str(e)[:200].partition(chr(10))[0]}): lower "
                f"--tokens-per-microbatch (now {s.tokens_per_microbatch}) or --rollout-rows (now "
                f"{s.rollout_rows}), add --checkpoint-activations, or lower --group-size or "
                "--max-new-tokens")
    if parallel.n_processes() > 1 and isinstance(e, RuntimeError) and (
            "gloo" in str(e).lower() or "nccl" in str(e).lower()):
        return f"lost another process, whose own message says why ({str(e)[:200]})"
    return None


def finish(s, folder, test):
    """What the run gained: greedy strict accuracy of the base model and of best/."""
    if not test:
        print(f"wrote {folder}/best; to measure it:\n"
              f"python evaluate.py {s.model} {shlex.quote(str(folder / 'best'))} --data "
              f"{shlex.quote(s.data)}")
        return
    scores = []
    torch.set_float32_matmul_precision("highest")  # fp32 as evaluate.py's, and the same figures
    for path in (s.model, folder / "best"):
        rows = answer(Qwen2.from_pretrained(path, s.device), test, max_rows=s.rollout_rows,
                      progress="test")
        scores.append(summarise(rows, 1)["strict"])
    write_json(folder / "test.json", {"data": s.data, "n_problems": len(test),
                                      "base_strict": scores[0], "best_strict": scores[1]})
    print(f"greedy strict accuracy on {len(test)} test problems: base model {scores[0]:.1%}, "
          f"{folder}/best {scores[1]:.1%}")


def stop_on_signals():
    """A list that takes the signals that came, Ctrl-C or SIGTERM, so that the step under way ends;
    a second Ctrl-C leaves at once. What comes again within 0.3 seconds is the same one: a launcher
    and the terminal may both pass it on."""
    stopping, came = [], [0.0]

    def handler(signum, frame):
        first, came[0] = time.monotonic() - came[0] > 0.3, time.monotonic()
        if stopping and not first:
            return
        if stopping and signum == signal.SIGINT:
            os._exit(130)
        stopping.append(signum)
        with suppress(OSError):  # not print: it may be what was interrupted
            os.write(2, f"\n{signal.Signals(signum).name}: finishing this step and saving; press "
                        "Ctrl-C to leave at once\n".encode())

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)
    return stopping


def peak_memory_gib(device):
    """Highest memory so far: of the device on CUDA, of the process on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage may begin with the peak of the process's parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30  # macOS counts bytes


def main(argv=None):
    keep_freed_memory()
    s, folder = read_settings(argv)
    return train(s, folder, stop_on_signals())


if __name__ == "__main__":
    sys.exit(main())

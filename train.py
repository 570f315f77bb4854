"""GR-PSPO: sample → score → advantages → update → log, on one device or several.

What it does    reinforcement learning of a language model on word problems with the smoothed,
                clipped or plain importance ratio, from the first prompt to the best checkpoint.
                `train` is the loop, `update` all that happens to one rollout.
Not here        the objective (objectives.py), sampling (rollout.py), the network (model.py), the
                task (rewards.py), accuracy (evaluate.py), the metrics (plumbing/metrics.py); what a
                run needs beside the method: folder, checkpoints, console, errors (plumbing/run.py).
Run it alone    python train.py --alpha 0.1            (laptop: the embedded default; GPU: Qwen2.5)
Where to fork   here. A new objective is a function in objectives.py, a new setting one line in
                plumbing/settings.py.

Deviations from the paper (arXiv:2509.21282) and its released recipe; objectives.py has two more:
  1. The reward is correctness plus 0.05 for a clean format (rewards.py says when); `--reward
     paper` is the authors'.
  2. top-p truncates the distribution that is sampled from; ratio and log-probabilities use the
     full softmax.
  3. With β = 0 a group whose rewards are all equal is left out of the update, since its gradient is
     zero; its tokens stay in the divisor. A minibatch of only such groups makes no optimizer
     step, while the schedule advances. (AdamW would still move by its momentum.)
  4. Old log-probabilities are computed by the trainer, not taken from the sampler: the sampler
     rounds differently, and that difference would look like a ratio (`sampler_gap` is logged).
  5. The weights are fp32 masters; bf16 is a dtype of computation only. Logits are fp32 on CUDA and
     rounded to bf16 on a CPU; their softmax is fp32.
  6. Prompts use our own system instruction.

Words, from large to small: a *step* is one rollout of P·G completions with its updates; an *epoch*
is one pass over the rollout; a *minibatch* is the groups of one optimizer step; a *micro-batch* is
what fits in memory at once (gradients add up); a *chunk* is what fits in the output head.
Axis letters: P prompts, G completions per prompt, B = P·G, M completion tokens of a micro-batch.
"""
import math
import sys
from dataclasses import dataclass, field

import torch

from objectives import group_advantages, kl_k3, policy_loss, reduction_weights
from plumbing import parallel
from plumbing.metrics import Laps, mean, noise_floor, rollout_metrics, update_metrics
from plumbing.problems import prompt_order
from plumbing.run import begin, end, explained, record, stop_on_signals, with_advantages
from plumbing.settings import chosen_objective, read_settings
from rewards import GradingError, answer_rows, grade, reward
from rollout import FlatBatch, Rollout, flat_batch, generate, sample_answers

VALIDATION_STEP = -1  # the sampler's step counter for validation: never one of training
NOTHING = Rollout([], [], [], [], 0.0)  # of a process with no prompt


def train(args, folder, stopping=()):
    """The run: sample → score → advantages → update → log, until the last step or a signal.

    args, folder: as `read_settings` gives them. stopping: a list that a signal handler fills with
    the signals that came. Returns the exit code: 0, or 130 (Ctrl-C) and 143 (SIGTERM).

    `run` holds model, policy (what samples: the model itself, a whole copy only with --fsdp),
    reference (the start model, only with --beta), optimizer; problems and prompts (their token
    ids), validation (problems); state (counters), step, last (the step to end with), stopped.
    """
    run = begin(args, folder, stopping)  # anew, or where --resume finds it; completes args
    with explained(run, args):
        if run.validating and not run.resumed:  # step 0: how good is the model we start from?
            record(run, args, 0, validate(run, args))
        for step in range(run.step + 1, run.last + 1):
            if run.stopped:
                break

            # sample: G answers to each of P problems
            chosen = prompt_order(len(run.problems), args.prompts_per_step, step, args.seed)
            problems = [run.problems[i] for i in chosen]
            rollout = sample(run, args, step, chosen)

            # score: a reward for every answer
            rows = score(rollout, problems, run.model.tokenizer, args, step)
            reward_PG = torch.tensor([[row["reward"] for row in group] for group in rows],
                                     dtype=torch.float64)

            # advantages: did an answer beat the other answers to its problem?
            advantage_PG = group_advantages(reward_PG, args.advantage_scale).float()

            # update: several optimizer steps on these same answers
            minibatches = lay_out(rollout, advantage_PG, args, run.model.device)
            lap = Laps(args.device)
            seen = remember_old_policy(run, minibatches, args)
            lap("old_logp_s")
            update(run, minibatches, args, seen)
            lap("update_s")

            # log, validate, save
            metrics = (rollout_metrics(rollout, rows, reward_PG)
                       | update_metrics(run, minibatches, args, seen, lap.seconds)
                       | {"learning_rate": learning_rate(args, run.state["optimizer_steps"])})
            if step == 1:
                metrics |= noise_floor(run.model, minibatches, args.temperature)
            if run.validating and (step % args.validate_every == 0 or step == args.steps):
                metrics |= validate(run, args)
            record(run, args, step, metrics, with_advantages(rows, advantage_PG, problems, step))
    return end(run, args)


# ------------------------------------------------------------------ sample, score

def sample(run, args, step, chosen):
    """The rollout of the chosen problems (indices). Each process samples every n-th group; all
    processes get all groups."""
    mine, rollout = chosen[parallel.rank()::parallel.n_processes()], NOTHING
    if mine:
        rollout = generate(run.policy, [run.prompts[i] for i in mine], args.group_size,
                           args.max_new_tokens, args.temperature, args.top_p, args.seed, step,
                           prompt_keys=mine, max_rows=args.rollout_rows,
                           progress=None if parallel.rank() else "sampling")
    return parallel.with_all_groups(rollout)


def score(rollout, problems, tokenizer, args, step):
    """rows[p][g]: a dict for every answer, with its text, n_tokens, finished, grades and reward.
    Each process grades every n-th group; all processes get all groups."""
    rows, G = answer_rows(rollout, problems, tokenizer), len(rollout.completions[0])
    mine = range(parallel.rank(), len(rows) // G, parallel.n_processes())
    rows = grade([row for p in mine for row in rows[p * G:(p + 1) * G]], problems)
    for row in rows:
        about = (f"{row['problem']}, --reward {args.reward}, gold {row['gold']!r}, completion "
                 f"{row['text']!r:.2000}")
        try:
            row["reward"] = reward(row["text"], row["gold"], row["finished"], args.reward,
                                   key=(args.seed, step, row["problem"], row["sample"]))
        except Exception as e:
            raise GradingError(f"grading raised {e!r} on {about}") from e
        if not (isinstance(row["reward"], (int, float)) and math.isfinite(row["reward"])):
            raise GradingError(f"the reward is {row['reward']!r:.80}, expected a finite number, "
                               f"for {about}")
    groups = [rows[first:first + G] for first in range(0, len(rows), G)]
    return parallel.interleave(parallel.gather(groups))


def validate(run, args):
    """Mean reward and accuracy on the validation problems, sampled as in training. Each process
    answers every n-th problem."""
    mine, rollout = range(parallel.rank(), len(run.validation), parallel.n_processes()), NOTHING
    if mine:
        rollout = sample_answers(run.policy, [run.validation[i] for i in mine],
                                 args.validation_samples, args.temperature, args.top_p,
                                 args.max_new_tokens, args.seed, VALIDATION_STEP,
                                 args.rollout_rows, mine,
                                 None if parallel.rank() else "validation")
    groups = score(parallel.with_all_groups(rollout), run.validation, run.model.tokenizer, args,
                   VALIDATION_STEP)
    rows = [row for group in groups for row in group]
    return {"validation_reward": math.fsum(row["reward"] for row in rows) / len(rows),
            "validation_accuracy": mean(row["flexible"] for row in rows),
            "validation_format_rate": mean(row["format"] for row in rows)}


# ------------------------------------------------------------------ lay out a rollout

@dataclass
class MicroBatch:
    """Whole groups that run forward and backward together, with what the loss needs per token."""
    batch: FlatBatch
    advantage_M: torch.Tensor
    weight_M: torch.Tensor
    sampler_logp_M: torch.Tensor
    old_logp_M: torch.Tensor = None        # of the policy that sampled, computed by the trainer
    reference_logp_M: torch.Tensor = None  # of the start model; with --beta only


def lay_out(rollout, advantage_PG, args, device):
    """The minibatches of a rollout, each a list of micro-batches; built once, used every epoch.

    The weight of a token counts all completions of its minibatch, also those of groups that are
    left out because their rewards are equal (deviation 3). Of the other groups each process takes
    every n-th, and fills micro-batches with them up to `tokens_per_microbatch`.
    """
    minibatches, n = [], len(rollout.prompts) // args.minibatches  # n groups in a minibatch
    for first in range(0, len(rollout.prompts), n):
        groups = range(first, first + n)
        length_PG = torch.tensor([[len(ids) for ids in rollout.completions[p]] for p in groups])
        weight_PG = reduction_weights(length_PG.flatten(), args.reduction,
                                      args.max_new_tokens).view_as(length_PG)
        packs, room = [], 0  # the groups of each micro-batch; what is free in the last one
        trained = [p for p in groups if args.beta > 0 or advantage_PG[p].any()]
        for p in trained[parallel.rank()::parallel.n_processes()]:
            size = len(rollout.prompts[p]) + int(length_PG[p - first].sum())
            if not packs or size > room:
                packs.append([])
                room = args.tokens_per_microbatch
            packs[-1].append(p)
            room -= size
        micros = [micro_batch(rollout, pack, advantage_PG[pack],
                              weight_PG[[p - first for p in pack]], device) for pack in packs]
        if args.fsdp:  # every pass is an exchange, so that each process makes as many
            micros += [idle_micro_batch(device) for _ in range(
                max(parallel.gather(len(micros))) - len(micros))]
        minibatches.append(micros)
    return minibatches


def micro_batch(rollout, pack, advantage_PG, weight_PG, device):
    """The MicroBatch of these groups (indices) and all their completions."""
    batch = flat_batch([rollout.prompts[p] for p in pack],
                       [rollout.completions[p] for p in pack], device)
    length_B = torch.tensor(batch.lengths)

    def per_token(x_PG):
        return x_PG.flatten().repeat_interleave(length_B).to(device)
    logps = [x for p in pack for completion in rollout.logps[p] for x in completion]
    return MicroBatch(batch, per_token(advantage_PG), per_token(weight_PG),
                      torch.tensor(logps, device=device))


def idle_micro_batch(device):
    """A MicroBatch without a completion token: it runs, and adds nothing."""
    nothing = torch.empty(0, device=device)
    return MicroBatch(flat_batch([[0]], [[[]]], device), nothing, nothing, nothing)


# ------------------------------------------------------------------ update

@dataclass
class Seen:
    """What an update shows on its way, for the metrics: tensors over the tokens of a micro-batch or
    a chunk."""
    entropies: list = field(default_factory=list)
    log_ratios: list = field(default_factory=list)  # of the last epoch
    kls: list = field(default_factory=list)         # to the reference
    norms: list = field(default_factory=list)       # of the gradient, one an optimizer step


def remember_old_policy(run, minibatches, args):
    """Store the log-probs of the policy that sampled in every micro-batch, while it is still there.

    With one minibatch an epoch nothing is stored here: the first pass of `backward` runs on that
    policy and stores the log-probs then, which saves a pass and gives the same numbers. With --beta
    also those of the reference. Returns a Seen with the entropies found on the way.
    """
    seen = Seen()
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        if args.minibatches > 1:
            micro.old_logp_M, entropy_M = run.model.completion_log_probs(
                micro.batch, args.temperature, entropy=True)
            seen.entropies.append(entropy_M)
        if run.reference is not None:
            micro.reference_logp_M, _ = run.reference.completion_log_probs(
                micro.batch, args.temperature)
    return seen


def update(run, minibatches, args, seen):
    """All epochs over one rollout: loss, gradients, optimizer steps. Fills `seen`. Raises
    FloatingPointError where a gradient was not finite; the weights are lost then."""
    objective = chosen_objective(args)
    for epoch in range(args.epochs):
        for minibatch in minibatches:
            run.state["optimizer_steps"] += 1  # the schedule goes on even where nothing is learned
            if not parallel.any_process(len(minibatch) > 0):
                run.state["skipped_steps"] += 1
                continue
            for micro in minibatch:
                backward(run, micro, objective, args, seen, keep_ratios=epoch == args.epochs - 1)
            seen.norms.append(optimizer_step(run, args))
    for norm in seen.norms:  # not before: who looks at a number waits for the GPU
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient norm is {norm.item()} (a lower --learning-rate "
                                     "or --max-grad-norm may help)")
    if args.fsdp:
        parallel.refresh(run.policy, run.model)


def backward(run, micro, objective, args, seen, keep_ratios):
    """Add the gradient of one micro-batch.

    The output head calls `loss` for a few whole completions at a time (`chunk`, their slice of M)
    and adds up the gradients. What needs all tokens of an optimizer step, a quantile for example,
    belongs in `update`, before the micro-batches; every process must reach every exchange there.
    """
    first_pass = micro.old_logp_M is None  # then the model is still the one that sampled

    def loss(logp, chunk):
        old_logp = logp.detach() if first_pass else micro.old_logp_M[chunk]
        weight = micro.weight_M[chunk]
        total, log_ratio = policy_loss(logp, old_logp, micro.advantage_M[chunk], weight,
                                       micro.batch.sequence_M[chunk], objective, args.ratio_level)
        if keep_ratios:
            seen.log_ratios.append(log_ratio)
        if run.reference is not None:
            kl = kl_k3(logp, micro.reference_logp_M[chunk])
            seen.kls.append(kl.detach())
            total = total + args.beta * (weight * kl).sum()
        return total

    logp_M, entropy_M = run.model.accumulate_gradients(micro.batch, args.temperature, loss,
                                                       entropy=first_pass)
    if first_pass:
        micro.old_logp_M = logp_M
        seen.entropies.append(entropy_M)


def optimizer_step(run, args):
    """One optimizer step on the gradients of all processes; returns their norm before the limit.
    """
    parallel.sum_gradients(run.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(args, run.state["optimizer_steps"])
    run.optimizer.step()
    run.optimizer.zero_grad()
    return parallel.unsharded(norm)


def learning_rate(args, optimizer_step):
    """Linear warm-up to the peak, then linear decay that reaches 0 one step after the last.

    optimizer_step: 1 is the first."""
    total = args.steps * args.epochs * args.minibatches
    rise = optimizer_step / max(args.warmup_steps, 1)
    fall = (total - optimizer_step + 1) / max(total - args.warmup_steps, 1)
    return args.learning_rate * max(min(rise, fall, 1.0), 0.0)


def main(argv=None):
    args, folder = read_settings(argv)
    return train(args, folder, stop_on_signals())


if __name__ == "__main__":
    sys.exit(main())

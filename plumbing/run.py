"""A run beside its method: its beginning, its folder, its console, its errors, its end.

What it does    `begin` prepares a model, an optimizer, the problems and the folder, and announces
                the arithmetic of the run before any of it is computed; `record` keeps what a step
                leaves; `explained` turns errors that a user can mend into one line; `end` tests the
                best model.
Not here        what a step does: train.py. What survives a crash: checkpoint.py.
"""
import gc
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from evaluate import answer_problems
from evaluation.figures import draw_curves
from evaluation.summaries import summarise
from model import Qwen2
from plumbing import parallel
from plumbing.checkpoint import (
    checkpoints,
    copy_model,
    cut_rows,
    keep_copy,
    lock_run,
    newest_undamaged,
    save_checkpoint,
    set_aside,
)
from plumbing.engine import places_for
from plumbing.files import append_rows, read_json, write_json, write_whole
from plumbing.hub import is_out_of_memory, keep_freed_memory, use_threads
from plumbing.onednn import is_large
from plumbing.problems import SETS, answer_of, prompt_order, split_problems
from plumbing.reward_file import sha256_of_reward
from plumbing.settings import warn_of_slow_bf16
from rewards import GradingError, build_prompt
from rollout import flat_batch, generate, sample_answers

HERE = Path(__file__).resolve().parent.parent
SAMPLE_GROUPS = 1  # chosen: groups per step written to samples.jsonl
STATE_BYTES = {"adamw": 8, "adamw8bit": 2 + 8 / 256, "sgd": 0}  # of an optimizer, a parameter


# ------------------------------------------------------------------ begin

def begin(args, folder, stopping=()):
    """Prepare a run and its folder: the namespace that `prepare` makes, and

    last          the step to end with (--stop-after)
    validating    whether the run is long enough to validate
    stopping      a list of the signals that came; stopped: whether any process has one
    folder, bar, wandb

    Ends the process, in one line, where that cannot be. Of several processes the first one writes,
    and the others begin when it has.
    """
    keep_freed_memory()
    args.threads = use_threads(args.threads)
    settings = dict(vars(args))
    try:
        args.device = parallel.start(args.device)
    except ValueError as e:
        sys.exit(f"error: {e}")
    first = parallel.rank() == 0
    if not first:
        sys.stdout = open(os.devnull, "w")
    print(f"run        {folder}: --model {args.model} --data {args.data} --objective "
          f"{args.objective}, {args.dtype} on {args.device}, seed {args.seed}"
          + f", {parallel.n_processes()} processes" * (parallel.n_processes() > 1))
    if first:
        warn_of_slow_bf16(args)
    try:
        lock = lock_run(folder) if args.resume and first else None
        run = prepare(args, folder)
        announce(args, run)
        if run.model.on_cuda:
            try_largest_batch(run, args)
        args.tokens_per_microbatch = args.tokens_per_microbatch or 8192  # --device cpu beside a GPU
        if first:
            run.lock = lock or lock_run(folder)
            write_beginning(run, args, folder, settings)
        places = set(parallel.gather((run.step, run.resumed, run.reward_sha256)))
    except Exception as e:
        reason = str(e) if isinstance(e, ValueError) else in_words(e, args)
        if reason is None:  # a mistake in the code: its traceback says more
            raise
        sys.exit(f"error: {reason}")
    if len(places) > 1:
        sys.exit(f"error: the processes do not find the same checkpoint in {folder}, or the same "
                 f"--reward {args.reward}; both must lie on a disk that all of them see alike")
    run.folder, run.stopping, run.stopped = folder, stopping, False
    run.last = min(args.steps, args.stop_after or args.steps)
    run.validating = args.validate_every <= args.steps
    run.wandb = None
    if first and args.wandb:
        import wandb
        run.wandb = wandb.init(project=args.wandb, name=args.name, dir=folder, config=vars(args))
    tqdm.write(console_line())
    run.bar = tqdm(total=args.steps, desc="training", unit="step", initial=run.step,
                   disable=not first)
    return run


def write_beginning(run, args, folder, settings):
    """What a run's folder holds before its next step; ValueError where another process began it."""
    if not args.resume:
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} was begun by another process meanwhile; choose another "
                             "--name")
        write_json(folder / "config.json", {"settings": settings, **describe_run(args),
                                            "problems_sha256": run.problems_sha256,
                                            "reward_sha256": run.reward_sha256})
    else:
        begun = read_json(folder / "config.json")
        if begun.get("problems_sha256") != run.problems_sha256:
            raise ValueError(f"--data {args.data} does not hold the problems that {folder} began "
                             "with; put them back, or start a new run with another --name")
        if begun.get("reward_sha256") != run.reward_sha256:
            raise ValueError(f"--reward {args.reward} is not the file that {folder} began with; "
                             "put it back, or start a new run with another --name; if rewards so "
                             "far would be the same (a mended crash), give config.json there this "
                             f"one's reward_sha256, {run.reward_sha256}")
    if run.resumed:
        print(f"resume     after step {run.step}")
        if run.checkpoint != checkpoints(folder)[-1]:  # the best may be of a step that is lost
            keep_copy(folder / "best")
        if run.best_step == run.step:  # it was perhaps killed before it wrote best/
            copy_model(run.checkpoint, folder / "best")
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_rows(folder / name, run.step)
    elif args.resume:
        for name in ("best", "metrics.jsonl", "samples.jsonl"):  # of before a lost checkpoint?
            set_aside(folder / name)
    if run.test:
        write_whole(folder / "test.jsonl", "".join(
            json.dumps({"question": p.question, "answer": answer_of(p)}) + "\n" for p in run.test))


def prepare(args, folder):
    """All that a run needs, as one namespace: model, policy (what samples: the model itself, or
    with --fsdp a whole copy in the dtype of computation), reference (None unless β > 0), optimizer,
    problems to train on with their prompts, validation and test problems, and where it stands:
    step, best (validation reward so far) and the best_step that had it, state (counters of
    optimizer steps), resumed, checkpoint (the last one, or None), problems_sha256, reward_sha256
    (of the file of --reward, or None).

    Raises ValueError and OSError for what is missing or does not fit, before anything is written.
    """
    checkpoint = newest_undamaged(folder) if args.resume else None
    policy = model = Qwen2.from_pretrained(checkpoint or args.model,
                                           "cpu" if args.fsdp else args.device, args.dtype)
    model.checkpoint_activations = args.checkpoint_activations
    if args.fsdp:
        parallel.shard(model, args.device)
        policy = model.for_sampling()
    reference = whole_model(args.model, args) if args.beta else None
    problems, validation, test = split_problems(args)
    problems_sha256 = hashlib.sha256(json.dumps([problems, validation, test]).encode()).hexdigest()
    prompts = [build_prompt(model.tokenizer, problem)
               for problem in tqdm(problems, desc="prompts", leave=False, delay=2)]
    longest = max(map(len, [*prompts, *(build_prompt(model.tokenizer, p) for p in validation)]))
    if longest + args.max_new_tokens > model.context:
        raise ValueError(f"the longest prompt has {longest} tokens and --max-new-tokens is "
                         f"{args.max_new_tokens}; the model's context holds {model.context}")
    optimizer = make_optimizer(model, args)
    run = SimpleNamespace(
        model=model, policy=policy, reference=reference, optimizer=optimizer, problems=problems,
        prompts=prompts, validation=validation, test=test, step=0, best=-math.inf, best_step=None,
        state={"optimizer_steps": 0, "skipped_steps": 0}, resumed=checkpoint is not None,
        checkpoint=checkpoint, problems_sha256=problems_sha256,
        reward_sha256=sha256_of_reward(args.reward))
    if run.resumed:
        trainer = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True,
                             mmap=args.fsdp)  # of which each process takes its part
        optimizer.load_state_dict(parallel.distribute(trainer.pop("optimizer"),
                                                      list(model.parameters())))
        vars(run).update(trainer)  # step, best, best_step and state
    return run


def whole_model(path, args):
    """A model that is not trained: on the device in the dtype of computation only."""
    model = Qwen2.from_pretrained(path, "cpu", args.dtype).for_sampling().to(args.device)
    model.checkpoint_activations = args.checkpoint_activations  # smaller chunks of the head
    return model


def make_optimizer(model, args):
    if args.optimizer == "sgd":  # plain: for experiments
        return torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    adamw = partial(torch.optim.AdamW, fused=True)
    if args.optimizer == "adamw8bit":  # each 256 numbers of a moment share a scale (2110.02861)
        from bitsandbytes.optim import AdamW8bit as adamw
    return adamw(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.999),
                 eps=args.adam_epsilon, weight_decay=0.0)


def try_largest_batch(run, args):
    """Run a full rollout, a validation and the largest micro-batch, so that memory ends now or not
    at all; where --tokens-per-microbatch was not given, choose it by the memory that is left.

    Every group has the longest prompt and completions of full length; room for AdamW's state is
    held meanwhile. Nothing stays but the samplers that CUDA keeps. Raises ValueError, with the
    flags that help.
    """
    G, prompt = args.group_size, max(run.prompts, key=len)
    group_tokens = len(prompt) + G * args.max_new_tokens
    share = parallel.largest_share(args.prompts_per_step)  # of a rollout
    n_groups = -(-share // args.minibatches)
    completion = (prompt * args.max_new_tokens)[:args.max_new_tokens]

    def bytes_of(n):
        batch = flat_batch([prompt] * n, [[completion] * G] * n, args.device)
        return peak_bytes(run.model, batch, args.temperature)
    try:
        n_parameters = sum(p.numel() for p in run.model.parameters())
        n_parameters //= parallel.n_processes() if args.fsdp else 1
        state_bytes = 0 if run.optimizer.state else STATE_BYTES[args.optimizer] * n_parameters
        state = torch.empty(int(state_bytes), dtype=torch.uint8, device=args.device)
        generate(run.policy, [prompt] * share, G, args.max_new_tokens, args.temperature,
                 args.top_p, max_rows=args.rollout_rows)
        if args.validate_every <= args.steps:
            longest = max(run.validation, key=lambda problem: len(problem.question))
            _, n_problems = places_for(parallel.largest_share(len(run.validation)),
                                       args.validation_samples, args.rollout_rows)
            sample_answers(run.policy, [longest] * n_problems, args.validation_samples,
                           args.temperature, args.top_p, args.max_new_tokens,
                           max_rows=args.rollout_rows, progress=None)
        bytes_of(1)  # from now on the gradients are there
        torch.cuda.empty_cache()
        n_fit = args.tokens_per_microbatch and args.tokens_per_microbatch // group_tokens
        if n_fit is None:
            free_bytes = torch.cuda.mem_get_info(args.device)[0]
            two_run = n_groups > 1 and (args.fsdp or groups_that_run(bytes_of, 2) == 2)
            n_fit = groups_that_fit(free_bytes, bytes_of(1), bytes_of(2)) if two_run else 1
        n = min(max(n_fit, 1), n_groups)
        if args.tokens_per_microbatch or args.fsdp:  # with it every pass is an exchange
            bytes_of(n)
        else:
            n = groups_that_run(bytes_of, n)
        del state
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise ValueError(f"a rollout, a validation or a micro-batch: {in_words(e, args)}; a group "
                         f"needs {group_tokens} tokens") from e
    finally:
        run.optimizer.zero_grad()
    if args.tokens_per_microbatch is None:
        args.tokens_per_microbatch = group_tokens * min(parallel.gather(n))
        print(f"           micro-batches of {args.tokens_per_microbatch:,} tokens, for which there "
              "is room (--tokens-per-microbatch)")


def peak_bytes(model, batch, temperature):
    """What a forward and backward pass takes on CUDA, at most, above what was there before it."""
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model.accumulate_gradients(batch, temperature, lambda logp, chunk: logp.sum(), True)
    return torch.cuda.max_memory_allocated(model.device) - before


def groups_that_fit(free_bytes, peak_of_one, peak_of_two):
    """How many groups a micro-batch can hold, from what one group and two take; a quarter of the
    memory stays free (chosen: groups of very unequal lengths are padded inside attention)."""
    bytes_per_group = max(peak_of_two - peak_of_one, 1)
    beside = peak_of_one - bytes_per_group  # what does not grow with the groups
    return int(0.75 * free_bytes - beside) // bytes_per_group


def groups_that_run(bytes_of, n):
    """n, halved until a micro-batch of so many groups runs: in the peaks of one group and two the
    head may hide what a layer takes."""
    while n > 1:
        try:
            bytes_of(n)
            return n
        except torch.OutOfMemoryError:
            n //= 2
        gc.collect()  # what the failed one held
        torch.cuda.empty_cache()
    bytes_of(1)
    return 1


def git(*words):
    """What git says of this folder; "" where it is no clone, or git not installed."""
    try:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        return ""


def describe_run(args):
    """What config.json holds beside the settings: commit, versions, device."""
    import transformers
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    return {"commit": git("rev-parse", "HEAD") or None, "device_name": device,
            "processes": parallel.n_processes(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "transformers": transformers.__version__}}


def announce(args, run):
    """The arithmetic of the run, before any of it is computed, and its first prompt."""
    G, P = args.group_size, args.prompts_per_step
    n_parameters = sum(p.numel() for p in run.model.parameters())
    c = run.model.config
    kv_bytes = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    kv_bytes *= 2 if args.dtype == "bf16" else 4
    longest = max(map(len, run.prompts))

    def cache_gib(n_prompts, samples):
        rows, prompts = places_for(parallel.largest_share(n_prompts), samples, args.rollout_rows)
        return kv_bytes * (rows * args.max_new_tokens + prompts * longest) / 2**30
    optimizer_steps = args.epochs * args.minibatches
    print(f"data       {len(run.problems)} training problems, {len(run.validation)} for "
          f"validation; prompts of at most {longest} tokens")
    if args.validate_every > args.steps:
        print(f"           no validation: --steps {args.steps} ends before --validate-every "
              f"{args.validate_every}; best/ will be the last step")
    print(f"step       {P} prompts × {G} completions = {P * G}, at most "
          f"{P * G * args.max_new_tokens:,} new tokens; {args.epochs} epochs × {args.minibatches} "
          f"minibatches = {optimizer_steps} optimizer steps")
    print(f"run        {args.steps} steps = {args.steps * optimizer_steps} optimizer steps, "
          f"{args.steps * P / len(run.problems):.2f} passes over the training problems")
    state_bytes = (8 + STATE_BYTES[args.optimizer]) * n_parameters
    if args.fsdp:  # a part of it, and the whole head with its gradient
        state_bytes = state_bytes / parallel.n_processes() + 8 * c["vocab_size"] * c["hidden_size"]
    # the copy that samples, but where fp32 in one process shares the weights (of a large model a
    # CPU reorders its own); the reference
    copies = ["sampler's copy"] * (args.dtype == "bf16" or args.fsdp or
                                   any(is_large(p) for p in run.model.parameters()))
    copies += ["reference"] * (args.beta > 0)
    state_bytes += len(copies) * (2 if args.dtype == "bf16" else 4) * n_parameters
    held = ["weights", "gradients", *["AdamW state"] * (args.optimizer != "sgd"), *copies]
    print(f"memory     {state_bytes / 2**30:.2f} GiB for {', '.join(held)} of {n_parameters:,} "
          f"parameters{', in each process' * args.fsdp}; caches of {cache_gib(P, G):.2f} GiB while "
          f"sampling and {cache_gib(len(run.validation), args.validation_samples):.2f} in "
          "validation; activations on top")
    if optimizer_steps == 1 and args.objective != "noclip":
        print(f"warning    one optimizer step per rollout keeps every ratio at 1, where "
              f"{args.objective} is noclip up to a constant: raise --epochs or --minibatches",
              file=sys.stderr)
    first = run.prompts[prompt_order(len(run.prompts), P, 1, args.seed)[0]]
    print(f"prompt 1   {run.model.tokenizer.decode(first)!r}\n           {first}\n")


# ------------------------------------------------------------------ what a step leaves

def record(run, args, step, metrics, rows=()):
    """Keep what a step leaves: its metrics and rows, a checkpoint when one is due, best/; say it.

    rows[p][g]: dicts, of which the first group is kept. Every process calls this, since they decide
    together whether a signal ends the run; the first one writes. Sets run.step and run.stopped.
    """
    metrics = {"step": step, **metrics}
    improved = metrics.get("validation_reward", -math.inf) > run.best
    if improved:
        run.best, run.best_step = metrics["validation_reward"], step
    run.stopped = parallel.any_process(run.stopping)
    ending = run.stopped or step == run.last
    saving = ending or improved or step % args.checkpoint_every == 0
    if saving:
        weights = parallel.collect(run.model.state_dict())
        trainer = {"optimizer": parallel.collect(run.optimizer.state_dict()), "step": step,
                   "best": run.best, "best_step": run.best_step, "state": run.state}
    if parallel.rank() == 0:
        append_rows(run.folder / "metrics.jsonl", metrics)
        append_rows(run.folder / "samples.jsonl",
                    *[row for group in rows[:SAMPLE_GROUPS] for row in group])
        if saving:
            run.checkpoint = save_checkpoint(run.folder, run.model, trainer, args.keep, weights)
            if improved:  # after its checkpoint, so that best/ is never of a step that was lost
                copy_model(run.checkpoint, run.folder / "best")
            draw_curves(run.folder)
    if ending:
        parallel.gather("written")  # torchrun ends the others soon after the first ends
    tqdm.write(console_line(metrics))
    if run.wandb:
        run.wandb.log(metrics, step=step)
    run.bar.update(step > 0)
    run.step = step


def with_advantages(rows, advantage_PG, problems, step):
    """The rows as samples.jsonl keeps them, group by group; each group's first has the question."""
    return [[{**row, "step": step, "advantage": advantage,
              **({"question": problem.question} if g == 0 else {})}
             for g, (row, advantage) in enumerate(zip(group, advantage_G))]
            for group, advantage_G, problem in zip(rows, advantage_PG.tolist(), problems)]


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


# ------------------------------------------------------------------ errors and signals

@contextmanager
def explained(run, args):
    """An error that a user can mend ends the run in one line, which names the last checkpoint."""
    try:
        yield
    except Exception as e:
        reason = in_words(e, args)
        if reason is None:  # a mistake in the code: its traceback says more
            raise
        way = f"go on with --resume --name {shlex.quote(args.name)}"
        if isinstance(e, FloatingPointError):
            chosen = prompt_order(len(run.problems), args.prompts_per_step, run.step + 1, args.seed)
            reason += f"; prompts {[run.problems[i].id for i in chosen]}"
            way = "it leads there again; start a new run with another --name"
        sys.exit(f"error: step {run.step + 1}: {reason}\nlast checkpoint: "
                 f"{run.checkpoint or 'none yet'}; {way}")


def in_words(e, args):
    """What to tell the user of an exception within a step; None where its traceback says more."""
    if isinstance(e, GradingError) and args.reward.endswith(".py"):
        return f"{e} (mend the file; --resume then says how this run keeps it)"
    if isinstance(e, (FloatingPointError, GradingError, OSError)):
        return str(e)
    if is_out_of_memory(e):
        return (f"out of memory ({str(e)[:200].partition(chr(10))[0]}): lower "
                f"--tokens-per-microbatch (now {args.tokens_per_microbatch}) or --rollout-rows "
                f"(now {args.rollout_rows}), add --checkpoint-activations, or lower --group-size "
                "or --max-new-tokens" + "; or begin a run with --optimizer adamw8bit" * (
                    args.optimizer == "adamw" and not args.fsdp))
    if parallel.n_processes() > 1 and isinstance(e, RuntimeError) and (
            "gloo" in str(e).lower() or "nccl" in str(e).lower()):
        return f"lost another process, whose own message says why ({str(e)[:200]})"
    return None


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


# ------------------------------------------------------------------ end

def end(run, args):
    """Part the processes; where the run is complete, test its best model. Returns the exit code."""
    run.bar.close()
    # before the processes part, and to make room for the models that are tested
    run.model = run.policy = run.reference = run.optimizer = None
    if run.step < args.steps:
        parallel.stop()
        print(f"stopped after step {run.step} of {args.steps}; go on with "
              f"--resume --name {shlex.quote(args.name)}")
        return 128 + (run.stopping or [signal.SIGTERM])[0] if run.stopped else 0
    if parallel.rank() == 0:
        if not run.validating:
            copy_model(run.checkpoint, run.folder / "best")
        try:
            test_at_the_end(args, run.folder, run.test)
        except Exception as e:
            if not isinstance(e, (OSError, ValueError)) and not is_out_of_memory(e):
                raise
            advice = (f"; try again with --resume --name {shlex.quote(args.name)} --rollout-rows "
                      f"and less than {args.rollout_rows}" if is_out_of_memory(e) else "")
            sys.exit("error: the training is complete and saved, but not its test: "
                     f"{str(e)[:200]}{advice}")
    parallel.gather("finished")  # torchrun ends the others soon after the first ends
    parallel.stop()
    return 0


def test_at_the_end(args, folder, test):
    """What the run gained: greedy strict accuracy of the base model and of best/, with room for
    answers four times as long as in training (the paper's 128 tokens: 512, as evaluate.py)."""
    if not test:
        data = args.data if args.data in SETS else "OTHER_PROBLEMS.jsonl"  # not trained on
        print(f"wrote {folder}/best; to measure it:\n"
              f"python evaluate.py {args.model} {shlex.quote(str(folder / 'best'))} --data {data}")
        return
    scores = []
    torch.set_float32_matmul_precision("highest")  # fp32 as evaluate.py's, and the same figures
    for path in (args.model, folder / "best"):
        rows = answer_problems(Qwen2.from_pretrained(path, args.device), test,
                               max_new_tokens=4 * args.max_new_tokens,
                               max_rows=args.rollout_rows, progress="test")
        scores.append(summarise(rows, 1)["strict"])
    write_json(folder / "test.json", {"data": args.data, "n_problems": len(test),
                                      "base_strict": scores[0], "best_strict": scores[1]})
    print(f"greedy strict accuracy on {len(test)} test problems: base model {scores[0]:.1%}, "
          f"{folder}/best {scores[1]:.1%}")

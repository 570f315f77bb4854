"""Does all of it work on this GPU, and how fast: python -m bench gpu

What it does    claims first (the tests of tests/test_cuda.py; a run of train.py from start to end,
                stopped and resumed), then speed and memory: decoding, the update, the paper's step,
                kernels, the micro-batch that fits; TRL's step where TRL is installed. Each part
                adds to bench/results/gpu-<device>.md and .json when it ends, so that a run cut
                short leaves what it had. The exit code is 0 only if every claim held. Last, where
                bitsandbytes is installed, 1.5B in the memory of a card of 24 GB, and what is not
                the default yet.
Not here        what is measured: ours.py; comparisons on a CPU: __main__.py.
Run it alone    python -m bench gpu --device cpu --quick       every part, tiny, without a GPU
Where to fork   a part is a function of (args, size) that yields rows of (measure, value) and calls
                `claim`; PARTS is their order.
"""
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench import ours, peers
from bench.fits import CARD_BYTES, LONGEST, PROMPT
from bench.report import ROOT, device_name, report, table
from model import Qwen2
from plumbing import engine, fused_head
from plumbing.engine import sampler_for
from plumbing.files import read_rows
from plumbing.hub import TINY, checked_config, is_out_of_memory
from plumbing.metrics import peak_memory_gib
from plumbing.run import groups_that_fit, groups_that_run, peak_bytes
from rollout import choose, flat_batch, generate, n_draws

CARD = SimpleNamespace(
    shape="qwen2.5-0.5b", large="qwen2.5-1.5b", rows=(64, 256, 1024), new_tokens=128, prompt=PROMPT,
    updates=((16, 4, 128), (64, 8, 256)), tests=["tests/test_cuda.py"], first_tokens=8192,
    flags="--validation-problems 16 --prompts-per-step 16 --checkpoint-every 2 --test-problems 8 "
          "--max-new-tokens 128")
TINY_SIZE = SimpleNamespace(
    shape="0.8m", large="0.8m", rows=(4, 8), new_tokens=8, prompt=12, updates=((2, 2, 8),),
    tests=["tests/test_as_on_cuda.py", "-k", "captured"], first_tokens=88,
    flags="--validation-problems 4 --prompts-per-step 2 --group-size 2 --minibatches 1 "
          "--checkpoint-every 2 --test-problems 2 --max-new-tokens 8")


def accept(args):
    """Every part in turn; ends the process with 1 where a claim did not hold or a part failed."""
    size, began = TINY_SIZE if args.quick else CARD, time.perf_counter()
    args.peers = ["trl"] * bool(importlib.util.find_spec("trl"))
    name = "gpu-" + re.sub(r"\W+", "-", device_name(args) if args.device != "cpu" else "cpu")
    rows, claims = [], []
    for part in PARTS:
        spent = time.perf_counter() - began
        if spent > args.limit_s:
            rows.append((part.__name__, f"left out: {spent:.0f} s are over"))
            claims.append((f"there is time for {part.__name__}", False))
        else:
            print(f"{spent:5.0f} s  {part.__doc__.splitlines()[0]}", flush=True)
            try:
                for row in part(args, size, lambda *claim: claims.append(claim)):
                    rows.append(row)
            except Exception as e:  # the other parts still say what they find
                print(f"         {part.__name__} failed: {e!r}", file=sys.stderr)
                claims.append((f"{part.__name__} runs ({type(e).__name__}: {str(e)[:200]})", False))
        gc.collect()  # a trainer's cycles
        if args.device != "cpu":
            torch.cuda.empty_cache()
        rows_now = [("seconds in all", f"{time.perf_counter() - began:.0f}"), *rows]
        text = (table(["claim", "holds"], [(words, "yes" if held else "**no**")
                                           for words, held in claims])
                + "\n\n" + table([f"{size.shape}, random weights", "measured"], rows_now))
        report(name, args, text, {"claims": claims, "measures": rows_now}, quiet=True)
    print(f"\n{text}\n\n{args.out / name}.md")
    sys.exit(0 if all(held for _, held in claims) else 1)


# ------------------------------------------------------------------ what is right

def tests(args, size, claim):
    """The tests of what only CUDA can show"""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *size.tests], cwd=ROOT,
                          capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    claim(f"the tests of {size.tests[0]} pass", done.returncode == 0 and "passed" in last)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    yield f"`pytest {' '.join(size.tests)}`", last.strip("= ")


def model_folder(folder, size):
    """A folder of random weights whose tokenizer has as many tokens as Qwen2.5's: the embedded
    model's, and words that no text holds."""
    shown = ours.make_model(size.shape)
    config = checked_config({**shown.config, "max_position_embeddings": 1024})
    model, tiny = Qwen2(config), Qwen2.from_pretrained("tiny")
    model.load_state_dict(shown.state_dict())
    tokenizer = json.loads(tiny.tokenizer_files["tokenizer.json"])
    words = tokenizer["model"]["vocab"]
    for i in range(len(words), min(ours.REAL_IDS, config["vocab_size"])):
        words[f"w{i}"] = i
    model.tokenizer_files = {**tiny.tokenizer_files,
                             "tokenizer.json": json.dumps(tokenizer).encode()}
    model.stop_ids = tiny.stop_ids
    model.save_pretrained(folder)
    return folder


def whole_run(args, size, claim):
    """train.py from start to end, stopped after half of its steps and resumed"""
    with tempfile.TemporaryDirectory() as place:
        model = model_folder(Path(place) / "model", size) if not args.quick else TINY
        begin = [sys.executable, str(ROOT / "train.py")]
        flags = ["--model", str(model), "--data", "tiny", "--device", args.device, "--dtype",
                 args.dtype, "--alpha", "0.1", "--reward", "noise", "--steps", "4",
                 "--validate-every", "2", "--warmup-steps", "0", "--name", "run",
                 *size.flags.split()]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        began, said = time.perf_counter(), ""
        for some in ([*flags, "--stop-after", "2"],
                     ["--resume", "--name", "run", "--checkpoint-activations"]):
            done = subprocess.run([*begin, *some], cwd=place, env=env, capture_output=True,
                                  text=True)
            said += done.stdout
            if done.returncode:
                print(done.stdout[-1000:], done.stderr[-3000:], file=sys.stderr)
                claim("train.py trains, stops and resumes", False)
                return
        rows = read_rows(Path(place) / "runs" / "run" / "metrics.jsonl")
        numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
        claim("train.py trains, stops and resumes, its metrics finite",
              [row["step"] for row in rows] == [0, 1, 2, 3, 4] and all(map(math.isfinite, numbers))
              and rows[-1]["gradient_norm"] > 0)
        claim("the sampler's log-probs are the trainer's, to 0.05 nats in the mean",
              max(row["sampler_gap_mean"] for row in rows[1:]) < 0.05)
        claim("it tests base and best at the end", "greedy strict accuracy" in said)
        best = Path(place) / "runs" / "run" / "best"
        claim("best/ loads", Qwen2.from_pretrained(best).stop_ids != [])
        last = rows[-1]
        yield "train.py, 4 steps, validation, checkpoints, test, two starts", (
            f"{time.perf_counter() - began:.0f} s")
        for key in ("sample_s", "update_s", "peak_memory_gib", "sampler_gap_mean",
                    "sampler_gap_p99"):
            yield f"its last step: `{key}`", f"{last[key]:.4g}"
        for key in ("noise_floor_0.1", "noise_floor_0.2"):
            yield f"its first step: `{key}`", f"{rows[1][key]:.1%}"
        if chosen := re.search(r"micro-batches of ([\d,]+) tokens", said):
            yield "its --tokens-per-microbatch, chosen by memory", chosen[1]


# ------------------------------------------------------------------ how fast, how much memory

class CountOperations(TorchDispatchMode):
    """On a CPU, in the place of kernels: operations that torch dispatches."""
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def kernels(function, device, times=1):
    """(kernels, their milliseconds or None) of one of `times` calls."""
    if device == "cpu":
        with CountOperations() as counted:
            function()
        return counted.n, None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            function()
        torch.cuda.synchronize()
    took = [e.device_time for e in profiled.events()
            if e.device_type == torch.autograd.DeviceType.CUDA]
    return round(len(took) / times), sum(took) / times / 1e3


def in_words(n, ms):
    return f"{n:,} operations" if ms is None else f"{n:,} kernels, {ms:.2f} ms of them"


def median_s(function, device, n=3):
    return statistics.median(ours.timed(function, torch.device(device))[0] for _ in range(n))


def decode(args, size, claim):
    """Decoding at several numbers of rows, by the faster step where it passes its check"""
    model = ours.make_model(size.shape, args.device, args.dtype)
    for rows in size.rows:
        P, G, T = rows // 4, 4, size.new_tokens
        prompts = ours.make_prompts(P, model.config["vocab_size"], length=size.prompt)
        work = (model, prompts, G, T, 0.8, 0.9)
        first, _ = ours.timed(lambda: generate(*work, max_rows=rows), model.device)
        took = median_s(lambda: generate(*work, max_rows=rows, step=1), args.device)
        with torch.inference_mode():
            sampler = sampler_for(*work[:4], rows, n_draws(0.9),
                                  partial(choose, temperature=0.8, top_p=0.9))
            sampler.resize(rows)

            def step():  # of rows that have ended, which cost what others do
                sampler.step_or_replay(T)
            step()  # captured, where it has not been
            counted, n = kernels(step, args.device, times=4), 50
            alone = median_s(lambda: [step() for _ in range(n)], args.device) / n
        yield (f"decode, {rows} rows × {T} tokens after prompts of {size.prompt}",
               f"{rows * T / took:,.0f} tokens/s ({took / T * 1e3:.2f} ms a token); "
               f"the first time {first:.1f} s")
        yield f"its step alone, {rows} rows", (
            f"{rows / alone:,.0f} tokens/s ({alone * 1e3:.2f} ms); {in_words(*counted)}")
        model.kept_samplers.clear()


def decode_plain(args, size, claim):
    """Decoding by the plain step, beside the faster one of plumbing/fast_decode.py"""
    model, gaps, ran = ours.make_model(size.shape, args.device, args.dtype), [], []
    prompts = ours.make_prompts(size.rows[0] // 4, model.config["vocab_size"], length=size.prompt)
    for fast in (True, False):
        with mock.patch.object(engine, "FAST", fast):
            rollout = generate(model, prompts, 4, size.new_tokens, 0.8, 0.9)
        ran += [sampler.fast == fast for sampler in model.kept_samplers.values()]
        model.kept_samplers.clear()
        logp_M, _ = model.completion_log_probs(
            flat_batch(prompts, rollout.completions, args.device), 0.8)
        sampled = [x for group in rollout.logps for logps in group for x in logps]
        gaps.append((logp_M.cpu() - torch.tensor(sampled)).abs().mean().item())
    fast_gap, plain_gap = gaps
    claim("the faster step runs, as near the trainer as the plain one, times 1.2",
          all(ran) and fast_gap <= 1.2 * plain_gap + 1e-5)
    yield "gap to the trainer, plain and faster step", f"{plain_gap:.4f}, {fast_gap:.4f} nats"
    with mock.patch.object(engine, "FAST", False):
        for what, value in decode(args, size, claim):
            yield "plain: " + what, value


def work_of(args, size, P, G, T, model, tokens, **flags):
    prompts = ours.make_prompts(P, model.config["vocab_size"], length=size.prompt)
    s = ours.settings(group_size=G, max_new_tokens=T, temperature=0.8, top_p=0.9,
                      rollout_rows=min(P * G, 512), device=args.device, prompts_per_step=P,
                      tokens_per_microbatch=tokens, **flags)
    return ours.make_run(model, s), prompts, s


def update(args, size, claim):
    """The update: speed, kernels, memory; and the largest micro-batch that fits"""
    model = ours.make_model(size.shape, args.device, args.dtype)
    flops, copy = ours.machine(model.device, model.compute_dtype)
    yield "matrix product, copy (read and written)", (
        f"{flops / 1e9:,.0f} GFLOP/s, {copy / 1e9:,.0f} GB/s")
    group = size.prompt + 4 * size.new_tokens
    tokens = yield from largest_micro_batch(args, size, model, group, claim)
    for P, G, T in size.updates:
        run, prompts, s = work_of(args, size, P, G, T, model, tokens)
        result = ours.sampling(run, prompts, s)
        model.kept_samplers.clear()
        n = ours.updating(run, result, s)
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        took = median_s(lambda: ours.updating(run, result, s), args.device)
        peak = peak_memory_gib(args.device)
        counted, ms = kernels(lambda: ours.updating(run, result, s), args.device)
        work = 3 * s.epochs * ours.forward_flops(model, n, P * G * T)
        yield (f"update, {P} × {G} × {T} tokens, {s.epochs} epochs of {n:,} packed tokens",
               f"{took:.3f} s, {s.epochs * n / took:,.0f} tokens/s, {work / took / flops:.1%} of "
               f"the matrix rate, peak {peak:.1f} GiB")
        yield "its kernels an epoch", in_words(
            counted // s.epochs, ms and ms / s.epochs)


def update_fused(args, size, claim):
    """The update with all of plumbing/fused_head.py; its gradients beside those without"""
    model, found = ours.make_model(size.shape, args.device, args.dtype), []
    prompts = ours.make_prompts(4, model.config["vocab_size"], length=size.prompt)
    batch = flat_batch(prompts, [[prompt[:size.new_tokens]] * 4 for prompt in prompts],
                       args.device)
    for on in (False, True):
        model.zero_grad()
        with mock.patch.object(fused_head, "ON", on):
            logp_M, entropy_M = model.accumulate_gradients(
                batch, 0.8, lambda logp, chunk: logp.square().sum(), entropy=True)
        found.append([logp_M, entropy_M, *(p.grad for p in model.parameters())])
    worst = torch.stack([(a - b).norm() / a.norm() for a, b in zip(*found)]).max().item()
    claim("a fused head gives the other's log-probs, entropies and gradients, to 1 %", worst < 0.01)
    yield "log-probs, entropies and gradients of a fused head: at most apart", f"{worst:.1e}"
    del found, model, batch
    with mock.patch.object(fused_head, "ON", True):
        for what, value in update(args, size, claim):
            yield "fused head: " + what, value


def bytes_of_groups(args, size, model, n):
    """The peak of a micro-batch of n groups, above what was there; 0 on a CPU, whose peak never
    falls."""
    batch = flat_batch([[1] * size.prompt] * n, [[[1] * size.new_tokens] * 4] * n, args.device)
    if args.device == "cpu":
        model.accumulate_gradients(batch, 0.8, lambda logp, chunk: logp.sum())
        return 0
    torch.cuda.empty_cache()
    return peak_bytes(model, batch, 0.8)


def groups_by_memory(args, bytes_of, limit=math.inf):
    """How many groups train.py would put in a micro-batch, were there `limit` bytes in all."""
    bytes_of(1)  # from now on the gradients are there
    if args.device == "cpu":
        return 4
    torch.cuda.empty_cache()
    free_bytes = min(torch.cuda.mem_get_info(args.device)[0],
                     limit - torch.cuda.memory_reserved(args.device))
    return max(groups_that_fit(free_bytes, bytes_of(1), bytes_of(2)), 1)


def largest_micro_batch(args, size, model, group, claim):
    """Yields rows; returns the tokens that train.py would choose here."""
    bytes_of = partial(bytes_of_groups, args, size, model)
    chosen = groups_by_memory(args, bytes_of)
    try:
        bytes_of(chosen)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    claim("the micro-batch chosen by memory runs", fits)
    yield "micro-batch chosen by memory, beside weights and gradients", (
        f"{chosen * group:,} tokens")
    most, peak, n = 0, 0.0, max(size.first_tokens // group, 1)
    while n <= 2 * chosen:  # each costs as much as all before together
        try:
            peak = bytes_of(n) / 2**30
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            break
        most, n = n, 2 * n
    model.zero_grad()
    yield "largest micro-batch that fits, by doubling", f"{most * group:,} tokens, {peak:.1f} GiB"
    return chosen * group


def paper_step(args, size, claim):
    """One rollout and its two updates, the paper's settings; TRL beside it where it is installed"""
    model = ours.make_model(size.shape, args.device, args.dtype)
    P, G, T = size.updates[0]
    run, prompts, s = work_of(args, size, P, G, T, model, tokens=2**15)
    mine = []

    def cycle():
        sampled, result = ours.timed(lambda: ours.sampling(run, prompts, s), model.device)
        mine.append((sampled, sampled + ours.timed(lambda: ours.updating(run, result, s),
                                                   model.device)[0]))
    theirs = []
    if args.peers:
        with tempfile.TemporaryDirectory() as folder:
            theirs = peers.trl_rounds(peers.hf_model(model), prompts, G, T, 4, cycle, folder, 0.8,
                                      0.9, cache="dynamic", threads=args.threads)[1:]
    else:
        for _ in range(4):
            cycle()
    sampled, whole = (statistics.median(x) for x in zip(*mine[1:]))
    name = f"{P} × {G} × {T} tokens, two updates"
    yield f"step, {name}", f"{whole:.3f} s, of which sampling {sampled:.3f} s"
    if theirs:
        yield "the same with TRL", (
            f"{statistics.median(t['cycle'] for t in theirs):.3f} s, of which sampling "
            f"{statistics.median(t['sample'] for t in theirs):.3f} s")
    if args.device != "cpu":
        yield "memory reserved in this process, at most", (
            f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")


def small_card(args, size, claim):
    """The larger model with 8-bit AdamW in the memory of a card of 24 GB, as README.md has it"""
    what, on_gpu = f"{size.large} within {CARD_BYTES / 2**30:.0f} GiB", args.device != "cpu"
    if not importlib.util.find_spec("bitsandbytes"):
        yield what, "left out: there is no package bitsandbytes here"
        return
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        all_bytes = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(CARD_BYTES / all_bytes, 1.0))
    try:
        P, G, T = size.updates[0]
        model, seconds = ours.make_model(size.large, args.device, args.dtype), []
        model.checkpoint_activations = True
        run, prompts, s = work_of(args, size, P, G, T, model, None, optimizer="adamw8bit")
        others = ours.make_prompts(2 * P, model.config["vocab_size"], length=LONGEST - 1)
        for some in (prompts, others):  # the samplers of training and of validation
            generate(model, some, G, T, 0.8, 0.9, max_rows=P * G)
        bytes_of = partial(bytes_of_groups, args, size, model)
        bytes_of(1)
        run.optimizer.step()  # from now on its state is there
        n = groups_that_run(bytes_of, min(groups_by_memory(args, bytes_of, CARD_BYTES), P))
        run.optimizer.zero_grad()
        s.tokens_per_microbatch = n * (size.prompt + G * T)
        for _ in range(2):
            sampled, result = ours.timed(lambda: ours.sampling(run, prompts, s), model.device)
            updated, _ = ours.timed(lambda: ours.updating(run, result, s), model.device)
            seconds.append(f"{sampled + updated:.2f} s, of which sampling {sampled:.2f} s")
        claim(f"{what} makes two steps, gradients and weights finite",  # or the update had raised
              all(p.isfinite().all().item() for p in model.parameters()))
        yield f"{what}: steps 1 and 2, {P} × {G} × {T} tokens, two updates", "; ".join(seconds)
        yield "its micro-batches, chosen by memory", f"{s.tokens_per_microbatch:,} tokens"
        if on_gpu:
            yield "its memory, at most: in tensors, reserved", (
                f"{peak_memory_gib(args.device):.2f} GiB, "
                f"{torch.cuda.max_memory_reserved(args.device) / 2**30:.2f} GiB")
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


PARTS = (tests, whole_run, decode, decode_plain, update, paper_step, small_card, update_fused)

"""Speed and memory beside the peers: python -m bench sample|update|step|memory|scale|gpu [flags]

What it does    Runs ours and the peers in turns, in one process, on the same weights, prompts,
                lengths and threads; prints a table of medians and writes it, with every round, to
                bench/results/. Peak memory is measured in a fresh process for each contender.
Not here        our work (ours.py), the peers' (peers.py; it needs bench/requirements.txt).
Run it alone    python -m bench step --shape 24.9m --peers trl
                python -m bench step --device cuda --shape qwen2.5-0.5b      the paper's step
                python -m bench gpu                  does all of it work on this GPU, and how fast
Where to fork   a shape is one line in ours.SHAPES, a contender one entry in a dict below.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from bench import gpu, ours, peers
from bench.report import ROOT, needed, ratio, report, table
from plumbing.hub import keep_freed_memory
from plumbing.metrics import peak_memory_gib
from rollout import flat_batch

RESULTS = ROOT / "bench" / "results"
SLOTS = 64  # rows in flight on ragged work; four sequences for each
COMMANDS = {}


def command(function):
    COMMANDS[function.__name__] = function
    return function


# ------------------------------------------------------------------ rounds, tables, files

def rounds_of(contenders, n, device):
    """Run each contender once a round, after one round unmeasured: {name: list of seconds}."""
    seconds = {name: [] for name in contenders}
    names = list(contenders)
    for i in tqdm(range(n + 1), desc="rounds", leave=False):
        for name in names[i % len(names):] + names[:i % len(names)]:  # each goes first in turn
            took = ours.timed(contenders[name], device)[0]
            if i:
                seconds[name].append(took)
    return seconds


def in_a_fresh_process(args, contender, **more):
    """Seconds and memory of one contender alone, as its line of JSON says; None if out of memory.
    """
    flags = {key: getattr(args, key) for key in (
        "device", "dtype", "threads", "shape", "prompts", "group_size", "new_tokens",
        "prompt_length", "rows", "temperature", "top_p", "trl_batch",
        "trl_cache")} | more
    done = subprocess.run([sys.executable, "-m", "bench", "alone", contender, json.dumps(flags)],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode == -9 or "not enough memory" in done.stderr or "OutOfMem" in done.stderr:
        return None  # it does not fit on this machine
    if done.returncode:
        sys.exit(f"error: {contender} {flags} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fixed_work(args, **more):
    model = ours.make_model(args.shape, args.device, args.dtype)
    s = ours.settings(group_size=args.group_size, max_new_tokens=args.new_tokens,
                      temperature=args.temperature, top_p=args.top_p, rollout_rows=args.rows,
                      device=args.device, **more)
    prompts = ours.make_prompts(args.prompts, model.config["vocab_size"], length=args.prompt_length)
    return model, ours.make_run(model, s), prompts, s


# ------------------------------------------------------------------ the commands

@command
def sample(args):
    """Sampling alone: fixed lengths beside generate, then ragged lengths with refilled places."""
    model, run, prompts, s = fixed_work(args)
    device, n_tokens = model.device, args.prompts * args.group_size * args.new_tokens
    contenders = {"ours": lambda: ours.sampling(run, prompts, s)}
    if args.peers:
        network = peers.hf_model(model)
        for cache in ("dynamic", "static"):
            contenders[f"generate, {cache} cache"] = lambda cache=cache: peers.hf_generate(
                network, prompts, args.group_size, args.new_tokens, args.temperature, args.top_p,
                cache)
    seconds = rounds_of(contenders, args.rounds, device)
    flops = ours.machine(device, model.compute_dtype)[0]
    work = ours.forward_flops(model, n_tokens + sum(map(len, prompts)), n_tokens)
    rows = [[name, f"{n_tokens / statistics.median(t):,.0f}", f"{ratio(t, seconds['ours']):.2f}",
             f"{work / statistics.median(t) / flops:.0%}"] for name, t in seconds.items()]
    text = (f"Sampling, {args.shape}: {args.prompts} prompts × {args.group_size} samples × "
            f"{args.new_tokens} tokens, temperature {args.temperature}, top-p {args.top_p}\n\n"
            + table(["sampler", "tokens/s", "time ÷ ours",
                     f"useful FLOP/s ÷ {flops / 1e9:,.0f} GFLOP/s measured"], rows))

    n = 4 * SLOTS
    prompts = ours.make_prompts(n // 8, model.config["vocab_size"])
    lengths = ours.ragged_lengths(n)
    mean = round(sum(lengths) / n)
    s.group_size, s.max_new_tokens, s.rollout_rows = 8, max(lengths), SLOTS
    contenders = {f"ours, all {mean} tokens": lambda: ours.sampling(run, prompts, s, [mean] * n),
                  "ours, ragged": lambda: ours.sampling(run, prompts, s, lengths)}
    kept = {f"ours, all {mean} tokens": mean * n, "ours, ragged": sum(lengths)}
    if args.peers:
        contenders["generate, ragged"] = lambda: peers.hf_ragged(network, prompts, 8, lengths,
                                                                 SLOTS, "static")
        kept["generate, ragged"] = sum(lengths)
    ragged = rounds_of(contenders, max(args.rounds // 3, 1), device)
    base, first = kept[f"ours, all {mean} tokens"], ragged[f"ours, all {mean} tokens"]
    rows = [[name, f"{kept[name] / statistics.median(t):,.0f}",
             f"{kept[name] / base * ratio(first, t):.2f}"] for name, t in ragged.items()]
    text += (f"\n\nRagged lengths, {args.shape}: {n} sequences of 8…256 tokens through {SLOTS} "
             "places (TRL samples with this generate)\n\n"
             + table(["sampler", "kept tokens/s", "÷ ours at fixed length"], rows))
    report(f"sample-{args.shape}-{device.type}", args, text,
           {"seconds": seconds, "ragged_seconds": ragged, "matmul_flops": flops})


@command
def update(args):
    """The update alone: what the objective costs, and how near the machine's ceiling it runs."""
    model, run, prompts, s = fixed_work(args)
    result = ours.sampling(run, prompts, s)
    packed, device = {}, model.device
    start = [p.detach().clone() for p in model.parameters()]

    def one(objective):
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), start)  # the same work for each
        s.objective = objective
        vars(s).update(alpha=0.1, epsilon_low=0.2, epsilon_high=0.2)
        packed[objective] = ours.updating(run, result, s)
    names = ("pspo", "clip", "noclip")
    seconds = rounds_of({name: lambda name=name: one(name) for name in names}, args.rounds, device)
    flops = ours.machine(device, model.compute_dtype)[0]
    n_scored = args.prompts * args.group_size * args.new_tokens
    work = 3 * s.epochs * ours.forward_flops(model, packed["pspo"], n_scored)
    memory = {}
    for name in names:
        with ours.LiveBytes() as live:
            one(name)
        memory[name] = live.peak
    rows = [[name, f"{s.epochs * packed[name] / statistics.median(seconds[name]):,.0f}",
             f"{ratio(seconds[name], seconds['noclip']):.3f}",
             f"{memory[name] / 2**20:,.2f}", f"{memory[name] / memory['noclip']:.4f}",
             f"{work / statistics.median(seconds[name]) / flops:.0%}"] for name in names]
    text = (f"Update, {args.shape}: {args.prompts} prompts × {args.group_size} completions × "
            f"{args.new_tokens} tokens, 2 epochs\n\n"
            + table(["objective", "packed tokens/s", "time ÷ noclip", "live tensors' peak, MiB",
                     "÷ noclip", f"FLOP/s ÷ {flops / 1e9:,.0f} GFLOP/s measured"], rows))
    report(f"update-{args.shape}-{device.type}", args, text,
           {"seconds": seconds, "live_peak_bytes": memory, "matmul_flops": flops})


@command
def step(args):
    """The whole cycle, one rollout and two updates, beside TRL's GRPOTrainer."""
    model, run, prompts, s = fixed_work(args)
    device, mine = model.device, []

    def cycle():
        sampled, result = ours.timed(lambda: ours.sampling(run, prompts, s), device)
        updated, n_packed = ours.timed(lambda: ours.updating(run, result, s), device)
        with_old, _ = ours.timed(lambda: ours.updating(run, result, s, True), device)
        mine.append({"sample": sampled, "cycle": sampled + updated, "packed": n_packed,
                     "cycle with old pass": sampled + with_old})
    theirs = []
    if "trl" in args.peers:
        with tempfile.TemporaryDirectory() as folder:
            theirs = peers.trl_rounds(peers.hf_model(model), prompts, args.group_size,
                                      args.new_tokens, args.rounds + 1, cycle, folder,
                                      args.temperature, args.top_p, cache=args.trl_cache,
                                      device_batch=args.trl_batch, threads=args.threads)[1:]
    else:
        for _ in tqdm(range(args.rounds + 1), desc="rounds", leave=False):
            cycle()
    mine = mine[1:]
    n_tokens = args.prompts * args.group_size * args.new_tokens
    flops, copy = ours.machine(device, model.compute_dtype)
    prompt_tokens = sum(map(len, prompts))
    work = (ours.forward_flops(model, n_tokens + prompt_tokens, n_tokens)
            + 3 * s.epochs * ours.forward_flops(model, mine[0]["packed"], n_tokens))

    def line(name, seconds, against):
        return [name, f"{statistics.median(seconds):.3f}",
                f"{n_tokens / statistics.median(seconds):,.0f}",
                f"{ratio(against, seconds):.2f}" if against else "",
                f"{work / statistics.median(seconds) / flops:.0%}" if "cycle" in name else ""]
    rows = [line(f"ours, {key}", [m[key] for m in mine],
                 [t["sample" if key == "sample" else "cycle"] for t in theirs])
            for key in ("sample", "cycle", "cycle with old pass")]
    rows += [line(f"TRL, {key}", [t[key] for t in theirs], []) for key in ("sample", "cycle")
             if theirs]
    text = (f"One rollout and two updates, {args.shape}: {args.prompts} prompts × "
            f"{args.group_size} completions × {args.new_tokens} tokens\n\n"
            + table(["", "seconds", "new tokens/s", "TRL's time ÷ ours",
                     f"useful FLOP/s ÷ {flops / 1e9:,.0f} GFLOP/s"], rows))
    report(f"step-{args.shape}-{device.type}", args, text,
           {"ours": mine, "trl": theirs, "trl_batch": args.trl_batch, "trl_cache": args.trl_cache,
            "matmul_flops": flops, "copy_bytes_per_s": copy})


@command
def memory(args):
    """Peak memory of the cycle beside TRL's; time and peak of the head on a large vocabulary."""
    contenders = ["step"] + ["trl_step"] * ("trl" in args.peers)
    peaks = {name: in_a_fresh_process(args, name) for name in contenders}
    above = {name: p["peak_gib"] - p["start_gib"] for name, p in peaks.items()}
    rows = [[name, f"{p['peak_gib']:.2f}", f"{peaks['step']['peak_gib'] / p['peak_gib']:.2f}",
             f"{above[name]:.2f}", f"{above['step'] / above[name]:.2f}"]
            for name, p in peaks.items()]
    text = (f"Peak memory of three cycles, {args.shape} (on a CPU that of the process)\n\n"
            + table(["", "peak GiB", "ours ÷ it", "above its imports", "ours ÷ it"], rows))
    heads = ["head", "full_head"] + ["trl_head"] * ("trl" in args.peers)
    data = {"peaks": peaks}
    for n in args.head_tokens:
        runs = {name: [] for name in heads}
        for _ in range(max(args.rounds // 2, 1)):
            for name in heads:
                if None not in runs[name]:
                    runs[name].append(in_a_fresh_process(args, name, n_tokens=n))
        data[f"head of {n}"] = runs
        fitting = {name: own for name, own in runs.items() if None not in own}
        seconds = {name: [r["seconds"] for r in own] for name, own in fitting.items()}
        above = {name: statistics.median(r["peak_gib"] - r["start_gib"] for r in own)
                 for name, own in fitting.items()}
        full = "full_head" in fitting
        rows = [[name, f"{statistics.median(seconds[name]):.2f}",
                 f"{ratio(seconds[name], seconds['full_head']):.2f}" if full else "",
                 f"{above[name]:.2f}", f"{above[name] / above['full_head']:.2f}" if full else ""]
                if name in fitting else [name, "out of memory", "", "", ""] for name in runs]
        text += (f"\n\nHead of 151,936 × 896 with its gradient, {n:,} completion tokens\n\n"
                 + table(["", "seconds", "÷ full logits", "peak GiB above weights",
                          "÷ full logits"], rows))
    report(f"memory-{args.shape}-{torch.device(args.device).type}", args, text, data)


@command
def scale(args):
    """Cost against size, each size in a fresh process: one figure."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    base = dict(rows=64, new_tokens=64, group_size=8, prompt_length=104)
    axes = {"rows": [8, 16, 32, 64, 128, 256, 512], "new_tokens": [16, 32, 64, 128, 256],
            "group_size": [2, 4, 8, 16, 32], "prompt_length": [32, 64, 128, 256, 512]}
    points = {name: [] for name in axes}
    for name, values in axes.items():
        for value in tqdm(values, desc=name, leave=False):
            size = {**base, name: value}
            size["prompts"] = max(size["rows"] // size["group_size"], 1)
            points[name].append({**size, **in_a_fresh_process(args, "step", **size)})
    figure, panels = plt.subplots(2, 4, figsize=(14, 6), layout="constrained", sharey="row")
    for column, (name, found) in zip(panels.T, points.items()):
        x = [p[name] for p in found]
        for key, style in (("sample_s", "o-"), ("update_s", "s--")):
            column[0].plot(x, [p[key] for p in found], style, label=key.split("_")[0])
        column[1].plot(x, [p["peak_gib"] for p in found], "d-", color="0.4", label="peak")
        column[0].set(xscale="log", yscale="log", title=name.replace("_", " "))
        column[1].set(xscale="log", xlabel=name.replace("_", " "), ylim=(0, None))
        for axis in column:
            axis.set_xticks(x, x, minor=False)
            axis.minorticks_off()
    panels[0, 0].set_ylabel("seconds per rollout")
    panels[1, 0].set_ylabel("peak memory, GiB")
    panels[0, 0].legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / f"scale-{args.shape}-{torch.device(args.device).type}.png", dpi=110)
    plt.close(figure)
    rows = [[name, p[name], f"{p['sample_s']:.2f}", f"{p['new_tokens'] * p['rows']:,}",
             f"{p['update_s']:.2f}", f"{p['packed']:,}", f"{p['peak_gib']:.2f}"]
            for name, found in points.items() for p in found]
    text = (f"Cost against size, {args.shape}; the rest stays at {base}\n\n"
            + table(["varied", "value", "sample s", "new tokens", "update s", "packed tokens",
                     "peak GiB"], rows))
    report(f"scale-{args.shape}-{torch.device(args.device).type}", args, text, {"points": points})


COMMANDS["gpu"] = gpu.accept


# ------------------------------------------------------------------ one contender in its process

def alone(contender, flags):
    """What `in_a_fresh_process` starts: a line of JSON with seconds and peak memory."""
    f = argparse.Namespace(**flags)
    torch.set_num_threads(f.threads)
    out = {}
    if contender.endswith("head"):
        model = ours.make_model("head", f.device, f.dtype)
        prompt, n = [1] * 4, f.n_tokens
        batch = flat_batch([prompt], [ours.make_prompts(n // 256, 1000, length=256)], f.device)
        weight = torch.linspace(-1, 1, n, device=f.device)

        def loss(logp, chunk):
            return (weight[chunk] * logp).sum()
        scored = {"head": lambda: model.accumulate_gradients(batch, 0.8, loss),
                  "full_head": lambda: peers.full_logits(model, batch, 0.8, loss),
                  "trl_head": lambda: peers.trl_head(model, batch, 0.8, loss)}[contender]
        if contender == "trl_head":
            import trl.trainer.utils  # noqa: F401   so that its imports are not in the difference
        out["start_gib"] = peak_memory_gib(f.device)
        first = ours.timed(scored, model.device)[0]
        model.zero_grad()
        out["seconds"] = min(first, ours.timed(scored, model.device)[0])
    elif contender == "trl_step":
        from datasets import Dataset  # noqa: F401   they are loaded on first use
        from trl import GRPOConfig, GRPOTrainer  # noqa: F401
        out["start_gib"] = peak_memory_gib(f.device)
        model, _, prompts, _ = fixed_work(f)
        network = peers.hf_model(model)
        del model, _
        with tempfile.TemporaryDirectory() as folder:
            peers.trl_rounds(network, prompts, f.group_size, f.new_tokens, 3, lambda: None, folder,
                             f.temperature, f.top_p, cache=f.trl_cache, device_batch=f.trl_batch,
                             threads=f.threads)
    else:
        out["start_gib"] = peak_memory_gib(f.device)
        model, run, prompts, s = fixed_work(f, objective=flags.get("objective", "pspo"))
        for _ in range(3):
            out["sample_s"], result = ours.timed(lambda: ours.sampling(run, prompts, s),
                                                 model.device)
            out["update_s"], out["packed"] = ours.timed(lambda: ours.updating(run, result, s),
                                                        model.device)
    print(json.dumps({**out, "peak_gib": peak_memory_gib(f.device)}))


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m bench", allow_abbrev=False,
                                     description="Speed and memory beside the peers.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("command", choices=list(COMMANDS), help="; ".join(
        f"{name}: {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items()))
    add("--shape", choices=[name for name in ours.SHAPES if name != "head"], default="0.8m")
    add("--device", default=None, help="cpu or cuda (cpu; of gpu: cuda)")
    add("--quick", action="store_true", help="of gpu: every part, tiny, to see that all of it runs")
    add("--limit-s", type=float, default=480, help="of gpu: seconds after which no part begins")
    add("--dtype", choices=["fp32", "tf32", "bf16"], default=None, help="fp32; on cuda bf16")
    add("--peers", default="", help="comma-separated: hf, trl; none by default")
    add("--rounds", type=int, default=5, help="measured, after one that is not")
    add("--prompts", type=int, default=None, help="prompts per rollout; 8, on cuda 16")
    add("--group-size", type=int, default=None, help="samples per prompt; 8, on cuda 4")
    add("--new-tokens", type=int, default=None, help="tokens per completion; 64, on cuda 128")
    add("--prompt-length", type=int, default=None, help="of all prompts; without it, GSM8K's mix")
    add("--rows", type=int, default=512, help="places for running rows")
    add("--temperature", type=float, default=1.0, help="of sampling and scoring")
    add("--top-p", type=float, default=1.0, help="nucleus mass")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--trl-batch", type=int, default=None, help="TRL's per-device batch; default all rows")
    add("--trl-cache", choices=["static", "dynamic"], default="static", help="of TRL's generate")
    add("--head-tokens", type=int, nargs="*", default=[2048, 8192], help="of memory's head")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def main(argv=None):
    keep_freed_memory()
    parser = make_parser()
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if args.command == "gpu" else "cpu")
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch finds no GPU here"
                     + "; a dry run: --device cpu --quick" * (args.command == "gpu"))
    args.peers = [name for name in args.peers.split(",") if name]
    if unknown := set(args.peers) - {"hf", "trl"}:
        parser.error(f"--peers has {', '.join(sorted(unknown))}; expected hf, trl or both")
    for package in needed(args.peers):
        try:
            __import__(package)
        except ImportError:
            parser.error(f"--peers: there is no package {package} here; it comes with "
                         "pip install -r bench/requirements.txt")
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    for name, defaults in {"prompts": (8, 16), "group_size": (8, 4),
                           "new_tokens": (64, 128)}.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[on_gpu])
    torch.set_num_threads(args.threads)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:
        alone(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()

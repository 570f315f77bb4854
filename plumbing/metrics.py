"""What a step of training writes into metrics.jsonl; docs/metrics.md says what each one is.

What it does    means, spreads and speeds of the rollout and of the update; the noise floor of bf16.
Not here        the ratios' own figures (objectives.ratio_diagnostics); writing (plumbing/run.py).
"""
import resource
import sys
import time
from pathlib import Path

import torch

from objectives import quantile, ratio_diagnostics
from plumbing import parallel


def rollout_metrics(rollout, rows, reward_PG):
    """Of what was sampled and graded."""
    flat = [row for group in rows for row in group]
    finished = [row["n_tokens"] for row in flat if row["finished"]]
    P = len(reward_PG)
    return {
        "reward_mean": reward_PG.mean().item(),
        "reward_se": reward_PG.mean(1).std().item() / P**0.5 if P > 1 else 0.0,
        "accuracy": mean(row["flexible"] for row in flat),
        "format_rate": mean(row["format"] for row in flat),
        "length_mean": rollout.n_tokens / len(flat),
        "length_finished": mean(finished), "truncated": 1 - len(finished) / len(flat),
        "equal_groups": (reward_PG == reward_PG[:, :1]).all(1).double().mean().item(),
        "sample_s": rollout.seconds,
        "sample_tokens_per_s": rollout.n_tokens / max(rollout.seconds, 1e-9)}


def update_metrics(run, minibatches, args, seen, seconds):
    """Of the update, over the tokens that all processes trained on; of ratios, KL, entropy and gaps
    none where every group was equal. seconds: {"old_logp_s", "update_s"}."""
    everything = [micro for minibatch in minibatches for micro in minibatch]

    def of_all(tensors):
        mine = torch.cat(tensors).cpu() if tensors else torch.empty(0)
        return torch.cat(parallel.gather(mine))
    old_M, sampler_M, advantage_M, weight_M = (
        of_all([getattr(micro, name) for micro in everything])
        for name in ("old_logp_M", "sampler_logp_M", "advantage_M", "weight_M"))
    log_ratio_M, entropy_M, kl_M = map(of_all, (seen.log_ratios, seen.entropies, seen.kls))
    n_tokens = sum(parallel.gather(sum(len(micro.batch.ids_N) for micro in everything)))
    n_passes = (args.minibatches > 1) + (run.reference is not None)  # before the update
    metrics = dict(run.state) | {
        "old_logp_s": seconds["old_logp_s"], "update_s": seconds["update_s"],
        "old_logp_tokens_per_s": n_passes * n_tokens / max(seconds["old_logp_s"], 1e-9),
        "update_tokens_per_s": args.epochs * n_tokens / max(seconds["update_s"], 1e-9),
        "peak_memory_gib": max(parallel.gather(peak_memory_gib(args.device)))}
    if not len(old_M):
        return metrics
    gap_M, norms = (old_M - sampler_M).abs(), torch.stack(seen.norms)
    if len(kl_M):
        metrics["kl_reference"] = kl_M.mean().item()
    return metrics | ratio_diagnostics(log_ratio_M, advantage_M, weight_M) | {
        "entropy": entropy_M.mean().item(),
        "sampler_gap_mean": gap_M.mean().item(), "sampler_gap_p99": quantile(gap_M, 0.99)[0],
        "gradient_norm": norms.mean().item(),
        "gradient_limited": (norms > args.max_grad_norm).double().mean().item()}


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


class Laps:
    """A stopwatch: lap("update_s") notes the seconds since the last lap, the device's work done."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, clock(device)

    def __call__(self, name):
        now = clock(self.device)
        self.seconds[name], self.last = now - self.last, now


def clock(device):
    """Seconds, once the device has done what it was asked to."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def noise_floor(model, minibatches, temperature):
    """Of the first micro-batch: the share of tokens whose probability leaves 1 ± 0.1 (and 0.2)
    times that of an fp32 computation; no metrics where nothing was trained on.

    0 in fp32. In bf16 rounding alone moves ratios that far, and every update draws it anew; a clip
    then acts on noise. (Moving the weights by 1e-9 instead, as a smallest update, shows nothing for
    a published model: its weights lie on the bf16 grid, and the cast rounds the move away.)
    """
    if not any(minibatches):
        return {}
    micro = next(filter(None, minibatches))[0]
    rounded_M, _ = model.completion_log_probs(micro.batch, temperature)
    distance_M = ((rounded_M - exact_log_probs(model, micro, temperature)).exp() - 1).abs()
    return {f"noise_floor_{limit}": (distance_M > limit).double().mean().item()
            for limit in (0.1, 0.2)}


def peak_memory_gib(device):
    """Highest memory so far: of the device on CUDA, of the process on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage may begin with the peak of the process's parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30  # macOS counts bytes

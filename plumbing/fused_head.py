"""The output head's softmax and gradients in fewer passes over (tokens, vocabulary), for CUDA.

What it does    CUDA takes `log_softmax` and `logit_gradient`, compiled to one kernel for each pass;
                with `ON` it takes `log_probs_of` and `add_product`, too: log-probabilities are not
                written then, and what needs one takes x / temperature − lse again.
Not here        what is computed, and the way of a CPU: the end of `Qwen2` in model.py.

Axis letters: N or M tokens, V vocabulary, C width. Logits and log-probs are fp32.
"""
import torch
import torch.nn.functional as F

from plumbing.compiled import compiled

ON = False  # not run on a GPU yet; `python -m bench gpu` puts it beside the other way


@compiled
def log_softmax(logit_NV, temperature):
    return F.log_softmax(logit_NV / temperature, -1)


@compiled
def log_probs_of(logit_MV, target_M1, temperature):
    """The targets' log-probs and the entropies, (M,) nats, and the log-sum-exps of logits /
    temperature, (M, 1): two passes, which write nothing else."""
    x_MV = logit_MV / temperature
    top_M1 = x_MV.amax(1, keepdim=True)
    below_MV = x_MV - top_M1
    exp_MV = below_MV.exp()
    total_M1, below_M1 = exp_MV.sum(1, keepdim=True), (exp_MV * below_MV).sum(1, keepdim=True)
    logp_M1 = logit_MV.gather(1, target_M1) / temperature - top_M1 - total_M1.log()
    entropy_M1 = total_M1.log() - below_M1 / total_M1
    return logp_M1[:, 0], entropy_M1[:, 0], top_M1 + total_M1.log()


@compiled
def logit_gradient(x_MV, lse_M1, divisor, target_M1, g_M1, dtype):
    """g · (1[token] − exp(x / divisor − lse)), (M, V) in dtype: one pass."""
    is_target_MV = torch.arange(x_MV.shape[1], device=x_MV.device) == target_M1
    return (g_M1 * (is_target_MV.float() - (x_MV / divisor - lse_M1).exp())).to(dtype)


def add_product(total_VC, x_VM, y_MC):
    """total += x @ y: bf16 factors, an fp32 total. Older torch refuses such a total; there the
    product is rounded to bf16 before it is added."""
    try:
        torch.addmm(total_VC, x_VM, y_MC, out_dtype=torch.float32, out=total_VC)
    except RuntimeError:
        total_VC += x_VM @ y_MC

"""Small functions that torch compiles into one kernel where they run on CUDA.

What it does    `compiled` wraps a function of tensors. On CUDA it is compiled when it first runs,
                once for all layers, and what it returns and its gradients are compared with those
                of the function as it is written; where they differ or torch cannot compile, the
                latter stays, and a line says so. On a CPU nothing is compiled.
"""
import sys
from functools import wraps

import torch
from torch.utils._pytree import tree_leaves, tree_map

from plumbing.hub import is_out_of_memory

LARGEST_DIFFERENCE = 0.02  # chosen, of a result beside its norm: bf16 rounds to 0.004
LARGEST = 1e4  # chosen: what is larger, the logit of no token, counts as this
ON = True  # tests turn it off to compare


def runs_on(device):
    return device.type == "cuda"


def compiled(function):
    """`function`, compiled where its first argument is on CUDA. The first axis of its arguments may
    have any length; another length of the others, or dtype, is compiled anew, and not checked.
    """
    chosen = {}  # whether gradients are asked for -> what runs then

    @wraps(function)
    def either(x, *rest):
        if not (ON and runs_on(x.device)):
            return function(x, *rest)
        mode = torch.is_grad_enabled()
        if mode not in chosen:
            chosen[mode] = checked(function, (x, *rest))
        return chosen[mode](x, *rest)
    return either


def checked(function, arguments):
    """`function` compiled, or as it is where that fails on these arguments."""
    import torch._dynamo  # here, since torch takes 3 s to load its compiler
    torch._dynamo.config.recompile_limit = 64  # several models, dtypes, lengths that change
    fast = torch.compile(function)
    try:
        pairs = zip(outcome(function, arguments), outcome(fast, arguments), strict=True)
        apart = [((a - b).norm() / a.norm().clamp(min=1e-6)).item() for a, b in pairs]
        too_far = [x for x in apart if not x <= LARGEST_DIFFERENCE]  # not a number is, too
        reason = f"the results differ by {too_far[0]:.1%}" if too_far else ""
    except Exception as e:  # a compiler fails in many ways
        reason = why(e)
    if reason:
        print(f"{function.__name__} runs as it is written, not compiled: {reason}",
              file=sys.stderr)
    return function if reason else fast


def why(e):
    """What an exception says, in a line; one of memory is raised again, since what failed may work.
    """
    if is_out_of_memory(e):
        raise e
    return (str(e).strip() or type(e).__name__).partition("\n")[0]


def outcome(function, arguments):
    """All floating-point results, in fp32, and the gradients of their sum."""
    def same(x):
        return x

    def copied(x):
        if not torch.is_tensor(x):
            return x
        x, leaf = x.detach(), x.requires_grad
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        torch._dynamo.maybe_mark_dynamic(copy, 0)  # compiled for any length of the first axis
        return copy.requires_grad_(leaf)
    copies = tree_map(copied, arguments)
    # activation checkpointing around this must not count what is saved here
    with torch.autograd.graph.saved_tensors_hooks(same, same):
        results = [x for x in tree_leaves(function(*copies))
                   if torch.is_tensor(x) and x.is_floating_point()]
        leaves = [x for x in tree_leaves(copies) if torch.is_tensor(x) and x.requires_grad]
        if torch.is_grad_enabled() and leaves:
            results += torch.autograd.grad([x.sum() for x in results], leaves)
    return [x.detach().float().clamp(-LARGEST, LARGEST) for x in results]

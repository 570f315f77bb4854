"""How many kernels a GPU would run, and about how long: counted without one.

What it does    Runs the project's own code once, on tensors without data (device `meta`) that say
                they are CUDA's, so that the code takes its CUDA branches. `Count` sees every
                operation that torch dispatches, and turns it into kernels, bytes and FLOP by a rule
                for its class. `Compiled` divides a function of plumbing/compiled.py into kernels.
                A change of the code changes the count.
Not here        a measurement (gpu.py). Caches, overlap and the host have no rule.
Run it alone    python -m bench.count              the table
                python -m bench.count --top 12     and the operations that cost most, by function
Where to fork   a class of operation is a line of KERNELS; what is counted is a line of WORK.

Axis letters: R rows in flight, M completion tokens, V vocabulary, P prompts, G completions of each,
T new tokens. A *vocabulary pass* reads or writes as many elements as there are log-probs, R·V or
M·V; the head's matrix products make none.
"""
import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from bench import gpu, ours
from bench.report import ROOT, table
from plumbing.engine import Sampler, places_for
from rollout import Rollout, choose, n_draws

# Of an H100, from bench/results and the profiles behind bench/README.md.
FLOPS = 771e12       # a second: a bf16 product of 8192³
ATTENTION = 0.25     # of it in attention: sequences of 300 tokens, a kernel made for the A100
BYTES = 2816e9       # a second: a copy, read and written; a product streams its operands so
ELEMENTWISE = 0.75   # of it in other kernels: those of the update reach 65 to 88 %
LAUNCH_S = {"attention": 8e-6, "product": 3.5e-6, "other": 1.8e-6}  # with next to nothing to do
SCAN_S = 1.6e-9      # an element of a row: cumsum has one block a row, which walks along it

LONG_ROW = 65536     # elements: a sum of more is divided among blocks, and reads its row itself

# ------------------------------------------------------------------ rules, by class of operation

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
           "lift_fresh", "_unsafe_view", "_reshape_alias", "_record_function_enter_new",
           "_record_function_exit"}
GATHERS = {"index_select", "gather", "index", "embedding"}  # read as much as they write
SCATTERS = {"index_put_", "scatter_", "scatter_add_", "index_add_", "index_fill_"}  # write as much
WRITES = {"copy_", "fill_", "zero_", "index_put_", "scatter_"}  # do not read what they change
REDUCES = {"sum", "mean", "any", "argmax", "amax", "max", "cumsum", "logsumexp", "sort", "topk"}


def multi_tensor(lists, more=0):
    """torch._foreach_*, fused AdamW: a launch takes 320 blocks of 65,536 elements, and of `lists`
    lists of tensors at most these many each (ATen/native/cuda/MultiTensorApply.cuh)."""
    most = {1: 110, 2: 64, 3: 48, 4: 36}[lists]

    def kernels(args, out):
        n_blocks = sum(-(-x.numel() // 65536) for x in args[0])
        return max(-(-n_blocks // 320), -(-len(args[0]) // most)) + more
    return kernels


def reduction(args, out):
    """A sum that torch divides among blocks, 256 values or more a thread, first clears a counter:
    512 threads share a row, 16 a column."""
    x, *dim = args
    along = not dim or x.dim() - 1 in (d % x.dim() for d in tree_leaves(dim[0]))
    n = x.numel() // max(tensors(out)[0].numel(), 1)
    return 1 + (n >= 256 * (512 if along else 16))


def product(args, out):
    """cuBLAS splits a long sum over blocks where the result has few tiles of 128 × 128 for 132
    multiprocessors, and adds the parts up in a second kernel. Seen: of sums of 4,864 terms 7 tiles
    split and 14 do not; of 8,000 and more 49 split and 63 do not."""
    a = tensors(args)[-2]
    tiles = -(-out.shape[-2] // 128) * -(-out.shape[-1] // 128)
    return 1 + (a.dim() == 2 and a.shape[1] >= 4096 and tiles < (60 if a.shape[1] > 5000 else 10))


KERNELS = {  # the others: 1
    "mm": product, "addmm": product,
    "sum": reduction, "argmax": reduction, "mean": reduction,
    "roll": lambda args, out: 1 + (not args[0].is_contiguous()),  # copied first
    "constant_pad_nd": 2,                           # fill, copy
    "topk": 2,                                      # select, sort
    "cat": lambda args, out: -(-len(args[0]) // 128),
    "stack": lambda args, out: -(-len(args[0]) // 128),
    "embedding_dense_backward": 14,                 # a radix sort of the ids, then sums
    "rms_norm_backward": 2,                         # of the input, of the weight
    "_flash_attention_backward": 5,                 # two around the main one; shared keys' sums
    "_log_softmax": lambda args, out: 1 + 4 * (out.shape[-1] >= LONG_ROW),  # compiled: both of its
                                                    # sums are divided, and added up
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_foreach_norm": multi_tensor(1, more=3),       # zeros, two for the parts
    "_foreach_mul_": multi_tensor(1), "_foreach_add_": multi_tensor(1),
    "_fused_adamw_": multi_tensor(4)}


# So many more a chunk of the head do the recorded epochs have, of 5 chunks and of 87: what products
# and sums clear before they begin (the profile has 116 of these "Memset" an epoch of 5 chunks).
FITTED = {"logit_gradient": 12}


@dataclass
class Operation:
    """What one operation costs; wide: elements of (·, V) tensors that it reads or writes."""
    name: str
    where: str
    kernels: int
    bytes: float
    flops: float = 0
    wide: float = 0
    scan: int = 0

    @property
    def seconds(self):
        """Starting its kernels, and then what is slowest: memory, arithmetic or a walk."""
        kind = ("attention" if "attention" in self.name else "product" if self.flops else "other")
        flops = FLOPS * (ATTENTION if kind == "attention" else 1)
        stream = BYTES * (1 if self.flops else ELEMENTWISE)
        return self.kernels * LAUNCH_S[kind] + max(self.bytes / stream, self.flops / flops,
                                                   self.scan * SCAN_S)


def traffic(x, at_most=None):
    """(bytes, elements that count as vocabulary) of reading or writing x once; what `expand`
    repeats is there once. at_most: a tensor of as many elements as are touched."""
    n = min(x.numel(), x.untyped_storage().nbytes() // x.itemsize,
            x.numel() if at_most is None else at_most.numel())
    wide = x.dim() > 1 and x[0].numel() >= ours.REAL_IDS
    return n * x.itemsize, n * wide


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def is_product(name):
    """Whether torch has a formula for its FLOP; `mm` and attention, in place or not."""
    return getattr(torch.ops.aten, name.removesuffix("_"), None) in flop_registry


def costs(name, args, kwargs, out):
    """The Operation of an aten call."""
    inputs = [*{id(x): x for x in tensors((args, kwargs))}.values()]  # `out=` may be one of them
    outs = tensors(out) or inputs * name.endswith("_")  # lists are changed, not returned
    if name == "_flash_attention_forward":  # of a cache it reads the keys of its sequences
        n = (len(args[3]) - 1) * args[6]
        inputs[1:3] = args[1][:n], args[2][:n]
    values = inputs[-1] if name in SCATTERS else None
    moved = [traffic(x, outs[0] if name in GATHERS and i == 0 else values if i == 0 else None)
             for i, x in enumerate(inputs) if i or name not in WRITES]
    moved += [traffic(x, values) for x in outs]
    if name == "_log_softmax" and moved[0][1]:  # a row too long for a block is read three times
        moved += 2 * moved[:1]
    kernels = KERNELS.get(name, KERNELS.get(name.removesuffix("_"), 1))
    flops = is_product(name) and flop_registry[getattr(torch.ops.aten, name.removesuffix("_"))](
        *[x for x in args if not isinstance(x, torch.dtype)], **kwargs, out_val=out)
    return Operation(
        name, place(), kernels(args, out) if callable(kernels) else kernels,
        sum(n for n, _ in moved), int(flops),
        0 if flops else sum(n for _, n in moved),
        max(x.shape[-1] for x in inputs) if name == "cumsum" else 0)


# ------------------------------------------------------------------ what runs

class Count(TorchDispatchMode):
    """While on, `operations` fills with what torch dispatches to the device `meta`."""

    def __init__(self):
        super().__init__()
        self.operations, self.compiled = [], None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._overloadpacket.__name__, kwargs or {}
        if name == "_local_scalar_dense" and args[0].is_meta:
            out = 1.0  # what the host reads
        elif function._overloadname == "dtype_out":  # products with out_dtype are CUDA's alone
            out = kwargs["out"]
        elif function._overloadname == "dtype" and is_product(name):
            *_, a, b = tensors(args)
            out = a.new_empty(*a.shape[:-1], b.shape[-1], dtype=next(
                x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)))
        else:
            out = function(*args, **kwargs)
        if not function.is_view:
            self.note(name, args, kwargs, out)
        return out

    def note(self, name, args, kwargs, out):
        if name not in NOTHING and any(x.is_meta for x in tensors((args, kwargs, out))):
            if not (self.compiled and self.compiled.takes(name, args, kwargs, out)):
                self.operations.append(costs(name, args, kwargs, out))

    def run_compiled(self, function, *args):
        """The result of a function under torch.compile, whose kernels are noted."""
        outer, self.compiled = self.compiled, Compiled()
        out = function(*args)
        if outer is None:
            self.operations += self.compiled.end_all(function.__name__, tensors(out))
        self.compiled = outer
        return out

    def total(self, field):
        """The sum of a field of Operation over all of them."""
        return sum(getattr(operation, field) for operation in self.operations)


class Compiled:
    """The kernels of one compiled function, by three rules of torch's compiler.

    1. Elementwise operations and gathers cost nothing: who uses their value computes it again.
    2. A sum over an axis or along it (REDUCES) ends a kernel; one over the same rows that needs its
       result goes on in that kernel, unless rows are long. A copy into another order of a value
       that needs more than REALIZES tensors ends a kernel, too.
    3. Values that end at the same level (as many kernels after each other) over as many elements
       share one kernel. What the function returns or changes is stored by one, too.
    """
    REALIZES = 4  # torch._inductor.config.realize_reads_threshold

    def __init__(self):
        self.made = {}    # storage: (tensor, its level, traffic of each tensor that it needs)
        self.rows = {}    # (level, elements): results of the sums in that kernel
        self.stored = {}  # (level, elements): (traffic that it reads, traffic that it writes)

    def needs(self, x):
        return self.made.get(x.untyped_storage()._cdata,
                             (x, 0, {x.untyped_storage()._cdata: traffic(x)}))[1:]

    def store(self, level, n, reads, x):
        """x is written by the kernel of this level over n elements."""
        all_reads, writes = self.stored.setdefault((level, n), ({}, {}))
        all_reads.update(reads)
        writes[x.untyped_storage()._cdata] = traffic(x)
        self.made[x.untyped_storage()._cdata] = (
            x, level + 1, {x.untyped_storage()._cdata: traffic(x)})

    def takes(self, name, args, kwargs, out):
        """Whether this operation becomes a part of the kernels; a matrix product does not."""
        inputs, outs = tensors((args, kwargs)), tensors(out)
        level, reads = 0, {}
        for i, x in enumerate(inputs):
            x_level, x_reads = self.needs(x)
            if i == 0 and name in GATHERS:
                most = outs[0].numel()
                x_reads = {k: (min(n, most * x.itemsize), min(wide, most))
                           for k, (n, wide) in x_reads.items()}
            if i == 0 and name in WRITES:
                x_reads = {}
            level, reads = max(level, x_level), {**reads, **x_reads}
        if is_product(name):
            for x in inputs:
                self.end(x)
        if is_product(name) or name == "_log_softmax":
            return False
        if name in REDUCES:
            n = max(x.numel() for x in inputs)
            if (self.rows.get((level - 1, n)) == outs[0].numel()
                    and n < LONG_ROW * outs[0].numel()):
                level -= 1
            self.rows[level, n] = outs[0].numel()
            self.store(level, n, reads, outs[0])
        elif name in WRITES | SCATTERS:
            self.store(level, inputs[-1].numel(), reads, inputs[-1])
        else:
            if name == "clone" and len(reads) > self.REALIZES:
                self.store(level, inputs[0].numel(), reads, inputs[0])
                level, reads = self.needs(inputs[0])
            for x in outs:
                self.made[x.untyped_storage()._cdata] = x, level, reads
        return True

    def end(self, x):
        """Store x, unless it is."""
        level, reads = self.needs(x)
        if set(reads) != {x.untyped_storage()._cdata}:
            self.store(level, x.numel(), reads, x)

    def end_all(self, name, outs):
        """The kernels of a function of this name that returns these tensors."""
        for x in outs:
            self.end(x)
        for reads, writes in self.stored.values():
            moved = [*reads.values(), *writes.values()]
            yield Operation(name, "compiled", 1 + FITTED.get(name, 0), sum(n for n, _ in moved),
                            wide=sum(n for _, n in moved))


def place():
    """The function of this project that an operation comes from; a backward's is who began it."""
    frame = sys._getframe(1)
    while frame and (not frame.f_code.co_filename.startswith(str(ROOT))
                     or frame.f_globals is globals()):
        frame = frame.f_back
    return frame.f_code.co_qualname if frame else "?"


# ------------------------------------------------------------------ the likeness of CUDA

class RMSNorm(torch.autograd.Function):
    """CUDA has a kernel for it; torch knows no shapes of that one."""

    @staticmethod
    def forward(ctx, x, weight):
        out = torch.empty_like(x)
        ctx.save_for_backward(x, weight)
        _get_current_dispatch_mode().note("rms_norm", (x, weight), {}, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        outs = torch.empty_like(x), torch.empty_like(weight)
        _get_current_dispatch_mode().note("rms_norm_backward", (gradient, x, weight), {}, outs)
        return outs


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """The kernel that CUDA chooses in bf16, with cuDNN's switched off: FlashAttention has no mask.
    """
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)[0]


def stand_in_for_compile(function, arguments):
    """`function`; while a Count is on, its kernels and those of its backward are noted."""
    def run(*args):
        mode = _get_current_dispatch_mode()
        if not isinstance(mode, Count):
            return function(*args)
        leaves = [x for x in tensors(args) if x.requires_grad]
        if torch.is_grad_enabled() and leaves:
            return WithBackward.apply(function, args, *leaves)
        return mode.run_compiled(function, *args)
    return run


class WithBackward(torch.autograd.Function):
    """A compiled function whose backward is compiled, too: what it needs of the forward it computes
    again, but for sums, from the arguments."""

    @staticmethod
    def forward(ctx, function, args, *leaves):
        ctx.function, ctx.args = function, args
        return _get_current_dispatch_mode().run_compiled(function, *args)

    @staticmethod
    def backward(ctx, gradient):
        def backward_of(gradient):
            copies = tree_map(lambda x: x.detach().requires_grad_(x.requires_grad)
                              if isinstance(x, torch.Tensor) else x, ctx.args)
            with torch.enable_grad():
                out = ctx.function(*copies)
            return torch.autograd.grad(out, [x for x in tensors(copies) if x.requires_grad],
                                       gradient)
        backward_of.__name__ = ctx.function.__name__ + "_backward"
        return None, None, *_get_current_dispatch_mode().run_compiled(backward_of, gradient)


@contextmanager
def like_cuda(packs=True, fast=False, fused=False):
    """Tensors say that they are CUDA's, and torch runs on `meta` what it keeps for CUDA. packs:
    attention of training as in plumbing/packed.py; fast: decoding as in plumbing/fast_decode.py;
    fused: all of plumbing/fused_head.py.
    """
    def supported():
        return ["meta"]
    with ExitStack() as stack:
        for target, stand_in in {
                "torch.Tensor.is_cuda": property(lambda self: True),
                "torch.cuda.graph_pool_handle": lambda: None, "torch.cuda.Stream": lambda: None,
                "plumbing.compiled.runs_on": lambda device: True,
                "plumbing.compiled.checked": stand_in_for_compile,
                "torch.nn.functional.scaled_dot_product_attention": attention,
                "torch.nn.functional.rms_norm":
                    lambda x, shape, weight, eps: RMSNorm.apply(x, weight),
                "torch.optim.optimizer._get_fused_kernels_supported_devices": supported,
                "torch.optim.optimizer._get_foreach_kernels_supported_devices": supported,
                "torch.utils._foreach_utils._get_foreach_kernels_supported_devices": supported,
                "model.packed_works": lambda *_: packs,
                "plumbing.engine.fast_works": lambda *_: fast,
                "plumbing.engine.FAST": fast, "plumbing.fused_head.ON": fused}.items():
            stack.enter_context(mock.patch(target, stand_in))
        yield


def make_model(shape):
    with torch.device("meta"):
        return ours.make_model(shape, "meta", "bf16")


def decode(rows, fast=False, left=None, shape="qwen2.5-0.5b", new_tokens=gpu.CARD.new_tokens):
    """A Count of one step at full length; rows: in flight, four to a prompt of 172 tokens. left: so
    many of them, each of another prompt, when the others have ended."""
    with like_cuda(fast=fast), torch.no_grad(), Count() as count:  # in inference mode torch
        sampler = Sampler(  # would dispatch composites whole
            make_model(shape).for_sampling(), -(-gpu.PROMPT // 128) * 128,
            *places_for(rows // 4, 4, rows), 4, new_tokens, n_draws(0.9),
            partial(choose, temperature=0.8, top_p=0.9))
        sampler.resize(left or rows)
        sampler.attention.n_prompts = left or sampler.attention.n_places
        sampler.step(new_tokens)  # the first of this size makes what the others find
        count.operations.clear()
        sampler.step(new_tokens)
    return count


def update(P, G, T, tokens=2**15, packs=True, fused=False, shape="qwen2.5-0.5b"):
    """A Count of the two epochs of one optimizer step each; tokens: of a micro-batch."""
    with like_cuda(packs=packs, fused=fused), Count() as count:
        s = ours.settings(group_size=G, max_new_tokens=T, temperature=0.8, device="meta",
                          prompts_per_step=P, tokens_per_microbatch=tokens)
        run = ours.make_run(make_model(shape), s)
        rollout = Rollout([[1] * gpu.PROMPT] * P, [[[1] * T] * G] * P, [[[0.0] * T] * G] * P, [], 0)
        ours.updating(run, rollout, s)  # AdamW makes its state
        count.operations.clear()
        ours.updating(run, rollout, s)
    return count


# ------------------------------------------------------------------ the table

WORK = {  # what: rows of a vocabulary pass, how it is counted, epochs; kernels and ms recorded on
    # an H100 (bench/README.md), or None
    "decode step, 64 rows": (64, partial(decode, 64), 1, 945, 3.17),
    "decode step, 256 rows": (256, partial(decode, 256), 1, 969, 4.74),
    "faster step, 64 rows": (64, partial(decode, 64, fast=True), 1, 412, 1.55),
    "faster step, 256 rows": (256, partial(decode, 256, fast=True), 1, 388, 2.36),
    "faster step, 1,024 rows": (1024, partial(decode, 1024, fast=True), 1, 388, 5.70),
    "faster step, the last 2 of 256 rows": (2, partial(decode, 256, fast=True, left=2), 1, None,
                                            None),
    "update, 16 × 4 × 128, padded": (8192, partial(update, 16, 4, 128, packs=False), 2,
                                     2660, 113.4),
    "update, 16 × 4 × 128, packed": (8192, partial(update, 16, 4, 128), 2, 1758, 101.7),
    "the same, fused head": (8192, partial(update, 16, 4, 128, fused=True), 2, None, None),
    "update, 64 × 8 × 256, packed": (131072, partial(update, 64, 8, 256), 2, 12131, 1293.4),
    "that, fused head": (131072, partial(update, 64, 8, 256, fused=True), 2, None, None)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top", type=int, default=0, help="operations shown of each work")
    args = parser.parse_args()
    rows, tops = [], []
    for what, (n_rows, counted, epochs, n, ms) in WORK.items():
        count = counted()
        rows.append([what, f"{count.total('kernels') / epochs:,.0f}", f"{n:,}" if n else "",
                     f"{count.total('bytes') / epochs / 1e9:,.2f}",
                     f"{count.total('wide') / epochs / n_rows / ours.REAL_IDS:.1f}",
                     f"{count.total('seconds') / epochs * 1e3:,.2f}", f"{ms:,.2f}" if n else ""])
        groups = defaultdict(list)
        for operation in count.operations:
            groups[operation.where, operation.name].append(operation)
        top = sorted(groups.items(), key=lambda g: -sum(x.seconds for x in g[1]))[:args.top]
        tops += [f"\n{what}"] * bool(top) + [
            f"{sum(x.seconds for x in group) / epochs * 1e3:9.3f} ms "
            f"{sum(x.kernels for x in group) / epochs:7.0f} kernels  {' '.join(key)}"
            for key, group in top]
    print(table(["a decode step, or an epoch of the update", "kernels", "recorded", "GB",
                 "vocabulary passes", "predicted ms", "recorded ms"],
                rows))
    print("\n".join(tops))


if __name__ == "__main__":
    main()

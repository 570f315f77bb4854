"""What a CPU hides of CUDA, made visible: `make_cpu_like_cuda` is the fixture `as_on_cuda`.

Every tensor says `is_cuda`, so that the code takes its CUDA branches, and where the two devices
differ the CPU behaves as CUDA does:

  strides   attention returns (B, H, T, D) laid out in memory as (B, T, H, D)
  products  `torch.bmm`, `mm` and `addmm` take `out_dtype`, from half precision to fp32 only
  graphs    a captured step runs once, without effect, and is then replayed operation by operation
            into the very same tensors (`Graph`). While it is captured, a read by the host, a shape
            that depends on data and a tensor made from Python numbers are refused.

Not shown: a CPU tensor that meets one of CUDA (tests/test_as_on_cuda.py asks fake tensors for
that), the numbers of CUDA's kernels, streams, and memory that runs out.
"""
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE_BYTES = 2**30  # what torch.cuda.mem_get_info says is left
HOST_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
SHAPED_BY_DATA = ("nonzero", "masked_select", "unique", "bincount", "repeat_interleave.Tensor",
                  "_local_scalar_dense", "is_nonzero")


class Graph:
    """A captured sequence of operations; `replay` computes it again, in the same tensors."""

    def __init__(self):
        self.operations = []

    def replay(self):
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            if function._schema.is_mutable:
                continue  # it wrote where it wrote before
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and not shares_memory(old, (args, kwargs)):
                    assert old.shape == new.shape, (function, old.shape, new.shape)
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """Fills a Graph with what runs; in the end memory is as if nothing had run."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self.made, self.before = graph, set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function).removeprefix("aten.")
        masks = (torch.bool, torch.uint8)
        if name.startswith(SHAPED_BY_DATA) or name.startswith("index") and any(
                x.dtype in masks for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)):
            raise RuntimeError(f"{name} in a captured step: its shape depends on data")
        if name.startswith("lift_fresh"):
            raise RuntimeError("a tensor made from Python numbers in a captured step: CUDA would "
                               "copy it from the host")
        if function._schema.is_mutable:
            self.save(name, args, kwargs)
        out = function(*args, **kwargs)
        self.made |= {place(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)
                      and not shares_memory(x, (args, kwargs))}
        self.graph.operations.append((function, args, kwargs, out))
        return out

    def save(self, name, args, kwargs):
        """Keep what an operation is about to write over, unless the capture made it."""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and place(x) not in self.made | self.before.keys():
                self.before[place(x)] = x.untyped_storage(), x.untyped_storage().clone()

    def undo(self):
        """CUDA computes nothing while it captures: written tensors as before, new ones garbage."""
        for storage, content in self.before.values():
            storage.copy_(content)
        for *_, out in self.graph.operations:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and place(x) in self.made:
                    x.fill_(torch.nan if x.is_floating_point() else 1)


def place(x):
    return x.untyped_storage().data_ptr()


def shares_memory(x, others):
    return place(x) in {place(y) for y in tree_leaves(others) if isinstance(y, torch.Tensor)}


@contextmanager
def capture(graph, pool=None, stream=None):
    reads = {name: getattr(torch.Tensor, name) for name in HOST_READS}

    def refuse(name):
        def refused(*_, **__):
            raise RuntimeError(f".{name}() in a captured step: the host would wait, and read what "
                               "a replay does not read again")
        return refused
    mode = Capture(graph)
    try:
        for name in reads:
            setattr(torch.Tensor, name, refuse(name))
        with mode:
            yield
    finally:
        for name, function in reads.items():
            setattr(torch.Tensor, name, function)
    mode.undo()


class Stream:
    def wait_stream(self, other):
        pass


def make_cpu_like_cuda(monkeypatch):
    attention = F.scaled_dot_product_attention

    def laid_out_as_on_cuda(*arguments, **settings):
        out_BHTD = attention(*arguments, **settings)
        return out_BHTD.transpose(1, 2).contiguous().transpose(1, 2)

    def with_dtype(product):
        def either(*tensors, out_dtype=None, out=None):
            *sums, a, b = tensors
            if out_dtype is None:
                return product(*tensors, out=out)
            assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
            assert out_dtype == torch.float32
            return product(*sums, a.float(), b.float(), out=out)
        return either
    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out_as_on_cuda)
    for name in ("bmm", "mm", "addmm"):
        monkeypatch.setattr(torch, name, with_dtype(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    for name, stand_in in {
            "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: None,
            "Stream": Stream, "current_stream": Stream, "stream": nullcontext,
            "device": nullcontext, "synchronize": lambda *_: None,
            "empty_cache": lambda: None, "reset_peak_memory_stats": lambda *_: None,
            "max_memory_allocated": lambda *_: 0, "memory_allocated": lambda *_: 0,
            "mem_get_info": lambda *_: (FREE_BYTES, FREE_BYTES)}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

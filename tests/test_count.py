"""The kernels that bench/count.py counts without a GPU are those that a GPU was seen to run."""
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import model
from bench import count
from bench.count import Count, Operation, decode, like_cuda, make_model, update
from plumbing.compiled import compiled

SINCE = 13 - 2 + 14  # of the faster step: the rotary table is looked up, `ends_of` is kept
RECORDED = {  # by torch's profiler on an H100: bench/README.md
    "decode, 64 rows": (partial(decode, 64), 1, 945),
    "faster decode, 64 rows": (partial(decode, 64, fast=True), 1, 412 - SINCE),
    "faster decode, 1,024 rows": (partial(decode, 1024, fast=True), 1, 388 - SINCE),
    "an epoch, padded attention": (partial(update, 16, 4, 128, packs=False), 2, 2660),
    "an epoch, packed attention": (partial(update, 16, 4, 128), 2, 1758)}


@pytest.mark.parametrize("counted, epochs, recorded", RECORDED.values(), ids=RECORDED)
def test_the_count_is_within_five_percent_of_what_a_gpu_ran(counted, epochs, recorded):
    assert 0.95 * recorded < counted().total("kernels") / epochs < 1.05 * recorded


def test_a_faster_step_has_at_most_400_kernels_and_passes_the_vocabulary_twice():
    step = decode(64, fast=True)
    assert step.total("kernels") <= 400
    names = Counter(x.name for x in step.operations if x.where == "compiled")
    for name, n in {"add_and_norm": 49, "rotate_and_store": 48, "weigh": 24, "swiglu": 24}.items():
        assert names[name] == n, name  # as the profile's names have them
    whole = [x for x in step.operations if x.wide >= 64 * 151_665]
    assert [x.name for x in whole] == ["block_masses", "likelier_masses"]
    assert step.total("wide") < 2.1 * 64 * 151_672  # the rest: the blocks that were drawn


def test_an_epoch_of_the_update_has_at_most_2200_kernels():
    assert update(16, 4, 128).total("kernels") / 2 <= 2200


def test_a_fused_head_reads_the_logits_thrice_and_writes_their_gradient():
    fused = update(16, 4, 128, fused=True).total("wide") / 2 / (8192 * 151_672)
    assert 4 <= fused < 4.01 < update(16, 4, 128).total("wide") / 2 / (8192 * 151_672)


def counted(function):
    with like_cuda(), torch.no_grad(), Count() as found:
        function()
    return found


def a_layer(cast):
    """One layer on five tokens; `cast`: its weights are fp32 masters, cast where they are used."""
    qwen = make_model("0.8m")
    layer, x = qwen.model["layers"][0], torch.empty(5, 128, device="meta", dtype=torch.bfloat16)
    rotary = [torch.empty(5, 1, 32, device="meta", dtype=torch.bfloat16)] * 2
    if not cast:
        layer.to(torch.bfloat16)
    return lambda: layer(x, rotary, lambda number, q, k, v: q, 0)


def test_a_layer_by_hand():
    by_hand = Counter(
        rms_norm=2, addmm=1, mm=3,            # two norms; q, k and v with a bias; o; the MLP's two
        rotate=1, swiglu=1,                   # compiled
        add=2)                                # the two residuals
    names = Counter()
    for x in counted(a_layer(cast=False)).operations:
        names[x.name] += x.kernels
    assert names == by_hand and names.total() == 10
    casts = 2 + 2 + 3  # norms, weight and bias of q, k and v, three matrices
    assert counted(a_layer(cast=True)).total("kernels") == 10 + casts


def test_the_count_follows_the_code(monkeypatch):
    before = decode(8, shape="0.8m").total("kernels")
    rotate = model.rotate
    monkeypatch.setattr(model, "rotate", lambda x, rotary: rotate(x, rotary) * 1.0)
    assert decode(8, shape="0.8m").total("kernels") == before + 4  # it has four layers


def test_bytes_flops_and_vocabulary_passes_by_hand():
    def empty(*shape, dtype=torch.bfloat16, device="meta"):
        return torch.empty(shape, dtype=dtype, device=device)
    a, b, logits = empty(4, 8), empty(8, 16), empty(2, 151_665, dtype=torch.float32)
    table, ids = empty(1000, 8), empty(3, dtype=torch.int64)

    def work():
        a @ b                          # 32 + 128 + 64 elements; 2·4·8·16 FLOP
        F.embedding(ids, table)        # 3 ids of 8 bytes; 24 elements read, 24 written
        empty(4, 1).expand(4, 8) + a   # 4 + 32 read, 32 written
        logits.exp()                   # a pass that reads and one that writes
        a.view(8, 4)[:2].T             # views
        empty(4, device="cpu") + 1     # not on the device
    product, lookup, add, exp = counted(work).operations
    assert (product.kernels, product.bytes, product.flops) == (1, 448, 1024)
    assert (lookup.bytes, add.bytes, exp.bytes) == (3 * 8 + 2 * 48, 2 * 68, 2 * 4 * 2 * 151_665)
    assert (exp.wide, add.wide, product.wide) == (2 * 2 * 151_665, 0, 0)


def test_products_that_cuda_alone_has():
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 8), (8, 16)))
    total = torch.empty(4, 16, device="meta")
    narrow, tall = (torch.empty(shape, dtype=torch.bfloat16, device="meta")
                    for shape in ((64, 4864), (4864, 896)))

    def work():
        torch.mm(a, b, out_dtype=torch.float32)
        torch.bmm(a[None], b[None], out_dtype=torch.float32)
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        narrow @ tall  # few tiles and a long sum: divided, then added up
    *small, split = counted(work).operations
    read, result = 2 * (32 + 128), 4 * 64
    assert [x.bytes for x in small] == [read + result, read + result, read + 2 * result]
    assert [x.kernels for x in small] == [1, 1, 1] and split.kernels == 2
    assert [x.flops for x in small] == [1024] * 3


def test_what_takes_longest_says_how_long():
    start = count.LAUNCH_S["product"]
    product = Operation("mm", "", 1, bytes=1e3, flops=771e12)  # a second of arithmetic
    stream = Operation("mm", "", 1, bytes=2816e9, flops=1e3)   # a second of memory
    assert product.seconds == pytest.approx(1 + start) == stream.seconds
    assert Operation("cumsum", "", 1, 0, scan=10**6).seconds == pytest.approx(1.6e-3, rel=0.01)


def test_what_is_compiled_shares_kernels():
    def two_sums(x):          # of one shape, at one level: one kernel; their quotient: another
        return x.exp().sum(-1) / x.sum(-1)

    def reordered(a, b, c, d, e):   # a value of five tensors is stored before it is transposed
        return (a + b + c + d + e).T.contiguous()

    def reordered_cheaply(a, b):    # a value of two is computed again
        return (a + b).T.contiguous()
    x = torch.empty(6, 7, device="meta")
    for function, n in ((two_sums, 2), (reordered, 2), (reordered_cheaply, 1)):
        inputs = [torch.empty_like(x) for _ in range(function.__code__.co_argcount)]
        wrapped = compiled(function)
        found = counted(lambda: wrapped(*inputs))
        assert found.total("kernels") == n, function.__name__
    both = counted(lambda: wrapped(*inputs)).operations[0]
    assert both.bytes == 3 * 6 * 7 * 4  # two read, one written

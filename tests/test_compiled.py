"""plumbing/compiled.py: what is compiled gives the same, or is not used. On a CPU, as on CUDA."""
import shutil

import pytest
import torch

import model
from plumbing import compiled
from rollout import flat_batch


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    monkeypatch.setattr(compiled, "runs_on", lambda device: True)


def double(x):
    return 2 * x, x.shape[0]


def failing(error):
    def fail(x):
        raise error
    return fail


@pytest.mark.parametrize("what, instead, said", [
    ("right", lambda f: lambda x: (x + x, 3), ""),
    ("wrong", lambda f: lambda x: (2.1 * x, 3), "double runs as it is written, not compiled: the "
                                                "results differ by 5.0%\n"),
    ("wrong backward", lambda f: lambda x: (x + 2 * x - x.detach(), 3), "the results differ by"),
    ("not a number", lambda f: lambda x: (x / 0 * 0, 3), "the results differ by nan%"),
    ("a fault", lambda f: lambda x: 1 / 0, "not compiled: division by zero\n"),
    ("a fault without words", lambda f: failing(AssertionError()), "compiled: AssertionError\n")])
def test_what_errs_runs_as_it_is_written(as_if_on_cuda, monkeypatch, capsys, what, instead, said):
    monkeypatch.setattr(torch, "compile", instead)
    x = torch.ones(3, requires_grad=True)
    function = compiled.compiled(double)
    for _ in range(2):  # checked once
        y, _ = function(x)
        assert y.tolist() == [2, 2, 2]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2, 2, 2]
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == (said != "")


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_compiler(as_if_on_cuda, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: failing(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        compiled.compiled(double)(torch.ones(2))


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: 1 / 0)
    assert compiled.compiled(double)(torch.ones(2))[0].tolist() == [2, 2]


def test_a_check_leaves_the_arguments_and_their_strides_alone(as_if_on_cuda, monkeypatch):
    seen = []

    def add_one_to_the_first(x, y):
        seen.append(x.stride())
        y[0] = x[0] + 1
        return y.clone()
    monkeypatch.setattr(torch, "compile", lambda f: f)
    x, y = torch.arange(6.0).view(3, 2)[:, 0], torch.zeros(3)
    assert compiled.compiled(add_one_to_the_first)(x, y).tolist() == [1, 0, 0]
    assert seen == [(2,)] * 3 and y.tolist() == [1, 0, 0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")
@pytest.mark.parametrize("name, arguments", [
    ("swiglu", lambda N: [torch.randn(N, 32, requires_grad=True)]),
    ("rotate", lambda N: [torch.randn(N, 6, 8, requires_grad=True)[:, :4],
                          (torch.randn(N, 1, 8), torch.randn(N, 1, 8))])])
def test_compiled_once_for_all_lengths(as_if_on_cuda, capsys, name, arguments):
    function = compiled.compiled(getattr(model, name).__wrapped__)
    for N in (5, 9):
        torch.compiler.set_stance("default" if N == 5 else "fail_on_recompile")
        try:
            for f in (function, function.__wrapped__):
                torch.manual_seed(N)
                inputs = arguments(N)
                out = f(*inputs)
                found = [out, *torch.autograd.grad(out.square().sum(), inputs[:1])]
                if f is function:
                    fast = found
        finally:
            torch.compiler.set_stance("default")
        for a, b in zip(fast, found):
            torch.testing.assert_close(a, b)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")
def test_a_check_inside_a_layer_that_is_computed_twice(as_if_on_cuda, monkeypatch, capsys):
    """--checkpoint-activations: a function's first run, with its check, is in such a layer."""
    found = []
    for on in (False, True):
        monkeypatch.setattr(compiled, "ON", on)
        if on:
            for name in ("swiglu", "rotate"):
                monkeypatch.setattr(model, name,
                                    compiled.compiled(getattr(model, name).__wrapped__))
        qwen = model.Qwen2.from_pretrained("tiny")
        qwen.checkpoint_activations = True
        batch = flat_batch([[5, 6, 7], [8, 9]], [[[10, 11], [12]], [[13, 14, 15], [16]]])
        qwen.accumulate_gradients(batch, 0.7, lambda logp, chunk: logp.square().sum())
        found.append([p.grad for p in qwen.parameters()])
    for plain, fast in zip(*found):
        assert (fast - plain).norm() <= 1e-4 * plain.norm()
    assert capsys.readouterr().err == ""

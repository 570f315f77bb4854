"""What a run holds in memory, added up from the code's own tensors; AdamW's state in 8 bits."""
import importlib.util
import re
import shlex

import pytest
import torch
from test_readme import README, rows_of_table
from test_train import (
    assert_same_weights,
    in_empty_folder,  # noqa: F401
    metrics,
    repeatable,
    run,
    weights,
)

import train
from bench.fits import CARD_BYTES, memory_of
from plumbing.run import STATE_BYTES, make_optimizer
from plumbing.settings import make_parser

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="--optimizer adamw8bit: there is no package bitsandbytes here")
GIB = 2**30


def settings(flags):
    return make_parser().parse_args(["--dtype", "bf16", *shlex.split(flags)])


# ---------------------------------------------------------------- the sum

def test_1_5b_trains_on_24_gb_with_the_readmes_flags_and_not_without():
    (flags,) = re.findall(r"^python train\.py (.*Qwen2\.5-1\.5B.*)$", README, re.M)
    parts, n_groups = memory_of("qwen2.5-1.5b", settings(flags))
    n_parameters = parts["weights"] / 4
    assert n_parameters == 1_543_714_304  # as the hub's Qwen2.5-1.5B
    assert parts["gradients"] == pytest.approx(4 * n_parameters, rel=1e-3) and n_groups >= 1
    assert parts["copy that samples"] == 2 * n_parameters
    assert 2 * n_parameters < parts["the optimizer's state"] < 2.04 * n_parameters
    assert sum(parts.values()) < CARD_BYTES
    without = settings("--model Qwen/Qwen2.5-1.5B")
    assert sum(memory_of("qwen2.5-1.5b", without)[0].values()) > 1.3 * CARD_BYTES


@pytest.mark.slow
def test_the_table_of_cards_is_what_the_code_adds_up():
    rows = rows_of_table("bench/README.md", "### Which model on which card")
    assert len(rows) >= 8
    for card, shape, flags, gib in rows:
        s = settings(flags.strip("`"))
        n_bytes = sum(memory_of(f"qwen2.5-{shape.lower()}", s, 0)[0].values())
        assert float(gib) == pytest.approx(n_bytes / GIB, rel=0.05), (card, shape)
        assert float(gib) < 0.9 * float(card.removesuffix(" GB")), (card, shape)


@pytest.mark.parametrize("name", [
    "adamw", "sgd", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
def test_the_bytes_of_an_optimizers_state_are_those_it_makes(name):
    layer = torch.nn.Linear(1024, 1024, bias=False)
    optimizer = make_optimizer(layer, settings(f"--optimizer {name}"))
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    made = [x for x in optimizer.state[layer.weight].values() if isinstance(x, torch.Tensor)]
    n_bytes = sum(x.numel() * x.element_size() for x in made)
    assert n_bytes / layer.weight.numel() == pytest.approx(STATE_BYTES[name], rel=0.002)


# ---------------------------------------------------------------- the optimizer

SAME = ["--reward", "noise", "--test-problems", "0"]


@needs_bitsandbytes
def test_eight_bits_move_the_weights_as_thirty_two_do():
    """One rollout, eight optimizer steps on it."""
    for optimizer in ("adamw", "adamw8bit"):
        run("--optimizer", optimizer, "--name", optimizer, "--steps", "1", "--epochs", "4", *SAME)
    one, other = (weights(f"runs/{name}/best") for name in ("adamw", "adamw8bit"))
    start = weights("tiny")
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(one[name] - other[name]).flatten() for name in start])
    assert 0 < apart.norm() < 0.1 * moved.norm()
    rows = [metrics(name)[-1] for name in ("adamw", "adamw8bit")]
    assert rows[1]["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=0.05)
    assert rows[0]["learning_rate"] == rows[1]["learning_rate"] > 0


@needs_bitsandbytes
def test_a_resumed_run_in_eight_bits_is_the_same_to_the_last_bit():
    flags = ["--optimizer", "adamw8bit", *SAME]
    run("--name", "whole", *flags)
    run("--name", "halves", *flags, "--stop-after", "2")
    assert train.main(["--resume", "--name", "halves"]) == 0
    assert repeatable(metrics("whole")) == repeatable(metrics("halves"))
    one, other = (f"runs/{name}/checkpoints/step_4" for name in ("whole", "halves"))
    assert_same_weights(one, other)
    one, other = (torch.load(f"{place}/trainer.pt", weights_only=True)["optimizer"]
                  for place in (one, other))
    assert one["param_groups"] == other["param_groups"]
    leaves = [torch.utils._pytree.tree_flatten(x["state"])[0] for x in (one, other)]
    assert len(leaves[0]) > 100
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*leaves))


@pytest.mark.parametrize("found, flags, message", [
    (None, [], "needs the package bitsandbytes: pip install bitsandbytes"),
    (True, ["--fsdp"], "keeps its state whole in each process; leave --fsdp away")])
def test_what_eight_bits_need_is_said(monkeypatch, capsys, found, flags, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(SystemExit):
        train.main(["--model", "tiny", "--optimizer", "adamw8bit", *flags])
    assert message in " ".join(capsys.readouterr().err.split())

"""The fixture `as_on_cuda` shows the faults that a plain CPU hides; and no tensor of the CPU meets
one of CUDA. All tests that run as on CUDA: python -m pytest -k as_on_cuda"""
import inspect
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_model import random_batch
from test_train import made_up_rollout, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rollout
import train
from bench.ours import make_run
from model import PaddedSequences, Qwen2
from plumbing.engine import CachedAttention, Sampler, prefill
from rollout import choose, flat_batch, generate


def sampled(model, max_new_tokens=30):
    return generate(model, random_batch()[0], 6, max_new_tokens, 1.0, 0.9, seed=1).completions


def sampled_together(model):
    """All rows run to the end: a plain CPU never looks at the tensors that rows began with."""
    return sampled(model, max_new_tokens=6)


def scored(model):
    batch = flat_batch(*random_batch())
    return model.accumulate_gradients(batch, 1.0, lambda logp, chunk: logp.sum())[0].tolist()


FAULTS = {  # what is done, the method with the fault, its line as it is, with the fault
    "a view of what attention returns": (
        scored, PaddedSequences.attend, "out.reshape(B, H, T, D)", "out.view(B, H, T, D)"),
    "the host reads in a step": (
        sampled, Sampler.step, "r.token.copy_(token_R)",
        "r.token.copy_(token_R if token_R.sum().item() >= 0 else token_R)"),
    "the host lists in a step": (
        sampled, Sampler.step, "t_R = r.length.clamp(max=self.T - 1)",
        "t_R = torch.tensor(r.length.tolist()).clamp(max=self.T - 1)"),
    "a shape depends on data": (
        sampled, Sampler.step, "r.length.add_(r.running)", "r.length[r.running] += 1"),
    "lengths are replaced": (
        sampled_together, Sampler.step, "r.length.add_(r.running)",
        "r.length = r.length + r.running"),
    "tokens are replaced": (
        sampled_together, Sampler.step, "r.token.copy_(token_R)", "r.token = token_R"),
    "a constant comes from the host": (
        sampled, Sampler.step, "(r.length < self.T)", "(r.length < torch.tensor(self.T))")}


def plant(monkeypatch, method, line, fault):
    """Put `fault` in the place of `line` in the source of a method."""
    owner, name = method.__qualname__.split(".")
    module = sys.modules[method.__module__]
    source = textwrap.dedent(inspect.getsource(method))
    assert line in source, f"{method.__qualname__} has changed; it has no {line!r}"
    scope = {}
    exec(source.replace(line, fault), vars(module), scope)
    monkeypatch.setattr(getattr(module, owner), name, scope[name])


@pytest.mark.parametrize("work, method, line, fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_show_as_on_cuda_and_not_on_the_cpu(work, method, line, fault, request,
                                                           monkeypatch):
    right = work(Qwen2.from_pretrained("tiny"))
    plant(monkeypatch, method, line, fault)
    assert work(Qwen2.from_pretrained("tiny")) == right
    request.getfixturevalue("as_on_cuda")
    try:
        found = work(Qwen2.from_pretrained("tiny"))
    except (RuntimeError, AssertionError):
        return
    assert found != right


def test_steps_are_captured_and_replayed_as_on_cuda(as_on_cuda):
    model = Qwen2.from_pretrained("tiny")
    sampled(model)
    (sampler,) = model.kept_samplers.values()
    assert len(sampler.graphs) > 1 and all(graph.operations for graph in sampler.graphs.values())


def test_a_sampler_is_kept_for_one_way_of_choosing_only(as_on_cuda, monkeypatch):
    # the rule is what `generate` puts into the partial, so a new setting cannot be left out
    model = Qwen2.from_pretrained("tiny")
    first = sampled(model)

    def either(model, hidden_RC, u_RU, fast, temperature, top_p, likeliest):
        return choose(model, hidden_RC, u_RU, fast, 0.0 if likeliest else temperature, top_p)
    for likeliest in (False, True, False):
        monkeypatch.setattr(rollout, "choose", partial(either, likeliest=likeliest))
        assert (sampled(model) == first) == (not likeliest)


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices. Copies between them are none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
                   and x.dim()}
        assert len(devices) < 2 or "copy" in str(function), (function, devices)
        return function(*args, **(kwargs or {}))


def sampled_and_updated_elsewhere():
    """Prefill, a step of the sampler, and an update, on tensors without content ("meta")."""
    model = Qwen2.from_pretrained("tiny").to("meta")
    model.compute_dtype = torch.bfloat16
    prompts, completions = random_batch()
    with torch.inference_mode():
        sampler = Sampler(model.for_sampling(), 20, n_rows=6, n_prompts=3, group_size=2,
                          max_new_tokens=10, n_draws=8,
                          choose=partial(choose, temperature=1.0, top_p=0.9))
        sampler.resize(6)
        places = torch.arange(2, device="meta")
        sampler.attention.store_prompts(places, *prefill(sampler.model, prompts))
        sampler.attention.seat(sampler.rows.seat, places)
        sampler.step(10)
    run = SimpleNamespace(model=model, reference=None, optimizer=torch.optim.AdamW(
        model.parameters()), state={"optimizer_steps": 0, "skipped_steps": 0})
    rollout, advantage_PG = made_up_rollout()
    s = settings(device="meta", minibatches=2)
    minibatches = train.lay_out(rollout, advantage_PG, s, "meta")
    with pytest.MonkeyPatch.context() as patch:  # whether this is finite, update asks
        patch.setattr(train, "optimizer_step", lambda run, args: torch.ones(()))
        train.update(run, minibatches, s, train.remember_old_policy(run, minibatches, s))
    assert {p.grad.device.type for p in model.parameters()} == {"meta"}


class Names(TorchDispatchMode):
    """The names of all operations, in turn."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_an_update_asks_for_no_number_before_its_last_optimizer_step(machine):
    s = settings(minibatches=2)
    rollout, advantage_PG = made_up_rollout()
    run = make_run(Qwen2.from_pretrained("tiny"), s)
    minibatches = train.lay_out(rollout, advantage_PG, s, "cpu")
    with Names() as seen:
        train.update(run, minibatches, s, train.remember_old_policy(run, minibatches, s))
    steps = [i for i, name in enumerate(seen.names) if "adamw" in name]
    asked = [i for i, name in enumerate(seen.names) if name == "aten::_local_scalar_dense"]
    assert len(steps) == s.epochs * s.minibatches == len(asked)
    assert max(steps) < min(asked)


def test_no_tensor_of_the_cpu_meets_one_of_cuda(as_on_cuda, monkeypatch):
    with OneDevice():
        sampled_and_updated_elsewhere()
    plant(monkeypatch, CachedAttention.look_at, "torch.arange(len(t_R), device=t_R.device)",
          "torch.arange(len(t_R))")
    with OneDevice(), pytest.raises(AssertionError, match="cpu"):
        sampled_and_updated_elsewhere()

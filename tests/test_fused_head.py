"""plumbing/fused_head.py gives what the plain head of model.py gives."""
import shutil

import pytest
import torch
from test_model import random_batch

import model as model_module
from model import NOTHING, Qwen2
from plumbing import compiled, fused_head
from rollout import flat_batch


def test_log_probs_entropies_and_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    logit_MV, target_M1, g_M1 = 5 * torch.randn(7, 50), torch.randint(40, (7, 1)), torch.randn(7, 1)
    logit_MV[:, 40:] = NOTHING  # ids without a token
    leaf_MV = logit_MV.clone().requires_grad_()
    logp_MV = (leaf_MV / 0.7).log_softmax(1)
    expected_M1 = logp_MV.gather(1, target_M1)
    (g_M1 * expected_M1).sum().backward()
    before = logit_MV.clone()
    logp_M, entropy_M, lse_M1 = fused_head.log_probs_of(logit_MV, target_M1, 0.7)
    gradient_MV = fused_head.logit_gradient(logit_MV, lse_M1, 0.7, target_M1, g_M1, torch.float32)
    assert torch.equal(logit_MV, before)
    torch.testing.assert_close(logp_M, expected_M1.detach().squeeze(1))
    torch.testing.assert_close(entropy_M, torch.distributions.Categorical(
        logits=logit_MV[:, :40] / 0.7).entropy())
    torch.testing.assert_close(gradient_MV / 0.7, leaf_MV.grad)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")
def test_compiled_they_give_the_same(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "runs_on", lambda device: True)
    torch.manual_seed(0)
    logit_MV, target_M1, g_M1 = 5 * torch.randn(6, 99), torch.randint(90, (6, 1)), torch.ones(6, 1)
    logit_MV[:, 90:] = NOTHING
    log_probs_of, logit_gradient = (getattr(fused_head, name).__wrapped__
                                    for name in ("log_probs_of", "logit_gradient"))
    expected = log_probs_of(logit_MV, target_M1, 0.8)
    rest = expected[2], 0.8, target_M1, g_M1, torch.bfloat16
    torch.testing.assert_close(compiled.compiled(log_probs_of)(logit_MV, target_M1, 0.8), expected)
    torch.testing.assert_close(compiled.compiled(logit_gradient)(logit_MV, *rest),
                               logit_gradient(logit_MV, *rest))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-5), ("bf16", 0.01)])
def test_on_and_off_give_one_update(as_on_cuda, monkeypatch, dtype, limit):
    found = []
    monkeypatch.setitem(model_module.HEAD_BYTES, "cuda", 4 * 384 * 20)  # several chunks
    for on in (False, True):
        monkeypatch.setattr(fused_head, "ON", on)
        model = Qwen2.from_pretrained("tiny", dtype=dtype)
        batch = flat_batch(*random_batch())
        logp_M, entropy_M = model.accumulate_gradients(
            batch, 0.8, lambda logp, chunk: logp.square().sum(), entropy=True)
        old_M, old_entropy_M = model.completion_log_probs(batch, 0.8, entropy=True)
        assert torch.equal(old_M, logp_M) and torch.equal(old_entropy_M, entropy_M)
        found.append([logp_M, entropy_M, *(p.grad for p in model.parameters())])
    for off, on in zip(*found):
        assert (on - off).norm() <= limit * off.norm()

"""The faster decode step of CUDA, on a CPU: its kernel in words, what is compiled run as it is."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import SHAPES, theirs

from model import NOTHING, Qwen2
from plumbing import engine, fast_decode
from plumbing.engine import CachedAttention, Sampler
from plumbing.fast_decode import FlashCache, decode, draw_in_blocks, fast_works
from rollout import draw, generate, uniforms_for


def kernel_in_words(q_NKD, k_JKD, v_JKD, query_ends, key_ends, longest_q, longest_k, *rest,
                    seqused_k):
    """What FlashAttention-2 does with sequences of which only the first keys are in use; the
    log-sum-exp of no key is infinite there."""
    assert rest == (0.0, False, False) and longest_k >= seqused_k.max()
    assert longest_q == query_ends.diff().max()
    outs, lses = [], []
    for b, n in enumerate(seqused_k.tolist()):
        q = q_NKD[query_ends[b]:query_ends[b + 1]].transpose(0, 1)
        k, v = (x[key_ends[b]:key_ends[b] + n].transpose(0, 1) for x in (k_JKD, v_JKD))
        score = q @ k.mT * q.shape[-1]**-0.5
        outs.append((score.softmax(-1) @ v).transpose(0, 1))
        lses.append(score.logsumexp(-1) if n else torch.full(score.shape[:2], torch.inf))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(fast_decode, "flash_attention", kernel_in_words)


class Fast(Sampler):
    """The sampler as it is where `fast_works` says so."""

    def __init__(self, model, longest_prompt, n_rows, n_prompts, group_size, max_new_tokens, *rest):
        super().__init__(model, longest_prompt, n_rows, n_prompts, group_size, max_new_tokens,
                         *rest)
        self.attention = FlashCache(model, n_rows, n_prompts, group_size, longest_prompt,
                                    max_new_tokens)
        self.forward, self.fast, self.fewest = engine.partial(decode, model), True, 2


@pytest.mark.parametrize("shape", [0, 3, 4, 6, 7], ids=lambda i: str(SHAPES[i]))
def test_the_faster_step_gives_the_plain_completions(shape, kernel, monkeypatch, tmp_path):
    theirs(*SHAPES[shape]).save_pretrained(tmp_path)
    model = Qwen2.from_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14, 15, 16, 17]]  # one of a single token
    work = (model, prompts, 3, 20, 0.8, 0.9, 1)
    plain = generate(*work, max_rows=6)
    monkeypatch.setattr(engine, "Sampler", Fast)
    fast = generate(*work, max_rows=6)
    assert fast.completions == plain.completions and fast.finished == plain.finished
    for one, two in zip(sum(fast.logps, []), sum(plain.logps, [])):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=1e-5, rtol=0)


def kernel_without_the_host(q_NKD, k_JKD, v_JKD, query_ends, key_starts, longest_q, longest_k,
                            *rest, seqused_k):
    """As `kernel_in_words`, but no number is read by the host: which query sees which key is a mask
    of all queries and all keys."""
    query_N, key_J = torch.arange(len(q_NKD)), torch.arange(len(k_JKD))
    owns_BN = (query_N >= query_ends[:-1, None]) & (query_N < query_ends[1:, None])
    starts_B1 = key_starts[:-1, None]
    has_BJ = (key_J >= starts_B1) & (key_J < starts_B1 + seqused_k[:, None])
    sees_NJ = (owns_BN.T.double() @ has_BJ.double()) > 0
    score_KNJ = q_NKD.transpose(0, 1) @ k_JKD.permute(1, 2, 0) * q_NKD.shape[-1]**-0.5
    score_KNJ = score_KNJ.masked_fill(~sees_NJ, -torch.inf)
    out_KND = score_KNJ.softmax(-1).nan_to_num() @ v_JKD.transpose(0, 1)
    lse_KN = score_KNJ.logsumexp(-1)
    lse_KN = torch.where(lse_KN == -torch.inf, torch.inf, lse_KN)
    return out_KND.transpose(0, 1).contiguous(), lse_KN


def test_the_faster_step_is_captured_and_replayed_as_on_cuda(as_on_cuda, monkeypatch):
    """A captured step may make no tensor of Python numbers, and nothing that a later one lacks."""
    monkeypatch.setattr(fast_decode, "flash_attention", kernel_without_the_host)
    work = (Qwen2.from_pretrained("tiny"), [[5, 6, 7, 8], [9], [10, 11]], 6, 20, 0.8, 0.9, 1)
    plain = generate(*work, max_rows=12)
    work[0].kept_samplers.clear()
    monkeypatch.setattr(engine, "Sampler", Fast)
    for _ in range(2):  # the second finds the captured steps of the first
        fast = generate(*work, max_rows=12)
        assert fast.completions == plain.completions
    (sampler,) = work[0].kept_samplers.values()
    assert isinstance(sampler, Fast) and len(sampler.graphs) > 2


def test_a_step_that_errs_is_not_used_and_the_run_says_so(kernel, monkeypatch, capsys):
    with torch.inference_mode():
        model = Qwen2.from_pretrained("tiny").for_sampling()
        assert fast_works(model, CachedAttention) and capsys.readouterr().err == ""
        monkeypatch.setattr(fast_decode, "swiglu", lambda x: x.chunk(2, -1)[1])
        assert not fast_works(model, CachedAttention)
        assert "plain decode step is used on cpu: hidden states differ" in capsys.readouterr().err

        def missing(*arguments, **more):
            raise NotImplementedError("no such kernel\nand more")
        monkeypatch.setattr(fast_decode, "flash_attention", missing)
        assert not fast_works(model, CachedAttention)
        assert capsys.readouterr().err.endswith("used on cpu: no such kernel\n")


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.9])
@pytest.mark.parametrize("V", [97, 1024, 3001])
def test_drawing_in_blocks_is_drawing(top_p, V):
    generator = torch.Generator().manual_seed(V)
    logit_RV, temperature = 3 * torch.randn(500, V, generator=generator), 0.8
    logp_RV = (logit_RV / temperature).log_softmax(-1)
    key_R, none_R = torch.arange(500), torch.zeros(500, dtype=torch.int64)
    u_RU = uniforms_for(0, 0, key_R, none_R, 1, top_p)[:, 0]
    prob_RV = logp_RV.exp()
    expected = draw(prob_RV, prob_RV.cumsum(-1), top_p, u_RU)
    token_R, found_R = draw_in_blocks(logit_RV, u_RU, temperature, top_p)
    same_R = token_R == expected
    assert same_R.double().mean() > 0.99  # where a sum rounds another way, u falls on the next one
    torch.testing.assert_close(found_R, logp_RV.gather(1, token_R[:, None])[:, 0])


@pytest.mark.parametrize("times", [1 - 2e-7, 1, 1 + 2e-7])
def test_a_token_is_not_likelier_than_itself_where_a_division_rounds_otherwise(times, monkeypatch):
    """A compiled function may multiply by 1 / temperature, or not; the second token, which
    crosses the 0.9 of the nucleus, belongs to it."""
    likelier = fast_decode.likelier_masses
    monkeypatch.setattr(fast_decode, "likelier_masses", lambda logit, drawn, top, temperature:
                        likelier(logit, drawn, top, temperature * times))
    logp_V = torch.tensor([0.60, 0.35, 0.03, 0.02]).log()
    logit_RV = 1.1 * logp_V + torch.linspace(-9, 9, 40)[:, None]
    token_R, logp_R = draw_in_blocks(logit_RV, torch.full((40, 1), 0.8), 1.1, 0.9)
    assert (token_R == 1).all()
    torch.testing.assert_close(logp_R, torch.full((40,), 0.35).log(), atol=1e-5, rtol=0)


def test_drawing_in_blocks_never_takes_a_token_without_probability():
    logp_RV = torch.full((4, 2500), NOTHING)
    logp_RV[0, 3], logp_RV[1, 1024], logp_RV[2, 2499] = 0, 0, 0
    logp_RV[3, [1023, 2048]] = -0.6931472
    for u in (0.0, 0.25, 0.5, 1 - 2**-24):
        token_R, found_R = draw_in_blocks(logp_RV, torch.full((4, 1), u), 0.5, 1.0)
        assert (logp_RV.gather(1, token_R[:, None]) > -1).all(), (u, token_R)
        torch.testing.assert_close(found_R, torch.tensor([0, 0, 0, -0.6931472]))
        assert token_R[3] == (1023 if u < 0.5 else 2048)


def test_loading_the_project_does_not_load_torchs_compiler():
    """It takes 3 s, and every command would wait for it."""
    done = subprocess.run([sys.executable, "-c",
                           "import sys, train; sys.exit('torch._dynamo' in sys.modules)"],
                          cwd=Path(fast_decode.__file__).parent.parent)
    assert done.returncode == 0

"""The same claims on a GPU, skipped where there is none: python -m pytest tests/test_cuda.py -s"""
import pytest
import torch
from test_model import SHAPES, random_batch, theirs
from test_train import metrics, run, updated

import model as model_module
import train
from model import Qwen2, SharedPromptAttention
from plumbing import engine
from plumbing.engine import LENGTH_STEP, Sampler
from plumbing.fast_decode import FlashCache, draw_in_blocks
from plumbing.packed import packed_works
from rollout import flat_batch, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "stop_on_signals", lambda: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs(*SHAPES[0]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-4), ("bf16", 0.2)])
def test_logits_equal_transformers(folder, dtype, limit):
    ours, network = Qwen2.from_pretrained(folder, "cuda", dtype), theirs(*SHAPES[0]).cuda()
    ids = torch.arange(50, device="cuda")
    with torch.no_grad():
        attend = SharedPromptAttention([50], [[]], "cuda")
        difference = (ours.logits(ours(ids, ids, attend)).float() - network(ids[None]).logits[0])
    print(f"{dtype}: maximum difference of logits {difference.abs().max().item():.1e}")
    assert difference.abs().max() < limit


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-3), ("bf16", 0.2)])
def test_cached_decoding_equals_teacher_forcing(folder, dtype, limit):
    model = Qwen2.from_pretrained(folder, "cuda", dtype)
    prompts = random_batch()[0]
    result = generate(model, prompts, 8, 40, 0.8, 0.9, seed=1)
    scored, _ = model.completion_log_probs(flat_batch(prompts, result.completions, "cuda"), 0.8)
    sampled = torch.tensor([x for group in result.logps for row in group for x in row],
                           device="cuda")
    gap = (scored - sampled).abs()
    print(f"{dtype}: sampler-trainer gap mean {gap.mean().item():.1e}, max {gap.max().item():.1e}")
    assert gap.mean() < limit / 10 and gap.max() < limit


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_before_the_first_optimizer_step_every_ratio_is_one(monkeypatch, dtype):
    log_ratios = []
    policy_loss = train.policy_loss

    def watched(*arguments):
        loss, log_ratio = policy_loss(*arguments)
        log_ratios.append(log_ratio.abs().max().item())
        return loss, log_ratio
    monkeypatch.setattr(train, "policy_loss", watched)
    _, minibatches = updated(device="cuda", dtype=dtype, minibatches=2,
                             tokens_per_microbatch=60)
    first = len(minibatches[0])
    assert first >= 2 and log_ratios[:first] == [0.0] * first and max(log_ratios[first:]) > 0


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6])
def test_captured_steps_equal_plain_ones(folder, monkeypatch, top_p):
    def rollouts(model):
        for step in range(2):  # the second call finds the first one's graphs, and newer weights
            yield generate(model, random_batch()[0], 8, 70, 1.0, top_p, seed=1, step=step,
                           max_rows=16)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
    captured, plain = (Qwen2.from_pretrained(folder, "cuda", "bf16") for _ in range(2))
    expected = list(rollouts(captured))
    (sampler,) = captured.kept_samplers.values()
    assert len(sampler.graphs) > 1
    monkeypatch.setattr(Sampler, "step_or_replay", lambda self, n_own: self.step(
        min(-(-n_own // LENGTH_STEP) * LENGTH_STEP, self.T)))
    for one, two in zip(expected, rollouts(plain), strict=True):
        same = [a == b for a, b in zip(sum(one.completions, []), sum(two.completions, []))]
        print(f"top-p {top_p}: {sum(same)} of {len(same)} completions equal")
        assert sum(same) > 0.9 * len(same)  # sums over a single row are not deterministic there


def test_the_graph_is_captured_once_a_size_and_refreshed_in_place(folder):
    model = Qwen2.from_pretrained(folder, "cuda", "bf16")
    prompts = random_batch()[0]
    generate(model, prompts, 8, 40, 1.0)
    (sampler,) = model.kept_samplers.values()
    graphs = dict(sampler.graphs)
    generate(model, prompts, 8, 40, 1.0, seed=2)
    assert list(model.kept_samplers.values()) == [sampler]
    assert all(sampler.graphs[size] is graph for size, graph in graphs.items())


def test_a_sampler_that_is_dropped_leaves_the_graphs_of_the_others_whole(folder):
    model = Qwen2.from_pretrained(folder, "cuda", "bf16")

    def sampled(group_size):
        return generate(model, random_batch()[0], group_size, 40, 1.0, seed=3).completions
    sampled(4)
    before = sampled(8)
    (_, kept) = model.kept_samplers.values()
    sampled(2)  # two are kept, so that the first goes
    assert sampled(8) == before and kept in model.kept_samplers.values()


def test_gradients_are_finite_at_the_lengths_where_a_fused_kernel_once_gave_nan(folder):
    model = Qwen2.from_pretrained(folder, "cuda", "bf16")
    g = torch.Generator().manual_seed(0)
    for n in (32, 64, 100):  # 64 and 28 + 100: sequences of 64 modulo 128 keys
        completions = [torch.randint(97, (n,), generator=g).tolist() for _ in range(4)]
        batch = flat_batch([completions[0][:28]], [completions], "cuda")
        model.zero_grad()
        model.accumulate_gradients(batch, 1.0, lambda logp, chunk: logp.mean())
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_packed_attention_is_used_and_gives_the_padded_gradients(folder, monkeypatch):
    assert packed_works(SharedPromptAttention, torch.device("cuda"))
    found = []
    for packs in (packed_works, lambda *arguments: False):
        monkeypatch.setattr("model.packed_works", packs)
        model = Qwen2.from_pretrained(folder, "cuda", "bf16")
        batch = flat_batch(*random_batch(), "cuda")
        assert (batch.attend.packed is not None) == (packs is packed_works)
        logp, _ = model.accumulate_gradients(batch, 0.8, lambda logp, chunk: logp.sum())
        found.append([logp, *(p.grad for p in model.parameters())])
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found))
    print(f"log-probs and gradients, packed beside padded: at most {worst:.1e} apart")
    assert worst < 0.05


def test_what_is_compiled_gives_what_is_written(capsys):
    """No line says that something runs as it is written."""
    for name, arguments in {
            "swiglu": lambda N: [torch.randn(N, 9728)],
            "rotate": lambda N: [torch.randn(N, 16, 64), (torch.randn(N, 1, 64),) * 2]}.items():
        for N in (5, 60):
            inputs = [x.cuda().bfloat16().requires_grad_() if torch.is_tensor(x)
                      else tuple(y.cuda().bfloat16() for y in x) for x in arguments(N)]
            getattr(model_module, name)(*inputs).float().square().sum().backward()
    logit_RV, u_RU = 3 * torch.randn(400, 3001, device="cuda"), torch.rand(400, 8, device="cuda")
    peaked_RV = torch.tensor([0.60, 0.35, 0.03, 0.02], device="cuda").log() + logit_RV[:, :1]
    for temperature in (0.8, 1.1, 0.55):  # the later ones are compiled for any temperature
        with torch.inference_mode():
            fast = draw_in_blocks(logit_RV, u_RU, temperature, 0.9)
            second_R = draw_in_blocks(peaked_RV * temperature, torch.full_like(u_RU[:, :1], 0.8),
                                      temperature, 0.9)[0]
        slow = draw_in_blocks(logit_RV.cpu(), u_RU.cpu(), temperature, 0.9)
        same_R = fast[0].cpu() == slow[0]
        assert same_R.double().mean() > 0.98  # rounding can tip a draw
        assert (fast[1].cpu() - slow[1])[same_R].abs().max() < 1e-4
        assert (second_R == 1).all()  # a token is not likelier than itself
    assert capsys.readouterr().err == ""


def test_the_faster_step_gives_the_tokens_of_the_trainers_policy(folder, monkeypatch, capsys):
    """Its log-probs are the trainer's; a prompt's first tokens are as frequent as the plain step's.
    """
    monkeypatch.setattr(engine, "FAST", True)
    model = Qwen2.from_pretrained(folder, "cuda", "bf16")
    prompts, n = random_batch()[0], 2000
    result = generate(model, prompts, 8, 40, 0.8, 0.9, seed=1)
    (sampler,) = model.kept_samplers.values()
    assert isinstance(sampler.attention, FlashCache) and capsys.readouterr().err == ""
    scored, _ = model.completion_log_probs(flat_batch(prompts, result.completions, "cuda"), 0.8)
    sampled = torch.tensor([x for group in result.logps for row in group for x in row],
                           device="cuda")
    assert (scored - sampled).abs().mean() < 0.02
    counts = []
    for fast in (True, False):
        monkeypatch.setattr(engine, "FAST", fast)
        model.kept_samplers.clear()
        drawn = generate(model, prompts[:1], n, 1, 0.8, 0.9, seed=2 + fast, max_rows=n)
        counts.append(torch.bincount(torch.tensor(drawn.completions).flatten(), minlength=97))
    a, b = (x.double() for x in counts)
    seen = (a + b) > 10
    chi_square = ((a - b).square() / (a + b))[seen].sum().item()
    print(f"chi-square {chi_square:.0f} with {seen.sum().item() - 1} degrees of freedom")
    assert chi_square < seen.sum().item() + 4 * (2 * seen.sum().item()) ** 0.5


def test_the_bench_runs(tmp_path):
    from bench import __main__ as bench
    bench.main(["step", "--device", "cuda", "--rounds", "1", "--out", str(tmp_path)])
    assert "tokens/s" in (tmp_path / "step-0.8m-cuda.md").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_the_embedded_model_trains(dtype):
    run("--device", "cuda", "--dtype", dtype, "--reward", "noise")
    assert metrics("tiny-pspo-s0")[-1]["gradient_norm"] > 0

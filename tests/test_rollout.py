"""rollout.py: cached decoding, the sampler's frequencies, and the flat batch."""
import math

import pytest
import torch
from test_model import SHAPES, needs_onednn, random_batch, theirs

import rollout
from model import Qwen2
from objectives import noclip, policy_loss
from plumbing import engine, onednn
from rollout import flat_batch, generate, inverse_cdf, n_draws, sample, sample_slowly, uniform

FALSE_ALARM = 1e-6  # chance that a chi-square test below fails though the sampler is right


@pytest.fixture(scope="module")
def network():
    return theirs(*SHAPES[0])


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    return Qwen2.from_pretrained(folder)


def some_prompts():
    g = torch.Generator().manual_seed(3)
    return [torch.randint(97, (n,), generator=g).tolist() for n in (7, 12, 3)]


def flat(nested):
    """One list over all groups."""
    return [x for group in nested for x in group]


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("shape", [SHAPES[0], *SHAPES[5:]], ids=str)
def test_greedy_text_equals_transformers(shape, machine, tmp_path):
    network = theirs(*shape)
    network.save_pretrained(tmp_path)
    model = Qwen2.from_pretrained(tmp_path)
    result = generate(model, some_prompts(), 1, 40, 0.0)
    for prompt, (ours,) in zip(some_prompts(), result.completions, strict=True):
        output = network.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert ours == output[0, len(prompt):].tolist()


def test_cached_decoding_equals_teacher_forcing(model, machine):
    # The sampler's log-probs come from the cache, one token at a time, while rows finish and are
    # dropped; the scored ones from one pass over the finished text.
    result = generate(model, some_prompts(), 6, 40, 0.8, seed=4)
    lengths = [len(c) for c in flat(result.completions)]
    assert len(set(lengths)) > 3, "rows should finish at different times for this to mean anything"
    scored, _ = model.completion_log_probs(flat_batch(result.prompts, result.completions), 0.8)
    sampled = torch.tensor([x for row in flat(result.logps) for x in row])
    gap = (scored - sampled).abs().max().item()
    print(f"largest gap between cached and whole: {gap:.1e} nats")
    assert gap < 2e-5


def slow_generate(network, prompt, temperature, top_p, counters, stop_ids, max_new_tokens):
    """One completion, the obvious way: transformers computes the whole text anew for each token."""
    ids, logps = list(prompt), []
    while len(ids) < len(prompt) + max_new_tokens and (not logps or ids[-1] not in stop_ids):
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, -1]
        logp = (logits / temperature).log_softmax(-1)
        prob = logp.exp()
        ascending = prob.sort().values
        for draw in range(rollout.MAX_DRAWS):
            u = uniform(*(torch.tensor([x]) for x in (*counters, len(logps), draw)))
            if 0.9 <= top_p < 1:  # draw from everything until a token of the nucleus comes
                token = int((prob.cumsum(0) <= u * prob.sum()).sum())
                if prob[prob > prob[token]].sum() < top_p:
                    break
            else:  # leave out what the nucleus does not hold, and draw once
                smallest = min(p for p in ascending if ascending[ascending > p].sum() < top_p)
                cdf = torch.where(prob >= smallest, prob, 0).cumsum(0)
                token = int((cdf <= u * cdf[-1]).sum())
                break
        ids.append(token)
        logps.append(logp[token].item())
    return ids[len(prompt):], logps


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6])
@pytest.mark.parametrize("max_rows", [256, 4, 5], ids=["one wave", "one group at a time", "refill"])
def test_sampling_equals_the_slow_and_obvious_way(model, network, top_p, max_rows, machine):
    prompts = [*some_prompts(), [9], *some_prompts()[:2]]  # one prompt of a single token
    keys = [3, 1, 4, 15, 9, 2]
    result = generate(model, prompts, 4, 24, 1.2, top_p, 11, 5, keys, max_rows)
    assert len({len(ids) for ids in flat(result.completions)}) > 3
    finished = flat(result.finished)
    for b, (ids, logps) in enumerate(zip(flat(result.completions), flat(result.logps),
                                         strict=True)):
        slow_ids, slow_logps = slow_generate(network, prompts[b // 4], 1.2, top_p,
                                             (11, 5, keys[b // 4], b % 4), model.stop_ids, 24)
        assert ids == slow_ids and logps == pytest.approx(slow_logps, abs=2e-5)
        assert finished[b] == (slow_ids[-1] in model.stop_ids)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.8, 0.9), (1.2, 0.5), (0.0, 1.0)])
def test_the_fast_sampler_gives_what_the_slow_one_defines(model, machine, temperature, top_p):
    work = (model, some_prompts(), 3, 20, temperature, top_p, 4, 1, [7, 8, 2])
    fast, slow = generate(*work, max_rows=4), sample_slowly(*work)
    assert (fast.completions, fast.finished) == (slow.completions, slow.finished)
    for one, two in zip(flat(fast.logps), flat(slow.logps), strict=True):
        assert one == pytest.approx(two, abs=2e-5)


@needs_onednn
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_reordered_weights_give_the_log_probs_of_the_weights_as_they_now_are(
        dtype, rounding, model, monkeypatch):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN computes no products in bf16 on this processor")
    monkeypatch.setattr(onednn, "LARGE", 1)
    monkeypatch.setattr(model, "compute_dtype", dtype)
    twin = model.for_sampling()
    onednn.reorder_weights(twin)
    assert twin.reordered_head.is_mkldnn
    assert {p.is_mkldnn for p in twin.model["layers"].parameters() if p.dim() == 2} == {True}
    weight = model.model["layers"][0].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        for factor in (1, -1):  # a rollout reorders what the update before it left
            weight.data.mul_(factor)
            result = generate(model, some_prompts(), 3, 20, 0.8, seed=4)
            batch = flat_batch(result.prompts, result.completions)
            scored, _ = model.completion_log_probs(batch, 0.8)
            sampled = torch.tensor([x for row in flat(result.logps) for x in row])
            torch.testing.assert_close(scored, sampled, atol=rounding, rtol=0)
    finally:
        weight.data.copy_(before)


def test_the_embedded_model_is_not_reordered_so_that_recorded_runs_repeat():
    twin = Qwen2.from_pretrained("tiny").for_sampling()
    onednn.reorder_weights(twin)
    assert twin.reordered_head is None and not any(p.is_mkldnn for p in twin.parameters())


def test_waves_and_company_change_no_text(model, machine):
    # A row's draws are keyed by (seed, step, prompt, sample, position), not by where it runs.
    prompts = some_prompts()
    together = generate(model, prompts, 4, 30, 1.0, seed=6)
    waves = generate(model, prompts, 4, 30, 1.0, seed=6, max_rows=4)
    alone = generate(model, prompts[1:2], 4, 30, 1.0, seed=6, prompt_keys=[1])
    assert waves.completions == together.completions
    assert alone.completions == together.completions[1:2]
    for other in (dict(seed=7), dict(seed=6, step=1), dict(seed=6, prompt_keys=[5, 6, 7])):
        assert generate(model, prompts, 4, 30, 1.0, **other).completions != together.completions


def test_completions_end_with_their_first_stop_token_or_at_the_limit(model, machine):
    result = generate(model, some_prompts(), 8, 30, 1.2, seed=8)
    assert any(flat(result.finished)) and not all(flat(result.finished))
    for ids, finished in zip(flat(result.completions), flat(result.finished)):
        stops = [t for t, i in enumerate(ids) if i in model.stop_ids]
        assert stops == ([len(ids) - 1] if finished else [])
        assert finished or len(ids) == 30


def test_finished_rows_leave_the_computation(model, monkeypatch):
    rows = []
    forward = Qwen2.forward

    def counted(self, ids_N, positions_N, attend):
        rows.append(len(ids_N))
        return forward(self, ids_N, positions_N, attend)
    monkeypatch.setattr(Qwen2, "forward", counted)
    monkeypatch.setattr(model, "stop_ids", [3, 4, 5, 6, 7])  # lengths of about 97 / 5 tokens
    result = generate(model, some_prompts(), 8, 60, 1.2, seed=8)
    lengths = [len(c) for c in flat(result.completions)]
    assert rows.pop(0) == sum(map(len, some_prompts()))  # prompts once, not once a sample
    for t, n in enumerate(rows):  # what runs at step t, rounded up to a size, a few steps late
        running = sum(length > t - t % engine.LOOK_EVERY for length in lengths)
        assert n == min(engine.size_for(running), len(lengths))
    assert sum(rows) < 0.8 * len(lengths) * max(lengths)


def test_sizes_are_two_to_a_doubling():
    assert [engine.size_for(n) for n in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12,
                                                           16, 16, 16, 16, 24]


def test_places_of_ended_rows_are_refilled(model, monkeypatch):
    rows = []
    forward = Qwen2.forward

    def counted(self, ids_N, positions_N, attend):
        if isinstance(attend, engine.CachedAttention):
            rows.append(len(ids_N))
        return forward(self, ids_N, positions_N, attend)
    monkeypatch.setattr(Qwen2, "forward", counted)
    monkeypatch.setattr(model, "stop_ids", [3, 4, 5, 6, 7])  # lengths of about 97 / 5 tokens
    prompts = some_prompts() * 8
    result = generate(model, prompts, 4, 60, 1.2, seed=8, max_rows=16)
    lengths = [len(c) for c in flat(result.completions)]
    waves = sum(max(lengths[i:i + 16]) * 16 for i in range(0, len(lengths), 16))
    assert max(rows) == 16
    assert sum(lengths) / sum(rows) > 0.7 > 0.5 > sum(lengths) / waves


@pytest.mark.parametrize("prompts, settings, message", [
    ([[1] * 100], dict(max_new_tokens=30), "prompt 0 has 100 tokens.*context is 128"),
    ([[1], []], {}, "prompt 1 has 0 tokens"),
    ([[1]], dict(group_size=9, max_rows=8), "does not hold one group")])
def test_what_does_not_fit_is_refused(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 4, **settings})


# ---------------------------------------------------------------- the draw

def draws(prob, n, temperature=1.0, top_p=1.0, seed=0):
    """How often each token comes out of n draws from one distribution."""
    logp = prob.log()[None].expand(n, -1)
    row = torch.arange(n)
    u = uniform(seed, 0, row[:, None], row[:, None] * 0, 0, torch.arange(n_draws(top_p)))
    tokens = sample(logp, u, temperature, top_p)
    return torch.bincount(tokens, minlength=len(prob)).double()


def assert_follows(counts, prob):
    """Chi-square goodness of fit at the stated false-alarm rate (Wilson–Hilferty approximation)."""
    assert counts[prob == 0].sum() == 0, "a token outside the distribution was drawn"
    expected = prob[prob > 0].double() / prob.sum() * counts.sum()
    assert expected.min() > 5, "too few expected draws for the approximation"
    chi2 = ((counts[prob > 0] - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    z = ((chi2 / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    p_value = math.erfc(z / math.sqrt(2)) / 2
    assert p_value > FALSE_ALARM, f"chi-square {chi2:.1f} at {freedom} degrees, p {p_value:.1e}"


PROB = torch.tensor([0.02, 0.3, 0.08, 0.25, 0.05, 0.2, 0.07, 0.03])


def test_frequencies_match_the_softmax():
    assert_follows(draws(PROB, 100_000), PROB)


@pytest.mark.parametrize("top_p, nucleus", [
    # sorted: .30 .25 .20 .08 .07 .05 .03 .02; the mass before each: 0 .30 .55 .75 .83 .90 .95 .98
    (0.5, [1, 3]), (0.6, [1, 3, 5]), (0.85, [1, 3, 5, 2, 6]), (0.92, [1, 3, 5, 2, 6, 4]),
    (0.97, [1, 3, 5, 2, 6, 4, 7]), (1e-6, [1])])
def test_frequencies_match_the_nucleus(top_p, nucleus):
    inside = torch.zeros_like(PROB)
    inside[nucleus] = PROB[nucleus]
    counts = draws(PROB, 100_000, top_p=top_p)
    if len(nucleus) == 1:
        assert counts[nucleus[0]] == 100_000
    else:
        assert_follows(counts, inside)


def test_tokens_that_tie_are_in_the_nucleus_together():
    # 1/4 each at p = 0.5: no token has strictly likelier ones, so all four are inside, either way
    equal = torch.full((4,), 0.25)
    for top_p in (0.5, 0.95):
        assert_follows(draws(equal, 10_000, top_p=top_p), equal)


def test_the_chi_square_test_can_fail():
    skewed = PROB.clone()
    skewed[1] += 0.01
    with pytest.raises(AssertionError, match="chi-square"):
        assert_follows(draws(skewed / skewed.sum(), 400_000), PROB)


def test_temperature_zero_takes_the_likeliest():
    assert draws(PROB, 10, temperature=0.0)[1] == 10


def test_both_ends_of_the_uniform_pick_a_token_that_has_probability():
    first, last = torch.tensor([0.0]), torch.tensor([1 - 2**-24])
    prob = torch.tensor([[0.0, 0.0, 0.6, 0.4, 0.0, 0.0]])
    prob = prob.cumsum(-1)
    assert inverse_cdf(prob, first).item() == 2  # not the masked id 0, whose cdf is also ≤ 0
    assert inverse_cdf(prob, last).item() == 3  # not the masked id 5
    # at a vocabulary's size the sum is not exactly 1 in fp32, and u·total may round to the total
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        prob = torch.rand(1, 151_936, generator=g).softmax(-1)
        prob[:, 151_665:] = 0
        prob[:, :7] = 0
        assert inverse_cdf(prob.cumsum(-1), first).item() == 7
        assert prob[0, inverse_cdf(prob.cumsum(-1), last).item()] > 0


def test_uniform_is_a_hash_of_all_its_counters_and_uniform():
    row = torch.arange(4096)
    u = uniform(0, 0, row, row * 0, 0, 0)
    assert u.dtype == torch.float32 and (u >= 0).all() and u.max() <= 1 - 2**-24
    assert torch.equal(u, uniform(0, 0, row, row * 0, 0, 0))
    zero, ones = row * 0, row * 0 + 1
    others = [uniform(1, 0, row, zero, 0, 0), uniform(0, 1, row, zero, 0, 0),
              uniform(0, 0, row, ones, 0, 0), uniform(0, 0, row, zero, 1, 0),
              uniform(0, 0, row, zero, 0, 1), uniform(0, -1, row, zero, 0, 0)]
    for v in others:  # no counter is ignored, and neighbours are not correlated: |r| < 5/√4096
        assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 5 / 64
    assert_follows(torch.histc(u, 16, 0, 1).double(), torch.full((16,), 1 / 16))
    # SplitMix64's finaliser, by hand in Python's exact integers
    state, mask = 0, 2**64 - 1
    for counter in (9, 2, 3, 4, 5, 6):
        state = ((state ^ counter) + 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state = state ^ state >> 31
    u = uniform(9, 2, torch.tensor([3]), torch.tensor([4]), 5, 6)
    assert u.item() == (state >> 40) / 2**24


# ---------------------------------------------------------------- the flat batch

def test_a_group_is_scored_with_its_prompt_once():
    prompt, completions = [1] * 100, [[2] * 30] * 8
    batch = flat_batch([prompt], [completions])
    print(f"tokens in the forward pass: {len(batch.ids_N)}")
    assert len(batch.ids_N) == 100 + 8 * 30 and len(batch.target_M) == 8 * 30


def test_flat_batch_by_hand():
    # prompts [10 11] and [20]; completions [12 13] and [14] of the first, none and [21] of the next
    batch = flat_batch([[10, 11], [20]], [[[12, 13], [14]], [[], [21]]])
    assert batch.ids_N.tolist() == [10, 11, 20, 12, 13, 14, 21]
    assert batch.positions_N.tolist() == [0, 1, 0, 2, 3, 2, 1]
    assert batch.target_M.tolist() == [12, 13, 14, 21]
    # 12 and 14 are predicted by token 11 at row 1, 13 by 12 at row 3, 21 by 20 at row 2
    assert batch.predictor_M.tolist() == [1, 3, 1, 2]
    assert batch.sequence_M.tolist() == [0, 0, 1, 3]
    assert batch.chunks(2) == [slice(0, 2), slice(2, 4)]
    assert batch.chunks(1) == [slice(0, 2), slice(2, 3), slice(3, 4)]  # a completion stays whole


def test_group_shared_scoring_equals_separate_scoring_gradients_included(model, machine):
    g = torch.Generator().manual_seed(9)
    prompt = torch.randint(97, (100 - 70,), generator=g).tolist()
    completions = [torch.randint(97, (n,), generator=g).tolist() for n in (30, 30, 11, 1, 25)]
    advantage = torch.randn(sum(map(len, completions)), generator=g)

    def gradients(prompts, groups):
        batch = flat_batch(prompts, groups)
        model.zero_grad()

        def loss(logp, chunk):
            weight = torch.full_like(logp, 1 / len(advantage))
            return policy_loss(logp, logp.detach(), advantage[chunk], weight,
                               batch.sequence_M[chunk], noclip)[0]
        logp, _ = model.accumulate_gradients(batch, 1.0, loss)
        return logp, {name: p.grad.clone() for name, p in model.named_parameters()}
    shared_logp, shared = gradients([prompt], [completions])
    single_logp, single = gradients([prompt] * 5, [[c] for c in completions])
    assert (shared_logp - single_logp).abs().max() < 1e-5
    for name in shared:
        assert (shared[name] - single[name]).norm() / single[name].norm() < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_without_gradient_equals_one_with_it_bit_for_bit(model, dtype, machine):
    prompts, completions = random_batch(seed=10)
    batch = flat_batch(prompts, completions)
    model.compute_dtype = dtype
    try:
        quiet, _ = model.completion_log_probs(batch, 0.8)
        loud, _ = model.accumulate_gradients(batch, 0.8, lambda logp, chunk: logp.sum())
    finally:
        model.compute_dtype = torch.float32
    assert torch.equal(quiet, loud)


def test_the_stop_token_is_trained_on_though_pad_equals_eos(model, machine):
    stop = model.stop_ids[0]
    batch = flat_batch([[1, 2]], [[[3, stop], [4, 6, stop]]])
    assert (batch.target_M == stop).sum() == 2
    model.zero_grad()
    model.accumulate_gradients(batch, 1.0, lambda logp, chunk: -logp[batch.target_M == stop].sum())
    assert model.get_parameter("model.embed_tokens.weight").grad[stop].norm() > 0

"""The mathematics of PSPO as executable claims: read it beside objectives.py.

What it does    states what the objectives, advantages, weights and estimators are, in numbers
                worked by hand (in the comments) or by an independent computation.
Not here        the model, the sampler, the grader and the loop (tests/).
Run it alone    python -m pytest test_objectives.py -v
Where to fork   a new objective: its values, its gradient, where its gradient vanishes.
"""
import math
from functools import partial

import pytest
import torch

import objectives
from objectives import (
    OBJECTIVES,
    cispo,
    clip,
    group_advantages,
    kl_k3,
    noclip,
    policy_loss,
    pspo,
    ratio_diagnostics,
    reduction_weights,
    sapo,
    scopic,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradient(objective, ratio, advantage):
    """d objective / d ratio, elementwise (times the ratio it is the README's weight)."""
    ratio = ratio.clone().requires_grad_()
    return torch.autograd.grad(objective(ratio, advantage).sum(), ratio)[0]


def random_policies(n, size, seed):
    """(2, n, size): two stacks of n distributions over `size` tokens, sharp and flat among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, size, generator=generator, dtype=torch.float64)
    return (logits * torch.linspace(0.1, 6, n, dtype=torch.float64)[:, None]).softmax(-1)


# ---------------------------------------------------------------- advantages

def test_advantages_by_hand():
    # rewards 1 0 0 0: mean 1/4; squares (9 + 1 + 1 + 1)/16 = 12/16, over n − 1 = 3: 1/4, std 1/2
    advantage = group_advantages(tensor(1, 0, 0, 0)[None])
    expected = tensor(0.75, -0.25, -0.25, -0.25)[None] / (0.5 + 1e-4)
    assert torch.equal(advantage, expected)
    # without the division what is left is the distance from the mean
    assert group_advantages(tensor(3, 1)[None], scale="none").tolist() == [[1.0, -1.0]]


def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero():
    # 0.1 is not a binary fraction: mean(0.1 × 3) differs from 0.1 in the last bit, and a difference
    # of 1e-17 divided by a std of 0 + 1e-4 would be a small push, not none
    reward = torch.tensor([[0.1, 0.1, 0.1], [1.05, 1.05, 1.05], [0.0, 0.0, 1.0]])
    for scale in ("std", "none"):
        advantage = group_advantages(reward, scale)
        assert (advantage[:2] == 0).all() and (advantage[2] != 0).all()


def test_advantages_of_a_group_sum_to_zero_and_do_not_depend_on_other_groups():
    reward = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage = group_advantages(reward)
    assert advantage.sum(1).abs().max() < 1e-12
    assert torch.equal(advantage[2:3], group_advantages(reward[2:3]))


@pytest.mark.parametrize("reward, message", [
    (torch.zeros(4), r"\(prompts, group size\)"), (torch.zeros(4, 1), "2 or more"),
    (torch.tensor([[0.0, math.nan]]), "not finite")])
def test_rewards_of_another_shape_or_not_finite_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(reward)


# ---------------------------------------------------------------- objectives

def test_objectives_by_hand():
    ratio, advantage = tensor(0.5, 1.0, 1.5, 1.5), tensor(2.0, 2.0, 2.0, -2.0)
    # noclip: r·A
    assert noclip(ratio, advantage).tolist() == [1.0, 2.0, 3.0, -3.0]
    # pspo, α = 0.1: r̃ = 0.9·r + 0.1 = 0.55, 1, 1.45
    torch.testing.assert_close(pspo(ratio, advantage, 0.1), tensor(1.1, 2.0, 2.9, -2.9))
    # clip at 0.2: 0.5·2 is less than 0.8·2; 1.2·2 is less than 1.5·2; −1.5·2 is less than −1.2·2
    torch.testing.assert_close(clip(ratio, advantage, 0.2, 0.2), tensor(1.0, 2.0, 2.4, -3.0))
    # separate ends: 1.28·2 = 2.56
    torch.testing.assert_close(clip(ratio, advantage, 0.2, 0.28), tensor(1.0, 2.0, 2.56, -3.0))


def test_clip_has_no_gradient_once_the_ratio_has_gone_the_way_the_advantage_wants():
    # ratio:            0.7                0.9, 1.1           1.3
    # A > 0: may rise   gradient A         gradient A         none: already above 1.2
    # A < 0: may fall   none: below 0.8    gradient A         gradient A
    # Ignoring the sign of A, a common slip, would also cut the other two corners.
    ratio = tensor(0.7, 0.9, 1.1, 1.3)
    assert gradient(clip, ratio, torch.full_like(ratio, 2.0)).tolist() == [2, 2, 2, 0]
    assert gradient(clip, ratio, torch.full_like(ratio, -2.0)).tolist() == [0, -2, -2, -2]


def test_pspo_with_alpha_zero_is_noclip_and_with_alpha_one_has_no_gradient():
    ratio = torch.linspace(0, 5, 101, dtype=torch.float64)
    for advantage in (torch.ones_like(ratio), -torch.ones_like(ratio)):
        assert torch.equal(pspo(ratio, advantage, 0.0), noclip(ratio, advantage))
        assert torch.equal(pspo(ratio, advantage, 1.0), advantage)
        assert (gradient(partial(pspo, alpha=1.0), ratio, advantage) == 0).all()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 0.9])
def test_pspo_gradient_is_one_minus_alpha_times_unclipped(alpha):
    generator = torch.Generator().manual_seed(1)
    ratio = torch.rand(1000, generator=generator, dtype=torch.float64) * 10
    advantage = torch.randn(1000, generator=generator, dtype=torch.float64)
    pspo_gradient = gradient(partial(pspo, alpha=alpha), ratio, advantage)
    expected = (1 - alpha) * gradient(noclip, ratio, advantage)
    torch.testing.assert_close(pspo_gradient, expected, rtol=1e-14, atol=0)


def test_smoothing_the_probability_is_smoothing_the_ratio():
    policy, old = random_policies(50, 7, seed=2)
    for alpha in (0.1, 0.6):
        smoothed = (1 - alpha) * policy + alpha * old
        torch.testing.assert_close(smoothed / old, pspo(policy / old, torch.tensor(1.0), alpha))


def test_smoothing_contracts_the_total_variation_by_one_minus_alpha():
    policy, old = random_policies(200, 20, seed=3)
    for alpha in (0.1, 0.5, 0.9):
        smoothed = (1 - alpha) * policy + alpha * old
        before, after = ((p - old).abs().sum(-1) / 2 for p in (policy, smoothed))
        torch.testing.assert_close(after, (1 - alpha) * before, rtol=1e-12, atol=0)


def test_smoothing_bounds_the_kl_by_one_minus_alpha():
    # KL is convex in its first argument: KL((1 − α)p + αq ‖ q) ≤ (1 − α)·KL(p‖q) + α·KL(q‖q)
    policy, old = random_policies(200, 20, seed=4)
    for alpha in (0.1, 0.5, 0.9):
        smoothed = (1 - alpha) * policy + alpha * old
        before, after = ((p * (p / old).log()).sum(-1) for p in (policy, smoothed))
        assert (after <= (1 - alpha) * before + 1e-15).all()
        assert (after < 0.999 * (1 - alpha) * before).any()  # a bound, not an equality


def test_nothing_bounds_the_ratio_of_the_policy_that_generates():
    # The contraction holds for the mixture π̃. The weight on A·∇log π grows with r without end.
    for ratio in (10.0, 1000.0):
        r, a = tensor(ratio), tensor(1.0)
        assert gradient(partial(pspo, alpha=0.1), r, a).item() * ratio == pytest.approx(0.9 * ratio)
        assert gradient(clip, r, a).item() == 0


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    ratio, advantage = tensor(0.25, 1.0, 3.0, 8.0, 8.0), tensor(2.0, 2.0, 2.0, 2.0, -1.0)
    # ∂/∂log π = min(r, 5)·A; `gradient` is ∂/∂r, which is that divided by r
    expected = tensor(0.5, 2.0, 6.0, 10.0, -5.0)
    torch.testing.assert_close(gradient(cispo, ratio, advantage) * ratio, expected)
    # in value, the bounded weight times log r times A: 5·log 8·2
    assert cispo(ratio, advantage)[3].item() == pytest.approx(10 * math.log(8))
    with pytest.raises(ValueError, match="ratio_max is 0.5"):
        cispo(ratio, advantage, 0.5)


def test_soft_gates_by_hand():
    ratio = tensor(0.2, 1.0, 3.0, 3.0)
    advantage = tensor(1.0, 1.0, 1.0, -1.0)
    # A > 0, τ = 1: 4σ(r − 1); A < 0, τ = 1.05: (4/1.05)·σ(2.1) = 3.80952·0.890903 = 3.393914
    expected = tensor(4 / (1 + math.exp(0.8)), 2.0, 4 / (1 + math.exp(-2)), -3.3939145)
    torch.testing.assert_close(sapo(ratio, advantage), expected, rtol=1e-6, atol=0)
    # the gradient in log π is r·4p(1 − p)·A with p = σ(τ(r − 1)): at r = 1 it is A whatever τ is
    for tau_positive, tau_negative in ((1.0, 1.05), (3.0, 7.0)):
        objective = partial(sapo, tau_positive=tau_positive, tau_negative=tau_negative)
        tau = torch.where(advantage > 0, tau_positive, tau_negative)
        p = 1 / (1 + (-tau * (ratio - 1)).exp())
        torch.testing.assert_close(gradient(objective, ratio, advantage),
                                   4 * p * (1 - p) * advantage)
        torch.testing.assert_close(gradient(objective, tensor(1.0, 1.0), tensor(2.0, -2.0)),
                                   tensor(2.0, -2.0))
    # Scopic is that gate with one τ: σ(4·0.25) for r = 1.25, A = 1
    found = scopic(tensor(1.25), tensor(1.0))
    assert found.item() == pytest.approx(1 / (1 + math.exp(-1)))
    with pytest.raises(ValueError, match="tau_negative is 0"):
        sapo(ratio, advantage, 1.0, 0)


def test_a_ratio_of_whole_completions_by_hand():
    # Two completions of 2 and 1 tokens; log-ratios (0.4, −0.2), mean 0.1, and 0.3.
    logp = tensor(-0.6, -1.2, -0.7).requires_grad_()
    old, sequence = tensor(-1.0, -1.0, -1.0), torch.tensor([3, 3, 7])
    weight = reduction_weights(torch.tensor([2, 1]), "sequence", 8).double()[[0, 0, 1]]
    advantage = tensor(2.0, 2.0, -1.0)
    loss, log_ratio = policy_loss(logp, old, advantage, weight, sequence, noclip, "sequence")
    # GSPO: −(s₁·A₁ + s₂·A₂)/2 with s = e^0.1 and e^0.3
    assert loss.item() == pytest.approx(-(2 * math.exp(0.1) - math.exp(0.3)) / 2)
    torch.testing.assert_close(log_ratio, tensor(0.4, -0.2, 0.3))  # for the metrics: per token
    loss.backward()
    # ∂s₁/∂logp = s₁/2 for both of its tokens, ∂s₂/∂logp = s₂
    expected = tensor(-math.exp(0.1) / 2, -math.exp(0.1) / 2, math.exp(0.3) / 2)
    torch.testing.assert_close(logp.grad, expected)
    # clipped: s₂ is above 1 + 4e-4, but A₂ < 0 keeps its gradient; s₁'s goes
    logp.grad = None
    gspo = partial(clip, epsilon_low=3e-4, epsilon_high=4e-4)
    policy_loss(logp, old, advantage, weight, sequence, gspo, "sequence")[0].backward()
    torch.testing.assert_close(logp.grad, tensor(0.0, 0.0, math.exp(0.3) / 2))
    with pytest.raises(ValueError, match="ratio_level is 'word'"):
        policy_loss(logp, old, advantage, weight, sequence, clip, "word")


def test_wrong_settings_of_an_objective_are_refused():
    one = tensor(1.0)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            pspo(one, one, alpha)
    for ends in ((-0.1, 0.2), (1.5, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match="epsilon"):
            clip(one, one, *ends)


# ---------------------------------------------------------------- weights and the loss

def test_reduction_weights_by_hand():
    length = torch.tensor([1, 3])
    # token: 4 tokens of 1/4. sequence: 1/2 for each completion, shared by its tokens.
    # constant, maximum 10: 1/20 for every token.
    assert reduction_weights(length, "token", 10).tolist() == [0.25, 0.25]
    assert reduction_weights(length, "sequence", 10).tolist() == pytest.approx([1 / 2, 1 / 6])
    assert reduction_weights(length, "constant", 10).tolist() == pytest.approx([1 / 20, 1 / 20])
    with pytest.raises(ValueError, match="token, sequence, constant"):
        reduction_weights(length, "mean", 10)


def test_an_empty_completion_keeps_every_weight_finite():
    for reduction in objectives.REDUCTIONS:
        for lengths in ([0, 2], [0, 0]):
            weight = reduction_weights(torch.tensor(lengths), reduction, 10)
            assert weight.isfinite().all()
    empty = torch.zeros(0)
    loss, log_ratio = policy_loss(empty, empty, empty, empty, empty.long(), noclip)
    assert loss.item() == 0 and log_ratio.shape == (0,)


def test_policy_loss_by_hand():
    # log-ratios log 2 and 0; r·A = 2·1 and 1·(−3); loss = −(0.5·2 + 0.25·(−3)) = −0.25
    logp = tensor(math.log(0.5), -1.0).requires_grad_()
    old = tensor(math.log(0.25), -1.0)
    loss, log_ratio = policy_loss(logp, old, tensor(1, -3), tensor(0.5, 0.25),
                                  torch.tensor([0, 1]), noclip)
    assert loss.item() == pytest.approx(-0.25)
    torch.testing.assert_close(log_ratio, tensor(math.log(2), 0))
    assert not log_ratio.requires_grad
    loss.backward()
    # d(−w·r·A)/d logp = −w·r·A: −1 and 0.75
    torch.testing.assert_close(logp.grad, tensor(-1.0, 0.75))


def fixed_rollout(seed=5, n_states=6, n_tokens=5, n_samples=400):
    """A tabular policy's rollout: logits (states, tokens), and per token state, id, advantage."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_states, n_tokens, generator=g, dtype=torch.float64)
    state = torch.randint(n_states, (n_samples,), generator=g)
    token = logits.softmax(-1)[state].multinomial(1, generator=g).squeeze(1)
    advantage = torch.randn(n_samples, generator=g, dtype=torch.float64)
    sequence = torch.arange(n_samples) // 8
    return logits, state, token, advantage, sequence


def test_splitting_a_step_into_micro_batches_changes_no_gradient():
    logits, state, token, advantage, sequence = fixed_rollout()
    old = logits.log_softmax(-1)[state, token] + 0.1 * advantage  # ratios away from 1
    length = torch.bincount(sequence)
    length[::3] += 4  # as if tokens were left out, so that the reductions differ
    for reduction in objectives.REDUCTIONS:
        weight = reduction_weights(length, reduction, 16).double()[sequence]
        for objective in (pspo, clip, noclip):
            gradients = []
            for n_parts in (1, 2, 7):
                leaf = logits.clone().requires_grad_()
                for part in torch.arange(len(token)).chunk(n_parts):
                    logp = leaf.log_softmax(-1)[state[part], token[part]]
                    policy_loss(logp, old[part], advantage[part], weight[part], sequence[part],
                                objective)[0].backward()
                gradients.append(leaf.grad)
            for other in gradients[1:]:
                torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-14)


def trajectory(optimizer_class, objective, learning_rate, n_rollouts=20, epochs=4):
    """Parameters after every optimizer step, on rollouts fixed beforehand: (steps, …) float64.

    Rollouts are replayed, not sampled anew, so that only the objective can make a difference.
    """
    start, state, token, advantage, sequence = fixed_rollout()
    logits = start.clone().requires_grad_()
    optimizer = optimizer_class([logits], lr=learning_rate)
    path = [start]
    for rollout in range(n_rollouts):
        mine = torch.arange(len(token)) % n_rollouts == rollout
        old = logits.detach().log_softmax(-1)[state[mine], token[mine]]
        weight = torch.full_like(old, 1 / len(old))
        for _ in range(epochs):
            optimizer.zero_grad()
            logp = logits.log_softmax(-1)[state[mine], token[mine]]
            policy_loss(logp, old, advantage[mine], weight, sequence[mine], objective)[0].backward()
            optimizer.step()
            path.append(logits.detach().clone())
    return torch.stack(path)


def test_alpha_is_a_learning_rate_factor_under_sgd_and_almost_nothing_under_adamw():
    # AdamW divides the gradient by its own running size, so a constant factor cancels, up to its
    # δ (torch's eps) of 1e-8. SGD does not: its steps shrink by the factor 1 − α.
    adamw = partial(torch.optim.AdamW, weight_decay=0.0)
    distances = {}
    for name, optimizer, learning_rate in (("sgd", torch.optim.SGD, 0.1), ("adamw", adamw, 1e-3)):
        plain, smoothed = (trajectory(optimizer, partial(pspo, alpha=a), learning_rate)
                           for a in (0.0, 0.1))
        travelled = (plain[-1] - plain[0]).norm()
        distances[name] = ((smoothed[-1] - plain[-1]).norm() / travelled).item()
        print(f"{name}: α 0.1 ends {distances[name]:.3%} of the distance travelled from α 0")
    assert distances["adamw"] < 0.002
    assert distances["sgd"] == pytest.approx(0.1, rel=0.1)


def test_adamw_with_alpha_is_adamw_with_a_larger_epsilon():
    # Its step is η·m/(√v + δ), m a mean of gradients, v one of their squares. With c = 1 − α before
    # the gradient that is η·c·m/(c·√v + δ) = η·m/(√v + δ/c): of α only δ/c is left.
    def adamw(epsilon):
        return partial(torch.optim.AdamW, weight_decay=0.0, eps=epsilon)
    for alpha in (0.1, 0.5, 0.9):
        smoothed = trajectory(adamw(1e-4), partial(pspo, alpha=alpha), 1e-3)
        plain = trajectory(adamw(1e-4), noclip, 1e-3)
        same = trajectory(adamw(1e-4 / (1 - alpha)), noclip, 1e-3)
        torch.testing.assert_close(smoothed, same, rtol=1e-9, atol=1e-11)
        assert (smoothed - plain).abs().max() > 1e-5  # with a δ of 1e-4 α is not nothing


def test_sgd_with_alpha_is_sgd_with_a_smaller_learning_rate():
    smoothed = trajectory(torch.optim.SGD, partial(pspo, alpha=0.1), 0.1)
    slower = trajectory(torch.optim.SGD, noclip, 0.1 * 0.9)
    torch.testing.assert_close(smoothed, slower, rtol=1e-12, atol=1e-14)


def test_the_first_optimizer_step_of_a_rollout_is_the_same_for_every_objective_but_the_factor():
    # At ratio 1 nothing is clipped: only later steps of a rollout can tell objectives apart.
    ratio, advantage = torch.ones(9, dtype=torch.float64), torch.linspace(-2, 2, 9).double()
    assert torch.equal(gradient(clip, ratio, advantage), gradient(noclip, ratio, advantage))
    torch.testing.assert_close(gradient(pspo, ratio, advantage), 0.9 * advantage)


@pytest.mark.parametrize("name", ["old_logp_M", "advantage_M", "weight_M", "sequence_M"])
def test_wrong_shapes_raise(name):
    arguments = {key: torch.zeros(4) for key in ("logp_M", "old_logp_M", "advantage_M", "weight_M")}
    arguments["sequence_M"] = torch.zeros(4, dtype=torch.int64)
    for shape in ((3,), (4, 1), ()):
        wrong = {**arguments, name: torch.zeros(shape)}
        with pytest.raises(ValueError, match="one length"):
            policy_loss(**wrong, objective=noclip)


def test_a_log_ratio_beyond_twenty_is_clamped_counted_and_stays_finite():
    logp = torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([-200.0, 0.0])
    loss, log_ratio = policy_loss(logp, old, torch.ones(2), torch.ones(2), torch.arange(2), noclip)
    loss.backward()
    assert loss.item() == pytest.approx(-(math.exp(20) + 1), rel=1e-6)
    assert logp.grad.tolist() == [0.0, -1.0]  # beyond the clamp there is no gradient
    assert ratio_diagnostics(log_ratio, torch.ones(2), torch.ones(2))["n_clamped"] == 1


# ---------------------------------------------------------------- estimators and diagnostics

def test_k3_is_unbiased_and_never_negative():
    policy, reference = random_policies(30, 12, seed=6)
    # exact expectation under p: Σ p·(q/p − log(q/p) − 1) = Σq − Σp + KL(p‖q) = KL(p‖q)
    k3 = kl_k3(policy.log(), reference.log())
    exact = (policy * (policy / reference).log()).sum(-1)
    assert (k3 >= 0).all()
    # rows whose log-ratios stay within the clamp of ±20
    inside = ((policy / reference).log().abs() < 20).all(-1)
    assert inside.sum() > 20
    torch.testing.assert_close((policy * k3).sum(-1)[inside], exact[inside])


def test_k3_keeps_its_digits_in_float32_for_policies_that_hardly_differ():
    # k3 of a log-ratio x is x²/2 + x³/6 + …; exp(x) − x − 1 in float32 would be off by all of it
    log_ratio = torch.tensor([1e-4, -1e-4, 3e-5, 1e-3])
    found = kl_k3(torch.zeros_like(log_ratio), log_ratio)
    assert (found > 0).all()
    torch.testing.assert_close(found, log_ratio**2 / 2, rtol=2e-3, atol=0)


def test_k3_by_hand():
    # p = 1/2, q = 1/4: q/p = 1/2, −log(1/2) = log 2: 0.5 + 0.6931 − 1 = 0.1931
    assert kl_k3(tensor(0.5).log(), tensor(0.25).log()).item() == pytest.approx(0.5 + math.log(2)
                                                                                - 1)


def test_ratio_diagnostics_by_hand():
    ratio, advantage = tensor(0.5, 1.0, 1.0, 2.0), tensor(-1.0, 1.0, 1.0, 1.0)
    found = ratio_diagnostics(ratio.log(), advantage, torch.full((4,), 0.25))
    assert found["ratio_p50"] == pytest.approx(1.0)
    assert found["ratio_outside"] == 0.5  # 0.5 and 2.0
    # both are where a clip has no gradient: 0.5·1 + 2·1 of 0.5 + 1 + 1 + 2 in all
    assert found["clip_removed"] == pytest.approx(2.5 / 4.5)
    # (Σr)² / (n·Σr²) = 4.5² / (4·6.25)
    assert found["effective_sample_size"] == pytest.approx(4.5**2 / 25)
    # mean of r − log r − 1: the logs of 1/2 and 2 cancel, (4.5 − 4)/4
    assert found["kl_old_new"] == pytest.approx(0.125)
    assert found["n_clamped"] == 0


def test_every_objective_in_the_table_is_elementwise_and_keeps_its_arguments():
    ratio, advantage = tensor(0.5, 1.5, 1.0), tensor(1.0, -1.0, 0.5)
    for name, objective in OBJECTIVES.items():
        kept = ratio.clone(), advantage.clone()
        whole = objective(ratio, advantage)
        single = torch.cat([objective(r, a) for r, a in zip(ratio.split(1), advantage.split(1))])
        assert torch.equal(whole, single), name
        assert torch.equal(ratio, kept[0]) and torch.equal(advantage, kept[1]), name

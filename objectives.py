"""Group advantages, objectives, reduction weights and diagnostics: pure tensors.

What it does    turns rewards into advantages, and log-probabilities into a loss. An objective is a
                function of (ratio, advantage), token by token; how tokens are averaged is a
                separate choice, a weight per token fixed before the optimizer step begins.
Not here        everything with a model in it; figures (evaluation/figures.py). Imports only torch.
Run it alone    python objectives.py     the table of gradient weight against ratio
Where to fork   write a function of (ratio, advantage, settings…), add it to OBJECTIVES: its
                settings become flags of train.py, with the defaults that stand in its signature.

In the formulas r = π_θ(token)/π_old(token) is the importance ratio, A the advantage.

Deviations from the paper (arXiv:2509.21282) and its released recipe:
  1. The ratio is formed from log-probabilities, and the log-ratio clamped at ±20 before `exp`:
     nothing else bounds r in PSPO. Tokens whose own ratio is clamped are counted.
  2. A group whose rewards are all equal gets advantages of exactly 0, not rounding over 1e-4.

Axis letters: P prompts, G completions per prompt, B = P·G, M completion tokens end to end.
"""
import math
from functools import partial

import torch

STD_EPSILON = 1e-4  # added to a group's standard deviation, as TRL's GRPOTrainer does
MAX_LOG_RATIO = 20.0  # chosen: e²⁰ is 5e8, far past any use, and its square is still finite fp32
DIAGNOSTIC_EPSILON = 0.2  # the ε of the diagnostics, chosen: the default of `clip`
REDUCTIONS = ("token", "sequence", "constant")
RATIO_LEVELS = ("token", "sequence")


def group_advantages(reward_PG, scale="std"):
    """Measure how much better each completion is than the others of its prompt.

    A = (R − mean(R)) / (std(R) + 1e-4) within a group, std with n − 1 (GRPO, arXiv:2402.03300);
    scale="none" leaves the division out (Dr. GRPO, arXiv:2503.20783).
    reward_PG: (P, G) float, G ≥ 2, finite. Returns (P, G), exactly 0 where a group is all equal.
    Raises ValueError for another shape, a non-finite reward or an unknown scale.
    """
    check_rewards(reward_PG, scale)
    advantage_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if scale == "std":
        advantage_PG = advantage_PG / (reward_PG.std(1, keepdim=True) + STD_EPSILON)
    equal_P1 = (reward_PG == reward_PG[:, :1]).all(1, keepdim=True)
    return advantage_PG.masked_fill(equal_P1, 0.0)


def check_rewards(reward_PG, scale):
    """The refusals of `group_advantages`."""
    if reward_PG.dim() != 2 or reward_PG.shape[1] < 2:
        raise ValueError(f"reward_PG has shape {tuple(reward_PG.shape)}; expected (prompts, group "
                         "size) with a group size of 2 or more: one completion has no one to beat")
    if not reward_PG.isfinite().all():
        raise ValueError(f"reward_PG holds a value that is not finite: {reward_PG.tolist()}")
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'std' or 'none'")


# ------------------------------------------------------------------ objectives, to be maximised

def pspo(ratio, advantage, alpha=0.1):
    """Probability smoothing: ((1 − α)·r + α)·A, the ratio of (1 − α)·π_θ + α·π_old to π_old.

    arXiv:2509.21282. Its gradient is (1 − α) times that of `noclip`. α in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a value in [0, 1]: 0 does not smooth, "
                         "1 leaves no gradient")
    return ((1 - alpha) * ratio + alpha) * advantage


def clip(ratio, advantage, epsilon_low=0.2, epsilon_high=0.2):
    """Clipping: min(r·A, clamp(r, 1 − ε_low, 1 + ε_high)·A).

    PPO, arXiv:1707.06347, Eq. 7; separate ends as in DAPO, arXiv:2503.14476. No gradient where
    r > 1 + ε_high and A > 0, or r < 1 − ε_low and A < 0. ε_low in [0, 1], ε_high ≥ 0.
    """
    if not (0 <= epsilon_low <= 1 and epsilon_high >= 0):
        raise ValueError(f"epsilon_low is {epsilon_low}, epsilon_high is {epsilon_high}; expected "
                         "0 ≤ epsilon_low ≤ 1 and epsilon_high ≥ 0")
    clipped_ratio = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return torch.minimum(ratio * advantage, clipped_ratio * advantage)


def noclip(ratio, advantage):
    """No clip, no smoothing: r·A (the surrogate of conservative policy iteration, arXiv:1707.06347,
    Eq. 6)."""
    return ratio * advantage


def cispo(ratio, advantage, ratio_max=5.0):
    """REINFORCE with a bounded weight: min(r, r_max)·A·log π, where the weight has no gradient.

    arXiv:2506.13585, Eq. 4–5, without a lower bound, as there; r_max is their 1 + ε_high, whose
    value they do not give (5 is chosen). log r stands for log π: they differ by a constant.
    """
    if not ratio_max >= 1:
        raise ValueError(f"ratio_max is {ratio_max}; expected 1 or more")
    return ratio.detach().clamp(max=ratio_max) * advantage * ratio.log()


def sapo(ratio, advantage, tau_positive=1.0, tau_negative=1.05):
    """Soft gates: σ(τ·(r − 1))·4/τ·A, one τ for A > 0 and one for the rest.

    arXiv:2511.20347. Its weight on A·∇log π is 4σ(1 − σ)·r; the gate 4σ(1 − σ) is 1 at
    r = 1 and falls on both sides.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"tau_positive is {tau_positive}, tau_negative is {tau_negative}; "
                         "expected values above 0")
    tau = torch.where(advantage > 0, tau_positive, tau_negative)
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage


def scopic(ratio, advantage, tau=4.0):
    """The same gate on both sides, σ(τ·(r − 1))·4/τ·A (P3O, arXiv:2205.10047; τ = 4 is chosen).

    P3O adds a penalty on KL(π_old‖π), which is left out here.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; expected a value above 0")
    return sapo(ratio, advantage, tau, tau)


OBJECTIVES = {"pspo": pspo, "clip": clip, "noclip": noclip, "cispo": cispo, "sapo": sapo,
              "scopic": scopic}


# ------------------------------------------------------------------ from tokens to one loss

def reduction_weights(length_B, reduction, max_length):
    """Weigh the tokens of an optimizer step; all tokens of one completion weigh the same: (B,).

    token     1 / Σ lengths                 every token counts alike (DAPO, arXiv:2503.14476)
    sequence  1 / (B · length_b)            every completion counts alike (GRPO, arXiv:2402.03300)
    constant  1 / (B · max_length)          no length anywhere (Dr. GRPO, arXiv:2503.20783)
    length_B: (B,) tokens, of all completions of the step, whether they are trained on or not.
    max_length: tokens a completion could have had. Raises ValueError for an unknown reduction.
    """
    length_B = length_B.double()
    if reduction == "token":
        weight_B = torch.ones_like(length_B) / length_B.sum().clamp(min=1)
    elif reduction == "sequence":
        weight_B = 1 / (len(length_B) * length_B.clamp(min=1))
    elif reduction == "constant":
        weight_B = torch.full_like(length_B, 1 / (len(length_B) * max_length))
    else:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    return weight_B.float()


def sequence_mean(x_M, sequence_M):
    """Give every token the mean of x over the tokens of its completion: (M,)."""
    _, inverse_M, length_B = torch.unique(sequence_M, return_inverse=True, return_counts=True)
    sum_B = torch.zeros(len(length_B), dtype=x_M.dtype, device=x_M.device)
    return (sum_B.index_add(0, inverse_M, x_M) / length_B)[inverse_M]


def policy_loss(logp_M, old_logp_M, advantage_M, weight_M, sequence_M, objective,
                ratio_level="token"):
    """The loss of these tokens, −Σ weight · objective(ratio, advantage), and their log-ratios.

    logp_M, old_logp_M: (M,) float, nats, of the sampled tokens; gradient flows through the first.
    advantage_M: (M,) float. weight_M: (M,) float, fixed for the whole optimizer step, so that
        losses of micro-batches add up to the loss of the step.
    sequence_M: (M,) int, the number of the completion that a token belongs to. For ratio_level
        "sequence" every completion must be here with all its tokens.
    objective: (ratio_M, advantage_M) -> (M,), e.g. functools.partial(pspo, alpha=0.1).
    ratio_level: "token", or "sequence": every token of a completion has the geometric mean of the
        ratios of all its tokens (GSPO, arXiv:2507.18071, Eq. 7, which goes with `clip`, reduction
        "sequence", ε_low 3e-4 and ε_high 4e-4).
    Returns (scalar, (M,) float, nats, no grad).
    Raises ValueError unless all five are vectors of one length, and for another ratio_level.
    """
    check_tokens(ratio_level, logp_M=logp_M, old_logp_M=old_logp_M, advantage_M=advantage_M,
                 weight_M=weight_M, sequence_M=sequence_M)
    log_ratio_M = logp_M - old_logp_M
    exponent_M = log_ratio_M if ratio_level == "token" else sequence_mean(log_ratio_M, sequence_M)
    ratio_M = exponent_M.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -(weight_M * objective(ratio_M, advantage_M)).sum()
    return loss, log_ratio_M.detach()


def check_tokens(ratio_level, **tensors):
    """The refusals of `policy_loss`; tensors: its first five arguments by name."""
    first, *others = tensors.values()
    if first.dim() != 1 or any(x.shape != first.shape for x in others):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"expected vectors of one length, found {shapes}")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level is {ratio_level!r}; expected one of "
                         f"{', '.join(RATIO_LEVELS)}")


def kl_k3(logp_p, logp_q):
    """Estimate KL(p‖q) at tokens drawn from p: q/p − log(q/p) − 1 ≥ 0, elementwise, nats.

    The estimator that Schulman's note on approximating KL calls k3.

    arXiv:2402.03300, Eq. 4. Unbiased when the tokens were drawn from p. `expm1` keeps the digits
    that exp(x) − 1 would lose for policies as close as those of one rollout.
    """
    log_ratio = (logp_q - logp_p).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def clip_removes(ratio, advantage, epsilon=DIAGNOSTIC_EPSILON):
    """Say where `clip` with this ε on both sides has no gradient, elementwise: bool."""
    return ((ratio > 1 + epsilon) & (advantage > 0)) | ((ratio < 1 - epsilon) & (advantage < 0))


def quantile(x_M, *shares):
    """The values below which these shares of x lie, as torch.quantile has them; that function stops
    at 2²⁴ elements, which one step can exceed."""
    sorted_M = x_M.sort().values
    places = [share * (len(x_M) - 1) for share in shares]
    return [torch.lerp(sorted_M[int(i)], sorted_M[math.ceil(i)], i - int(i)).item()
            for i in places]


@torch.no_grad()
def ratio_diagnostics(log_ratio_M, advantage_M, weight_M):
    """Describe the importance ratios of M tokens: a dict of floats (docs/metrics.md says of what).

    With ε = DIAGNOSTIC_EPSILON, `ratio_outside` is the share of tokens with |r − 1| > ε, and
    `clip_removed` the share of Σ weight·|A|·r on tokens where a clip at ε has no gradient.
    """
    log_ratio_M = log_ratio_M.double()
    ratio_M = log_ratio_M.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    p1, p50, p99 = quantile(ratio_M, 0.01, 0.5, 0.99)
    outside_M = (ratio_M < 1 - DIAGNOSTIC_EPSILON) | (ratio_M > 1 + DIAGNOSTIC_EPSILON)
    gradient_M = weight_M.double() * advantage_M.abs() * ratio_M
    removed = (gradient_M[clip_removes(ratio_M, advantage_M)].sum()
               / gradient_M.sum().clamp(min=1e-30))
    return {"ratio_p1": p1, "ratio_p50": p50, "ratio_p99": p99,
            "ratio_outside": outside_M.double().mean().item(),
            "clip_removed": removed.item(),
            "kl_old_new": kl_k3(torch.zeros_like(log_ratio_M), log_ratio_M).mean().item(),
            "effective_sample_size": (ratio_M.sum() ** 2 / ratio_M.square().sum()
                                      / len(ratio_M)).item(),
            "n_clamped": int((log_ratio_M.abs() > MAX_LOG_RATIO).sum())}


# ------------------------------------------------------------------ run alone: a table

def gradient_weight(objective, ratio, sign):
    """∂objective/∂log π for advantage `sign`, divided by that sign: what multiplies A·∇log π."""
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    advantage = torch.full_like(log_ratio, sign)
    (gradient,) = torch.autograd.grad(objective(log_ratio.exp(), advantage).sum(), log_ratio)
    return gradient / sign


SHOWN = {  # in the figure; the table has every other objective, too
    "noclip": noclip, "clip ε=0.2": clip, "clip .2, .28 (DAPO)": partial(clip, epsilon_high=0.28),
    "pspo α=0.1": pspo, "pspo α=0.5": partial(pspo, alpha=0.5),
    "cispo r≤2": partial(cispo, ratio_max=2.0), "sapo τ=1": sapo, "scopic τ=4": scopic}


def main():
    others = {name: f for name, f in OBJECTIVES.items() if f not in SHOWN.values()}
    ratios = [0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0]
    for sign in (1.0, -1.0):
        print(f"\nweight on A·∇log π where the advantage is {sign:+.0f}\n")
        print(f"{'ratio':20}" + "".join(f"{r:7.2f}" for r in ratios))
        for name, objective in {**others, **SHOWN}.items():
            weights = (gradient_weight(objective, ratios, sign) + 0.0).tolist()  # −0 becomes 0
            print(f"{name:20}" + "".join(f"{w:7.2f}" for w in weights))


if __name__ == "__main__":
    main()

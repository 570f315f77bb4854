"""Group advantages, surrogate objectives, reduction weights and diagnostics: pure tensors.

What it does    turns rewards into advantages, and log-probabilities into a loss. An objective is a
                function of (ratio, advantage), token by token; how tokens are averaged is a
                separate choice, a weight per token fixed before the optimizer step begins.
What it leaves  everything with a model in it, figures to evaluation/figures.py. Only torch is
                imported.
Run it alone    python objectives.py     the table of gradient weight against ratio
Where to fork   write a function of (ratio, advantage, settings…), add it to OBJECTIVES: its
                settings become flags of train.py, with the defaults that stand in its signature.

In the formulas r = π_θ(token)/π_old(token) is the importance ratio, A the advantage.

Deviations from the paper (arXiv:2509.21282) and its released recipe:
  1. The ratio is formed from log-probabilities, and the log-ratio clamped at ±20 before `exp`:
     nothing else bounds r in PSPO. Tokens whose own ratio is clamped are counted.
  2. A group whose rewards are all equal gets advantages of exactly 0, not rounding over 1e-4.

Axis letters: P prompts, G completions per prompt, B = P·G, N completion tokens end to end (these
are the M of the other files, whose N counts prompt tokens too).
"""
import math
from functools import partial

import torch

STD_EPSILON = 1e-4  # added to a group's standard deviation, as TRL's GRPOTrainer does
MAX_LOG_RATIO = 20.0  # chosen: e²⁰ is 5e8, far past any use, and its square is still finite fp32
REDUCTIONS = ("token", "sequence", "constant")
RATIO_LEVELS = ("token", "sequence")


def group_advantages(reward_PG, scale="std"):
    """How much better each completion is than the others of its prompt.

    A = (R − mean(R)) / (std(R) + 1e-4) within a group, std with n − 1 (GRPO, arXiv:2402.03300);
    scale="none" leaves the division out (Dr. GRPO, arXiv:2503.20783).
    reward_PG: (P, G) float, G ≥ 2, finite. Returns (P, G), exactly 0 where a group is all equal.
    Raises ValueError for another shape, a non-finite reward or an unknown scale.
    """
    if reward_PG.dim() != 2 or reward_PG.shape[1] < 2:
        raise ValueError(f"reward_PG has shape {tuple(reward_PG.shape)}; expected (prompts, group "
                         "size) with a group size of 2 or more: one completion has no one to beat")
    if not reward_PG.isfinite().all():
        raise ValueError(f"reward_PG holds a value that is not finite: {reward_PG.tolist()}")
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'std' or 'none'")
    advantage_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if scale == "std":
        advantage_PG = advantage_PG / (reward_PG.std(1, keepdim=True) + STD_EPSILON)
    equal_P1 = (reward_PG == reward_PG[:, :1]).all(1, keepdim=True)
    return advantage_PG.masked_fill(equal_P1, 0.0)


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
    """The plain surrogate r·A of conservative policy iteration (arXiv:1707.06347, Eq. 6)."""
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

    arXiv:2511.20347. Its gradient is r·4·σ·(1 − σ) times that of log π: largest about r = 1.
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
    """For each completion of an optimizer step, the weight of every one of its tokens: (B,).

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


def sequence_mean(x_N, sequence_N):
    """The mean of x over each completion, at every one of its tokens: (N,)."""
    _, inverse_N, length_B = torch.unique(sequence_N, return_inverse=True, return_counts=True)
    sum_B = torch.zeros(len(length_B), dtype=x_N.dtype, device=x_N.device)
    return (sum_B.index_add(0, inverse_N, x_N) / length_B)[inverse_N]


def policy_loss(logp_N, old_logp_N, advantage_N, weight_N, sequence_N, objective,
                ratio_level="token"):
    """−Σ weight · objective(ratio, advantage), and the tokens' log-ratios: (scalar, (N,) no grad).

    logp_N, old_logp_N: (N,) float, nats, of the sampled tokens; gradient flows through the first.
    advantage_N: (N,) float. weight_N: (N,) float, fixed for the whole optimizer step, so that
        losses of micro-batches add up to the loss of the step.
    sequence_N: (N,) int, which completion a token belongs to. All tokens of it are here.
    objective: (ratio_N, advantage_N) -> (N,), e.g. functools.partial(pspo, alpha=0.1).
    ratio_level: "token", or "sequence" for the geometric mean of the ratios of a completion's
        tokens as the ratio of each (GSPO, arXiv:2507.18071, Eq. 7: with `clip`, reduction
        "sequence" and its own ε of 3e-4 and 4e-4).
    Raises ValueError unless all five are vectors of one length, and for another ratio_level.
    """
    tensors = {"logp_N": logp_N, "old_logp_N": old_logp_N, "advantage_N": advantage_N,
               "weight_N": weight_N, "sequence_N": sequence_N}
    if logp_N.dim() != 1 or any(x.shape != logp_N.shape for x in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"expected vectors of one length, found {shapes}")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level is {ratio_level!r}; expected one of "
                         f"{', '.join(RATIO_LEVELS)}")
    log_ratio_N = logp_N - old_logp_N
    used_N = log_ratio_N if ratio_level == "token" else sequence_mean(log_ratio_N, sequence_N)
    ratio_N = used_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -(weight_N * objective(ratio_N, advantage_N)).sum()
    return loss, log_ratio_N.detach()


def kl_k3(logp_p, logp_q):
    """Estimate KL(p‖q) at tokens drawn from p: q/p − log(q/p) − 1 ≥ 0, elementwise, nats.

    arXiv:2402.03300, Eq. 4. Unbiased when the tokens were drawn from p. `expm1` keeps the digits
    that exp(x) − 1 would lose for policies as close as those of one rollout.
    """
    log_ratio = (logp_q - logp_p).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def clip_removes(ratio, advantage, epsilon=0.2):
    """Where `clip` at this ε has no gradient, elementwise: bool."""
    return ((ratio > 1 + epsilon) & (advantage > 0)) | ((ratio < 1 - epsilon) & (advantage < 0))


def quantile(x_N, *shares):
    """The values below which these shares of x lie, as torch.quantile has them; that function stops
    at 2²⁴ elements, which one step can exceed."""
    sorted_N = x_N.sort().values
    places = [share * (len(x_N) - 1) for share in shares]
    return [torch.lerp(sorted_N[int(i)], sorted_N[math.ceil(i)], i - int(i)).item()
            for i in places]


@torch.no_grad()
def ratio_diagnostics(log_ratio_N, advantage_N, weight_N):
    """What the importance ratios of N tokens look like: a dict of floats (the README's glossary).

    `clip_removed` is the share of Σ weight·|A|·r on tokens where clip at ε = 0.2 has no gradient.
    """
    log_ratio_N = log_ratio_N.double()
    ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    p1, p50, p99 = quantile(ratio_N, 0.01, 0.5, 0.99)
    outside_N = (ratio_N < 0.8) | (ratio_N > 1.2)
    gradient_N = weight_N.double() * advantage_N.abs() * ratio_N
    removed = (gradient_N[clip_removes(ratio_N, advantage_N)].sum()
               / gradient_N.sum().clamp(min=1e-30))
    return {"ratio_p1": p1, "ratio_p50": p50, "ratio_p99": p99,
            "ratio_outside": outside_N.double().mean().item(),
            "clip_removed": removed.item(),
            "kl_old_new": kl_k3(torch.zeros_like(log_ratio_N), log_ratio_N).mean().item(),
            "effective_sample_size": (ratio_N.sum() ** 2 / ratio_N.square().sum()
                                      / len(ratio_N)).item(),
            "n_clamped": int((log_ratio_N.abs() > MAX_LOG_RATIO).sum())}


# ------------------------------------------------------------------ run alone: a table

def gradient_weight(objective, ratio, sign):
    """∂objective/∂log π for advantage `sign`, divided by that sign: what multiplies A·∇log π."""
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    advantage = torch.full_like(log_ratio, sign)
    (gradient,) = torch.autograd.grad(objective(log_ratio.exp(), advantage).sum(), log_ratio)
    return gradient / sign


ARMS = {  # what the table and the figure show
    "noclip": noclip, "clip ε=0.2": clip, "clip .2, .28 (DAPO)": partial(clip, epsilon_high=0.28),
    "pspo α=0.1": pspo, "pspo α=0.5": partial(pspo, alpha=0.5),
    "cispo r≤2": partial(cispo, ratio_max=2.0), "sapo τ=1": sapo, "scopic τ=4": scopic}


def main():
    ratios = [0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0]
    for sign in (1.0, -1.0):
        print(f"\nweight on A·∇log π where the advantage is {sign:+.0f}\n")
        print(f"{'ratio':20}" + "".join(f"{r:7.2f}" for r in ratios))
        for name, objective in ARMS.items():
            weights = (gradient_weight(objective, ratios, sign) + 0.0).tolist()  # −0 becomes 0
            print(f"{name:20}" + "".join(f"{w:7.2f}" for w in weights))


if __name__ == "__main__":
    main()

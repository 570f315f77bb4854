"""How sure: intervals of a share, a mean or a difference, and tests of paired differences.

What it does    turns lists of numbers, one a problem or one a run, into 95 % intervals and p's.
Not here        what the numbers are, and which of them are paired (summaries.py).
Run it alone    python -m evaluation.intervals        shows what each says of the same small example
Where to fork   summaries.py asks `interval_of` and `verdict`: change there what counts as shown.
"""
import math
import statistics

import torch

Z = statistics.NormalDist().inv_cdf(0.975)


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them correct, hold a correct one: 1 − C(n−c, k)/C(n, k).

    Unbiased (arXiv:2107.03374, Eq. 1). Needs 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n {n}, c {c}, k {k}: expected 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(c, n):
    """95 % interval of a share of which c of n were seen (Wilson 1927)."""
    centre, spread = c + Z**2 / 2, Z * math.sqrt(c * (n - c) / n + Z**2 / 4)
    return max((centre - spread) / (n + Z**2), 0.0), min((centre + spread) / (n + Z**2), 1.0)


def bootstrap(values, n_resamples=4000):
    """95 % percentile interval of the mean of independent values, one a problem; always the same
    resamples for the same number of values."""
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = torch.cat([x[torch.randint(len(x), (200, len(x)), generator=generator)].mean(1)
                       for _ in range(n_resamples // 200)]).sort().values
    return tuple(means[round(q * (len(means) - 1))].item() for q in (0.025, 0.975))


def interval_of(values):
    """95 % interval of a mean over problems: Wilson's where each is 0 or 1, else the bootstrap's.
    """
    if set(values) <= {0, 1}:
        return wilson(sum(values), len(values))
    return bootstrap(values)


def t_quantile(df):
    """The 97.5 % point of Student's t, df > 0. With t = √df·tan θ its density is cos^(df−1) θ."""
    theta = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(theta.cos() ** (df - 1), theta)
    i = torch.searchsorted(mass, 0.95 * mass[-1].item()).item()
    return math.sqrt(df) * math.tan(theta[i + 1].item())


def over_seeds(values):
    """(mean, 95 % interval of it) of independent runs, two or more: Student's t. Without any spread
    there is no interval: None."""
    mean, n = statistics.fmean(values), len(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, (mean - half, mean + half) if half else None


def welch(a, b):
    """(mean(b) − mean(a), 95 % interval) of two lists of runs with spreads of their own; None as
    interval where neither has any."""
    va, vb = (statistics.variance(x) / len(x) for x in (a, b))
    difference = round(statistics.fmean(b) - statistics.fmean(a), 12)  # no -0.0% of dust
    if va + vb == 0:
        return difference, None
    df = (va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = t_quantile(df) * math.sqrt(va + vb)
    return difference, (difference - half, difference + half)


def mcnemar(only_a, only_b):
    """Exact two-sided p of McNemar's test: of the problems that one alone solved, are as many A's
    as B's? Twice the binomial tail at one half."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


N_FLIPS = 10_000
LEAST_P = 1 / (1 + N_FLIPS)


def sign_flips(differences, n_flips=N_FLIPS):
    """Two-sided p of paired differences: how often other signs give as large a sum. All signs are
    counted for up to 12 differences, else random ones; McNemar's where all are −1, 0 or 1.
    A bootstrap alone calls four differences out of four significant."""
    d = torch.tensor([x for x in differences if x], dtype=torch.float64)
    if set(d.abs().tolist()) <= {1.0}:
        return mcnemar((d < 0).sum().item(), (d > 0).sum().item())
    generator, n = torch.Generator().manual_seed(0), len(d)
    bits = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1 if n <= 12 else
            torch.randint(2, (n_flips, n), generator=generator))
    as_large = ((bits.double() * 2 - 1) @ d).abs() >= d.sum().abs() - 1e-9
    return as_large.double().mean().item() if n <= 12 else (
        (1 + as_large.sum().item()) / (1 + n_flips))


def verdict(interval, p=None):
    """What a difference's interval, and its p where there is one, allow to say."""
    if interval is None or interval[0] <= 0 <= interval[1] or (p is not None and p >= 0.05):
        return "no difference shown"
    return "B higher" if interval[0] > 0 else "B lower"


if __name__ == "__main__":
    a, b = [0] * 14 + [1] * 6, [0] * 8 + [1] * 12  # 20 problems; B solves six that A does not
    d = [y - x for x, y in zip(a, b)]
    print(f"A solves {sum(a)} of 20: Wilson {wilson(6, 20)}, bootstrap {bootstrap(a)}\n"
          f"B − A is {statistics.fmean(d)}: bootstrap {bootstrap(d)}, McNemar p {mcnemar(0, 6)}: "
          f"{verdict(bootstrap(d), mcnemar(0, 6))}\n"
          f"three runs of 0.5, 0.6 and 0.7: {over_seeds([0.5, 0.6, 0.7])}")

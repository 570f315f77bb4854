"""Summaries of graded answers, and one side against another.

What it does    `full_summary` is a row of the table of results; `compare` says whether two sides
                differ by one measure, `compare_all` by every measure of every set.
Not here        intervals and tests (evaluation/intervals.py), tables (evaluation/tables.py).
Where to fork   a measure is a key of the rows, listed in STYLE (and here in YES_OR_NO if it is true
                or false of an answer); `compare` takes any key.
"""
import statistics

from evaluation.answers import places
from evaluation.intervals import (
    bootstrap,
    interval_of,
    over_seeds,
    pass_at_k,
    sign_flips,
    verdict,
    welch,
)
from evaluation.judge import JUDGED
from evaluation.settings import setting_of
from evaluation.style import STYLE
from evaluation.tables import main_score
from rewards import SCORERS

YES_OR_NO = (*SCORERS, "format", "leakage")  # measures that are true or false of an answer


def by_problem(rows, key):
    """The mean of a measure over the samples of each problem, in order; None if none has a value.

    "arithmetic" is the share of true statements among all statements in the answers to a problem.
    """
    groups = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    if key == "arithmetic":
        counts = [(sum(r["true_statements"] for r in group), sum(r["statements"] for r in group))
                  for group in groups.values()]
        return [true / n if n else None for true, n in counts]
    values = [[r[key] for r in group if r.get(key) is not None] for group in groups.values()]
    return [sum(v) / len(v) if v else None for v in values]


def majority(rows):
    """Whether a problem's most frequent answer is right; of equally frequent ones the first counts.

    All right answers count as the same one, however they are written: 0.5 and 1/2 are two votes
    for it.
    """
    answers = [True if row["flexible"] else row["answer"] for row in rows
               if row["flexible"] or row["answer"] is not None]
    return max(answers, key=answers.count, default=None) is True


def summarise(rows, samples):
    """The means over all rows; for two or more samples also pass@k for k = 1, 2, 4, … ≤ samples and
    the majority vote, both by flexible correctness."""
    n = len(rows)
    summary = {"n_problems": n // samples, "samples": samples,
               **{key: sum(r[key] for r in rows) / n for key in ("strict", "flexible", "format")},
               "truncated": sum(not r["finished"] for r in rows) / n}
    groups = [rows[i:i + samples] for i in range(0, n, samples)]
    correct = [sum(r["flexible"] for r in group) for group in groups]
    k = 1
    while k <= samples and samples > 1:
        summary[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in correct) / len(correct)
        k *= 2
    if samples > 1 and "answer" in rows[0]:
        summary["majority"] = sum(map(majority, groups)) / len(groups)
    return summary


def full_summary(rows, samples):
    """As `summarise`; every score, measure of style and mark is a mean over problems, with its
    interval. A measure without values is left out, as arithmetic is without statements."""
    summary = summarise(rows, samples)
    summary["judged"] = sum(next(iter(JUDGED)) in row for row in rows)
    for key in (*SCORERS, "format", *STYLE, *JUDGED):
        values = [v for v in by_problem(rows, key) if v is not None]
        if values:
            interval = interval_of(values) if key in YES_OR_NO else bootstrap(values)
            summary[key], summary[f"{key}_interval"] = statistics.fmean(values), interval
    return summary


def seed_summaries(summaries):
    """The scores of each setting of which two or more runs were evaluated: mean and interval over
    the runs, a row for `seed_table`."""
    groups = {}
    for s in summaries:
        groups.setdefault((setting_of(s["model"]), s["data"], s["temperature"]), []).append(s)
    found = []
    for (name, data, temperature), group in groups.items():
        if len(group) > 1:
            row = {"model": name, "data": data, "temperature": temperature, "runs": len(group)}
            for key in SCORERS:
                if key in group[0]:
                    row[key], interval = over_seeds([s[key] for s in group])
                    row[f"{key}_interval"] = interval and (max(interval[0], 0.0),
                                                           min(interval[1], 1.0))
            found.append(row)
    return found


def compare(a_runs, b_runs, key):
    """Compare two sides by one measure: a dict with a, b, difference (B − A), interval, p, verdict.

    a_runs, b_runs: lists of runs (their rows) on the same problems. With one run each, the problems
        where both have a value are paired: bootstrap and `sign_flips`. With several runs each, a
        run is one value: Welch's interval, no p; no interval where no run differs from its
        siblings.
    Returns None where a side has no values, or one side a single run and the other several.
    """
    a, b = ([by_problem(rows, key) for rows in runs] for runs in (a_runs, b_runs))
    p = None
    if len(a) == len(b) == 1:
        pairs = [(x, y) for x, y in zip(a[0], b[0], strict=True) if None not in (x, y)]
        if not pairs:
            return None
        mean_a, mean_b = (statistics.fmean(side) for side in zip(*pairs))
        differences = [y - x for x, y in pairs]
        difference, interval, p = mean_b - mean_a, bootstrap(differences), sign_flips(differences)
    else:
        a, b = ([statistics.fmean(values) for run in side
                 if (values := [v for v in run if v is not None])] for side in (a, b))
        if min(len(a), len(b)) < 2:
            return None
        mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
        difference, interval = welch(a, b)
    return {"a": mean_a, "b": mean_b, "difference": difference, "interval": interval, "p": p,
            "verdict": verdict(interval, p)}


def compare_all(sides, cells, preferences):
    """Every measure of every set and temperature, B against A: rows of `comparison_table`."""
    found = []
    for data, temperature in places(cells):
        runs = [[cells[name, data, temperature] for name in side] for side in sides]
        score = main_score(runs[0][0])
        about = {"data": data, "temperature": temperature}
        measures = {score: (score, ".1%"), "format": ("format", ".1%"), **STYLE, **JUDGED}
        for key, (heading, form) in measures.items():
            if result := compare(*runs, key):
                found.append({**about, "measure": heading, "form": form, **result})
        scores = [[sum(outcome) - 1 for outcome in outcomes if outcome]  # 1: B, −1: A
                  for outcomes in preferences.get((data, temperature), [])]
        if scores and all(scores):
            if len(scores) == 1:
                mean, interval = statistics.fmean(scores[0]), bootstrap(scores[0])
                p = sign_flips(scores[0])
            else:
                (mean, interval), p = over_seeds(list(map(statistics.fmean, scores))), None
            found.append({**about, "measure": "judge: preferred", "form": ".1%", "p": p,
                          "a": (1 - mean) / 2, "b": (1 + mean) / 2, "difference": mean,
                          "interval": interval, "verdict": verdict(interval, p)})
    return found

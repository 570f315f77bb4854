"""Accuracy and style of models on problem sets, with intervals; one model against another.

What it does    samples answers with rollout.py, grades them with rewards.py, and writes tables and
                a figure: results.md, results.json, accuracy.png. Answers go to disk as they come:
                an interrupted evaluation goes on where it stopped, a finished one is not repeated.
What it leaves  sampling to rollout.py, what is correct to rewards.py, opinions to judge.py.
Run it alone    python evaluate.py tiny runs/tiny-pspo-s0/best --data tiny
Where to fork   a measure of style is a line in `style` and one in STYLE; a scorer, one in SCORES.
"""
import argparse
import glob
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from decimal import Decimal
from pathlib import Path

import torch
from tqdm import tqdm

import judge
from model import DTYPES, Qwen2, checked_config, model_folder, read_json
from rewards import INSTRUCTION, build_prompt, extract_answer, has_format, is_correct, load_problems
from rollout import check_sampling, generate, room_for

SCORES = ("strict", "flexible", "paper", "math")  # math: sets with LaTeX answers only
STYLE = {  # measure of one answer: (heading, format); README defines them
    "leakage": ("leakage", ".1%"), "n_tokens": ("tokens", ".1f"),
    "tokens_after": ("tokens after answer", ".1f"), "repeated": ("repeated 4-grams", ".1%"),
    "non_ascii": ("non-ASCII letters", ".1%"), "arithmetic": ("true arithmetic", ".1%")}
JUDGED = {f"judge_{aspect}": (f"judge: {aspect}", ".2f") for aspect in judge.ASPECTS}
CHUNK = 4  # chosen: answers are kept in chunks of 4 × the rows in flight; a kill costs one chunk
ANSWERS_VERSION = 1  # raise when grading or style changes, so that no old answer is taken for new


# ------------------------------------------------------------------ answers

def grade(rollout, problems, tokenizer, progress=None):
    """Grade every completion of a rollout, problems[p] being prompt p: a list of dicts, one a row.

    Rows hold problem (id), sample, text, gold, n_tokens, finished and the bools strict, flexible
    and format.
    """
    rows, G = [], rollout.group_size
    for b, ids in enumerate(tqdm(rollout.completions, desc=progress, unit="answer", leave=False,
                                 delay=2, disable=progress is None)):
        problem, finished = problems[b // G], rollout.finished[b]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        rows.append({"problem": problem.id, "sample": b % G, "text": text,
                     "gold": problem.gold, "n_tokens": len(ids), "finished": finished,
                     "strict": is_correct(text, problem.gold, "strict", finished),
                     "flexible": is_correct(text, problem.gold, "flexible", finished),
                     "format": has_format(text, finished, problem.gold)})
    return rows


def answer(model, problems, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=512, seed=0,
           step=0, max_rows=256, prompt_keys=None, progress="evaluate"):
    """Answer every problem `samples` times and grade each answer: rows as `grade` makes them.

    Draws depend on (seed, step, problem index or its key, sample, position) alone. progress: as
    in `generate`.
    """
    prompts = [build_prompt(model.tokenizer, problem) for problem in problems]
    rollout = generate(model, prompts, samples,
                       room_for(model, prompts, max_new_tokens), temperature, top_p, seed, step,
                       prompt_keys, max_rows=max(max_rows, samples), progress=progress)
    return grade(rollout, problems, model.tokenizer, "grading" if progress else None)


def measure(rows, problems, samples, tokenizer):
    """Add to rows of `grade` what only an evaluation wants: answer, more scores, style."""
    latex = any(problem.kind == "latex" for problem in problems)
    for b, row in enumerate(rows):
        text, gold, finished = row["text"], row["gold"], row["finished"]
        row["answer"] = extract_answer(text, "flexible", finished, problems[b // samples].kind)
        row["paper"] = is_correct(text, gold, "paper", finished)
        if latex:
            row["math"] = is_correct(text, gold, "math", finished)
        row |= style(text, tokenizer)
    return rows


ROLE = re.compile(r"<\|\w+\|>|^(?:system|user|human|assistant|q|question|problem)[ \t]*(?::|$)",
                  re.M | re.I)
OPERAND = r"[$€£]?(-?\d{1,15}(?:,\d{3})*(?:\.\d{1,10})?)"
STATEMENT = re.compile(rf"(?<![\d.,)]){OPERAND} *([-+*/×x÷−·]) *{OPERAND} *= *{OPERAND}"
                       r"(?![\d,.]*\d)")
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "−": lambda a, b: a - b,
           "*": lambda a, b: a * b, "×": lambda a, b: a * b, "x": lambda a, b: a * b,
           "·": lambda a, b: a * b, "/": lambda a, b: a / b, "÷": lambda a, b: a / b}


def style(text, tokenizer):
    """Measures of one answer's style; those of STYLE but for n_tokens.

    leakage: it repeats six words of the instruction in a row, has a role marker or a heading of a
        new question, or asks something after its answer line. tokens_after: tokens behind the first
        `####` line. repeated: share of word 4-grams that occurred before. non_ascii: share of
        letters. statements, true_statements: how many `a op b = c`, and how many of them hold.
    """
    _, _, behind = text.partition("####")[2].partition("\n")
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(4))))
    letters = [c for c in text if c.isalpha()]
    told, said = (re.findall(r"\w+", t.lower()) for t in (INSTRUCTION, text))
    sixes = [set(zip(*(w[i:] for i in range(6)))) for w in (told, said)]
    verdicts = [holds(match) for match in STATEMENT.finditer(text) if stands_alone(match)]
    return {"leakage": bool(sixes[0] & sixes[1] or ROLE.search(text) or "?" in behind),
            "tokens_after": len(tokenizer.encode(behind, add_special_tokens=False)),
            "repeated": 1 - len(set(grams)) / len(grams) if grams else 0.0,
            "non_ascii": sum(not c.isascii() for c in letters) / max(len(letters), 1),
            "statements": len(verdicts), "true_statements": sum(verdicts)}


def stands_alone(match):
    """Whether `a op b = c` is no part of a longer term: not 2 + [3 * 4 = 12], [3 * 4 = 12] + 2."""
    before, after = match.string[:match.start()][-20:], match.string[match.end():][:20]
    return not (re.search(r"[\d)%] *[-+*/×x÷−·] *[$€£]?$", before)
                or re.match(r" *[-+*/×x÷−·] *[$€£(]?\d", after))


def holds(match):
    """Whether a statement is true, c rounded to the digits it has."""
    a, b, c = (Decimal(match[i].replace(",", "")) for i in (1, 3, 4))
    if match[2] in "/÷" and not b:
        return False
    return abs(COMPUTE[match[2]](a, b) - c) <= Decimal(10) ** c.as_tuple().exponent / 2


# ------------------------------------------------------------------ answers on disk

def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint(folder):
    """A hash of all files of a model folder that decide its answers."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt"):
            total.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(2**24):
                    total.update(block)
    return total.hexdigest()


def read_answers(path, about, n_rows, n_chunk):
    """(rows, bytes they take) of a file of answers: all n_rows, or those of its whole chunks."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:  # damaged; what follows is answered again
            break
        if i == 0 and row != about:
            raise ValueError(f"{path} holds answers under other settings; move it away")
        rows.append(row)
    n = len(rows) - 1 if len(rows) > n_rows else (len(rows) - 1) // n_chunk * n_chunk
    return rows[1:n + 1], sum(len(line) + 1 for line in lines[:n + 1]) if n > 0 else 0


class Progress:
    """One bar over all answers of an evaluation, with the tokens a second of its sampling."""

    def __init__(self, total):
        self.bar = tqdm(total=total, unit="answer", smoothing=0.05, dynamic_ncols=True)
        self.rows, self.tokens, self.seconds = 0, 0, 0.0  # of rollouts that have ended

    def rollout(self, label):
        self.bar.set_description(label)
        self.began = time.perf_counter()
        return self

    def __call__(self, n_ended, tokens_ended, tokens_others):
        self.bar.update(self.rows + n_ended - self.bar.n)
        self.now = (self.tokens + tokens_ended + tokens_others,
                    self.seconds + time.perf_counter() - self.began)
        self.bar.set_postfix_str(f"{self.now[0] / self.now[1]:,.0f} tokens/s", refresh=False)

    def done(self):
        """The rollout has ended: from here its answers are graded."""
        self.rows, (self.tokens, self.seconds) = self.bar.n, self.now


# ------------------------------------------------------------------ statistics

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
    """(mean, 95 % interval) of independent runs: Student's t; two or more values."""
    mean, n = statistics.mean(values), len(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, (mean - half, mean + half)


def welch(a, b):
    """(mean(b) − mean(a), 95 % interval) of two lists of runs with spreads of their own."""
    va, vb = (statistics.variance(x) / len(x) for x in (a, b))
    difference = statistics.mean(b) - statistics.mean(a)
    if va + vb == 0:
        return difference, (difference, difference)
    df = (va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = t_quantile(df) * math.sqrt(va + vb)
    return difference, (difference - half, difference + half)


def mcnemar(only_a, only_b):
    """Exact two-sided p of McNemar's test: of the problems that one alone solved, are as many A's
    as B's? Twice the binomial tail at one half."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


# ------------------------------------------------------------------ summaries

def by_problem(rows, key):
    """The mean of a measure over each problem's samples, in order; None where it has none.

    arithmetic is the share of true statements among all of a problem's.
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
    """1 if a problem's most frequent answer is right (the earliest of equally frequent ones)."""
    answers = [row["answer"] for row in rows if row["answer"] is not None]
    chosen = max(answers, key=answers.count, default=None)
    return chosen is not None and next(r["flexible"] for r in rows if r["answer"] == chosen)


def summarise(rows, samples):
    """Means over all rows, and for two or more samples pass@k for k = 1, 2, 4, … ≤ samples and the
    majority vote, both by flexible correctness."""
    n = len(rows)
    summary = {"n_problems": n // samples, "samples": samples,
               **{key: sum(r[key] for r in rows) / n for key in ("strict", "flexible", "format")},
               "truncated": sum(not r["finished"] for r in rows) / n,
               "mean_tokens": sum(r["n_tokens"] for r in rows) / n}
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
    """`summarise`, with intervals over problems, the other scores and the style."""
    summary = summarise(rows, samples)
    for key in SCORES:
        if key in rows[0]:
            values = by_problem(rows, key)
            summary[key], summary[f"{key}_interval"] = statistics.mean(values), interval_of(values)
    for key in (*STYLE, *JUDGED):
        values = [v for v in by_problem(rows, key) if v is not None]
        summary[key] = statistics.mean(values) if values else None
        if key in JUDGED and values:
            summary["judged"], summary[f"{key}_interval"] = len(values), bootstrap(values)
    return summary


SEED = re.compile(r"(?<=[-_])(s|seed)[-_]?\d+(?=[-_/]|$)")


def setting_of(model):
    """A run's name without its seed: runs/tiny-pspo-s0/best -> runs/tiny-pspo-s*/best."""
    return SEED.sub(r"\1*", model)


def seed_summaries(summaries):
    """For each setting of which two or more runs were evaluated: mean and interval over runs."""
    groups = {}
    for s in summaries:
        groups.setdefault((setting_of(s["model"]), s["data"], s["temperature"]), []).append(s)
    found = []
    for (name, data, temperature), group in groups.items():
        if len(group) > 1:
            row = {"model": name, "data": data, "temperature": temperature, "runs": len(group)}
            for key in SCORES:
                if key in group[0]:
                    row[key], row[f"{key}_interval"] = over_seeds([s[key] for s in group])
            found.append(row)
    return found


def main_score(rows):
    """What a set is compared by: "math" where it has LaTeX answers, else "flexible"."""
    return "math" if "math" in rows[0] else "flexible"


def compare(a_runs, b_runs, key):
    """B − A of one measure: means of both, difference, 95 % interval, McNemar's p or None.

    a_runs, b_runs: lists of runs (their rows) on the same problems. One run each: paired by
    problem, bootstrap over problems. Several each: over runs (Welch), each run one value. None
    where the measure has no value, as arithmetic without statements.
    """
    a, b = ([by_problem(rows, key) for rows in runs] for runs in (a_runs, b_runs))
    p = None
    if len(a) == len(b) == 1:
        pairs = [(x, y) for x, y in zip(a[0], b[0], strict=True) if None not in (x, y)]
        if not pairs:
            return None
        mean_a, mean_b = (statistics.mean(side) for side in zip(*pairs))
        difference, interval = mean_b - mean_a, bootstrap([y - x for x, y in pairs])
        if key in SCORES and {v for pair in pairs for v in pair} <= {0, 1}:
            p = mcnemar(sum(x > y for x, y in pairs), sum(y > x for x, y in pairs))
    else:
        a, b = ([statistics.mean(v for v in run if v is not None) for run in side
                 if any(v is not None for v in run)] for side in (a, b))
        if min(len(a), len(b)) < 2:
            return None
        mean_a, mean_b = statistics.mean(a), statistics.mean(b)
        difference, interval = welch(a, b)
    return {"a": mean_a, "b": mean_b, "difference": difference, "interval": interval, "p": p,
            "verdict": verdict(interval)}


def verdict(interval, null=0.0):
    low, high = interval
    return "B higher" if low > null else "B lower" if high < null else "no difference shown"


# ------------------------------------------------------------------ tables and the figure

def share(key, digits=1):
    """Formats a share of a row, with its interval where it has one: 92.0% [87.4, 95.0]."""
    def cell(row):
        if row.get(key) is None:
            return ""
        low_high = row.get(f"{key}_interval")
        text = f"{row[key]:.{digits}%}"
        return f"{text} [{', '.join(f'{100 * x:.1f}' for x in low_high)}]" if low_high else text
    return cell


def plain(key, form="s"):
    return lambda row: format(row[key], form) if row.get(key) is not None else ""


WHICH = {"model": plain("model"), "data": plain("data"), "T": plain("temperature", "g")}


def table(rows, columns):
    """A Markdown table, aligned; columns: heading -> text of a row. Empty columns are left out."""
    columns = {heading: list(map(cell, rows)) for heading, cell in columns.items()}
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    widths = [max(map(len, [heading, *cells])) for heading, cells in columns.items()]
    lines = [list(columns), ["-" * width for width in widths], *zip(*columns.values())]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
                     for line in lines)


def score_table(summaries):
    ks = sorted({key for s in summaries for key in s if key.startswith("pass@")},
                key=lambda key: int(key[5:]))
    return table(summaries, {
        **WHICH, "n": plain("n_problems", "d"), "samples": plain("samples", "d"),
        **{key: share(key) for key in SCORES}, "format": share("format"), "cut": share("truncated"),
        "tokens": plain("mean_tokens", ".1f"), "majority": share("majority"),
        **{key: share(key) for key in ks}})


def style_table(summaries):
    return table(summaries, {**WHICH, **{heading: plain(key, form)
                                         for key, (heading, form) in STYLE.items()}})


def seed_table(seeds):
    return table(seeds, {**WHICH, "runs": plain("runs", "d"),
                         **{key: share(key) for key in SCORES}})


def comparison_table(comparisons):
    """All measures in which an answer differs, and the scores."""
    def interval(row):
        return "[" + ", ".join(format(x, row["form"]) for x in row["interval"]) + "]"
    shown = [c for c in comparisons if c["measure"] in SCORES or c["interval"] != (0, 0)]
    return table(shown, {
        "data": plain("data"), "T": plain("temperature", "g"), "measure": plain("measure"),
        **{side: lambda row, key=side.lower(): format(row[key], row["form"]) for side in "AB"},
        "B − A": lambda row: format(row["difference"], "+" + row["form"]),
        "95 % interval": interval, "McNemar p": plain("p", ".2g"), "verdict": plain("verdict")})


def draw_accuracy(summaries, path):
    """Accuracy against temperature with 95 % intervals, a panel per set, a line per model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sets = list(dict.fromkeys(s["data"] for s in summaries))
    models = list(dict.fromkeys(s["model"] for s in summaries))
    figure, panels = plt.subplots(1, len(sets), figsize=(1.5 + 3.5 * len(sets), 3.6), sharey=True,
                                  squeeze=False, layout="constrained")
    for data, panel in zip(sets, panels[0]):
        for i, model in enumerate(models):
            found = sorted((s for s in summaries if (s["data"], s["model"]) == (data, model)),
                           key=lambda s: s["temperature"])
            key = main_score(found)
            y = [s[key] for s in found]
            low, high = zip(*(s[f"{key}_interval"] for s in found))
            errors = [[max(v - a, 0) for v, a in zip(y, low)],
                      [max(b - v, 0) for v, b in zip(y, high)]]
            x = [s["temperature"] + 0.006 * (i - len(models) / 2) for s in found]
            panel.errorbar(x, y, errors, fmt="o-", capsize=3, markersize=4, label=model)
        panel.set(title=f"{data} ({key})", xlabel="temperature", ylim=(-0.02, 1.02))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("accuracy, 95 % intervals")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------ the evaluation

def expand(name):
    """A model's name, or the folders that a pattern such as "runs/a-s*/best" stands for."""
    if not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name))
    if not found:
        raise ValueError(f"{name}: no folder matches this pattern")
    return found


def rows_that_fit(folder, device, dtype, max_new_tokens):
    """Completions in flight that memory allows, at most 1,024, on a CPU 256 (more gain nothing).

    Of the device's whole memory, so that the same command finds its answers again: 80 % of it
    without the weights (masters and the sampler's copy), by a row's cache and four rows of logits.
    """
    c = checked_config(read_json(folder / "config.json"))
    if device == "cpu":
        most, memory = 256, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        most, memory = 1024, torch.cuda.get_device_properties(device).total_memory
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cached = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    tokens = min(max_new_tokens + 256, c["max_position_embeddings"])
    row = tokens * cached * DTYPES[dtype].itemsize + 16 * c["vocab_size"]
    fit = int((0.8 * memory - 3 * weights) / row)
    return max(1, min(most, 1 << fit.bit_length() - 1 if fit > 0 else 1))


def answer_cell(path, about, problems, load, args, label, progress):
    """Rows of one model on one set at one temperature: what `path` holds, and the rest answered.

    about: what the answers depend on, the first line of the file. load(): the model, if needed.
    """
    samples, n_problems = about["samples"], about["chunk"]
    rows, end = read_answers(path, about, len(problems) * samples, n_problems * samples)
    if len(rows) == len(problems) * samples:
        return rows
    model = load()
    room = room_for(model, [build_prompt(model.tokenizer, p) for p in problems],
                    args.max_new_tokens)
    with open(path, "r+b" if end else "wb") as file:
        file.truncate(end)
        file.seek(end)
        lines = [] if end else [about]
        for start in range(len(rows) // samples, len(problems), n_problems):
            chunk = problems[start:start + n_problems]
            new = answer(model, chunk, samples, about["temperature"], args.top_p, room, args.seed,
                         0, about["rows"], range(start, start + len(chunk)),
                         progress.rollout(label))
            lines += measure(new, chunk, samples, model.tokenizer)
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            progress.done()
            rows, lines = rows + new, []
    return rows


def answer_all(args, folders, sets):
    """{(model, data, temperature): rows} of every combination; a greedy one has one sample."""
    (args.out / "answers").mkdir(parents=True, exist_ok=True)
    cells, missing = {}, 0
    for name, folder in folders.items():
        weights = fingerprint(folder)
        n_rows = args.rollout_rows or rows_that_fit(folder, args.device, args.dtype,
                                                    args.max_new_tokens)
        for data, problems in sets.items():
            for temperature in dict.fromkeys(args.temperature):
                samples = args.samples if temperature else 1
                about = {
                    "version": ANSWERS_VERSION, "model": name, "weights": weights, "data": data,
                    "problems": digest(problems), "temperature": temperature, "samples": samples,
                    "chunk": max(CHUNK * n_rows // samples, 1), "top_p": args.top_p,
                    "max_new_tokens": args.max_new_tokens, "rows": n_rows, "seed": args.seed,
                    "dtype": args.dtype, "device": args.device.split(":")[0]}
                slug = re.sub(r"[^\w.-]+", "-", f"{name}-{Path(data).stem}-T{temperature:g}")
                path = args.out / "answers" / f"{slug}-{digest(about)[:8]}.jsonl"
                cells[name, data, temperature] = path, about
                n = len(problems) * samples
                missing += n - len(read_answers(path, about, n, about["chunk"] * samples)[0])
    loaded, progress, found = {}, Progress(missing), {}

    def load(name):
        if name not in loaded:
            loaded.clear()  # one model at a time
            loaded[name] = Qwen2.from_pretrained(name, args.device, args.dtype)
        return loaded[name]
    for (name, data, temperature), (path, about) in cells.items():
        found[name, data, temperature] = answer_cell(
            path, about, sets[data], lambda name=name: load(name), args,
            f"{name} {data} T={temperature:g}", progress)
    progress.bar.close()
    if progress.seconds:
        print(f"{progress.rows:,} answers, {progress.tokens:,} tokens sampled in "
              f"{progress.seconds:.1f} s: {progress.tokens / progress.seconds:,.0f} tokens/s",
              file=sys.stderr)
    return found


def ask_judge(args, answers, sets, sides):
    """Adds the judge's marks to the rows judged, the first sample of the first problems of each
    cell: (tallies, preferences, rows of the dispute sheet).

    preferences: {(data, temperature): per pair of runs the list of B's scores in both orders}.
    """
    said_by = judge.make_judge(args.judge, args.judge_name, args.device, args.dtype,
                               per_minute=args.judge_per_minute, timeout_s=args.judge_timeout)
    path = args.out / "judge.jsonl"
    question = {p.id: p.question for problems in sets.values() for p in problems}
    chosen = {cell: [row for row in rows if row["sample"] == 0][:args.judge_problems]
              for cell, rows in answers.items()}
    every = [row for rows in chosen.values() for row in rows]
    marks, tally = judge.mark_answers(said_by, [question[row["problem"]] for row in every],
                                      [row["text"] for row in every], path)
    for row, mark in zip(every, marks):
        row |= {f"judge_{aspect}": n for aspect, n in (mark or {}).items()}
    tallies, preferences = {"judge": said_by.name, "prompt_version": judge.PROMPT_VERSION,
                            "marks": tally}, {}
    flips = set()
    for a, b in zip(*sides):
        for data, temperature in dict.fromkeys(cell[1:] for cell in answers):
            rows_a, rows_b = (chosen[name, data, temperature] for name in (a, b))
            outcomes, tally = judge.prefer(
                said_by, [question[row["problem"]] for row in rows_a],
                [row["text"] for row in rows_a], [row["text"] for row in rows_b], path)
            preferences.setdefault((data, temperature), []).append(outcomes)
            tallies[f"preferences {a} | {b}, {data}, T {temperature:g}"] = tally
            flips |= {(data, temperature, row["problem"]) for row, o in zip(rows_a, outcomes)
                      if o and o[0] != o[1]}
    return tallies, preferences, disputes(chosen, question, flips)


def disputes(chosen, question, flips, n=20):
    """The n problems where the judge disagrees most with the grader or, by order, with itself."""
    found = {}
    for (name, data, temperature), rows in chosen.items():
        for row in rows:
            case = data, temperature, row["problem"]
            d = found.setdefault(case, {"question": question[row["problem"]], "gold": row["gold"],
                                        "answers": {}, "size": 0.0, "why": []})
            marks = {key[6:]: row[key] for key in JUDGED if key in row}
            right = row[main_score([row])]
            d["answers"][name] = (row["text"], f"{'right' if right else 'wrong'}; " + (", ".join(
                f"{aspect} {n}" for aspect, n in marks.items()) or "not judged"))
            gap = abs((marks["mathematics"] - 1) / 4 - right) if marks else 0.0
            d["size"] += gap
            if gap > 0.5:
                d["why"].append(f"{name} is {'right' if right else 'wrong'}, the judge gives its "
                                f"mathematics {marks['mathematics']}")
    for case in flips:
        found[case]["size"] += 1
        found[case]["why"].append("the preference changes with the order")
    for case, d in found.items():
        d["why"] = f"{case[2]}, T {case[1]:g}: " + "; ".join(d["why"])
    return sorted((d for d in found.values() if d["size"] > 0.5), key=lambda d: -d["size"])[:n]


def compare_all(sides, answers, preferences):
    """Every measure of every set and temperature, B against A: rows for `comparison_table`."""
    found = []
    for data, temperature in dict.fromkeys(cell[1:] for cell in answers):
        runs = [[answers[name, data, temperature] for name in side] for side in sides]
        score = main_score(runs[0][0])
        about = {"data": data, "temperature": temperature}
        measures = {score: (score, ".1%"), "format": ("format", ".1%"), **STYLE, **JUDGED}
        for key, (heading, form) in measures.items():
            result = compare(*runs, key)
            if result:
                found.append({**about, "measure": heading, "form": form, **result})
        scores = [[sum(o) / 2 for o in outcomes if o]
                  for outcomes in preferences.get((data, temperature), [])]
        if scores and all(scores):
            mean, interval = (over_seeds(list(map(statistics.mean, scores))) if len(scores) > 1
                              else (statistics.mean(scores[0]), bootstrap(scores[0])))
            interval = tuple(2 * x - 1 for x in interval)
            found.append({**about, "measure": "judge: preferred", "form": ".1%", "a": 1 - mean,
                          "b": mean, "difference": 2 * mean - 1, "interval": interval, "p": None,
                          "verdict": verdict(interval)})
    return found


def judge_table(summaries):
    def marks(key):
        def cell(row):
            if row[key] is None:
                return ""
            low, high = row[f"{key}_interval"]
            return f"{row[key]:.2f} [{low:.2f}, {high:.2f}]"
        return cell
    return table([s for s in summaries if "judged" in s], {
        **WHICH, "judged": plain("judged", "d"), **{key[6:]: marks(key) for key in JUDGED}})


def evaluate(args):
    """Answer, judge, summarise, compare; write the tables and the figure. Returns results.md."""
    sides = [expand(name) for name in args.compare or ()]
    if sides and (len(sides[0]) == 1) != (len(sides[1]) == 1):
        raise ValueError(f"--compare: A is {len(sides[0])} run(s) and B {len(sides[1])}; give one "
                         "run each or several each")
    models = dict.fromkeys([m for name in args.models for m in expand(name)] + sum(sides, []))
    folders = {name: model_folder(name) for name in models}  # a wrong name shows at once
    if args.judge and not judge.is_address(args.judge):
        model_folder(args.judge)
    for data in args.data:
        if Path(data).is_file():
            print(f"{data}: a file has no splits, all its rows are used (a run that trained on "
                  "a file leaves the problems it held out in test.jsonl)", file=sys.stderr)
    sets = {data: load_problems(data, args.split)[:args.limit] for data in args.data}
    answers = answer_all(args, folders, sets)
    tallies, preferences, sheet = {}, {}, []
    if args.judge:
        tallies, preferences, sheet = ask_judge(args, answers, sets, sides)
    summaries = [{"model": name, "data": data, "temperature": temperature,
                  **full_summary(rows, len(rows) // len(sets[data]))}
                 for (name, data, temperature), rows in answers.items()]
    seeds = seed_summaries(summaries)
    parts = {"Accuracy": score_table(summaries)}
    if seeds:
        parts["Over seeds, each run one value"] = seed_table(seeds)
    parts["Style"] = style_table(summaries)
    if any("judged" in s for s in summaries):
        parts[f"Marks of {tallies['judge']}"] = judge_table(summaries)
    comparisons = compare_all(sides, answers, preferences) if sides else []
    if sides:
        parts[f"A {args.compare[0]}, B {args.compare[1]}"] = comparison_table(comparisons)
    for name, tally in tallies.items():
        if isinstance(tally, dict):
            parts[f"Judge, {name}"] = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" if isinstance(
                v, float) else f"{k.replace('_', ' ')} {v}" for k, v in tally.items())
    text = "\n\n".join(f"**{heading}**\n\n{part}" for heading, part in parts.items())
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps(
        {"settings": settings, "results": summaries, "seeds": seeds, "comparison": comparisons,
         "judge": tallies}, indent=2) + "\n", encoding="utf-8")
    (args.out / "results.md").write_text(text + "\n", encoding="utf-8")
    draw_accuracy(summaries, args.out / "accuracy.png")
    if sheet:
        judge.dispute_sheet(sheet, args.out / "disputed.md")
    return text, verdicts(args, comparisons)


def verdicts(args, comparisons):
    """One line for each set and temperature: what the comparison of accuracies shows."""
    lines = []
    for c in comparisons:
        if c["measure"] in SCORES:
            low, high = (100 * x for x in c["interval"])
            p = f", McNemar p {c['p']:.2g}" if c["p"] is not None else ""
            lines.append(f"{c['data']}, T {c['temperature']:g}: {c['verdict']}: "
                         f"{c['measure']} {c['a']:.1%} of {args.compare[0]}, {c['b']:.1%} of "
                         f"{args.compare[1]}, {100 * c['difference']:+.1f} points "
                         f"[{low:+.1f}, {high:+.1f}]{p}")
    return lines


def make_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="python evaluate.py MODEL [MODEL …] --data SET [SET …] [flags]",
        description="Accuracy and style of models on problem sets; one table for all of them.")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="hub names, model folders, 'quoted/patterns*'")
    add("--data", nargs="+", required=True, help="gsm8k svamp asdiv math500 tiny, or a .jsonl file")
    add("--split", default="test", help="which rows of each set")
    add("--temperature", nargs="+", type=float, default=[0.0], help="≥ 0; 0 is greedy, once")
    add("--samples", type=int, default=1, help="answers per problem at temperature > 0")
    add("--top-p", type=float, default=1.0, help="nucleus mass, in (0, 1]")
    add("--max-new-tokens", type=int, default=512, help="per answer; less where the context ends")
    add("--limit", type=int, default=None, help="only the first problems of each set")
    add("--compare", nargs=2, metavar=("A", "B"), help="B against A, runs or patterns of seeds")
    add("--judge", default=None, help="model folder or hub name, or the URL of an "
        "OpenAI-compatible endpoint (key in OPENAI_API_KEY)")
    add("--judge-name", default=None, help="the model at that URL")
    add("--judge-problems", type=int, default=100, help="of each set, one answer each")
    add("--judge-per-minute", type=float, default=0, help="requests at most; 0: no limit")
    add("--judge-timeout", type=float, default=120.0, help="seconds for one request")
    add("--rollout-rows", type=int, default=None, help="completions in flight at once; without it "
        "what memory allows, at most 1,024, on a CPU 256")
    add("--seed", type=int, default=0, help="of the sampler")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the computation")
    add("--out", type=Path, default=Path("evaluations"),
        help="folder; answers in it are used again")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check_sampling(parser, args)
    if args.judge and judge.is_address(args.judge) and not args.judge_name:
        parser.error("--judge is a URL; name the model there with --judge-name")
    if not args.models and not args.compare:
        parser.error("name one or more models, or two with --compare")
    for flag in ("samples", "rollout_rows", "limit", "judge_problems", "judge_timeout"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            parser.error(f"--{flag.replace('_', '-')} is {value}; expected 1 or more")
    if args.samples > 1 and not any(args.temperature):
        print("--samples is for --temperature above 0; greedy answers once", file=sys.stderr)
    if args.out.exists() and not (args.out.is_dir() and (
            (args.out / "answers").is_dir() or not any(args.out.iterdir()))):
        parser.error(f"--out {args.out} exists and holds no evaluation; name another folder")
    try:
        text, lines = evaluate(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from what is in {args.out}", file=sys.stderr)
        sys.exit(130)
    print("\n".join([text, "", *lines, *[""] * bool(lines), f"wrote {args.out}/results.md, "
                     "results.json, accuracy.png and, one file a cell, answers/"]))


if __name__ == "__main__":
    main()

"""Accuracy and style of models on problem sets, with intervals; one model against another.

What it does    samples answers with rollout.py, grades them with rewards.py, and writes
                results.md, results.json, graded.jsonl and accuracy.png. Answers stay on disk:
                an interrupted evaluation goes on where it stopped, a finished one is not repeated.
What it leaves  sampling to rollout.py, what is correct to rewards.py, opinions to judge.py,
                statistics to intervals.py.
Run it alone    python evaluate.py tiny runs/tiny-pspo-s0/best --data tiny
Where to fork   a measure of style is a line in `style` and one in STYLE; a scorer is
                one of rewards.py. Answers on disk are graded anew each time, so neither costs any
                sampling.

A *cell* is one model on one set at one temperature; its *rows* are one dict for each answer.
"""
import argparse
import glob
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation import judge
from evaluation.answers import CHUNK, Progress, digest, read_answers, rows_that_fit
from evaluation.figures import draw_accuracy
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
from evaluation.style import STYLE, after_answer, style
from evaluation.tables import (
    comparison_table,
    main_score,
    measure_table,
    p_value,
    score_table,
    seed_table,
)
from model import DTYPES, Qwen2
from plumbing.checkpoint import locked
from plumbing.files import write_whole
from plumbing.hub import fingerprint, is_out_of_memory, keep_freed_memory, model_folder
from plumbing.latex import ungraded
from plumbing.problems import read_problems, report_dropped
from plumbing.settings import check_sampling
from rewards import INSTRUCTION, SCORERS, build_prompt, extract_answer, has_format, is_correct
from rollout import generate, room_for

YES_OR_NO = (*SCORERS, "format", "leakage")  # measures that are true or false of an answer


# ------------------------------------------------------------------ answers and their grades

def rows_of(rollout, problems, tokenizer):
    """rows[p][g]: a dict for every answer of a rollout, with problem (id), sample, text, n_tokens
    and finished. problems[p] is the problem that prompt p asks."""
    return [[{"problem": problem.id, "sample": g, "n_tokens": len(ids), "finished": finished,
              "text": tokenizer.decode(ids, skip_special_tokens=True)}
             for g, (ids, finished) in enumerate(zip(*group))]
            for problem, *group in zip(problems, rollout.completions, rollout.finished)]


def grade(rollout, problems, tokenizer, progress=None):
    """`rows_of`, each with its gold and graded: the bools strict, flexible and format."""
    rows = rows_of(rollout, problems, tokenizer)
    bar = tqdm(zip(rows, problems), desc=progress, unit="problem", leave=False, delay=2,
               total=len(rows), disable=progress is None)
    for group, problem in bar:
        for row in group:
            text, gold, finished = row["text"], problem.gold, row["finished"]
            row |= {"gold": gold, "strict": is_correct(text, gold, "strict", finished=finished),
                    "flexible": is_correct(text, gold, "flexible", finished=finished),
                    "format": has_format(text, gold, finished=finished)}
    return rows


def sample_answers(model, problems, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=512,
                   seed=0, step=0, max_rows=256, prompt_keys=None, progress="evaluate"):
    """A Rollout with `samples` answers to every problem.

    Draws depend on (seed, step, problem index or its key, sample, position) alone. progress: as
    in `generate`.
    """
    prompts = [build_prompt(model.tokenizer, problem) for problem in problems]
    return generate(model, prompts, samples, room_for(model, prompts, max_new_tokens), temperature,
                    top_p, seed, step, prompt_keys, max_rows=max(max_rows, samples),
                    progress=progress)


def answer(model, problems, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=512, seed=0,
           step=0, max_rows=256, progress="evaluate"):
    """Answer every problem `samples` times and grade each answer: the rows of `grade`, in one list.
    """
    rollout = sample_answers(model, problems, samples, temperature, top_p, max_new_tokens, seed,
                             step, max_rows, None, progress)
    rows = grade(rollout, problems, model.tokenizer, progress and "grading")
    return [row for group in rows for row in group]


def measure(rows, problems):
    """Rows of a cell with all that is said about an answer: every score, the answer, its style."""
    by_id = {problem.id: problem for problem in problems}
    latex = any(problem.kind == "latex" for problem in problems)
    for row in tqdm(rows, desc="grading", unit="answer", leave=False, delay=2):
        problem, text, finished = by_id[row["problem"]], row["text"], row["finished"]
        row |= {key: is_correct(text, problem.gold, key, finished=finished)
                for key in SCORERS if key != "math" or latex}
        row |= {"gold": problem.gold, "format": has_format(text, problem.gold, finished=finished),
                "answer": extract_answer(text, finished=finished, kind=problem.kind), **style(text)}
    return rows


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
    """Whether a problem's most frequent answer is right (the earliest of equally frequent ones).
    Right answers count as one however they are written, wrong ones as their text."""
    answers = [True if row["flexible"] else row["answer"] for row in rows
               if row["flexible"] or row["answer"] is not None]
    return max(answers, key=answers.count, default=None) is True


def summarise(rows, samples):
    """Means over all rows, and for two or more samples pass@k for k = 1, 2, 4, … ≤ samples and the
    majority vote, both by flexible correctness."""
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
    """`summarise`, and every score, measure of style and mark as a mean over problems with its
    interval; not those without values, as arithmetic without statements."""
    summary = summarise(rows, samples)
    summary["judged"] = sum(next(iter(JUDGED)) in row for row in rows)
    for key in (*SCORERS, "format", *STYLE, *JUDGED):
        values = [v for v in by_problem(rows, key) if v is not None]
        if values:
            interval = interval_of(values) if key in YES_OR_NO else bootstrap(values)
            summary[key], summary[f"{key}_interval"] = statistics.fmean(values), interval
    return summary


SEED = re.compile(r"(?:(?<=[-_/])|^)(s|seed)[-_]?\d+(?=[-_/]|$)")


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
            for key in SCORERS:
                if key in group[0]:
                    row[key], interval = over_seeds([s[key] for s in group])
                    row[f"{key}_interval"] = interval and (max(interval[0], 0.0),
                                                           min(interval[1], 1.0))
            found.append(row)
    return found


def compare(a_runs, b_runs, key):
    """B − A of one measure: dict with a, b, difference, interval, p, verdict; None without values.

    a_runs, b_runs: lists of runs (their rows) on the same problems. One run each: paired by
    problem (those where both have a value), bootstrap and `sign_flips`. Several each: Welch over
    runs, each one value, no p; None as interval where no run differs from its siblings.
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


# ------------------------------------------------------------------ the evaluation

def expand(name):
    """A model's name, or the folders that a pattern such as "runs/a-s*/best" stands for."""
    if Path(name).exists() or not glob.has_magic(name):
        return [name]
    found = glob.glob(name)
    if not found:
        raise ValueError(f"{name}: no folder matches this pattern")
    return sorted(found, key=lambda path: [int(x) if x.isdecimal() else x
                                           for x in re.split(r"(\d+)", path)])


def longest_answers(model, name, sets, max_new_tokens):
    """{data: tokens of an answer for which the set's longest prompt leaves room}."""
    found = {}
    for data, problems in sets.items():
        try:
            prompts = [build_prompt(model.tokenizer, problem) for problem in problems]
            found[data] = room_for(model, prompts, max_new_tokens)
        except ValueError as e:
            raise ValueError(f"{name} on {data}: {e}") from e
    return found


def fill(path, settings, problems, model, room, args, progress):
    """Answer what a cell's file lacks, a chunk at a time; room: tokens of an answer."""
    samples, per_chunk = settings["samples"], settings["problems_per_chunk"]
    expected = [(p.id, g) for p in problems for g in range(samples)]
    with locked(path, f"{path} is being written by another evaluation"):
        rows, end = read_answers(path, settings, expected, per_chunk * samples)
        n_lost = path.read_bytes()[end:].count(b"\n") - (not end)  # less the line of settings
        if n_lost >= per_chunk * samples:  # more than a killed process leaves
            kept = path.with_name(path.name + ".damaged")
            shutil.copy(path, kept)
            print(f"warning: {path} is damaged in answer {len(rows) + 1} or soon after it; "
                  f"{n_lost} answers are sampled again, the old file is kept as {kept}",
                  file=sys.stderr)
        with open(path, "r+b") as file:
            file.truncate(end)
            file.seek(end)
            lines = [] if end else [settings]
            for start in range(len(rows) // samples, len(problems), per_chunk):
                chunk = problems[start:start + per_chunk]
                rollout = sample_answers(
                    model, chunk, samples, settings["temperature"], args.top_p, room, args.seed, 0,
                    settings["rows_in_flight"], range(start, start + len(chunk)),
                    progress.start(f"{settings['model']} {settings['data']} "
                                   f"T={settings['temperature']:g}"))
                progress.end()
                for row in (r for group in rows_of(rollout, chunk, model.tokenizer) for r in group):
                    behind = after_answer(row["text"])
                    row["tokens_after"] = len(model.tokenizer.encode(behind,
                                                                     add_special_tokens=False))
                    lines.append(row)
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                file.flush()
                lines = []


def answer_all(args, folders, sets):
    """{(model, data, temperature): rows} of every cell; a greedy one has one sample."""
    (args.out / "answers").mkdir(parents=True, exist_ok=True)
    cells = {}
    for name, folder in folders.items():
        weights = fingerprint(folder)
        rows_in_flight = args.rollout_rows or rows_that_fit(folder, args.device, args.dtype,
                                                            args.max_new_tokens)
        for data, problems in sets.items():
            for temperature in dict.fromkeys(args.temperature):
                samples = args.samples if temperature else 1
                settings = {
                    "model": name, "weights": weights, "data": data, "temperature": temperature,
                    "problems": digest(INSTRUCTION, problems), "samples": samples,
                    "problems_per_chunk": max(CHUNK * rows_in_flight // samples, 1),
                    "rows_in_flight": rows_in_flight, "top_p": args.top_p, "seed": args.seed,
                    "max_new_tokens": args.max_new_tokens, "dtype": args.dtype,
                    "device": args.device.split(":")[0]}
                slug = re.sub(r"[^\w.-]+", "-", f"{name}-{Path(data).stem}-T{temperature:g}")
                cells[name, data, temperature] = (
                    args.out / "answers" / f"{slug}-{digest(settings)[:8]}.jsonl", settings)

    def answers(path, settings):
        samples = settings["samples"]
        expected = [(p.id, g) for p in sets[settings["data"]] for g in range(samples)]
        chunk = settings["problems_per_chunk"] * samples
        return read_answers(path, settings, expected, chunk)[0], len(expected)
    there, missing = {}, {}
    for which, (path, settings) in cells.items():
        there[which], n = answers(path, settings)
        missing[which] = n - len(there[which])
    if n_there := sum(map(len, there.values())):
        print(f"{n_there:,} answers are in {args.out}/answers already", file=sys.stderr)
    progress = Progress(sum(missing.values()))
    for name in folders:
        model = None
        for (of, data, temperature), (path, settings) in cells.items():
            if of == name and missing[of, data, temperature]:
                if model is None:
                    model = Qwen2.from_pretrained(name, args.device, args.dtype)
                    room = longest_answers(model, name, sets, args.max_new_tokens)
                fill(path, settings, sets[data], model, room[data], args, progress)
                there[of, data, temperature], _ = answers(path, settings)
    progress.bar.close()
    if progress.seconds:
        print(f"{progress.answers:,} answers, {progress.tokens:,} tokens sampled in "
              f"{progress.seconds:.1f} s: {progress.tokens / progress.seconds:,.0f} tokens/s",
              file=sys.stderr)
    return {which: measure(rows, sets[which[1]]) for which, rows in there.items()}


def ask_judge(asked, args, answers, sets, sides):
    """Add the judge's marks to the rows judged, the first sample of the first problems of each
    cell: (tallies, preferences, disputes).

    preferences: {(data, temperature): for each pair of runs the list of B's scores in both orders}.
    """
    path = args.out / "judge.jsonl"
    question = {(data, p.id): p.question for data, problems in sets.items() for p in problems}
    chosen = {which: [row for row in rows if row["sample"] == 0][:args.judge_problems]
              for which, rows in answers.items()}
    every = [(question[which[1], row["problem"]], row)
             for which, rows in chosen.items() for row in rows]
    marks, tally = judge.mark_answers(asked, [q for q, _ in every],
                                      [row["text"] for _, row in every], path)
    for (_, row), mark in zip(every, marks):
        row |= {f"judge_{aspect}": n for aspect, n in (mark or {}).items()}
    tallies, preferences, flips = {"marks": tally}, {}, set()
    for a, b in zip(*sides):
        for data, temperature in dict.fromkeys(which[1:] for which in answers):
            rows_a, rows_b = (chosen[name, data, temperature] for name in (a, b))
            outcomes, tally = judge.prefer(
                asked, [question[data, row["problem"]] for row in rows_a],
                [row["text"] for row in rows_a], [row["text"] for row in rows_b], path)
            preferences.setdefault((data, temperature), []).append(outcomes)
            tallies[f"preferences {a} | {b}, {data}, T {temperature:g}"] = tally
            flips |= {(data, temperature, row["problem"]) for row, outcome in zip(rows_a, outcomes)
                      if outcome and outcome[0] != outcome[1]}
    return tallies, preferences, disputes(chosen, question, flips)


def disputes(chosen, question, flips, n=20):
    """The n problems where the judge disagrees most with the grader or, by order, with itself."""
    cases = {}
    for (name, data, temperature), rows in chosen.items():
        for row in rows:
            case = cases.setdefault((data, temperature, row["problem"]), {
                "question": question[data, row["problem"]], "gold": row["gold"], "answers": {},
                "size": 0.0, "why": []})
            marks = {key[6:]: row[key] for key in JUDGED if key in row}
            right = row[main_score([row])]
            grade = "right" if right else "wrong"
            said = ", ".join(f"{aspect} {mark}" for aspect, mark in marks.items()) or "not judged"
            case["answers"][name] = row["text"], f"{grade}; {said}"
            if marks and abs((marks["mathematics"] - 1) / 4 - right) > 0.5:
                case["size"] += abs((marks["mathematics"] - 1) / 4 - right)
                case["why"].append(f"{name} is {grade}, the judge gives its mathematics "
                                   f"{marks['mathematics']}")
    for which in flips:
        cases[which]["size"] += 1
        cases[which]["why"].append("the preference changes with the order")
    for (data, temperature, problem), case in cases.items():
        case["why"] = f"{problem}, T {temperature:g}: " + "; ".join(case["why"])
    disputed = [case for case in cases.values() if case["size"]]
    return sorted(disputed, key=lambda case: -case["size"])[:n]


def compare_all(sides, answers, preferences):
    """Every measure of every set and temperature, B against A: rows for `comparison_table`."""
    found = []
    for data, temperature in dict.fromkeys(which[1:] for which in answers):
        runs = [[answers[name, data, temperature] for name in side] for side in sides]
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


def verdicts(args, comparisons):
    """One line for each set and temperature: what the comparison of accuracies shows."""
    lines = []
    for c in comparisons:
        if c["measure"] in SCORERS:
            between = "" if c["interval"] is None else " [{:+.1f}, {:+.1f}]".format(
                *(100 * x for x in c["interval"]))
            p = f", p {p_value(c)}" if c["p"] is not None else ""
            lines.append(f"{c['data']}, T {c['temperature']:g}: {c['verdict']}: "
                         f"{c['measure']} {c['a']:.1%} of {args.compare[0]}, {c['b']:.1%} of "
                         f"{args.compare[1]}, {100 * c['difference']:+.1f} points{between}{p}")
    return lines


def evaluate(args):
    """Answer, judge, and what `write_results` does: (text, verdicts)."""
    sides = [expand(name) for name in args.compare or ()]
    sizes = [len(side) for side in sides]
    if sides and min(sizes) == 1 != max(sizes) or args.judge and len(set(sizes)) > 1:
        raise ValueError(f"--compare: A is {sizes[0]} run(s) and B {sizes[1]}; give one run each "
                         "or several each, with --judge as many")
    others = [m for name in args.models for m in expand(name)]
    if sides and (both := set(sides[0]) & set(sides[1])) and sides[0] != sides[1]:
        raise ValueError(f"--compare: {', '.join(sorted(both))} is on both sides")
    if sizes == [1, 1] and len({setting_of(m) for m in (*args.compare, *others)}) == 1 and others:
        raise ValueError("--compare: A, B and the models before it are runs of one setting; quote "
                         "patterns, as in --compare 'runs/a-s*/best' 'runs/b-s*/best'")
    models = dict.fromkeys(others + sum(sides, []))
    folders = {name: model_folder(name) for name in models}  # a wrong name shows at once
    if args.judge and not judge.is_address(args.judge):
        model_folder(args.judge)
    for data in args.data:
        if Path(data).is_file():
            print(f"{data}: a file has no splits, all its rows are used (a run that trained on "
                  "a file leaves the problems it held out in test.jsonl)", file=sys.stderr)
    sets, dropped = {}, {}
    for data in args.data:
        problems, left_out = read_problems(data, args.split)
        sets[data] = problems[:args.limit]
        if left_out:
            dropped[data] = left_out
            report_dropped(data, args.split, len(problems), left_out)
    asked = None
    if args.judge:
        settings = json.loads(args.judge_body), args.judge_per_minute, args.judge_timeout
        asked = judge.make_judge(args.judge, args.judge_name, args.device, args.dtype, *settings)
        asked.try_out()  # before hours of sampling
    answers = answer_all(args, folders, sets)
    about = {"sets": sets, "sides": sides, "dropped": dropped}
    if asked:  # what is there should the judge fail
        write_results(args, answers, **about)
        said = ask_judge(asked, args, answers, sets, sides)
        return write_results(args, answers, asked.name, *said, **about)
    return write_results(args, answers, **about)


def write_results(args, answers, judged_by="", tallies=(), preferences=(), disputed=(), *, sets,
                  sides, dropped):
    """Summarise and compare; write the tables, every grade and the figure: (text, verdicts)."""
    tallies, preferences = dict(tallies), dict(preferences)
    summaries = [{"model": name, "data": data, "temperature": temperature,
                  **full_summary(rows, len(rows) // len(sets[data]))}
                 for (name, data, temperature), rows in answers.items()]
    seeds = seed_summaries(summaries)
    comparisons = compare_all(sides, answers, preferences) if sides else []
    parts = {"Accuracy": score_table(summaries)}
    if seeds:
        parts["Over seeds, each run one value"] = seed_table(seeds)
    parts["Style"] = measure_table(summaries, STYLE)
    if any(s["judged"] for s in summaries):
        parts[f"Marks of {judged_by}"] = measure_table(summaries, {
            "judged": ("judged", "d"), **JUDGED})
    if sides:
        parts[f"A {args.compare[0]}, B {args.compare[1]}"] = comparison_table(comparisons)
    for name, tally in tallies.items():
        parts[f"Judge, {name}"] = ", ".join(
            f"{key.replace('_', ' ')} {round(v, 2) if isinstance(v, float) else v}"
            for key, v in tally.items())
    text = "\n\n".join(f"**{heading}**\n\n{part}" for heading, part in parts.items())
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    write_whole(args.out / "results.json", json.dumps(
        {"settings": settings, "results": summaries, "seeds": seeds, "comparison": comparisons,
         "judge": {"name": judged_by, "prompt_version": judge.PROMPT_VERSION, **tallies},
         "dropped": dropped, "not_graded": len(ungraded)}, indent=2) + "\n")
    write_whole(args.out / "results.md", text + "\n")
    write_whole(args.out / "graded.jsonl", "".join(
        json.dumps({"model": name, "data": data, "temperature": temperature, **row}) + "\n"
        for (name, data, temperature), rows in answers.items() for row in rows))
    draw_accuracy(summaries, args.out / "accuracy.png")
    judge.dispute_sheet(disputed, args.out / "disputed.md")
    return text, verdicts(args, comparisons)


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
    add("--judge-body", default="{}", help="JSON of more or other fields of its requests; null "
        "takes one away: '{\"max_tokens\": null, \"max_completion_tokens\": 500}'")
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
    keep_freed_memory()
    parser = make_parser()
    args = parser.parse_args(argv)
    check_sampling(parser, args)
    if args.judge and judge.is_address(args.judge) and not args.judge_name:
        parser.error("--judge is a URL; name the model there with --judge-name")
    if not args.models and not args.compare:
        parser.error("name one or more models, or two with --compare")
    try:
        if not isinstance(json.loads(args.judge_body), dict):
            raise ValueError("no object")
    except ValueError as e:
        parser.error(f"--judge-body is {args.judge_body}; expected a JSON object ({e})")
    if args.judge_per_minute < 0 or args.judge_name and not args.judge:
        parser.error("--judge-per-minute expects 0 or more, --judge-name goes with --judge URL")
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
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(f"error: out of memory; lower --rollout-rows or --max-new-tokens ({e})")
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from what is in {args.out}", file=sys.stderr)
        sys.exit(130)
    print("\n".join([text, "", *lines, *[""] * bool(lines), f"wrote {args.out}/results.md, "
                     "results.json, graded.jsonl, accuracy.png and, one file a cell, answers/"]))


if __name__ == "__main__":
    main()

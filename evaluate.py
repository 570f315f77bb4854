"""Accuracy and style of models on problem sets, with intervals; one model against another.

What it does    samples answers, grades them, and writes results.md, results.json, graded.jsonl and
                accuracy.png. Answers stay on disk: an interrupted evaluation goes on where it
                stopped, a finished one is not repeated.
Not here        sampling (rollout.py), what is correct (rewards.py); and in evaluation/: the files
                of answers, style, summaries, the judge, intervals, tables, figures.
Run it alone    python evaluate.py tiny runs/tiny-pspo-s0/best --data tiny
Where to fork   a measure of style is a line in evaluation/style.py; a scorer is a branch in
                rewards.py. Answers on disk are graded anew each time, so neither costs sampling.

A *cell* is one model on one set at one temperature. Its *rows* are dicts, one for each answer.
"""
import json
import sys
from functools import partial
from pathlib import Path

from evaluation import judge
from evaluation.answers import answer_files
from evaluation.figures import draw_accuracy
from evaluation.judge import JUDGED, Opinion
from evaluation.settings import chosen_models, chosen_problems, read_settings
from evaluation.style import STYLE, after_answer, style
from evaluation.summaries import compare_all, full_summary, seed_summaries
from evaluation.tables import (
    comparison_table,
    measure_table,
    score_table,
    seed_table,
    verdict_lines,
)
from model import Qwen2
from plumbing.files import write_rows, write_whole
from plumbing.hub import is_out_of_memory, keep_freed_memory, model_folder, use_threads
from plumbing.latex import ungraded
from plumbing.settings import warn_of_slow_bf16
from rewards import SCORERS, answer_rows, build_prompt, extract_answer, grade
from rollout import room_for, sample_answers

# ------------------------------------------------------------------ answers and their grades

def grade_fully(rows, problems):
    """As `grade`, with every scorer that fits the set, the answer as text, and its style."""
    kind_of = {problem.id: problem.kind for problem in problems}
    scorers = [s for s in SCORERS if s != "math" or "latex" in kind_of.values()]
    return [row | style(row["text"]) | {"answer": extract_answer(
                row["text"], finished=row["finished"], kind=kind_of[row["problem"]])}
            for row in grade(rows, problems, scorers, "grading")]


def answer_problems(model, problems, samples=1, temperature=0.0, top_p=1.0, max_new_tokens=512,
                    seed=0, step=0, max_rows=256, progress="evaluate"):
    """Answer every problem `samples` times and grade each answer: rows as of `grade`."""
    rollout = sample_answers(model, problems, samples, temperature, top_p, max_new_tokens, seed,
                             step, max_rows, None, progress)
    return grade(answer_rows(rollout, problems, model.tokenizer), problems,
                 progress=progress and "grading")


# ------------------------------------------------------------------ the evaluation

def graded_cells(args, folders, sets):
    """{Cell: fully graded rows}: the answers that lie on disk, and those that are sampled now."""
    (args.out / "answers").mkdir(parents=True, exist_ok=True)
    files = answer_files(args, folders, sets)
    rows = {cell: file.read()[0] for cell, file in files.items()}
    if n_known := sum(map(len, rows.values())):
        print(f"{n_known:,} answers are in {args.out}/answers already", file=sys.stderr)
    for name in folders:
        unfinished = {cell: file for cell, file in files.items() if cell.model == name
                      and len(rows[cell]) < len(file.expected())}
        if unfinished:
            rows |= complete(args, name, unfinished, sets)
    return {cell: grade_fully(rows[cell], sets[cell.data]) for cell in files}


def complete(args, name, files, sets):
    """Load one model and complete these files of its answers: {Cell: rows}."""
    model = Qwen2.from_pretrained(name, args.device, args.dtype)
    room = {}  # of every set, before hours of sampling: tokens of an answer to its longest prompt
    for data, problems in sets.items():
        try:
            prompts = [build_prompt(model.tokenizer, problem) for problem in problems]
            room[data] = room_for(model, prompts, args.max_new_tokens)
        except ValueError as e:
            raise ValueError(f"{name} on {data}: {e}") from e
    return {cell: file.complete(partial(sample_chunk, args, model, cell, file, room[cell.data]))
            for cell, file in files.items()}


def sample_chunk(args, model, cell, file, room, problems, first):
    """Sample the answers to these problems of a cell, the first of which is its number `first`."""
    rollout = sample_answers(
        model, problems, file.settings["samples"], cell.temperature, args.top_p, room, args.seed, 0,
        file.settings["rows_in_flight"], range(first, first + len(problems)),
        f"{cell}, problem {first + 1} to {first + len(problems)} of {len(file.problems)}")
    rows = answer_rows(rollout, problems, model.tokenizer)
    for row in rows:
        behind = after_answer(row["text"])
        row["tokens_after"] = len(model.tokenizer.encode(behind, add_special_tokens=False))
    return rows


def evaluate(args):
    """Answer, grade, judge and compare, as the flags say: what `write_results` returns."""
    sides, folders = chosen_models(args)
    if args.judge and not judge.is_address(args.judge):
        model_folder(args.judge)
    sets, dropped = chosen_problems(args)
    asked = None
    if args.judge:
        settings = json.loads(args.judge_body), args.judge_per_minute, args.judge_timeout
        asked = judge.make_judge(args.judge, args.judge_name, args.device, args.dtype, *settings)
        asked.try_out()  # before hours of sampling
    cells = graded_cells(args, folders, sets)
    written = write_results(args, cells, sides, dropped)  # also where the judge will fail
    if asked:
        opinion = judge.judge_cells(asked, args.out / "judge.jsonl", args.judge_problems, cells,
                                    sets, sides)
        written = write_results(args, cells, sides, dropped, opinion)
    return written


def write_results(args, cells, sides, dropped, opinion=Opinion()):
    """Summarise and compare; write the tables, every graded answer and the figure.

    Returns (the tables as text, the lines of `verdict_lines`).
    """
    summaries = [{**cell._asdict(), **full_summary(rows, rows[-1]["sample"] + 1)}
                 for cell, rows in cells.items()]
    seeds = seed_summaries(summaries)
    comparisons = compare_all(sides, cells, opinion.preferences) if sides else []
    parts = {"Accuracy": score_table(summaries)}
    if seeds:
        parts["Over seeds, each run one value"] = seed_table(seeds)
    parts["Style"] = measure_table(summaries, STYLE)
    if any(s["judged"] for s in summaries):
        parts[f"Marks of {opinion.judge}"] = measure_table(summaries, {
            "judged": ("judged", "d"), **JUDGED})
    if sides:
        parts[f"A {args.compare[0]}, B {args.compare[1]}"] = comparison_table(comparisons)
    for name, tally in opinion.tallies.items():
        parts[f"Judge, {name}"] = ", ".join(
            f"{key.replace('_', ' ')} {round(v, 2) if isinstance(v, float) else v}"
            for key, v in tally.items())
    text = "\n\n".join(f"**{heading}**\n\n{part}" for heading, part in parts.items())
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    write_whole(args.out / "results.json", json.dumps(
        {"settings": settings, "results": summaries, "seeds": seeds, "comparison": comparisons,
         "judge": {"name": opinion.judge, "prompt_version": judge.PROMPT_VERSION,
                   **opinion.tallies},
         "dropped": dropped, "not_graded": len(ungraded)}, indent=2) + "\n")
    write_whole(args.out / "results.md", text + "\n")
    write_rows(args.out / "graded.jsonl", [{**cell._asdict(), **row}
                                           for cell, rows in cells.items() for row in rows])
    draw_accuracy(summaries, args.out / "accuracy.png")
    return text, verdict_lines(*args.compare, comparisons) if sides else []


def main(argv=None):
    keep_freed_memory()
    args = read_settings(argv)
    warn_of_slow_bf16(args)
    use_threads()
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

"""Sets of word problems: where they lie, and how their rows become problems.

What it does    loads problems by the name of a set or from a JSON-lines, CSV or parquet file;
                leaves out, and says so, what no scorer can grade and, between the splits of a
                run, what repeats.
Not here        the prompt and the grade: rewards.py, which also offers `Problem` and
                `load_problems`. torch is never imported.
Run it alone    python -m plumbing.problems [SET or FILE …]     how many, and the first
Where to fork   a new data set is one line in `SETS`.
"""
import csv
import glob
import os
import random
import re
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Callable, NamedTuple

from plumbing.files import hub_errors, numbered_rows
from plumbing.latex import LONGEST_LATEX, bare, last_box
from plumbing.number import as_text, gold_number
from plumbing.onestep import onestep_rows

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
LATEX_MARKS = re.compile(r"[\\^]|^\$.*\$$")
FILES = "a .jsonl file with the columns question and answer, or of a .csv or .parquet one"


class Problem(NamedTuple):
    """One question; `gold` is the short answer as text, "18", `kind` is "number" or "latex"."""
    id: str
    question: str
    gold: str
    kind: str


class Source(NamedTuple):
    """Where the rows of a set lie, and how a row is read."""
    splits: dict  # our name of a split: the hub's
    repo: str | None = None  # on the hub; a set without one lies in tiny/<split>.jsonl, or is
    rows: Callable | None = None  # made by a function of the split
    config: str | None = None
    question: tuple = ("question",)  # columns, joined by a space
    answer: str = "answer"  # column
    latex: bool = False  # whether an answer that is no number is LaTeX


TINY = Path(__file__).resolve().parent.parent / "tiny"
TRAIN_AND_TEST = {"train": "train", "test": "test"}
SETS = {
    "tiny": Source({**TRAIN_AND_TEST, "validation": "validation"}),
    "onestep": Source({**TRAIN_AND_TEST, "validation": "validation"}, rows=onestep_rows),
    # the hub also has a config `socratic`
    "gsm8k": Source(TRAIN_AND_TEST, repo="openai/gsm8k", config="main"),
    "svamp": Source(TRAIN_AND_TEST, repo="ChilleD/SVAMP", question=("Body", "Question"),
                    answer="Answer"),
    # its only split is named validation and serves as test
    "asdiv": Source({"test": "validation", "validation": "validation"}, repo="EleutherAI/asdiv",
                    question=("body", "question")),
    "math500": Source({"test": "test"}, repo="HuggingFaceH4/MATH-500", question=("problem",),
                      latex=True),
}


def load_problems(name_or_path, split="test"):
    """Load a set of problems; leave out, and report, those whose answer no scorer can grade.

    name_or_path: a name in SETS or its full hub name, or the path of a JSON-lines, CSV or parquet
        file with the columns question and answer: 18, "18", "9 (apples)", or a solution that ends
        in "#### 18" or holds \\boxed{18}. Where these columns are missing, `columns_of` looks for
        others.
    split: "train", "validation" or "test", as far as the set has it; a file has no splits.
    Returns a list of Problem in the order of the source; ids count the rows of the source from 0.
    Raises ValueError for an unknown name or split and for a file that cannot be used (with the
    line), ConnectionError where the hub does not deliver.
    """
    problems, dropped = read_problems(name_or_path, split)
    if dropped:
        report_dropped(name_or_path, split, len(problems), dropped)
    return problems


def read_problems(name_or_path, split="test"):
    """As `load_problems`, without the report: (problems, [(id, gold) of those left out])."""
    source, place, prefix, rows = find_rows(name_or_path, split)
    problems, dropped = [], []
    for n, (where, row) in enumerate(rows):
        question, answer = question_and_answer(row, source, f"{place}, {where}")
        gold, boxed = short_answer(answer)
        number = gold_number(gold, letters=not source.latex)
        if number:
            problems.append(Problem(f"{prefix}/{n}", question, as_text(number), "number"))
        elif why_dropped(gold, latex=source.latex or boxed):
            dropped.append((f"{prefix}/{n}", gold))
        else:
            problems.append(Problem(f"{prefix}/{n}", question, gold, "latex"))
    if not problems:
        raise ValueError(f"{place}: none of its {len(dropped)} rows is a problem with a number or "
                         "LaTeX as answer" + f" ({reasons(dropped)})" * bool(dropped))
    return problems, dropped


def short_answer(answer):
    """The gold in an answer or solution, and whether it stood in a box: "9 + 9\\n#### 18" gives
    ("18", False), "We get \\boxed{x+1}." ("x+1", True)."""
    text = answer.rpartition("####")[2].strip()
    box = last_box(text)
    return (text, False) if box is None else (bare(box), True)


def answer_of(problem):
    """What reads as the problem's gold in an answer column: the inverse of `short_answer`."""
    sure = problem.kind == "number" or not why_dropped(problem.gold)
    return problem.gold if sure else rf"\boxed{{{problem.gold}}}"


def why_dropped(gold, latex=False):
    """Why no scorer can grade a gold that is no number, or None. latex: whether it must be LaTeX.
    """
    if not gold:
        return "is empty"
    if len(gold) > LONGEST_LATEX:
        return f"is longer than {LONGEST_LATEX} characters"
    if not latex and "\n" in gold:
        return r"has several lines without #### or \boxed{}"
    return None if latex or LATEX_MARKS.search(gold) else "is neither a number nor LaTeX"


def reasons(dropped):
    """Why the problems of `read_problems` were left out, in words with examples."""
    golds_by_reason = {}
    for _, gold in dropped:
        golds_by_reason.setdefault(why_dropped(gold), []).append(gold)
    return "; ".join(f"{len(golds)} whose answer {why}: "
                     + ", ".join(repr(gold[:40]) for gold in golds[:3])
                     for why, golds in golds_by_reason.items())


def report_dropped(name_or_path, split, n_problems, dropped):
    """Say how many problems were left out beside `n_problems`; dropped: as of `read_problems`."""
    print(f"{name_or_path}, {split}: left out {len(dropped)} of {n_problems + len(dropped)} "
          f"problems, {reasons(dropped)}", file=sys.stderr)


def name_of(name_or_path):
    """The short name of a set that is given by its hub name; any other name or path as it is."""
    return next((n for n, s in SETS.items() if s.repo == name_or_path), str(name_or_path))


def find_rows(name_or_path, split):
    """(source, its place in words, what ids begin with, an iterator of (where, row))."""
    name = name_of(name_or_path)
    if name in SETS:
        source = SETS[name]
        if split not in source.splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(source.splits)}")
        if source.repo:
            hub_split = source.splits[split]
            return (source, f"{source.repo} ({hub_split})", f"{name}/{split}",
                    hub_rows(source.repo, source.config, hub_split))
        if source.rows:
            rows = enumerate(source.rows(split))
            return source, name, f"{name}/{split}", ((f"row {n}", row) for n, row in rows)
        file = TINY / f"{split}.jsonl"
        return source, file, f"{name}/{split}", file_rows(file)
    if os.path.isfile(name) or name.lower().endswith((".jsonl", ".json", ".csv", ".parquet")):
        rows = file_rows(name)
        first = list(islice(rows, 1))
        source = columns_of(first[0][1], name) if first else Source({})
        return source, name, os.path.basename(name), chain(first, rows)
    raise ValueError(f"unknown data set {name!r}; expected {', '.join(SETS)}, or the path of "
                     f"{FILES}")


def columns_of(row, path):
    """The Source of a file with rows like this one: of {"problem": …, "solution": …} the columns
    problem and solution, since nothing else fits. Says so."""
    chosen = []
    for usual, *others in (("question", "problem", "prompt"), ("answer", "solution")):
        there = [name for name in others if name in row]
        chosen.append(there[0] if usual not in row and len(there) == 1 else usual)
    if chosen != ["question", "answer"]:
        print(f"{path}: the question is read from column {chosen[0]}, the answer from column "
              f"{chosen[1]}", file=sys.stderr)
    return Source({}, question=(chosen[0],), answer=chosen[1])


def question_and_answer(row, source, where):
    """The question and the answer of a row, as text; ValueError says `where` it has neither."""
    columns = ", ".join(source.question)
    missing = [c for c in (*source.question, source.answer) if c not in row]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; expected {columns} and "
                         f"{source.answer}, found {', '.join(row)}")
    answer = row[source.answer]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"{where}: column {source.answer} holds {answer!r:.40}; expected text or "
                         "a number")
    parts = [row[c] for c in source.question]
    if not all(isinstance(part, str) and not SURROGATE.search(part) for part in parts):
        raise ValueError(f"{where}: column {columns} holds {parts!r:.80}; expected text")
    return " ".join(part.strip() for part in parts), str(answer)


def hub_rows(repo, config, split):
    """(where, row) of every row of a data set on the hub."""
    import datasets  # takes a second: only where it is needed
    try:
        rows = datasets.load_dataset(repo, config, split=split)
    except (datasets.exceptions.DatasetsError, *hub_errors()) as error:
        raise ConnectionError(
            f"cannot load {repo}, split {split}, from the hub; to go on without it, give the path "
            f"of {FILES}, instead of a name "
            f"({type(error).__name__}: {' '.join(str(error).split())})") from error
    return ((f"row {n}", row) for n, row in enumerate(rows))


def file_rows(path):
    """(where, row) of every row of a file: of JSON lines, unless its name ends otherwise."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    ending = os.path.splitext(path)[1].lower()
    if ending in (".csv", ".parquet"):
        return csv_rows(path) if ending == ".csv" else parquet_rows(path)
    return ((f"line {n}", row) for n, row in numbered_rows(path))


def csv_rows(path):
    """(where, row) of every row of a CSV file, all cells text: 1,234 and 007 as they stand there.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"more cells than the {len(reader.fieldnames)} columns")
                yield f"line {reader.line_num}", row
        except (ValueError, csv.Error) as error:  # the first also where it is not UTF-8
            raise ValueError(f"{path}, line {reader.line_num}: no row of a CSV file: {error}"
                             ) from error


def parquet_rows(path):
    """(where, row) of every row of a parquet file."""
    import datasets
    try:
        rows = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train",
                                     streaming=True)
        yield from ((f"row {n}", row) for n, row in enumerate(rows))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no whole parquet file: {error}") from error


# ------------------------------------------------------------------ the problems of a run

def split_problems(args):
    """(training, validation, test) problems; no question is in two of them, or twice in one.

    A set without a validation split gives some of its training problems, the same for every seed;
    a file, which has no splits, gives the test problems too.
    """
    train, source = load_problems(args.data, "train"), SETS.get(name_of(args.data))
    has_validation = source is not None and "validation" in source.splits
    validation = load_problems(args.data, "validation") if has_validation else []
    test = load_problems(args.data, "test") if source and args.test_problems else []
    test, validation, train = without_repeats(args.data, test, validation, train)
    if not has_validation:
        random.Random("validation").shuffle(train)
        validation, train = train[:args.validation_problems], train[args.validation_problems:]
    if not source:
        test, train = train[:args.test_problems], train[args.test_problems:]
    if len(train) < args.prompts_per_step or not validation:
        raise ValueError(f"{args.data} leaves {len(train)} training problems beside "
                         f"--validation-problems {args.validation_problems} and --test-problems "
                         f"{args.test_problems}; --prompts-per-step {args.prompts_per_step} needs "
                         "that many: lower these three, or give more problems")
    return train, validation[:args.validation_problems], test[:args.test_problems]


def without_repeats(data, *splits):
    """The splits, each question in the first of them that has it, once; says how many repeated.

    Questions that differ in white space only are one question.
    """
    first_of, n_others = {}, 0
    for problem in chain(*splits):
        first = first_of.setdefault(" ".join(problem.question.split()), problem)
        n_others += first.gold != problem.gold
    kept, total = {problem.id for problem in first_of.values()}, sum(map(len, splits))
    if len(kept) < total:
        print(f"{data}: {total - len(kept)} of {total} problems repeat the question of another "
              f"({n_others} of them with another answer); the first one is used", file=sys.stderr)
    return [[problem for problem in split if problem.id in kept] for split in splits]


def prompt_order(n_problems, n, step, seed):
    """The problems of step 1, 2, …: each pass a new seeded shuffle, what does not fill a step left
    out. A list of n indices."""
    steps_per_pass = n_problems // n
    order = list(range(n_problems))
    random.Random(f"{seed}/{(step - 1) // steps_per_pass}").shuffle(order)
    start = (step - 1) % steps_per_pass * n
    return order[start:start + n]


if __name__ == "__main__":
    for name in sys.argv[1:] or ["tiny"]:
        problems = load_problems(name)
        print(f"{name}: {len(problems)} problems, the first is {problems[0]}")

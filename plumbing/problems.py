"""Sets of word problems: where they lie, and how their rows become problems.

What it does    loads problems by the name of a set or from a JSON-lines file; leaves out, and says
                so, what no scorer can grade.
Not here        the prompt and the grade: rewards.py, which also offers `Problem` and
                `load_problems`. torch is never imported.
Run it alone    python -m plumbing.problems [SET or FILE …]     how many, and the first
Where to fork   a new data set is one line in `SETS`.
"""
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

from plumbing.files import hub_errors, numbered_rows
from plumbing.latex import LONGEST_LATEX
from plumbing.number import as_text, gold_number

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
LATEX_MARKS = re.compile(r"[\\^]|^\$.*\$$")


class Problem(NamedTuple):
    """One question; `gold` is the short answer as text, "18", `kind` is "number" or "latex"."""
    id: str
    question: str
    gold: str
    kind: str


class Source(NamedTuple):
    """Where the rows of a set lie, and how a row is read."""
    splits: dict  # our name of a split: the hub's
    repo: str | None = None  # on the hub; a set without one lies in tiny/<split>.jsonl
    config: str | None = None
    question: tuple = ("question",)  # columns, joined by a space
    answer: str = "answer"  # column
    latex: bool = False  # whether an answer that is no number is LaTeX


TINY = Path(__file__).resolve().parent.parent / "tiny"
TRAIN_AND_TEST = {"train": "train", "test": "test"}
SETS = {
    "tiny": Source({**TRAIN_AND_TEST, "validation": "validation"}),
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

    name_or_path: a name in SETS or its full hub name, or the path of a JSON-lines file with the
        columns question and answer: 18, "18", "9 (apples)" or a solution that ends in "#### 18".
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
        question, gold = question_and_gold(row, source, f"{place}, {where}")
        number = gold_number(gold, letters=not source.latex)
        if number:
            problems.append(Problem(f"{prefix}/{n}", question, as_text(number), "number"))
        elif (source.latex or LATEX_MARKS.search(gold)) and 0 < len(gold) <= LONGEST_LATEX:
            problems.append(Problem(f"{prefix}/{n}", question, gold, "latex"))
        else:
            dropped.append((f"{prefix}/{n}", gold))
    if not problems:
        raise ValueError(f"{place}: none of its {len(dropped)} rows is a problem with a number or "
                         "LaTeX as answer")
    return problems, dropped


def report_dropped(name_or_path, split, n_problems, dropped):
    """Say how many problems were left out beside `n_problems`; dropped: as of `read_problems`."""
    examples = ", ".join(repr(gold[:40]) for _, gold in dropped[:3])
    print(f"{name_or_path}, {split}: left out {len(dropped)} of {n_problems + len(dropped)} "
          f"problems, whose answer is neither a number nor LaTeX: {examples}", file=sys.stderr)


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
        file = TINY / f"{split}.jsonl"
        return source, file, f"{name}/{split}", file_rows(file)
    if os.path.isfile(name) or name.endswith((".jsonl", ".json")):
        return Source({}), name, os.path.basename(name), file_rows(name)
    raise ValueError(f"unknown data set {name!r}; expected {', '.join(SETS)}, or the path of a "
                     ".jsonl file with the columns question and answer")


def question_and_gold(row, source, where):
    """The question and the gold of a row, as text; ValueError says `where` it has neither."""
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
    return " ".join(part.strip() for part in parts), str(answer).rpartition("####")[2].strip()


def hub_rows(repo, config, split):
    """(where, row) of every row of a data set on the hub."""
    import datasets  # takes a second: only where it is needed
    try:
        rows = datasets.load_dataset(repo, config, split=split)
    except (datasets.exceptions.DatasetsError, *hub_errors()) as error:
        raise ConnectionError(
            f"cannot load {repo}, split {split}, from the hub; to go on without it, give the path "
            "of a .jsonl file with the columns question and answer instead of a name "
            f"({type(error).__name__}: {' '.join(str(error).split())})") from error
    return ((f"row {n}", row) for n, row in enumerate(rows))


def file_rows(path):
    """(where, row) of every line of a JSON-lines file that is not blank."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    return ((f"line {n}", row) for n, row in numbered_rows(path))


# ------------------------------------------------------------------ the problems of a run

def split_problems(args):
    """(training, validation, test) problems, none in two of them.

    A set without a validation split gives some of its training problems, the same for every seed;
    a file, which has no splits, gives the test problems too.
    """
    train, test, source = load_problems(args.data, "train"), [], SETS.get(name_of(args.data))
    if source and "validation" in source.splits:
        validation = load_problems(args.data, "validation")[:args.validation_problems]
    else:
        random.Random("validation").shuffle(train)
        validation, train = train[:args.validation_problems], train[args.validation_problems:]
    if not source:  # `train` writes them to test.jsonl, for evaluate.py
        test, train = train[:args.test_problems], train[args.test_problems:]
    elif args.test_problems:
        test = load_problems(args.data, "test")[:args.test_problems]
    if len(train) < args.prompts_per_step:
        raise ValueError(f"{args.data} leaves {len(train)} training problems beside "
                         f"--validation-problems {args.validation_problems} and --test-problems "
                         f"{args.test_problems}; --prompts-per-step {args.prompts_per_step} needs "
                         "that many: lower these three, or give more problems")
    return train, validation, test


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

"""Sets of word problems: where they lie, and how their rows become problems.

What it does    loads problems by the name of a set or from a JSON-lines file; leaves out, and says
                so, what no scorer can grade.
Not here        the prompt and the grade: rewards.py, which also offers `Problem` and
                `load_problems`. torch is never imported.
Run it alone    python rewards.py [name or file …]     one problem of each
Where to fork   a new data set is one line in `SETS`.
"""
import os
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
    """Where a set lies on the hub, and how to read it. Without a repo: tiny/<split>.jsonl."""
    repo: str | None
    config: str | None
    splits: dict  # our name of a split: the hub's
    question: list  # columns, joined by a space
    answer: str
    latex: bool  # whether an answer that is no number is LaTeX


TINY = Path(__file__).resolve().parent.parent / "tiny"
BOTH = {"train": "train", "test": "test"}
ONE = {"test": "validation", "validation": "validation"}  # its only split serves as test
THREE = {**BOTH, "validation": "validation"}
SETS = {  # gsm8k needs its config: the hub also has `socratic`
    "tiny": Source(None, None, THREE, ["question"], "answer", False),
    "gsm8k": Source("openai/gsm8k", "main", BOTH, ["question"], "answer", False),
    "svamp": Source("ChilleD/SVAMP", None, BOTH, ["Body", "Question"], "Answer", False),
    "asdiv": Source("EleutherAI/asdiv", None, ONE, ["body", "question"], "answer", False),
    "math500": Source("HuggingFaceH4/MATH-500", None, {"test": "test"}, ["problem"], "answer",
                      True),
}


def load_problems(name_or_path, split="test"):
    """Load a set of problems; those whose answer cannot be graded are left out and reported.

    name_or_path: a name in SETS or its full hub name, or the path of a JSON-lines file with the
        columns question and answer: 18, "18", "9 (apples)" or a solution that ends in "#### 18".
    split: "train", "validation" or "test", as far as the set has it; a file has no splits.
    Returns a list of Problem in the order of the source; ids count its rows from 0.
    Raises ValueError for an unknown name or split and for a file that cannot be used (with the
    line), ConnectionError where the hub does not deliver.
    """
    problems, dropped = read_problems(name_or_path, split)
    if dropped:
        report_dropped(name_or_path, split, len(problems), dropped)
    return problems


def name_of(name_or_path):
    """The name in SETS of what is given by its name on the hub; anything else as it is."""
    return next((n for n, s in SETS.items() if s.repo == name_or_path), str(name_or_path))


def report_dropped(name_or_path, split, n_problems, dropped):
    """Say how many problems were left out beside n_problems; dropped: as of `read_problems`."""
    examples = ", ".join(repr(gold[:40]) for _, gold in dropped[:3])
    print(f"{name_or_path}, {split}: left out {len(dropped)} of {n_problems + len(dropped)} "
          f"problems, whose answer is neither a number nor LaTeX: {examples}", file=sys.stderr)


def read_problems(name_or_path, split="test"):
    """As `load_problems`, but silent: returns (problems, dropped), dropped a list of (id, gold)."""
    name = name_of(name_or_path)
    columns, answer_column, other_is_latex = ["question"], "answer", False
    if name in SETS:
        repo, config, splits, columns, answer_column, other_is_latex = SETS[name]
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
        source = f"{repo} ({splits[split]})" if repo else TINY / f"{split}.jsonl"
        rows = _hub_rows(repo, config, splits[split]) if repo else _file_rows(source)
        prefix = f"{name}/{split}"
    elif os.path.isfile(name) or name.endswith((".jsonl", ".json")):
        source, rows, prefix = name, _file_rows(name), os.path.basename(name)
    else:
        raise ValueError(f"unknown data set {name!r}; expected {', '.join(SETS)}, or the path of a "
                         ".jsonl file with the columns question and answer")
    problems, dropped = [], []
    for n, (place, row) in enumerate(rows):
        missing = [c for c in (*columns, answer_column) if c not in row]
        if missing:
            raise ValueError(f"{source}, {place}: no column {', '.join(missing)}; expected "
                             f"{', '.join(columns)} and {answer_column}, found {', '.join(row)}")
        answer = row[answer_column]
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            raise ValueError(f"{source}, {place}: column {answer_column} holds {answer!r:.40}; "
                             "expected text or a number")
        parts = [row[c] for c in columns]
        if not all(isinstance(part, str) and not SURROGATE.search(part) for part in parts):
            raise ValueError(f"{source}, {place}: column {', '.join(columns)} holds {parts!r:.80}; "
                             "expected text")
        question = " ".join(part.strip() for part in parts)
        gold = str(answer).rpartition("####")[2].strip()
        number = gold_number(gold)
        if number:
            problems.append(Problem(f"{prefix}/{n}", question, as_text(number), "number"))
        elif (other_is_latex or LATEX_MARKS.search(gold)) and 0 < len(gold) <= LONGEST_LATEX:
            problems.append(Problem(f"{prefix}/{n}", question, gold, "latex"))
        else:
            dropped.append((f"{prefix}/{n}", gold))
    if not problems:
        raise ValueError(f"{source}: none of its {len(dropped)} rows is a problem with a number or "
                         "LaTeX as answer")
    return problems, dropped


def _hub_rows(repo, config, split):
    """(place, row) of every row of a data set on the hub."""
    import datasets  # takes a second: only where it is needed
    try:
        rows = datasets.load_dataset(repo, config, split=split)
    except (datasets.exceptions.DatasetsError, *hub_errors()) as error:
        raise ConnectionError(
            f"cannot load {repo}, split {split}, from the hub; to go on without it, give the path "
            "of a .jsonl file with the columns question and answer instead of a name "
            f"({type(error).__name__}: {' '.join(str(error).split())})") from error
    return ((f"row {n}", row) for n, row in enumerate(rows))


def _file_rows(path):
    """(place, row) of every line of a JSON-lines file that is not blank."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    return ((f"line {n}", row) for n, row in numbered_rows(path))

"""The task: word problems, the prompt that asks them, and the grade of what a model answers.

What it does: loads problems by name or from a JSON-lines file, writes the prompt, finds the answer
in a completion, compares it with the gold answer and turns that into a reward.
What it leaves to others: the tokenizer is handed in (train.py), rewards become advantages in
objectives.py, accuracies over a data set are evaluate.py's. torch is never imported here.
Run alone (`python rewards.py [name or file …]`), it shows one problem of each set it can reach and
a prompt as text, then grades every line that you type against the first problem shown.
Where to fork it: a new data set is one line in `SETS`; a new way to grade is one branch in
`is_correct` and its name in SCORERS; a new reward is one branch in `reward` and its name in MODES.

A completion is hostile input: it is searched with linear-time patterns and compared as exact
decimals, never evaluated. LaTeX goes through math-verify in a process of its own, which ends
itself when a comparison takes too long, because sympy can be kept busy for hours.
"""
import argparse
import faulthandler
import functools
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from decimal import Context, Decimal
from pathlib import Path
from typing import NamedTuple

LONGEST = 1000  # characters of a number or a `####` line, chosen; what is longer is no answer
LONGEST_LATEX = 400  # characters of a LaTeX answer, chosen; MATH-500's longest gold has 53
LATEX_LIMIT_S = 0.6  # for one comparison, chosen: with the start of a new process behind it (0.4 s)
# it stays within a second; MATH-500's slowest needs 0.15. What takes longer counts as wrong.
EXACT = Context(prec=10 * LONGEST)  # products of numbers of LONGEST digits are not rounded
FORMAT_BONUS = 0.05  # the authors' value
SCORERS = ("strict", "flexible", "paper", "math")  # math: of sets with LaTeX answers
MODES = ("correct", "paper", "noise")


class Problem(NamedTuple):
    """One question; `gold` is the short answer as text, "18", `kind` is "number" or "latex"."""
    id: str
    question: str
    gold: str
    kind: str


# ---------------------------------------------------------------------------------- problems

class Source(NamedTuple):
    """Where a set lies on the hub, and how to read it. Without a repo: tiny/<split>.jsonl."""
    repo: str | None
    config: str | None
    splits: dict  # our name of a split: the hub's
    question: list  # columns, joined by a space
    answer: str
    latex: bool  # whether an answer that is no number is LaTeX


TINY = Path(__file__).resolve().parent / "tiny"
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
        number = _gold_number(gold)
        if number:
            problems.append(Problem(f"{prefix}/{n}", question, _as_text(number), "number"))
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
    from huggingface_hub.errors import HfHubHTTPError
    try:
        rows = datasets.load_dataset(repo, config, split=split)
    # The bases: OSError, and HTTPError of the HTTP library that huggingface_hub is built on.
    except (datasets.exceptions.DatasetsError, *HfHubHTTPError.__bases__) as error:
        raise ConnectionError(
            f"cannot load {repo}, split {split}, from the hub; to go on without it, give the path "
            "of a .jsonl file with the columns question and answer instead of a name "
            f"({type(error).__name__}: {' '.join(str(error).split())})") from error
    return ((f"row {n}", row) for n, row in enumerate(rows))


def _file_rows(path):
    """(place, row) of every line of a JSON-lines file that is not blank."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, too deep
                detail = getattr(error, "msg", "not UTF-8, a number too long or nested too deep")
                raise ValueError(f"{path}, line {n}: not JSON, expected one object a line: "
                                 f"{detail}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {n}: expected an object with the columns question "
                                 f"and answer, found {type(row).__name__}")
            yield f"line {n}", row


# ---------------------------------------------------------------------------------- prompt

INSTRUCTION = ("Solve the problem step by step and show each step. Then end with one last line "
               "that holds only the answer, in the form: #### ")


def prompt_text(tokenizer, problem):
    """The prompt as text: instruction and question, in the tokenizer's chat template.

    Raises ValueError where there is no tokenizer, or none whose chat template can be used.
    """
    if tokenizer is None:
        raise ValueError("the model's folder has no tokenizer; expected tokenizer.json and "
                         "tokenizer_config.json beside config.json")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat "
                         "template, which the prompt is written in; set its chat_template")
    form = "<number>" if problem.kind == "number" else "<answer in LaTeX>"
    messages = [{"role": "system", "content": INSTRUCTION + form},
                {"role": "user", "content": problem.question}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template is a program in Jinja
        raise ValueError(f"the chat template of {tokenizer.name_or_path} fails with a system and a "
                         f"user message: {e}") from e


def build_prompt(tokenizer, problem):
    """Token ids of the prompt, a list of int.

    The text is encoded here: apply_chat_template(tokenize=True) gives a list in some versions of
    transformers and a dictionary in others. The template writes the special tokens itself.
    """
    return list(tokenizer.encode(prompt_text(tokenizer, problem), add_special_tokens=False))


# ---------------------------------------------------------------------------------- grading

MARK = re.compile("#{4,}")


def extract_answer(text, scorer="flexible", finished=True, kind="number"):
    """The answer in a completion, as text: "18", "-5/2", "50%" or LaTeX; None where there is none.

    text: any string of any length.
    scorer: "strict" reads the first `####` line; "flexible" that, else the last number (for kind
        "latex" the last \\boxed{}, else the last $formula$ or \\(formula\\), else the last number).
    finished: False for a completion that was cut off. Then only a `####` line that ends in a
        newline counts: without it, `#### 1` may be the start of `#### 18` or of `#### 1 + 2 = 3`.
    kind: the problem's, "number" or "latex".
    Raises ValueError for another scorer.
    """
    if scorer not in ("strict", "flexible"):
        raise ValueError(f"unknown scorer {scorer!r}; expected strict, flexible")
    if kind == "latex":
        return _answer_latex(text, scorer, finished)
    number = _answer_number(text, scorer, finished)
    return _as_text(number) if number else None


def is_correct(text, gold, scorer="flexible", finished=True):
    """Whether a completion answers with the gold.

    text, finished: as in `extract_answer`; scorer: also "paper", see `_paper_number`, and "math",
        which finds the answer as for LaTeX, \\boxed{} before the last number, whatever the gold.
    gold: the short answer as text, compared as a number if it is one, else as LaTeX.
    Raises ValueError for an unknown scorer or an empty gold, RuntimeError where math-verify, which
    compares LaTeX, does not start.
    """
    if scorer not in SCORERS:
        raise ValueError(f"unknown scorer {scorer!r}; expected {', '.join(SCORERS)}")
    if not gold.strip():
        raise ValueError("the gold answer is empty")
    if scorer == "paper":
        answer, right = _paper_number(text), _paper_number("#### " + gold)
        return None not in (answer, right) and abs(answer - right) <= Decimal("1e-6")
    number = _gold_number(gold)
    if number and scorer != "math":
        answer = _answer_number(text, scorer, finished)
        return answer is not None and _same_number(answer, number)
    latex = _answer_latex(text, scorer, finished)
    if latex is None:
        return False
    if number:  # "18 dollars" is 18, which math-verify does not know
        answer = _answer_number("#### " + latex, "strict", True)
        if answer is not None and _same_number(answer, number):
            return True
    return _compare_latex(_bare(gold), latex) == "same"


def has_format(text, finished=True, gold="0"):
    """Whether a completion has the form that is asked for.

    It finished, its only `####` line is its last line, and an answer can be read there, correct or
    not: LaTeX if the gold is LaTeX, else a number.
    """
    marks = list(MARK.finditer(text))
    if not finished or len(marks) != 1 or "\n" in text[marks[0].end():].strip():
        return False
    if _gold_number(gold):
        return _answer_number(text, "strict", True) is not None
    answer = _answer_latex(text, "strict", True)
    return answer is not None and _compare_latex(_bare(gold), answer) != "unreadable"


def reward(text, gold, finished=True, mode="correct", key=None):
    """The reward of a completion, a float.

    text, gold, finished: as in `is_correct`. mode:
    "correct": 1 if correct (flexible), plus 0.05 if it `has_format`. A bonus for any `####` would
        be earned by scattering them: in a group without a right answer it counts in full.
    "paper": the authors' in [0, 1]: 1 if correct, plus 0.05 for `####` with a digit and more
        behind it, minus 0.2 without any number. It looks at neither LaTeX nor `finished`.
    "noise": in [0, 1), from a hash of text and key, to try the plumbing with random weights, where
        real rewards are all equal.
    key: only for "noise": a value with a stable repr that tells the samples of a group apart, such
        as (seed, step, prompt, sample); without it equal texts have equal rewards.
    Raises ValueError for an unknown mode, and what `is_correct` raises.
    """
    if mode == "correct":
        bonus = FORMAT_BONUS * has_format(text, finished, gold)
        return is_correct(text, gold, finished=finished) + bonus
    if mode == "paper":
        value = is_correct(text, gold, "paper") + FORMAT_BONUS * bool(PAPER_FORMAT.search(text))
        return min(1.0, max(0.0, value - 0.2 * (_paper_number(text) is None)))
    if mode == "noise":
        seen = f"{key!r} {text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(seen).digest()[:6], "big") / 2**48
    raise ValueError(f"unknown reward mode {mode!r}; expected {', '.join(MODES)}")


def _marked_line(text, finished=True):
    """What stands on the first complete `####` line; None where there is none, "" if too long."""
    mark = MARK.search(text)
    end = text.find("\n", mark.end()) if mark else -1
    if mark is None or (end < 0 and not finished):
        return None
    line = text[mark.end():end if end >= 0 else len(text)].strip()
    return line if len(line) <= LONGEST else ""


# ---------------------------------------------------------------------------------- numbers

class Number(NamedTuple):
    """The exact value top / bottom, and whether a percent sign follows it."""
    top: Decimal
    bottom: Decimal
    percent: bool


DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+"
NUMBER = re.compile(rf"""  # 18  -1,234.5  $18  .5  1e3  5/2  2 1/2  50%  50 percent
    (?<![\w^])(?<!\^[{{-])                          # not the 2 of m2, x^2, x^{{2}}, x^-2
    (?P<sign>[-+]?(?:[$€£¥][ ]?)?[-+]?)
    (?P<digits>{DIGITS})(?P<exponent>[eE][-+]?[0-9]{{1,2}}(?!\w))?
    (?:[ ]?/[ ]?(?P<over>[0-9]+)                    # 5/2
      |[ ](?P<part>[0-9]+)/(?P<parts>[0-9]+))?      # 2 1/2
    (?P<percent>[ ]?%|[ ]percent\b)?""", re.VERBOSE)
# What may follow the number in a gold: a unit in brackets or words, as in "9 (apples)", "12 cm²",
# "30°", "5 miles per hour"; not "6th", "3 p.m.", "2k".
UNIT = re.compile(r"°?(?:\s*\([^()]*\)|(?:\s+(?!(?:[ap]\.?m|pi|o'clock)\b)[^\W\d_]{2}"
                  r"[\w./'²³-]*)+)?\.?")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
LATEX_MARKS = re.compile(r"[\\^]|^\$.*\$$")
FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9.]+)\}\{([0-9.]+)\}")
PLAIN_SPELLING = [("\u2212", "-"), ("\u2013", "-"), ("\u00a0", " "), ("\u202f", " "),
                  (r"\!", ""), (r"\,", ""), (r"\$", "$"), (r"\%", "%"), ("{,}", ",")]


def _plain(text):
    """Minus signs, spaces and LaTeX's ways to write $, % and 10,000, in their plain spelling."""
    for odd, plain in PLAIN_SPELLING:
        text = text.replace(odd, plain)
    return text


def _plain_answer(text):
    r"""As `_plain`, with \frac{4}{5} as 4/5. A gold keeps it: it is LaTeX."""
    return _plain(FRACTION.sub(r"\1/\2", re.sub(r"([0-9])(\\[dt]?frac)", r"\1 \2", text)))


def _value(match):
    """The Number of a match of NUMBER; None if it divides by zero or is too long."""
    bottom = Decimal(match["over"] or match["parts"] or 1)
    if not bottom or len(match[0]) > LONGEST:
        return None
    top = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["part"]:
        top = EXACT.add(EXACT.multiply(top, bottom), Decimal(match["part"]))
    sign = -1 if match["sign"].count("-") == 1 else 1
    return Number(EXACT.multiply(top, Decimal(sign)), bottom, bool(match["percent"]))


def _gold_number(gold):
    """The Number that a gold is as a whole, with or without a unit, or None."""
    text = re.sub(r"^\$([^$]*)\$$", r"\1", _plain(gold[:LONGEST + 1]).strip())  # $18$
    text = re.sub(r"^(-?)\(([^()]*)\)$", r"\1\2", text.strip())  # -(1/3)
    match = NUMBER.match(text)
    return _value(match) if match and UNIT.fullmatch(text, match.end()) else None


def _answer_number(text, scorer, finished):
    """The Number that a completion answers with, or None."""
    line = _marked_line(text, finished)
    if line is not None:
        line = _plain_answer(line)
        first = NUMBER.search(line)
        # `#### $18 per day` says 18. `#### Step 1` and `#### 3 + 4` do not say what the answer is.
        if (first and not re.search(r"\w", line[:first.start()].replace(r"\boxed", ""))
                and not NUMBER.search(line, first.end())):
            return _value(first)
    if scorer == "strict" or not finished:
        return None
    last = _last_match(NUMBER, text, _plain_answer)
    return _value(last) if last else None


def _last_match(pattern, text, prepare=str):
    """The last number in a text, as a match of `pattern`, or None.

    Only LONGEST characters on either side of the last digit are searched, so that a long text
    costs no more than a short one; a number that begins before them is too long.
    """
    last = max(text.rfind(digit) for digit in "0123456789")
    start = max(0, last - LONGEST)
    match = None
    for match in pattern.finditer(prepare(text[start:last + LONGEST])) if last >= 0 else ():
        pass
    return match if match and (start == 0 or match.start() > 0) else None


def _same_number(answer, gold):
    """Whether two Numbers are equal. The gold decides what a percent sign means.

    The sign is a unit: 50% answers a gold of 50, and 50 a gold of 50%. Where the gold has no sign,
    an answer's may also be a hundredth: 50% answers a gold of 0.5.
    """
    left, right = EXACT.multiply(answer.top, gold.bottom), EXACT.multiply(gold.top, answer.bottom)
    hundredth = answer.percent and not gold.percent
    return left == right or (hundredth and left == EXACT.multiply(right, Decimal(100)))


def _as_text(number):
    """A Number as plain text, without separators and closing zeros: -1234.5, 5/2, 50%."""
    top, bottom = (f"{part:f}".rstrip("0").rstrip(".") if "." in f"{part:f}" else f"{part:f}"
                   for part in (number.top, number.bottom))
    return top + f"/{bottom}" * (bottom != "1") + "%" * number.percent


PAPER_FORMAT = re.compile(r"####\s*[0-9]+[^\n]+")  # the authors': "#### 15" has it, "#### 5" not
PAPER_LINE = re.compile(rf"\$?(-?(?:{DIGITS}))(?:/([0-9]+))?(%?)")
PAPER_NUMBER = re.compile(rf"-?(?:{DIGITS})")


def _paper_number(text):
    """The number that the authors' scorer sees in a completion or a gold: a Decimal or None.

    The first `####` line, to its end, as number, a/b or percentage (50% is 0.5), else the last
    number of the whole text. A gold \\frac{14}{3} is therefore 3. For comparison only.
    """
    line = PAPER_LINE.fullmatch(text.partition("####")[2].partition("\n")[0][:LONGEST].strip())
    if line and Decimal(line[2] or 1):
        divisor = Decimal(line[2] or 1) * (100 if line[3] else 1)
        return Decimal(line[1].replace(",", "")) / divisor
    last = _last_match(PAPER_NUMBER, text)
    return Decimal(last[0].replace(",", "")) if last else None


# ---------------------------------------------------------------------------------- LaTeX

BOXED = r"\boxed{"
# Seconds to years of work for sympy: a factorial, an exponent in an exponent, a long exponent.
COSTLY = re.compile(r"(?<!\\)!|\^\s*(?:\{[^}]*|\([^)]*|\w+\s*)\^|\^[\s{(-]*[0-9]{5}")


def _answer_latex(text, scorer, finished):
    """The LaTeX that a completion answers with, without its wrapping, or None."""
    answer = _bare(_marked_line(text, finished) or "")
    if not answer and scorer != "strict" and finished:
        dollars = text.replace(r"\$", "").replace("$$", "$").rsplit("$", 2)
        if BOXED in text:
            answer = _bare(_braced(text, text.rfind(BOXED)))
        elif len(dollars) == 3:
            answer = _bare(dollars[1])
        elif r"\(" in text:
            answer = _bare(text.rpartition(r"\(")[2].partition(r"\)")[0])
        else:
            answer = extract_answer(text) or ""
    return answer if 0 < len(answer) <= LONGEST_LATEX else None


def _braced(text, start):
    """The text from `start` to the brace that closes the first one there; "" where none does."""
    depth = 0
    for i in range(start, min(len(text), start + LONGEST)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth <= 0:
            return text[start:i + 1]
    return ""


def _bare(latex):
    """LaTeX without the dollars, \\boxed{} and full stop around it."""
    latex = latex.replace(r"\$", "").replace("$", "").lstrip(" \n*").rstrip(" \n*.")
    if latex[:2] + latex[-2:] in (r"\(\)", r"\[\]"):
        latex = latex[2:-2].strip()
    if latex.startswith(BOXED) and _braced(latex, 0) == latex:
        latex = latex[len(BOXED):-1].strip()
    return latex


@functools.lru_cache(maxsize=4096)
def _compare_latex(gold, answer):
    """"same", "different", or "unreadable" where the answer is no LaTeX or is refused."""
    if " ".join(gold.split()) == " ".join(answer.split()):
        return "same"
    if COSTLY.search(gold) or COSTLY.search(answer):
        return "unreadable"
    with _worker_lock:
        if not _workers or _workers[0].poll() is not None:
            _start_worker()
        worker = _workers[0]
        worker.stdin.write(json.dumps([gold, answer]) + "\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline().strip()
        if not verdict:  # it ended at its limit, or crashed and left its traceback on stderr
            _workers.pop().communicate()
            ungraded.append((gold, answer))
            print(f"no verdict on the LaTeX answer {answer!r:.80} for {gold!r:.80}: counted as "
                  f"wrong, {len(ungraded)} so far", file=sys.stderr)
    return verdict or "unreadable"


ungraded = []  # (gold, answer) of every comparison without a verdict, for whoever wants to log it
_workers, _worker_lock = [], threading.Lock()  # at most one worker, asked by one thread at a time


def _start_worker():
    """Start the process that compares LaTeX and wait until it is ready, about 0.4 s.

    It ends when its input closes, that is with the process that started it, however that ends.
    """
    worker = subprocess.Popen([sys.executable, __file__, "--latex-worker"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              start_new_session=True)  # Ctrl-C is the caller's to handle
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError("math-verify, which compares LaTeX answers, did not start; its error is "
                           "above (installed? python -m pip install math-verify)")
    _workers[:] = [worker]


def _latex_worker():
    """The process behind `_compare_latex`: lines of JSON in, verdicts out.

    A watchdog ends it when a comparison exceeds LATEX_LIMIT_S. math-verify's own limit is an alarm
    signal: it replaces the caller's handler, fails outside the main thread and cannot interrupt
    one long operation on large integers.
    """
    from math_verify import LatexExtractionConfig, parse, verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limit is off

    def compare(gold, answer):
        # LatexExtractionConfig alone: the default also asks sympy's parser, which evaluates.
        parsed = [parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback",
                        parsing_timeout=None, raise_on_error=True) for latex in (gold, answer)]
        if not all(parsed):
            return "unreadable"
        same = verify(*parsed, timeout_seconds=None, raise_on_error=True)
        return "same" if same else "different"

    assert compare(r"\frac{1}{2}", "0.5") == "same", "math-verify does not know 1/2 = 0.5"
    print("ready", flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            faulthandler.dump_traceback_later(LATEX_LIMIT_S, exit=True, file=nowhere)
            verdict = compare(*json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            print(verdict, flush=True)


# ---------------------------------------------------------------------------------- run alone

def main():
    """Show a problem of each set and a prompt, then grade what is typed."""
    shown, hub_answers = [], True
    parser = argparse.ArgumentParser(description="Show problems, then grade what is typed.")
    parser.add_argument("name", nargs="*", help=f"sets or files; of {', '.join(SETS)}")
    for name in parser.parse_args().name or SETS:
        if name in SETS and name != "tiny" and not hub_answers:
            print(f"\n{name}: not tried, the hub does not answer")
            continue
        try:
            problems = load_problems(name)
        except (ValueError, ConnectionError) as error:
            hub_answers = hub_answers and not isinstance(error, ConnectionError)
            print(f"\n{name}: {error}")
            continue
        shown.append(problems[0])
        print(f"\n{name}: {len(problems)} problems, for example {problems[0].id}\n"
              f"  question: {problems[0].question}\n  gold: {problems[0].gold}")
    if not shown:
        sys.exit(1)
    problem = shown[0]
    if (TINY / "model").is_dir():
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
        print(f"\nthe prompt of {problem.id}:\n{prompt_text(tokenizer, problem)}")
    else:
        print(f"\nno prompt shown: no tokenizer at {TINY / 'model'}")
    print(f"\ntype completions of {problem.id}, one a line; an empty line ends")
    for line in sys.stdin or ():
        if not line.strip():
            break
        scores = ", ".join(f"{s} {is_correct(line, problem.gold, s)}" for s in SCORERS)
        answer = extract_answer(line, kind=problem.kind)
        print(f"  answer {answer!r}: {scores}, reward {reward(line, problem.gold):.2f}")


if __name__ == "__main__":
    try:
        _latex_worker() if sys.argv[1:] == ["--latex-worker"] else main()
    except KeyboardInterrupt:
        sys.exit(130)

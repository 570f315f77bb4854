"""The task: the prompt that asks a word problem, and the grade of what a model answers.

What it does    writes the prompt, finds the answer in a completion, compares the answer with the
                gold answer, and turns the comparison into a reward.
Not here        loading (plumbing/problems.py), exact numbers (plumbing/number.py), the comparison
                of LaTeX (plumbing/latex.py); advantages are made in objectives.py. No torch.
Run it alone    python rewards.py [SET or FILE …]     shows problems and a prompt, grades what you
                type
Where to fork   a way to grade is a branch in `is_correct` and a name in SCORERS; a reward is a
                file of yours (--reward mine.py), or a branch in `reward` and a name in MODES.

A completion is hostile input. It is searched with linear-time patterns and compared exactly, as
a number, or by math-verify in a process with a time limit; it is never evaluated.
"""
import argparse
import hashlib
import re
import sys
from decimal import Decimal

from tqdm import tqdm

from plumbing.chat import chat_ids, chat_text
from plumbing.latex import LONGEST_LATEX, around_last_box, bare, compare_latex, last_box
from plumbing.number import (
    LONGEST,
    as_text,
    boxed_number,
    gold_number,
    last_number,
    last_phrase,
    paper_number,
    plain,
    read_number,
    same_number,
)
from plumbing.problems import SETS, TINY, Problem, load_problems
from plumbing.reward_file import file_reward

__all__ = ["Problem", "load_problems", "build_prompt", "extract_answer", "is_correct", "has_format",
           "reward"]
FORMAT_BONUS = 0.05  # the authors' value
SCORERS = ("strict", "flexible", "paper", "math")  # math: of sets with LaTeX answers
MODES = ("correct", "paper", "noise")


# ---------------------------------------------------------------------------------- prompt

INSTRUCTION = ("Solve the problem step by step and show each step. Then end with one last line "
               "that holds only the answer, in the form: #### ")


def prompt_messages(problem):
    """What is asked: the instruction, then the question."""
    form = "<number>" if problem.kind == "number" else "<answer in LaTeX>"
    return [{"role": "system", "content": INSTRUCTION + form},
            {"role": "user", "content": problem.question}]


def prompt_text(tokenizer, problem):
    """The prompt as text, in the tokenizer's chat template; raises what `chat_text` raises."""
    return chat_text(tokenizer, prompt_messages(problem))


def build_prompt(tokenizer, problem):
    """Token ids of the prompt, a list of int; raises what `chat_text` raises."""
    return chat_ids(tokenizer, prompt_messages(problem))


# ---------------------------------------------------------------------------------- grading

MARK = re.compile("#{4,}")
WORDS = re.compile(r"(?:[^\W\d_]\w+(?!\w)|[\s.,:;!?*'\"()-])+")  # a word may hold digits: H5
THOUGHT = re.compile(r"</think(?:ing)?>")  # what stands before it is no answer
THINKING = re.compile(r"<think(?:ing)?>")  # nor what stands behind it, while it is open
# Markdown's headings, no answers, a line each: `#### 1. Count the eggs` and `#### 1: Add`;
# `#### 2 Find the total`; `#### Given:`; `#### Step 3` and `#### Part two`.
HEADING = re.compile(r"""[*_\s]*(?:
    \(?(?:[0-9]{1,3}|[a-z]|[ivx]+)\\?(?:[.)][.):*_]*\s+|、)\S | [0-9]+:\s*[^\W\d]
  | [0-9]{1,2}\ (?-i:[A-Z])[a-z]+\ (?:the|all|how|up|out|each|both|what|our)\b
  | [a-z][^\n]*:[*_\s]*$
  | (?:step|part|case|question|problem|stage|phase|method|option|section|example|solution|day|week
      |month|year|round|scenario|item|equation|person)
    s?\b[*_\s]*\#?(?:[0-9]|[ivx]+\b|[a-z]\b|one\b|two\b|three\b))""", re.VERBOSE | re.IGNORECASE)
NAME = r"\s*[A-Za-z]\w*\s*(?:\(\s*[A-Za-z]\s*\))?\s*"  # x, f(x): what an equation says the value of
PAPER_FORMAT = re.compile(r"####\s*[0-9]+[^\n]+")  # the authors': "#### 15" has it, "#### 5" not


def extract_answer(text, *, scorer="flexible", finished=True, kind="number"):
    """Return the answer that a completion gives, as text, or None: "so 9\\n#### $18.00" gives "18".

    text: any string of any length.
    scorer: "strict" reads the first `####` line that is no heading (`#### Step 1: …`), as a whole.
        "flexible" reads that line, too, else the last number on it; without such a line the last
        \\boxed{} (a number with what stands around it), for kind "latex" else the last $formula$ or
        \\(formula\\), else the last number. A thought, <think>…</think>, is not read, nor one that
        is still open. docs/scorers.md has an example of every rule.
    finished: False for a completion that was cut off. Such a completion has an answer only on a
        `####` line that ends in a newline: a bare `#### 1` may be the start of `#### 18`.
    kind: the kind of the problem, "number" or "latex".
    Raises ValueError for another scorer.
    """
    if scorer not in ("strict", "flexible"):
        raise ValueError(f"unknown scorer {scorer!r}; expected strict, flexible")
    if kind == "latex":
        return latex_answer(text, scorer, finished)
    number = number_answer(text, scorer, finished)
    return as_text(number) if number else None


def is_correct(text, gold, scorer="flexible", *, finished=True):
    """Say whether a completion gives the gold answer: is_correct("#### 18.00", "18") is True.

    text, finished: as in `extract_answer`.
    gold: the short answer as text. A gold that is a number is compared as a number, any other one
        as LaTeX. Both are compared exactly: 0.3333 is not 1/3.
    scorer: "strict" or "flexible", as in `extract_answer`; "math", the same as "flexible", the name
        by which sets with LaTeX answers are reported; or "paper", the authors' (`paper_number`).
    Raises ValueError for an unknown scorer or an empty gold, RuntimeError where math-verify, which
    compares LaTeX, does not start.
    """
    if scorer not in SCORERS:
        raise ValueError(f"unknown scorer {scorer!r}; expected {', '.join(SCORERS)}")
    if not gold.strip():
        raise ValueError("the gold answer is empty")
    if scorer == "paper":
        answer, right = paper_number(text), paper_number("#### " + gold)
        return None not in (answer, right) and abs(answer - right) <= Decimal("1e-6")
    number = gold_number(gold)
    if number:
        answer = number_answer(text, scorer, finished)
        return answer is not None and same_number(answer, number)
    latex = latex_answer(text, scorer, finished)
    if latex is None:
        return False
    right, answer = read_number(gold, letters=False), read_number(latex)
    if right and answer:  # exactly, and as mixed numbers: math-verify takes 2 2/3 for 4/3
        return same_number(answer, right)
    # of 3\pi = 2\pi math-verify reads the right side: every side but a name must be right
    first, *others = [latex] if "=" in gold else re.split(r"(?<![<>!])=", latex)
    sides = others if others and re.fullmatch(NAME, first) else [first, *others]
    return len(sides) < 5 and all(compare_latex(bare(gold), side.strip()) == "same"
                                  for side in sides)


def has_format(text, gold, *, finished=True):
    """Say whether a completion has the form that the prompt asks for, correct or not.

    The completion finished, its only `####` line is its last line, and that line holds an answer:
    a number if the gold is a number, else LaTeX. "#### 5" has the form, "#### 5\\nReally" has not.
    """
    text = spoken(text)
    marks = list(MARK.finditer(text))
    if not finished or len(marks) != 1 or "\n" in text[marks[0].end():].strip():
        return False
    if gold_number(gold):
        return number_answer(text, "strict") is not None
    answer = latex_answer(text, "strict")
    return answer is not None and compare_latex(bare(gold), answer) != "unreadable"


def reward(text, gold, finished=True, mode="correct", *, key=None):
    """Return the reward of a completion, a float: reward("so 9 + 9\\n#### 18", "18") is 1.05.

    text, gold, finished: as in `is_correct`.
    mode "correct": 1 for a correct answer (flexible), plus 0.05 if the completion `has_format`.
        (A bonus for any `####` would be earned by scattering them: in a group without a right
        answer the bonus decides alone.)
    mode "paper": the authors' reward, in [0, 1]: 1 for a correct answer, plus 0.05 for `####` with
        a digit and more behind it, minus 0.2 without any number. LaTeX and `finished` play no part.
    mode "mine.py": what the function reward(text, gold, finished) of that file returns.
    mode "noise": a number in [0, 1) from a hash of text and key, to try a run with random weights,
        where all real rewards are equal.
    key: for "noise", any value with a stable repr that tells the samples of a group apart, such as
        (seed, step, prompt, sample). Without a key equal texts have equal rewards.
    Raises ValueError for an unknown mode, and what `is_correct` raises.
    """
    if mode == "correct":
        bonus = FORMAT_BONUS * has_format(text, gold, finished=finished)
        return is_correct(text, gold, finished=finished) + bonus
    if mode == "paper":
        value = is_correct(text, gold, "paper") + FORMAT_BONUS * bool(PAPER_FORMAT.search(text))
        return min(1.0, max(0.0, value - 0.2 * (paper_number(text) is None)))
    if mode == "noise":
        seen = f"{key!r} {text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(seen).digest()[:6], "big") / 2**48
    if mode.endswith(".py"):
        return file_reward(mode, text, gold, finished)
    raise ValueError(f"unknown reward mode {mode!r}; expected {', '.join(MODES)}, or a .py file "
                     "with a function reward(text, gold, finished)")


# ---------------------------------------------------------------------------------- where it stands

def spoken(text):
    """What a completion says when it has thought: "18" of "<think>7?</think>18"."""
    return THINKING.split(THOUGHT.split(text)[-1], maxsplit=1)[0]


def answer_line(text, kind, finished=True):
    """The first `####` line that is complete and no heading; "" without one.

    For kind "number" words without a number are a heading, too: `#### Solution`. The first line, as
    in GSM8K's own grader: a base model that has answered often goes on with another question.
    """
    mark = MARK.search(text)
    while mark:
        end = text.find("\n", mark.end())
        if end < 0 and not finished:
            break
        line = text[mark.end():end if end >= 0 else len(text)].strip()
        if line and len(line) <= LONGEST and not HEADING.match(line) and not (
                kind == "number" and WORDS.fullmatch(line) and not read_number(line)):
            return line
        mark = MARK.search(text, end) if end >= 0 else None
    return ""


def number_answer(text, scorer, finished=True):
    """The Number that a completion answers with, or None."""
    text = spoken(text)
    line = answer_line(text, "number", finished)
    number = read_number(line)
    if number or scorer == "strict" or not finished:
        return number
    if line:
        return read_number(last_phrase(plain(line), to_end=True) or "")
    box = around_last_box(text)
    return boxed_number(*box) if box else last_number(text)


def latex_answer(text, scorer, finished=True):
    """The LaTeX that a completion answers with, without its wrapping, or None."""
    text = spoken(text)
    answer = bare(answer_line(text, "latex", finished))
    if not answer and scorer != "strict" and finished:
        dollars = text.replace(r"\$", "").replace("$$", "$").rsplit("$", 2)
        box = last_box(text)
        if box is not None:
            answer = bare(box)
        elif len(dollars) == 3:
            answer = bare(dollars[1])
        elif r"\(" in text:
            answer = bare(text.rpartition(r"\(")[2].partition(r"\)")[0])
        else:
            answer = extract_answer(text) or ""
    return answer if 0 < len(answer) <= LONGEST_LATEX else None


# ---------------------------------------------------------------------------------- a rollout

class GradingError(RuntimeError):
    """A grader that raised, or a reward that is no number: an error of the code, not a zero."""


def answer_rows(rollout, problems, tokenizer):
    """The answers of a rollout as rows: dicts with problem (its id), sample, text, n_tokens and
    finished. problems[p] is the problem that prompt p asks."""
    return [{"problem": problem.id, "sample": g, "n_tokens": len(ids), "finished": finished,
             "text": tokenizer.decode(ids, skip_special_tokens=True)}
            for problem, *group in zip(problems, rollout.completions, rollout.finished)
            for g, (ids, finished) in enumerate(zip(*group))]


def grade(rows, problems, scorers=("strict", "flexible"), progress=None):
    """The rows of `answer_rows`, each with its gold, the verdict of every scorer, and format.

    problems: all that the rows answer, in any order. progress: the label of a bar, or None.
    """
    gold_of = {problem.id: problem.gold for problem in problems}

    def graded(row):
        text, gold, finished = row["text"], gold_of[row["problem"]], row["finished"]
        try:
            verdicts = {s: is_correct(text, gold, s, finished=finished) for s in scorers}
            verdicts["format"] = has_format(text, gold, finished=finished)
        except Exception as e:
            raise GradingError(f"grading raised {e!r} on {row['problem']}, gold {gold!r}, "
                               f"completion {text!r:.2000}") from e
        return row | {"gold": gold, **verdicts}
    return [graded(row) for row in tqdm(rows, desc=progress, unit="answer", leave=False, delay=2,
                                        disable=progress is None)]


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
        main()
    except KeyboardInterrupt:
        sys.exit(130)

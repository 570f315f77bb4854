"""Grading, rewards, prompts and loading. The tests with `hub` load the four real data sets."""
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rewards
from plumbing import latex, onestep
from plumbing.number import as_text, gold_number
from plumbing.problems import read_problems
from rewards import (
    Problem,
    build_prompt,
    extract_answer,
    has_format,
    is_correct,
    load_problems,
    prompt_text,
    reward,
)

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------- number golds

# completion, gold, strict, flexible; each expectation follows from the words beside it
NUMBERS = [
    ("so 2 * 9 = 18\n#### 18", "18", True, True),      # the form the prompt asks for
    ("#### 18\n\nQuestion: 3?\n#### 5", "18", True, True),  # the first marked line counts
    ("#### 5\n#### 18", "18", False, False),
    ("####18", "18", True, True),
    ("#### 18.00", "18", True, True),                  # equal as numbers
    ("#### $18.00 per day", "18", True, True),         # currency, unit
    ("#### **18**", "18", True, True),                 # Markdown
    (r"#### \boxed{18}.", "18", True, True),
    (r"#### \$1{,}800", "1800", True, True),           # LaTeX's spelling of $1,800
    ("#### 1,234,567", "1234567", True, True),
    ("#### -$5", "-5", True, True),
    ("#### $-5", "-5", True, True),
    ("#### \u22125", "-5", True, True),                # U+2212, the minus sign
    ("#### 3-5", "-5", False, False),                  # a range or a difference, not -5
    ("#### 5/2", "2.5", True, True),
    (r"#### -\frac{5}{2}", "-2.5", True, True),
    ("#### 2 1/2", "2.5", True, True),
    ("#### 1/0", "1", False, False),
    ("#### .5", "1/2", True, True),
    ("#### 1e3", "1000", True, True),
    ("#### 0.3333", "1/3", False, False),              # exact, no tolerance
    ("#### 25 m^2", "25", True, True),                 # the exponent of a unit is no second number
    ("#### 72,", "72", True, True),                    # closing punctuation
    ("it is 72,", "72", False, True),
    ("it is 72.", "72", False, True),
    ("the area is 25 cm2", "25", False, True),
    ("at 1,234 km/h", "1234", False, True),
    (r"so \boxed{\frac{3}{4}}", "0.75", False, True),
    ("first 18, then 19", "18", False, False),         # flexible takes the last number
    ("#### Step 1\n9 + 9 is 18", "18", False, True),   # a heading is no answer
    ("#### Step 1\n9 + 9 is 18", "1", False, False),
    ("#### 3 + 4 = 7", "7", False, True),              # two numbers on the line: only flexible
    ("#### 3 + 4 = 7", "3", False, False),
    ("#### 12:30", "12", False, False),
    ("#### 1 2 3 18", "18", False, True),
    ("####\n18", "18", False, True),
    ("no number", "18", False, False),
    ("", "0", False, False),
    ("\u0661\u0668", "18", False, False),              # other alphabets' digits are not read
]


@pytest.mark.parametrize("text, gold, strict, flexible", NUMBERS)
def test_number_grades_equal_the_hand_worked_ones(text, gold, strict, flexible):
    assert is_correct(text, gold, "strict") is strict
    assert is_correct(text, gold, "flexible") is flexible
    assert is_correct(text, gold) is flexible


@pytest.mark.parametrize("answer, gold, right", [
    ("50%", "50", True), ("50%", "50%", True), ("50", "50%", True),  # a unit, like any other
    (r"50\%", "50", True), ("50 percent", "50%", True),
    ("50%", "0.5", True), ("50%", "1/2", True),  # the gold has no sign: a hundredth is right too
    ("0.5", "50%", False), ("0.5%", "50%", False), ("5000%", "50%", False)])
def test_the_gold_decides_what_a_percent_sign_means(answer, gold, right):
    assert is_correct(f"#### {answer}", gold, "strict") is right


@pytest.mark.parametrize("gold, number", [
    ("18", "18"), ("18.0", "18"), ("$1,800.50", "1800.5"), (r"\$18.90", "18.9"), ("$18$", "18"),
    ("9 (apples)", "9"), ("14  (seats)", "14"), ("-(1/3)", "-1/3"), ("2 1/2", "5/2"),
    ("60 km/h", "60"), ("3 sq. feet", "3"), ("50%", "50%"), ("10,\\!080", "10080"), ("007", "7"),
    ("Mrs. Hilt", None), ("3:30 p.m.", None), ("3 p.m.", None), ("5:6", None), ("6th", None),
    ("Vendor 2", None), ("2k", None), ("52_8", None), ("3, 5", None), (r"7\pi", None),
    (r"\frac{14}{3}", None), ("1/0", None), ("9" * 1001, None), ("", None)])
def test_a_gold_is_a_number_only_as_a_whole(gold, number):
    found = gold_number(gold)
    assert (as_text(found) if found else None) == number


def test_a_truncated_completion_answers_only_on_a_finished_line():
    """`#### 1` may be the beginning of `#### 18`; the newline says that it is not."""
    for scorer in ("strict", "flexible"):
        assert is_correct("#### 18\n", "18", scorer, finished=False)
        assert is_correct("#### 18\nQuestion: 4", "18", scorer, finished=False)
        assert not is_correct("so 9 + 9 = 18", "18", scorer, finished=False)
        assert not is_correct("#### 18", "18", scorer, finished=False)
        assert not is_correct("####\n18", "18", scorer, finished=False)
    assert not is_correct(r"\boxed{\pi}", r"\pi", finished=False)
    assert is_correct("#### \\pi\nand", r"\pi", finished=False)
    with pytest.raises(ValueError, match="'paper'; expected strict, flexible"):
        extract_answer("1", scorer="paper")


@pytest.mark.parametrize("text, kind, strict, flexible", [
    ("2 + 2 = 4\n#### $1,234.50 a day", "number", "1234.5", "1234.5"),
    ("about 50%", "number", None, "50%"),
    (r"so $\frac{1}{2}$ or $\sqrt{2}$.", "latex", None, r"\sqrt{2}"),
    (r"so \(\sqrt{2}\).", "latex", None, r"\sqrt{2}"),
    (r"$1$ or \boxed{\frac{1}{2}}", "latex", None, r"\frac{1}{2}"),
    (r"#### $\boxed{x^{2}}$.", "latex", "x^{2}", "x^{2}"),
    ("#### .5", "latex", ".5", ".5"),
    (r"\boxed{x", "latex", None, None),
    ("nothing", "latex", None, None)])
def test_extract_answer_returns_the_answer_as_plain_text(text, kind, strict, flexible):
    assert extract_answer(text, scorer="strict", kind=kind) == strict
    assert extract_answer(text, kind=kind) == flexible


# ---------------------------------------------------------------------------- LaTeX golds

@pytest.mark.parametrize("answer, gold, right", [
    (r"\frac{28}{6}", r"\frac{14}{3}", True), ("14/3", r"\frac{14}{3}", True),
    ("3", r"\frac{14}{3}", False), (r"\dfrac43", r"\frac{4}{3}", True),
    ("-q + p", "p - q", True), ("q - p", "p - q", False), ("(3, 4]", "(3,4]", True),
    ("[3, 4)", "(3,4]", False), (r"2\sqrt{3}", r"\sqrt{12}", True), ("5", "x=5", True),
    ("Evelyn", r"\text{Evelyn}", True), ("90", r"90^\circ", True), (r"\frac{1}{", r"\pi", False)])
def test_latex_is_compared_by_value(answer, gold, right):
    assert is_correct(f"#### ${answer}$", gold, "strict") is right
    assert is_correct(rf"hence \boxed{{{answer}}}.", gold) is right


def test_latex_is_graded_in_threads_and_leaves_the_signal_handlers_alone():
    import signal
    before = [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGINT)]
    graded = []
    threads = [threading.Thread(target=lambda n=n: graded.append(
        is_correct(rf"#### \frac{{{2 * n}x}}{{4}}", rf"\frac{{{n}x}}{{2}}"))) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == [True] * 8
    assert [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGINT)] == before


def test_a_comparison_without_a_verdict_is_reported_not_hidden(capfd):
    def cpu_s(seconds):
        return seconds.ru_utime + seconds.ru_stime
    assert is_correct("#### \\sqrt 4x", "2x")  # starts the process, which is not timed
    n_before = len(latex.ungraded)
    ticks = Path(f"/proc/{latex.workers[0].pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    before = (cpu_s(resource.getrusage(resource.RUSAGE_CHILDREN))
              + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"))
    assert not is_correct(r"#### \binom{99999999}{5000001}", r"\frac{1}{2}")
    taken = cpu_s(resource.getrusage(resource.RUSAGE_CHILDREN)) - before
    assert 0.5 * latex.LATEX_LIMIT_S < taken < 1  # CPU time of the process that was ended
    assert latex.ungraded[n_before:] == [(r"\frac{1}{2}", r"\binom{99999999}{5000001}")]
    assert "no verdict on the LaTeX answer" in capfd.readouterr().err
    assert is_correct("#### \\sqrt 9x", "3x")  # and the next one is graded as ever


def test_a_math_verify_that_does_not_start_raises(monkeypatch, tmp_path):
    broken = tmp_path / "latex.py"
    broken.write_text("raise ImportError('no math_verify')")
    monkeypatch.setattr(latex, "__file__", str(broken))
    monkeypatch.setattr(latex, "workers", [])
    with pytest.raises(RuntimeError, match="did not start"):
        is_correct("#### \\sqrt{12348}", r"42\sqrt{7}")  # compared nowhere else, so not remembered


# ---------------------------------------------------------------------------- the authors' scorer

@pytest.mark.parametrize("text, gold, right, value", [
    ("#### 15", "15", True, 1.0),
    ("#### 5", "5", True, 1.0),
    ("it is 5", "5", True, 1.0),                  # the last number of the text will do
    ("it is 6", "5", False, 0.0),
    ("#### 15", "5", False, 0.05),                # the format alone
    ("#### 6", "5", False, 0.0),                  # one digit is not the format: a slip of theirs
    ("#### 6 apples\nor 5", "5", True, 1.0),      # the line is no number: the last one of the text
    ("no idea", "5", False, 0.0),                 # -0.2, clipped
    ("#### 1,005", "1005", True, 1.0),
    ("#### 50%", "1/2", True, 1.0),
    ("#### 1/3", "0.3333334", True, 1.0),         # within 1e-6
    ("#### 0.33", "1/3", False, 0.05),
    ("#### 3", r"\frac{14}{3}", True, 1.0),       # every gold is reduced to its last number
    (r"#### \frac{14}{3}", r"\frac{14}{3}", True, 1.0),
    ("p - q", "p - q", False, 0.0)])
def test_the_paper_scorer_and_reward_equal_the_hand_worked_ones(text, gold, right, value):
    assert is_correct(text, gold, "paper") is right
    assert reward(text, gold, mode="paper") == pytest.approx(value)
    assert reward(text, gold, mode="paper", finished=False) == pytest.approx(value)


# ---------------------------------------------------------------------------- rewards

@pytest.mark.parametrize("text, gold, finished, value", [
    ("9 + 9 = 18\n#### 18", "18", True, 1.05),
    ("9 + 9 = 18\n#### 18\n \n", "18", True, 1.05),
    ("9 + 9 = 18", "18", True, 1.0),
    ("#### 18\nas 9 + 9 = 18", "18", True, 1.0),        # not the last line
    ("#### 18\n#### 18", "18", True, 1.0),              # not the only one
    ("#### 18\n", "18", False, 1.0),                    # cut off: no bonus
    ("#### 18", "18", False, 0.0),
    ("#### 17", "18", True, 0.05),
    ("#### seventeen", "18", True, 0.0),                # cannot be read
    ("#### 17 #### 17", "18", True, 0.0),
    ("", "18", True, 0.0),
    (r"#### \frac{2}{4}", r"\frac12", True, 1.05),
    (r"#### \frac{2}{5}", r"\frac12", True, 0.05),
    (r"#### \frac{2}{", r"\frac12", True, 0.0)])
def test_correct_reward_is_one_plus_a_bonus_for_the_asked_form(text, gold, finished, value):
    found = reward(text, gold, finished=finished)
    assert found == pytest.approx(value) and isinstance(found, float)
    assert has_format(text, gold, finished=finished) is (round(value % 1, 2) == 0.05)


def test_noise_repeats_exactly_and_differs_within_a_group():
    texts = ["", "a", "b", "\ud800"]
    noise = [reward(t, "18", mode="noise") for t in texts]
    assert noise == [reward(t, "5", finished=False, mode="noise") for t in texts]
    assert len(set(noise)) == 4 and all(0 <= n < 1 for n in noise)
    equal_texts = [reward("", "18", mode="noise", key=(0, 1, 2, sample)) for sample in range(8)]
    assert len(set(equal_texts)) == 8
    # sha256 of "None a" begins with these six bytes: the same on every machine and run
    assert reward("a", "18", mode="noise") == 0xf5cb7bbcb77f / 2**48


def test_unknown_scorers_and_modes_and_empty_golds_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'fuzzy'; expected strict, flexible, paper"):
        is_correct("1", "1", "fuzzy")
    with pytest.raises(ValueError, match="'fuzzy'; expected correct, paper, noise"):
        reward("1", "1", mode="fuzzy")
    with pytest.raises(ValueError, match="gold answer is empty"):
        is_correct("1", " ")


# ---------------------------------------------------------------------------- hostile completions

HOSTILE = {
    "empty": "",
    "digits": "9" * 200_000,
    "digits on the line": "#### " + "9" * 200_000,
    "decimals": "#### 0." + "3" * 200_000,
    "tower": "9**9**9",
    "tower on the line": "#### 9**9**9",
    "huge exponent": "#### 1e999999999",
    "unbalanced LaTeX": "#### " + r"\frac{1}{\sqrt{2" * 9,
    "much unbalanced LaTeX": r"\boxed{\frac{1}{2" * 10_000,
    "code": "#### __import__('os').remove('SENTINEL')",
    "code in LaTeX": r"#### \operatorname{__import__}('os').remove('SENTINEL')",
    "code as text": "```python\nimport os; os.remove('SENTINEL')\n```",
    "lone surrogates": "#### \ud800 18 \udfff" * 1000,
    "surrogate": "#### \ud800",
    "marks": "#" * 200_000,
    "many marks": "#### " * 40_000,
    "mark and spaces": "####" + " " * 200_000,
    "numbers": "1 " * 100_000,
    "commas": "1," * 100_000,
    "thousands": "1,111" * 40_000,
    "points": "1." * 100_000,
    "slashes": "1/" * 100_000,
    "dollars": "$" * 200_000,
    "minuses": "-" * 200_000,
    "fractions": r"\frac{1}{" * 20_000,
    "open boxes": r"\boxed{" * 30_000,
    "words": "#### " + "word" * 200 + "=",
    "words with marks": "#### " + "a_b'c-" * 150 + "(5",
    "a long word": "5 " + "a" * 900 + "(",
    "a long unit": "#### 5 " + "illionteendths" * 60 + "=",
    "halves": "½" * 50_000,
    "wide digits": "１，" * 50_000,
    "parentheses": "(" * 100_000 + "5" + ")" * 100_000,
    "nul": "\0" * 1000,
    "LaTeX tower": "#### $9^{9^{9}}$",
    "LaTeX factorial": "#### $99999999!$",
}


def seconds_to_grade(text, gold):
    """The longest of the calls that train.py and evaluate.py make, in seconds of CPU time (without
    the process that compares LaTeX, which the system ends after LATEX_LIMIT_S)."""
    longest = 0.0
    for call in (*(lambda s=s: is_correct(text, gold, s) for s in rewards.SCORERS),
                 *(lambda m=m: reward(text, gold, mode=m) for m in rewards.MODES),
                 lambda: extract_answer(text), lambda: extract_answer(text, kind="latex")):
        begun = time.process_time()
        call()
        longest = max(longest, time.process_time() - begun)
    return longest


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latex, "workers", [])  # a worker that runs in this folder, too
    file = tmp_path / "SENTINEL"
    file.write_text("still here")
    yield file
    for worker in latex.workers:
        worker.kill()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_are_graded_in_milliseconds_against_numbers(name, sentinel):
    # the best of three: a first call may load something, a slow pattern is slow every time
    assert min(seconds_to_grade(HOSTILE[name], "18") for _ in range(3)) < 0.05
    assert sentinel.exists()
    assert not is_correct(HOSTILE[name], "19")


def test_hostile_completions_are_graded_within_a_limit_against_latex(sentinel):
    is_correct("#### \\sqrt 4x", "2x")
    for gold in (r"\frac{14}{3}", "x^2+1", "$9^{9^{9}}$", "$99999999!$"):
        for name, text in HOSTILE.items():
            taken = next((seconds for _ in range(3) if (seconds := seconds_to_grade(text, gold))
                          < 1 - latex.LATEX_LIMIT_S), 1.0)  # slow every time, or something loaded
            assert taken < 1 - latex.LATEX_LIMIT_S, (name, gold, taken)
            assert not is_correct(text, gold) or name.startswith("LaTeX")
    assert sentinel.exists()


# ---------------------------------------------------------------------------- loading files

def write_lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_a_file_of_problems_loads_with_every_kind_of_answer(tmp_path, capsys):
    file = write_lines(
        tmp_path / "mine.jsonl", {"question": " a? ", "answer": "1 + 1 = 2\n#### 2"}, "",
        {"question": "b?", "answer": 145.0}, {"question": "c?", "answer": "9 (apples)", "more": 1},
        {"question": "d?", "answer": r"\frac{1}{2}"}, {"question": "e?", "answer": "Tom"})
    problems = load_problems(file, "ignored")
    assert problems == [Problem("mine.jsonl/0", "a?", "2", "number"),
                        Problem("mine.jsonl/1", "b?", "145", "number"),
                        Problem("mine.jsonl/2", "c?", "9", "number"),
                        Problem("mine.jsonl/3", "d?", r"\frac{1}{2}", "latex")]
    report = capsys.readouterr().err
    assert report.count("\n") == 1 and "left out 1 of 5 problems" in report and "'Tom'" in report
    assert read_problems(file)[1] == [("mine.jsonl/4", "Tom")] and not capsys.readouterr().err


GOOD = {"question": "a?", "answer": "2"}


@pytest.mark.parametrize("rows, message", [
    ([GOOD, "", '{"question": "a'], r"bad\.jsonl, line 3: not JSON"),
    ([GOOD, '["a", 2]'], r"bad\.jsonl, line 2: expected an object .* found list"),
    ([GOOD, {"question": "a?", "solution": "2"}],
     r"bad\.jsonl, line 2: no column answer; expected question and answer, found question, sol"),
    ([{"answer": "2"}], r"bad\.jsonl, line 1: no column question; .* found answer"),
    ([{"question": "a?", "answer": None}], r"line 1: column answer holds None; expected text or"),
    ([{"question": None, "answer": "1"}], r"line 1: column question holds \[None\]; expected text"),
    ([{"question": "\ud800", "answer": "1"}], r"line 1: column question holds .*; expected text"),
    ([], r"bad\.jsonl: none of its 0 rows"),
    ([{"question": "a?", "answer": "Tom"}], r"bad\.jsonl: none of its 1 rows")])
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(write_lines(tmp_path / "bad.jsonl", *rows))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_or_not_there_is_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: not JSON"):
        load_problems(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        load_problems(tmp_path / "nowhere.jsonl")


def test_unknown_names_and_splits_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'gsm9k'; expected tiny, onestep, gsm8k, svamp, asdiv, "
                                         "math500, or the path of a .jsonl file"):
        load_problems("gsm9k")
    for name, splits in [("gsm8k", "train, test"), ("openai/gsm8k", "train, test"),
                         ("svamp", "train, test"), ("asdiv", "test, validation"),
                         ("math500", "test"), ("tiny", "train, test, validation")]:
        with pytest.raises(ValueError, match=f"has no split 'dev'; it has {splits}$"):
            load_problems(name, "dev")


def test_onestep_problems_are_right_and_none_is_in_two_splits_or_in_tiny():
    splits = {split: load_problems("onestep", split) for split in ("train", "validation", "test")}
    assert {split: len(p) for split, p in splits.items()} == {
        "train": 972, "validation": 100, "test": 200}
    questions = [p.question for problems in splits.values() for p in problems]
    questions += [p.question for split in splits for p in load_problems("tiny", split)]
    assert len(set(questions)) == len(questions)
    wordings = {}  # a wording with its two numbers: the splits that have it
    for split, problems in splits.items():
        for p in problems:
            a, b = map(int, re.findall("[0-9]+", p.question))
            assert int(p.gold) in (a + b, a - b, a * b) and int(p.gold) > 0
            wording = re.sub("|".join(onestep.NAMES + onestep.THINGS), "_", p.question)
            wordings.setdefault(wording, set()).add(split)
    assert len(wordings) == 624 and all(len(found) == 1 for found in wordings.values())
    assert load_problems("onestep", "test") == splits["test"]


def test_the_embedded_problems_load_in_every_split():
    if not (ROOT / "tiny" / "test.jsonl").exists():
        pytest.skip("tiny/test.jsonl is not there: python -m tiny.make writes it")
    for split in ("train", "validation", "test"):
        problems, dropped = read_problems("tiny", split)
        assert problems[0].id == f"tiny/{split}/0" and not dropped
        assert all(p.kind == "number" and is_correct(f"#### {p.gold}", p.gold, "strict")
                   for p in problems)


# ---------------------------------------------------------------------------- prompt

class Tokenizer:
    """As little of a tokenizer as the prompt needs; one id per character."""
    name_or_path = "stand-in"
    chat_template, added_tokens_decoder = "some template", {}

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False, **_):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        text += "<assistant>" * add_generation_prompt
        return text if not tokenize else {"input_ids": self.encode(text)}

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) for c in text]


@pytest.mark.parametrize("kind, form", [("number", "#### <number>"), ("latex", "#### <answer")])
def test_the_prompt_is_instruction_and_question_in_the_chat_template(kind, form):
    problem = Problem("x/0", "How many?", "18", kind)
    ids = build_prompt(Tokenizer(), problem)
    text = "".join(map(chr, ids))  # ids of the text alone: no special token was added before it
    assert text == prompt_text(Tokenizer(), problem)
    assert re.fullmatch(rf"<system>[^<]+{form}.*<user>How many\?<assistant>", text)


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="'stand-in' has no chat template"):
        build_prompt(tokenizer, Problem("x/0", "How many?", "18", "number"))


# ---------------------------------------------------------------------------- in a new process

def python(code, env=None, stdin=""):
    done = subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True,
                          cwd=ROOT, input=stdin, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_and_grading_do_not_import_torch():
    python(["-c", "import sys, rewards; rewards.is_correct('#### 0.5', r'\\frac12'); "
                  "assert not {'torch', 'datasets', 'sympy', 'transformers'} & set(sys.modules)"])


def test_run_alone_it_shows_a_problem_and_grades_what_is_typed(tmp_path):
    file = write_lines(tmp_path / "mine.jsonl", {"question": "How many?", "answer": "18"})
    done = python(["rewards.py", file], stdin="#### 18\nit is 17\n\n#### 18\n")
    assert "mine.jsonl: 1 problems" in done.stdout and "How many?" in done.stdout
    for answer, right, value in ((18, True, "1.05"), (17, False, "0.00")):
        assert (f"answer '{answer}': strict {right}, flexible {right}, paper {right}, math {right},"
                f" reward {value}") in done.stdout
    assert done.stdout.count("reward") == 2  # the empty line ended it


def test_without_the_hub_one_line_says_what_was_wanted_and_what_else_works(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = python(["-c", """
import rewards
try:
    rewards.load_problems("gsm8k")
except ConnectionError as error:
    print(error)
    assert error.__cause__ is not None
"""], env)
    assert done.stdout.count("\n") == 1
    assert "cannot load openai/gsm8k, split test, from the hub" in done.stdout
    assert "give the path of a .jsonl file with the columns question and answer" in done.stdout
    shown = python(["rewards.py", "tiny", "gsm8k", "svamp"], env).stdout
    assert "svamp: not tried, the hub does not answer" in shown


def test_every_way_the_hub_can_fail_becomes_that_one_error(monkeypatch):
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    http_error = HfHubHTTPError.__bases__[0]  # of the HTTP library in use
    for error in (ConnectionError("x\ny"), TimeoutError("x"), OfflineModeIsEnabled("x"),
                  LocalEntryNotFoundError("x"), http_error("x"),
                  datasets.exceptions.DatasetGenerationError("x"),
                  datasets.exceptions.DatasetNotFoundError("x")):
        def load_dataset(*args, error=error, **kwargs):
            raise error
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(ConnectionError, match=r"ChilleD/SVAMP, split train.*\.jsonl") as caught:
            load_problems("svamp", "train")
        assert caught.value.__cause__ is error and "\n" not in str(caught.value)


LOAD_ALL = """
import json
from plumbing.problems import read_problems
from rewards import is_correct, load_problems, reward
found = {}
for name, split in [("gsm8k", "train"), ("openai/gsm8k", "test"), ("svamp", "train"),
                    ("ChilleD/SVAMP", "test"), ("asdiv", "test"), ("math500", "test"),
                    ("EleutherAI/asdiv", "validation"), ("HuggingFaceH4/MATH-500", "test")]:
    problems, dropped = read_problems(name, split)
    for p in problems:
        assert is_correct(f"#### {p.gold}", p.gold, "strict"), p
        assert is_correct(rf"so it is \\boxed{{{p.gold}}}.", p.gold, "flexible"), p
        assert reward(f"so\\n#### {p.gold}", p.gold) == 1.05, p
        assert p.question and p.kind in ("number", "latex"), p
    assert len({p.id for p in problems}) == len(problems)
    found[name + " " + split] = [len(problems), sum(p.kind == "latex" for p in problems),
                                 [gold for _, gold in dropped], problems[-1].id]
load_problems("asdiv")
print(json.dumps(found))
"""


def test_the_four_sets_load_whole_and_every_gold_scores_one_against_itself(hub):
    done = python(["-c", LOAD_ALL], hub)
    found = json.loads(done.stdout.splitlines()[-1])
    dropped = found["asdiv test"][2]
    # usable, LaTeX among them, dropped, id of the last: 2215 of ASDiv's rows are on this hub
    for key, expected in {
            "gsm8k train": [7473, 0, [], "gsm8k/train/7472"],
            "openai/gsm8k test": [1319, 0, [], "gsm8k/test/1318"],
            "svamp train": [700, 0, [], "svamp/train/699"],
            "ChilleD/SVAMP test": [300, 0, [], "svamp/test/299"],
            "math500 test": [500, 177, [], "math500/test/499"],
            "HuggingFaceH4/MATH-500 test": [500, 177, [], "math500/test/499"],
            "asdiv test": [2093, 0, dropped, "asdiv/test/2214"],
            "EleutherAI/asdiv validation": [2093, 0, dropped, "asdiv/validation/2214"]}.items():
        assert found[key] == expected, key
    times_and_ratios = [g for g in dropped if re.search(r"[0-9]:[0-9]", g)]
    words = [g for g in dropped if not re.search("[0-9]", g)]
    assert (len(dropped), len(times_and_ratios), len(words)) == (122, 61, 56)
    assert sorted(set(dropped) - {*times_and_ratios, *words}) == [
        "1st", "6th", "February 3rd", "The 60th caller.", "Vendor 2"]
    assert "asdiv, test: left out 122 of 2215 problems" in done.stderr
    assert "'Mrs. Hilt', 'Yes', 'Purple'" in done.stderr


def test_a_prompt_never_asks_for_thinking_and_never_names_today():
    # the switch of Qwen3's template, and the date of Llama 3's, as the two ask for them
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}: {{ messages[1]['content'] }}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}")
    text = prompt_text(tokenizer, Problem("x/0", "How many?", "18", "number"))
    assert text == "26 Jul 2024: How many?<think></think>"


QWEN_PROMPT = """
from transformers import AutoTokenizer
from rewards import Problem, build_prompt, prompt_text
for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"):
    tokenizer = AutoTokenizer.from_pretrained(name)
    problem = Problem("x/0", "How many?", "18", "number")
    ids, text = build_prompt(tokenizer, problem), prompt_text(tokenizer, problem)
    assert type(ids) is list and {type(i) for i in ids} == {int}
    assert tokenizer.decode(ids) == text
    assert text.startswith("<|im_start|>system\\nSolve the problem step by step"), text
    assert text.endswith("#### <number><|im_end|>\\n<|im_start|>user\\nHow many?<|im_end|>\\n"
                         "<|im_start|>assistant\\n"), text
    assert ids[0] == 151644 and ids.count(151644) == 3  # <|im_start|> is one token
"""


def test_the_prompt_of_the_base_and_the_instruct_tokenizer(hub):
    python(["-c", QWEN_PROMPT], hub)

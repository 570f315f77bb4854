"""plumbing/problems.py: solutions, columns, tables; splits that share no question."""
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import in_empty_folder, run  # noqa: F401

from evaluation.settings import chosen_problems
from plumbing import problems
from plumbing.files import read_rows
from plumbing.problems import SETS, Problem, load_problems, read_problems, split_problems
from rewards import is_correct


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def with_answers(*answers):
    return write("mine.jsonl", *({"question": f"{i}?", "answer": a} for i, a in enumerate(answers)))


# ------------------------------------------------------------------ the gold of a solution

SOLUTIONS = {  # answer column: (gold, kind)
    "18": ("18", "number"), "9 + 9 = 18\n#### 18": ("18", "number"),
    r"We get $9 + 9 = \boxed{18}$ eggs.": ("18", "number"),
    r"First \boxed{7}. No:" "\n" r"\[x = \boxed{18}.\]": ("18", "number"),
    r"\boxed{\frac{1}{2}}": (r"\frac{1}{2}", "latex"),
    r"So $x = \boxed{x+1}$, which was to be found.": ("x+1", "latex"),
    r"Hence \boxed{\left\{1, \{2\}\right\}}.": (r"\left\{1, \{2\}\right\}", "latex"),
    r"\boxed{\text{Tom}}": (r"\text{Tom}", "latex"),
    r"A long way. " * 100 + r"\boxed{-3}": ("-3", "number"),
    "\\boxed{5} is what a first try gives.\n#### 6": ("6", "number"),
    "#### Step 1\n9 + 9\n#### Step 2\n\\boxed{18}": ("18", "number"),
    r"#### \boxed{18}": ("18", "number"), r"\frac{1}{2}": (r"\frac{1}{2}", "latex")}


def test_the_gold_of_a_solution_is_its_last_line_or_its_last_box():
    found = load_problems(with_answers(*SOLUTIONS))
    assert [(p.gold, p.kind) for p in found] == list(SOLUTIONS.values())
    for p in found:
        assert is_correct(f"#### {p.gold}", p.gold, "strict")
        assert is_correct(rf"so it is \boxed{{{p.gold}}}", p.gold, "math")


def test_what_a_run_writes_of_its_test_problems_reads_as_the_same_problems():
    found = load_problems(with_answers(*SOLUTIONS))
    again = load_problems(with_answers(*map(problems.answer_of, found)))
    assert [p[2:] for p in again] == [p[2:] for p in found]


LEFT_OUT = {  # answer column: the reason
    "": "is empty", r"\boxed{}": "is empty", r"no end: \boxed{18": "is empty", "####": "is empty",
    "Tom": "is neither a number nor LaTeX", "12:30": "is neither a number nor LaTeX",
    "Add them.\nThat is 5^2 = 25, so 25.": r"has several lines without #### or \boxed{}",
    "x^2 + " * 100: "is longer than 400 characters",
    r"\boxed{" + "x + " * 120 + "1}": "is longer than 400 characters"}


@pytest.mark.parametrize("answer", LEFT_OUT)
def test_a_row_is_left_out_for_the_reason_that_is_said(answer, capsys):
    assert len(load_problems(with_answers("1", answer, "2"))) == 2
    said = capsys.readouterr().err
    assert f": left out 1 of 3 problems, 1 whose answer {LEFT_OUT[answer]}: " in said
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match="none of its 1 rows is a problem .* [(]1 whose answer "):
        load_problems(with_answers(answer))


def test_several_reasons_stand_on_one_line(capsys):
    load_problems(with_answers("1", *LEFT_OUT))
    said = capsys.readouterr().err
    assert said.startswith("mine.jsonl, test: left out 9 of 10 problems, 4 whose answer is empty: "
                           "'', '', ''; 2 whose answer is neither a number nor LaTeX: 'Tom', "
                           "'12:30'; 1 whose answer has several lines without ####")
    assert "; 2 whose answer is longer than 400 characters: 'x^2 + x^2 + " in said
    assert said.count("\n") == 1


# ------------------------------------------------------------------ columns

@pytest.mark.parametrize("columns, question, answer", [
    ("problem solution", "problem", "solution"), ("prompt answer", "prompt", "answer"),
    ("prompt solution level", "prompt", "solution"), ("problem answer solution", "problem",
                                                       "answer"),
    ("question solution problem", "question", "solution")])
def test_other_columns_are_taken_where_nothing_else_fits(columns, question, answer, capsys):
    row = {name: "9 + 9?" if name == question else "18" if name == answer else "no"
           for name in columns.split()}
    assert load_problems(write("mine.jsonl", row)) == [
        Problem("mine.jsonl/0", "9 + 9?", "18", "number")]
    assert capsys.readouterr().err == (f"mine.jsonl: the question is read from column {question}, "
                                       f"the answer from column {answer}\n")


def test_the_usual_columns_go_before_others_without_a_word(capsys):
    row = {"problem": "no", "question": "9 + 9?", "solution": "7", "answer": "18", "prompt": "no"}
    (found,) = load_problems(write("mine.jsonl", row))
    assert found.question == "9 + 9?" and found.gold == "18" and not capsys.readouterr().err


@pytest.mark.parametrize("columns, missing", [
    ("problem prompt answer", "question"), ("problem", "answer"), ("Question answer", "question"),
    ("instruction output", "question, answer")])
def test_columns_that_do_not_fit_are_refused(columns, missing):
    with pytest.raises(ValueError, match=f"mine.jsonl, line 1: no column {missing}; expected "
                                         f".* found {columns.replace(' ', ', ')}"):
        load_problems(write("mine.jsonl", dict.fromkeys(columns.split(), "1")))


# ------------------------------------------------------------------ CSV and parquet

def test_a_csv_file_is_read_as_it_stands():
    Path("mine.csv").write_bytes(
        "\ufeff,question,answer\r\n0,How many?,18\r\n1,\"two\nlines, 日本\",007\r\n"
        "2,c?,3.14159265358979323846\r\n3,d?,\"1,234\"\r\n\r\n4,e?,NA\r\n5,f?,\r\n".encode())
    found, dropped = read_problems("mine.csv")
    assert found == [Problem("mine.csv/0", "How many?", "18", "number"),
                     Problem("mine.csv/1", "two\nlines, 日本", "7", "number"),
                     Problem("mine.csv/2", "c?", "3.14159265358979323846", "number"),
                     Problem("mine.csv/3", "d?", "1234", "number")]
    assert dropped == [("mine.csv/4", "NA"), ("mine.csv/5", "")]


def parquet(name, columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), name)


def test_a_parquet_file_is_read_as_json_lines_are(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parquet("a [1]*.PARQUET", {"problem": ["a?", "b?", "c?"], "solution": [
        r"\boxed{18}", "#### 1/2", "Tom"]})
    assert read_problems("a [1]*.PARQUET") == (
        [Problem("a [1]*.PARQUET/0", "a?", "18", "number"),
         Problem("a [1]*.PARQUET/1", "b?", "1/2", "number")], [("a [1]*.PARQUET/2", "Tom")])
    parquet("numbers.parquet", {"question": ["a?", "b?"], "answer": [18.0, 2.5]})
    assert [p.gold for p in load_problems("numbers.parquet")] == ["18", "2.5"]


BAD = {
    "ragged.csv": (b"question,answer\na?,1\nb?,2,3\n", "line 3: .* more cells than the 2 columns"),
    "short.csv": (b"question,answer\na?,1\nb?\n", "line 3: column answer holds None"),
    "latin.csv": (b"question,answer\n\xe9?,1\n", "no row of a CSV file: .*utf-8"),
    "open.csv": (b'question,answer\n"a?,1\n', "no row of a CSV file: unexpected end of data"),
    "semicolon.csv": (b"question;answer\na?;1\n", "line 2: no column question, answer; expected "
                                                  "question and answer, found question;answer"),
    "empty.csv": (b"", "none of its 0 rows"), "head.csv": (b"question,answer\n", "none of its 0"),
    "empty.parquet": (b"", "no whole parquet file"),
    "cut.parquet": (b"PAR1\x00\x00", "no whole parquet file"),
    "text.parquet": (b'{"question": "a?", "answer": "1"}\n', "no whole parquet file")}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_with_its_name(name):
    content, message = BAD[name]
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name}.*{message}"):
        load_problems(name)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "none.jsonl"])
def test_a_table_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: no such file"):
        load_problems(name)


def test_null_in_a_parquet_file_is_refused_with_its_row():
    parquet("null.parquet", {"question": ["a?", "b?"], "answer": ["1", None]})
    with pytest.raises(ValueError, match="null.parquet, row 1: column answer holds None"):
        load_problems("null.parquet")


def test_a_run_trains_on_a_csv_file_and_evaluate_reads_what_it_left(capsys):
    lines = [f"What is {i} + 1?,{i + 1}" for i in range(40)]
    Path("mine.csv").write_text("\n".join(["prompt,answer", *lines, *lines]) + "\n")
    run("--data", "mine.csv", "--steps", "1", "--validate-every", "1")
    said = capsys.readouterr().err
    assert "mine.csv: the question is read from column prompt, the answer from column" in said
    assert "mine.csv: 40 of 80 problems repeat the question of another (0 of them with" in said
    held_out = "runs/tiny-pspo-s0/test.jsonl"
    sets, dropped = chosen_problems(SimpleNamespace(data=[held_out], split="test", limit=None))
    assert len(sets[held_out]) == 5 and not dropped


# ------------------------------------------------------------------ splits

def settings(data, n_validation=40, n_test=30):
    return SimpleNamespace(data=data, validation_problems=n_validation, test_problems=n_test,
                           prompts_per_step=8)


def spaced(question, draw):
    """The question with other white space, of the same words."""
    blanks = [" ", "  ", "\n", "\t", "\u00a0", "\u3000", " \r\n "]
    words = question.split()
    return draw.choice(["", *blanks]) + "".join(
        word + draw.choice(blanks) for word in words[:-1]) + words[-1] + draw.choice(["", *blanks])


@pytest.mark.parametrize("times", [1, 2, 3, 100])
@pytest.mark.parametrize("shuffled", [False, True])
def test_no_question_is_in_two_splits_of_a_file_whose_rows_repeat(times, shuffled, capsys):
    draw = random.Random(f"{times} {shuffled}")
    rows = [{"question": spaced(f"What is {i} + 1?", draw) if n else f"What is {i} + 1?",
             "answer": str(i + 1)} for n in range(times) for i in range(191)]
    if shuffled:
        draw.shuffle(rows)
    splits = split_problems(settings(write("mine.jsonl", *rows)))
    assert [len(split) for split in splits] == [121, 40, 30]
    questions = [" ".join(p.question.split()) for split in splits for p in split]
    assert len(set(questions)) == 191
    expected = (f"mine.jsonl: {191 * (times - 1)} of {191 * times} problems repeat the question of "
                "another (0 of them with another answer); the first one is used\n")
    assert capsys.readouterr().err == expected * (times > 1)
    if not shuffled:  # a file without repeats is split as it ever was, and this one is split so
        once = split_problems(settings(write("mine.jsonl", *rows[:191])))
        assert splits == once


def test_a_repeat_with_another_answer_is_counted_and_the_first_is_used(capsys):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(30)]
    wrong = [{"question": " 3  + 1?", "answer": "5"}, {"question": "4 + 1?", "answer": "5.0"}]
    splits = split_problems(settings(write("mine.jsonl", *rows, *wrong), 5, 5))
    assert "2 of 32 problems repeat the question of another (1 of them with another" in (
        capsys.readouterr().err)
    assert [p.gold for split in splits for p in split if p.question == "3 + 1?"] == ["4"]


def test_no_question_of_a_sets_test_or_validation_split_is_trained_on(monkeypatch, capsys):
    Path("tiny").mkdir()
    monkeypatch.setattr(problems, "TINY", Path("tiny"))

    def split(name, numbers):
        write(f"tiny/{name}.jsonl", *({"question": f" What  is {i}?", "answer": str(i)}
                                      for i in numbers))
    split("train", range(100))
    split("validation", range(80, 120))
    split("test", range(110, 150))
    train, validation, test = split_problems(settings("tiny", 20, 10))
    assert [p.gold for p in train] == [str(i) for i in range(80)]
    assert [p.gold for p in validation] == [str(i) for i in range(80, 100)]
    assert [p.gold for p in test] == [str(i) for i in range(110, 120)]
    assert "tiny: 30 of 180 problems repeat the question" in capsys.readouterr().err
    monkeypatch.setitem(SETS, "tiny", SETS["tiny"]._replace(splits=problems.TRAIN_AND_TEST))
    train, validation, test = split_problems(settings("tiny", 20, 10))
    split("test", range(90, 150))
    train, validation, test = split_problems(settings("tiny", 20, 10))
    assert len(validation) == 20 and len(train) == 70
    assert not {p.gold for p in (*train, *validation)} & {str(i) for i in range(90, 150)}


def test_the_embedded_splits_have_no_repeats_and_stay_as_they_are(capsys):
    train, validation, test = split_problems(settings("tiny", 100, 200))
    assert (train, validation, test) == tuple(map(
        load_problems, 3 * ["tiny"], ("train", "validation", "test")))
    assert not capsys.readouterr().err


def test_too_few_questions_are_refused_after_the_repeats_are_said(capsys):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(10)] * 100
    with pytest.raises(ValueError, match="mine.jsonl leaves 0 training problems beside"):
        split_problems(settings(write("mine.jsonl", *rows)))
    assert "990 of 1000 problems repeat" in capsys.readouterr().err
    assert read_rows("mine.jsonl") == rows

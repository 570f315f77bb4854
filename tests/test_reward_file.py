"""--reward mine.py: a run with a reward of one's own, resumed; each of its faults."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_parallel import torchrun
from test_train import ROOT, SMALL, assert_same_weights, in_empty_folder, metrics, run  # noqa: F401

import rewards
import train
from plumbing.files import read_rows, sha256
from plumbing.reward_file import load_reward_file

FOLDER = Path("runs/tiny-pspo-s0")
SHORT = """
from rewards import is_correct

def reward(text, gold, finished):
    return is_correct(text, gold, finished=finished) - len(text) / 1000
"""


def mine(source, name="mine.py"):
    Path(name).write_text(source)
    return ["--reward", name]


def refused(*flags):
    """The one line with which a run ends before it begins or after a step."""
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, *flags])
    said = str(stop.value.code)
    del stop  # its traceback would keep the lock of the run
    return said


# ------------------------------------------------------------------ a run

def test_a_run_with_a_reward_of_ones_own_is_that_reward():
    run(*mine(SHORT))
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["settings"]["reward"] == "mine.py"
    assert config["reward_sha256"] == sha256("mine.py")
    samples = read_rows(FOLDER / "samples.jsonl")
    assert len(samples) == 16 and len({row["reward"] for row in samples}) > 4
    for row in samples:
        assert row["reward"] == row["flexible"] - len(row["text"]) / 1000
    assert [row["step"] for row in metrics("tiny-pspo-s0")] == [0, 1, 2, 3, 4]
    assert rewards.reward("#### 18", "18", mode="mine.py") == 1 - 7 / 1000


def test_a_resumed_run_with_a_reward_of_ones_own_ends_with_the_same_bits():
    flags = [*mine(SHORT), "--threads", "1"]
    run("--name", "straight", *flags)
    run("--name", "halves", "--stop-after", "2", *flags)
    assert train.main(["--name", "halves", "--resume"]) == 0
    for folder in ("checkpoints/step_4", "best"):
        assert_same_weights(f"runs/straight/{folder}", f"runs/halves/{folder}")
    samples = [Path(f"runs/{name}/samples.jsonl").read_text() for name in ("straight", "halves")]
    assert samples[0] == samples[1]


def test_resuming_notices_a_changed_a_missing_and_another_file(capsys):
    run(*mine(SHORT), "--stop-after", "2")
    before = {p: p.read_bytes() for p in FOLDER.rglob("*") if p.is_file()}
    mine(SHORT.replace("1000", "2000"))  # as long as before, in the same second
    assert "--reward mine.py is not the file that runs/tiny-pspo-s0 began with; put it back" in (
        refused("--resume"))
    sha = re.search("reward_sha256, ([0-9a-f]{64})", refused("--resume"))[1]
    config = json.loads((FOLDER / "config.json").read_text())
    (FOLDER / "config.json").write_text(json.dumps(config | {"reward_sha256": sha}))
    assert train.main(["--model", "tiny", "--resume", "--stop-after", "3"]) == 0  # as told
    (FOLDER / "config.json").write_text(json.dumps(config))
    before = {p: p.read_bytes() for p in FOLDER.rglob("*") if p.is_file()}
    Path("mine.py").unlink()
    refused("--resume")
    assert "mine.py: no file that can be read (No such file" in capsys.readouterr().err
    refused("--resume", *mine(SHORT, "other.py"))
    assert "--reward was mine.py in runs/tiny-pspo-s0, now other.py" in capsys.readouterr().err
    refused("--resume", "--reward", "correct")
    assert "--reward was mine.py in runs/tiny-pspo-s0, now correct" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in FOLDER.rglob("*") if p.is_file()}
    mine(SHORT)
    assert train.main(["--model", "tiny", "--resume"]) == 0


@pytest.mark.slow
def test_a_reward_that_differs_between_processes_is_one_reward():
    # of each completion one process asks the file; the others take its word
    flags = mine("import os, random\n\ndef reward(text, gold, finished):\n"
                 "    open('asked', 'a').write('x')\n    return random.random() + os.getpid()\n")
    done = torchrun(2, ROOT / "train.py", *SMALL, *flags, "--threads", "1", "--steps", "3",
                    "--test-problems", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    # 4 · 4 completions a step; 5 · 2 of validation at step 0, 2 and 3
    assert len(Path("asked").read_text()) == 3 * 16 + 3 * 10
    assert metrics("tiny-pspo-s0")[-1]["equal_groups"] == 0


def test_a_file_may_be_named_as_a_file_of_the_project():
    Path("folder").mkdir()
    run(*mine("def reward(text, gold, finished=True):\n    return len(text)\n",
              "folder/rewards.py"), "--stop-after", "1")
    assert sys.modules["rewards"] is rewards
    assert read_rows(FOLDER / "samples.jsonl")[0]["reward"] > 1


# ------------------------------------------------------------------ its faults, before the run

BEFORE = {
    "no function": ("x = 1", "expected a function reward(text, gold, finished), found no function"),
    "no callable": ("reward = 1", "found no function"),
    "one argument": ("def reward(text): return 1.0", "found reward(text)"),
    "four arguments": ("def reward(question, text, gold, finished): return 1.0",
                       "found reward(question, text, gold, finished)"),
    "another order": ("def reward(gold, text, finished): return 1.0",
                      "found reward(gold, text, finished)"),
    "a fourth is needed": ("def reward(text, gold, finished, *, key): return 1.0",
                           "found reward(text, gold, finished, *, key)"),
    "no Python": ("def reward(text, gold, finished)\n    return 1.0",
                  "SyntaxError(\"expected ':'\") in mine.py, line 1"),
    "an import": ("import nothing_of_this_name", "ModuleNotFoundError(\"No module named 'nothing_"),
    "an error": ("x = 1\ny = x / 0", "ZeroDivisionError('division by zero') in mine.py, line 2"),
    "an exit": ("import sys\nsys.exit(0)", "SystemExit(0) in mine.py, line 2"),
    "no text": ("\0", "mine.py fails when it is imported")}


@pytest.mark.parametrize("name", BEFORE)
def test_a_file_that_holds_no_reward_is_refused_before_the_run(name, capsys):
    source, message = BEFORE[name]
    refused(*mine(source))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and "error: --reward mine.py" in said and not Path("runs").exists()


@pytest.mark.parametrize("value, message", [
    ("nothing.py", "--reward nothing.py: no file that can be read (No such file or directory); "
                   "expected a .py file with a function reward(text, gold, finished)"),
    ("folder.py", "--reward folder.py: no file that can be read (Is a directory)"),
    ("corect", "--reward is 'corect'; expected correct, paper, noise, or a .py file with a"),
    ("mine", "--reward is 'mine'; expected correct, paper, noise, or a .py file with a function")])
def test_what_is_no_file_is_refused(value, message, capsys):
    Path("folder.py").mkdir()
    refused("--reward", value)
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape(value)):
        rewards.reward("#### 1", "1", mode=value)


@pytest.mark.parametrize("source", [
    "def reward(text, gold, finished): return 1", "reward = lambda *a: 1",
    "def reward(completion, answer, done=True): return 1", "def reward(text, *rest): return 1",
    "class Reward:\n    def __call__(self, text, gold, finished): return 1\nreward = Reward()",
    "def reward(text, gold, finished, /, weight=1.0, **more): return weight",
    "from functools import partial\ndef f(text, gold, finished, n): return n\nreward = "
    "partial(f, n=1)",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n"
    "def reward(text, gold, finished): return A().x"])
def test_what_can_be_called_so_is_accepted(source):
    mine(source)
    load_reward_file("mine.py")
    assert rewards.reward("#### 1", "1", mode="mine.py") == 1.0


# ------------------------------------------------------------------ its faults, within the run

@pytest.mark.parametrize("expression, value", [
    ("1", 1.0), ("True", 1.0), ("-0.5", -0.5), ("Fraction(1, 2)", 0.5), ("Decimal('0.5')", 0.5),
    ("numpy.float32(0.5)", 0.5), ("torch.tensor(0.5)", 0.5)])
def test_every_number_is_a_reward(expression, value):
    mine("import numpy, torch\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
         f"def reward(text, gold, finished): return {expression}")
    load_reward_file("mine.py")
    found = rewards.reward("#### 1", "1", mode="mine.py")
    assert type(found) is float and found == value


@pytest.mark.parametrize("body, message", [
    ("return None", "the reward is None,"), ("return '1.0'", "the reward is '1.0',"),
    ("return float('nan')", "the reward is nan,"), ("return -1e999", "the reward is -inf,"),
    ("return [1.0]", r"the reward is \[1.0\],"), ("return 1j", "the reward is 1j,"),
    ("return 10**400", "grading raised OverflowError"),
    ("return text['x']", r"grading raised TypeError\(.* in mine.py, line 2 on"),
    ("return 1 / 0", r"grading raised ZeroDivisionError\('division by zero'\) in mine.py, line 2"),
    ("exit(3)", r"grading raised SystemExit\(3\) in mine.py, line 2 on"),
    ("async def a(): pass\n    return a()", "the reward is <coroutine object")])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_reward_that_fails_ends_the_run_and_says_where(body, message):
    run(*mine("def reward(text, gold, finished): return 0"), "--stop-after", "2")
    before = {p: p.read_bytes() for p in (FOLDER / "checkpoints").rglob("*") if p.is_file()}
    said = refused("--name", "fails", *mine(f"def reward(text, gold, finished):\n    {body}"),
                   "--validate-every", "100")
    assert re.search("error: step 1: " + message, said), said
    assert re.search(r"tiny/train/\d+, --reward mine.py, gold '\d+', completion '", said), said
    assert before == {p: p.read_bytes() for p in before}


def test_run_alone_it_gives_the_reward_of_what_is_typed():
    mine(SHORT)
    done = subprocess.run([sys.executable, "-m", "plumbing.reward_file", Path("mine.py").resolve(),
                           "#### 18", "18"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0.993\n", done.stderr

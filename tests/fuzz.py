"""Garbage in: completions through every scorer, mutated data files, configs and weights.

python tests/fuzz.py 100000 2000       completions, mutated files; exits 1 at what was not expected
"""
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.judge import read_marks, read_preference  # noqa: E402
from evaluation.style import style  # noqa: E402
from model import Qwen2  # noqa: E402
from plumbing.checkpoint import damage_of, save_checkpoint  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.problems import read_problems  # noqa: E402
from plumbing.settings import make_parser, read_settings  # noqa: E402
from rewards import (  # noqa: E402
    SCORERS,
    Problem,
    build_prompt,
    extract_answer,
    has_format,
    is_correct,
    reward,
)
from rollout import flat_batch  # noqa: E402

GOLDS = ["18", "-2.5", "1/3", "50%", "1,234", "0"]
LATEX = [r"\frac{14}{3}", r"x^2+1", r"(3,\frac{\pi}{2})"]
PIECES = [
    "0", "7", "42", "-", "+", ".", ",", "/", "%", "$", "#", "####", "#### ", "\n", " ", "=", "*",
    "e9", "e99", "1,000", "1" * 30, "\\frac{1}{2}", "\\boxed{", "}", "{", "\\(", "\\)", "^", "_",
    "\\sqrt", "\\left(", "!", "9^9^9", "x", "apples", "per cent", "?", "\x00", "\x1b[2J", "\r",
    "\u2028", "\u202e", "\ud800", "٣", "½", "−", "🙂", "<|im_start|>", "user\n", "nan", "inf", "\t",
    "__import__('os')", "\\input{/etc/passwd}", '{"overall": 5}', "None", "「", "```"]


def completion(draw):
    """A random text: pieces, sometimes one piece very often, sometimes bytes."""
    kind = draw.random()
    if kind < 0.02:
        return draw.choice(PIECES) * draw.randint(1, 5000)
    if kind < 0.1:
        return bytes(draw.randrange(256) for _ in range(draw.randint(0, 60))).decode("latin-1")
    text = "".join(draw.choices(PIECES, k=draw.randint(0, 25)))
    return text + "\n#### " + draw.choice(PIECES) if kind < 0.4 else text


def grade(text, gold, finished):
    """All that is said of a completion, but for what asks math-verify."""
    for scorer in SCORERS[:3]:
        assert type(is_correct(text, gold, scorer, finished=finished)) is bool
    assert type(has_format(text, gold, finished=finished)) is bool
    assert all(0 <= reward(text, gold, finished, mode, key=1) <= 1.05
               for mode in ("correct", "paper", "noise"))
    for kind in ("number", "latex"):
        answer = extract_answer(text, finished=finished, kind=kind)
        assert answer is None or type(answer) is str
    style(text)
    for read in (read_marks, read_preference):
        try:
            read(text)
        except ValueError:
            pass


def by_math(text, gold, finished):
    assert type(is_correct(text, gold, "math", finished=finished)) is bool


def fuzz_completions(n, how=grade, golds=tuple(GOLDS), seed=0):
    """(seconds of CPU time, text) of the completion that took longest to grade, the best of three
    times where one is the longest so far. The process that compares LaTeX is not counted: the
    system ends it after LATEX_LIMIT_S. Raises where one raises."""
    draw, slowest = random.Random(seed), (0.0, "")
    how("#### 1 + 1", golds[0], True)  # starts the process that knows LaTeX, where it is needed
    for _ in range(n):
        text = completion(draw)
        gold, finished = draw.choice(golds), draw.random() < 0.8
        seconds = math.inf
        for _ in range(3):
            began = time.process_time()
            try:
                how(text, gold, finished)
            except Exception as e:
                raise AssertionError(f"{text[:200]!r} raised {e!r}") from e
            seconds = min(seconds, time.process_time() - began)
            if seconds <= slowest[0]:
                break
        slowest = max(slowest, (seconds, repr(text[:80])))
    return slowest


ODD = [None, True, "", "x", -1, 0, 1.5, 1e308, 10**30, [], [1], {}, {"a": 1}, "\0", "9" * 5000]


def mutated(content, draw, as_json=False):
    """The bytes with a few flipped, cut out, doubled or replaced; or JSON with an odd value."""
    if as_json and draw.random() < 0.5:
        whole = within = json.loads(content)
        while isinstance(within, dict) and within:
            key = draw.choice(list(within))
            if not isinstance(within[key], dict) or not within[key] or draw.random() < 0.2:
                within[key] = draw.choice(ODD)
                break
            within = within[key]
        return json.dumps(whole).encode()
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        i = draw.randrange(len(content)) if content else 0
        j = min(len(content), i + draw.choice([1, 1, 3, 20, 300]))
        content[i:j] = draw.choice([
            b"", content[i:j] * 2, bytes([draw.randrange(256)]), b"null", b"-1", b"1e999", b'"',
            b"[" * 2000, b"{}", b"\xff\xfe", b"\\u0000", b"9" * 5000])
    return bytes(content)


MODEL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "model.safetensors", "model.safetensors.index.json"]
PROBLEM = Problem("fuzz/0", "How many?", "3", "number")


def load_data(path):
    read_problems(str(path))


def load_model(path):
    model = Qwen2.from_pretrained(path.parent)
    prompt = build_prompt(model.tokenizer, PROBLEM)
    assert prompt and all(0 <= i for i in prompt)
    if path.name == "config.json":  # one token through every layer
        model.completion_log_probs(flat_batch([prompt[:1]], [[[0]]]))


def load_run(path):
    """What --resume reads: the settings, and a checkpoint's sums."""
    if path.name == "checksums.json":
        wrong = damage_of(path.parent)
        if wrong:
            raise ValueError(f"{path}: {wrong}")
        return
    with redirect_stderr(StringIO()) as said:
        try:
            read_settings(["--resume", "--name", path.parent.name])
        except SystemExit as e:
            raise ValueError(said.getvalue()) from e


def fuzz_files(n, seed=0):
    """How many mutated files of each name loaded and how many were refused; raises for others.

    A refusal is a ValueError or OSError that names the file or its folder, of data also the line.
    """
    draw, counts, here = random.Random(seed), {}, os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        os.chdir(place)
        try:
            model, run = place / "model", place / "runs" / "run"
            shutil.copytree(ROOT / "tiny" / "model", model)
            (place / "data.jsonl").write_bytes(b"".join(
                (ROOT / "tiny" / "test.jsonl").read_bytes().splitlines(True)[:20]))
            saved = save_checkpoint(run, Qwen2.from_pretrained(model), {"step": 1}, keep=1)
            settings = vars(make_parser().parse_args(["--name", "run"]))
            write_json(run / "config.json", {"settings": settings})
            load = {place / "data.jsonl": load_data, run / "config.json": load_run,
                    saved / "checksums.json": load_run,
                    **{model / name: load_model for name in MODEL_FILES}}
            config = json.loads((model / "config.json").read_text())
            write_json(model / "config.json", {
                **config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
            write_json(model / "model.safetensors.index.json",
                       {"weight_map": {"model.norm.weight": "model.safetensors"}})
            whole = {path: path.read_bytes() for path in load}
            for _ in range(n):
                path = draw.choice(list(load))
                if path.suffix == ".json":
                    path.write_bytes(mutated(whole[path], draw, as_json=True))
                else:  # of the weights, the head with the names
                    path.write_bytes(mutated(whole[path][:4000], draw) + whole[path][4000:])
                try:
                    load[path](path)
                    result = "loaded"
                except (ValueError, OSError) as e:
                    result = "refused"
                    name = "model" if path.parent == model else path.name
                    assert name in str(e), f"{path.name}: {e!r}"
                    if name == "data.jsonl" and "no problem" not in str(e):
                        assert "line " in str(e), str(e)
                except Exception as e:
                    shutil.copy(path, tempfile.gettempdir())
                    raise AssertionError(f"{path.name} (see the temp folder) raised {e!r}") from e
                path.write_bytes(whole[path])
                parent = "place" if path.parent == place else path.parent.name
                key = f"{parent}/{path.name} {result}"
                counts[key] = counts.get(key, 0) + 1
        finally:
            os.chdir(here)
    return counts


def main():
    n_completions, n_files = int(sys.argv[1]), int(sys.argv[2])
    print("slowest:", *fuzz_completions(n_completions))
    print("slowest by math-verify:", *fuzz_completions(n_completions, by_math, (*GOLDS, *LATEX), 1))
    began = time.process_time()
    for text in ("9" * 10**6, "1+" * 5 * 10**5, "#### " * 2 * 10**5, "\\frac{" * 10**5, " " * 10**6,
                 "1,111," * 10**5, "$" * 10**6, "\\boxed{" * 10**5, "{" * 10**6):
        grade(text, "18", True)
        by_math(text, r"\frac{14}{3}", True)
    print(f"nine texts of about 1 MB: {time.process_time() - began:.2f} s of CPU time")
    print("files:", json.dumps(dict(sorted(fuzz_files(n_files).items())), indent=1))


if __name__ == "__main__":
    main()

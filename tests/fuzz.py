"""Garbage in: completions through every scorer, mutated data files, configs and weights.

python tests/fuzz.py 100000 2000       completions, mutated files; exits 1 at what was not expected
"""
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import style  # noqa: E402
from judge import read_marks, read_preference  # noqa: E402
from model import Qwen2, checked_config, read_json  # noqa: E402
from rewards import SCORERS, extract_answer, has_format, is_correct, read_problems, reward  # noqa: E402

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
        assert type(is_correct(text, gold, scorer, finished)) is bool
    assert type(has_format(text, finished, gold)) is bool
    assert all(0 <= reward(text, gold, finished, mode, key=1) <= 1.05
               for mode in ("correct", "paper", "noise"))
    for kind in ("number", "latex"):
        answer = extract_answer(text, "flexible", finished, kind)
        assert answer is None or type(answer) is str
    style(text)
    for read in (read_marks, read_preference):
        try:
            read(text)
        except ValueError:
            pass


def by_math(text, gold, finished):
    assert type(is_correct(text, gold, "math", finished)) is bool


def fuzz_completions(n, how=grade, golds=tuple(GOLDS), seed=0):
    """(seconds, text) of the completion that took longest to grade; raises where one raises."""
    draw, slowest = random.Random(seed), (0.0, "")
    how("#### 1 + 1", golds[0], True)  # starts the process that knows LaTeX, where it is needed
    for _ in range(n):
        text = completion(draw)
        began = time.perf_counter()
        try:
            how(text, draw.choice(golds), draw.random() < 0.8)
        except Exception as e:
            raise AssertionError(f"{text[:200]!r} raised {e!r}") from e
        slowest = max(slowest, (time.perf_counter() - began, repr(text[:80])))
    return slowest


def mutated(content, draw):
    """The bytes with a few flipped, cut out, doubled or replaced."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        i = draw.randrange(len(content)) if content else 0
        j = min(len(content), i + draw.choice([1, 1, 3, 20, 300]))
        content[i:j] = draw.choice([
            b"", content[i:j] * 2, bytes([draw.randrange(256)]), b"null", b"-1", b"1e999", b'"',
            b"[" * 2000, b"{}", b"\xff\xfe", b"\\u0000", b"9" * 5000])
    return bytes(content)


def fuzz_files(n, seed=0):
    """How many mutated files of each kind loaded and how many were refused; raises for others.

    A refusal is a ValueError or OSError that names the file.
    """
    draw, counts = random.Random(seed), {}
    problems = b"".join((ROOT / "tiny" / "test.jsonl").read_bytes().splitlines(True)[:20])
    config = (ROOT / "tiny" / "model" / "config.json").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        data, folder = Path(folder) / "data.jsonl", Path(folder) / "model"
        shutil.copytree(ROOT / "tiny" / "model", folder)
        weights = (folder / "model.safetensors").read_bytes()
        for i in range(n):
            kind = "weights" if i % 20 == 0 else "config" if i % 2 else "data"
            try:
                if kind == "data":
                    data.write_bytes(mutated(problems, draw))
                    read_problems(str(data))
                elif kind == "config":
                    (folder / "config.json").write_bytes(mutated(config, draw))
                    checked_config(read_json(folder / "config.json"))
                else:
                    (folder / "config.json").write_bytes(config)
                    head = mutated(weights[:4000], draw)
                    (folder / "model.safetensors").write_bytes(head + weights[4000:])
                    Qwen2.from_pretrained(folder)
                result = "loaded"
            except (ValueError, OSError) as e:
                assert str(e), kind
                assert "data.jsonl" in str(e) or kind != "data", str(e)
                assert "\n" not in str(e)[:60], str(e)
                result = "refused"
            counts[kind, result] = counts.get((kind, result), 0) + 1
    return counts


def main():
    n_completions, n_files = int(sys.argv[1]), int(sys.argv[2])
    print("slowest:", *fuzz_completions(n_completions))
    print("slowest by math-verify:", *fuzz_completions(n_completions, by_math, (*GOLDS, *LATEX), 1))
    began = time.perf_counter()
    for text in ("9" * 10**6, "1+" * 5 * 10**5, "#### " * 2 * 10**5, "\\frac{" * 10**5, " " * 10**6,
                 "1,111," * 10**5, "$" * 10**6, "\\boxed{" * 10**5, "{" * 10**6):
        grade(text, "18", True)
        by_math(text, r"\frac{14}{3}", True)
    print(f"nine texts of about 1 MB: {time.perf_counter() - began:.2f} s")
    print("files:", json.dumps({" ".join(k): v for k, v in sorted(fuzz_files(n_files).items())}))


if __name__ == "__main__":
    main()

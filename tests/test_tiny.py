"""The embedded default: problems that are right and apart, a tokenizer that others load."""
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import tiny.make as make
from model import Qwen2
from rewards import load_problems

TINY = Path(make.__file__).parent


def numbers(problem):
    """What tells two problems apart: the question without its name and the numbers in it."""
    return re.sub(r"^\w+ ", "", problem.question)


def test_no_problem_is_in_two_splits():
    splits = {split: load_problems("tiny", split) for split in ("train", "validation", "test")}
    assert [len(splits[s]) for s in ("validation", "test")] == [100, 200]
    assert len(splits["train"]) > 2000
    seen = [numbers(p) for problems in splits.values() for p in problems]
    assert len(seen) == len(set(seen))


def test_the_worked_solutions_are_right():
    for text in (TINY / "train.jsonl", TINY / "validation.jsonl", TINY / "test.jsonl"):
        for line in text.read_text().splitlines():
            steps, _, gold = make.json.loads(line)["answer"].rpartition("\n#### ")
            for step in steps.split("\n"):
                a, sign, b, c = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
                value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
                assert value == int(c)
            assert c == gold
    # by hand: 3 boxes of 4 pens and 5 more are 12 + 5 = 17; 2 − 3 − … goes below 1
    assert make.solve(0, 3, 4, 5) == "3*4=12\n12+5=17\n#### 17"
    assert make.solve(5, 2, 3, 4) is None


def test_the_tokenizer_loads_through_transformers_and_gives_text_back():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    for text in ("Tom has 3 apples.\n#### 17", "  two  spaces ", "naïve – 日本"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    assert len(tokenizer) == Qwen2.from_pretrained("tiny").config["vocab_size"] == 259
    assert tokenizer("<|user|>x<|endoftext|>")["input_ids"] == [1, 90, 0]


def test_all_of_it_stays_within_three_megabytes():
    files = [p for p in TINY.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 3e6


@pytest.mark.slow
def test_making_it_is_repeatable_byte_for_byte(tmp_path, monkeypatch):
    # The real recipe takes minutes; three steps of each stage go through the same code.
    monkeypatch.setattr(make, "STAGES", ((3, 3e-3, 0.0), (3, 5e-4, 0.5)))
    threads = torch.get_num_threads()
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["make", "--out", str(tmp_path / name)])
        make.main()
    torch.set_num_threads(threads)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) >= 8
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        if file.suffix == ".jsonl":  # and the problems are the committed ones
            assert (tmp_path / "one" / file).read_bytes() == (TINY / file).read_bytes()

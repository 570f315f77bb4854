"""evaluate.py: pass@k, the table, and agreement with the test at the end of training."""
import itertools
import json
from pathlib import Path

import pytest

import evaluate
from model import Qwen2
from rewards import load_problems


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_pass_at_k_by_hand_and_by_counting():
    # 4 samples, 1 correct, 2 drawn: of the 6 pairs 3 hold it
    assert evaluate.pass_at_k(4, 1, 2) == 0.5
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
                expected = sum(any(draw) for draw in draws) / len(draws)
                assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected 0 ≤ c ≤ n"):
        evaluate.pass_at_k(4, 5, 1)


def row(problem, flexible, **others):
    return {"problem": problem, "strict": False, "flexible": flexible, "format": True,
            "finished": True, "n_tokens": 10, **others}


def test_the_summary_by_hand():
    # two problems, two samples: one of two right, none right
    rows = [row("a", True), row("a", False, n_tokens=20), row("b", False, finished=False),
            row("b", False, format=False)]
    found = evaluate.summarise(rows, 2)
    assert found == {"n_problems": 2, "samples": 2, "strict": 0.0, "flexible": 0.25,
                     "format": 0.75, "truncated": 0.25, "mean_tokens": 12.5, "pass@1": 0.25,
                     "pass@2": 0.5}


def test_one_table_for_two_models_and_everything_is_written(capsys):
    Qwen2.from_pretrained("tiny").save_pretrained("copy")
    evaluate.main(["tiny", "copy", "--data", "tiny", "--temperature", "0", "0.8", "--samples", "4",
                   "--limit", "6", "--out", "out"])
    results = json.loads(Path("out/results.json").read_text())["results"]
    assert [(r["model"], r["temperature"], r["samples"]) for r in results] == [
        ("tiny", 0.0, 1), ("tiny", 0.8, 4), ("copy", 0.0, 1), ("copy", 0.8, 4)]
    numbers = [{k: v for k, v in r.items() if k != "model"} for r in results]
    assert numbers[:2] == numbers[2:]  # the same weights give the same answers
    assert results[1]["pass@1"] == pytest.approx(results[1]["flexible"])
    completions = Path("out/completions.jsonl").read_text().splitlines()
    assert len(completions) == 2 * (6 + 24)
    table = Path("out/results.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    assert table.splitlines()[0].split() == ("| model | data | n | T | samples | strict | flexible "
                                             "| format | cut | tokens | pass@1 | pass@2 | pass@4 |"
                                             ).split()
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_batches_change_no_answer():
    model, problems = Qwen2.from_pretrained("tiny"), load_problems("tiny")[:12]
    for temperature in (0.0, 1.0):
        rows = [evaluate.answer(model, problems, 3, temperature, max_rows=n, progress=None)
                for n in (3, 256)]
        assert rows[0] == rows[1]


def test_what_leaves_no_room_or_exists_is_refused(capsys):
    with pytest.raises(SystemExit, match="longest prompt has .* tokens; the model's context"):
        Path("long.jsonl").write_text(json.dumps({"question": "x" * 300, "answer": "1"}))
        evaluate.main(["tiny", "--data", "long.jsonl", "--out", "a"])
    Path("exists").mkdir()
    for flags, message in ((["--out", "exists"], "exists; name a new folder"),
                           (["--temperature", "-1"], "--temperature is -1.0; expected 0"),
                           (["--samples", "0"], "expect 1 or more"),
                           (["--sample", "3"], "unrecognized arguments")):
        with pytest.raises(SystemExit):
            evaluate.main(["tiny", "--data", "tiny", *flags])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="neither a model folder here nor"):
        evaluate.main(["no/such/model", "--data", "tiny", "--out", "b"])

"""experiments/: every cell parses, a run leaves its row, tables and figures say what rows say."""
import json
import os
import statistics
from types import SimpleNamespace

import pytest

from experiments import __main__ as entry
from experiments import cells
from experiments.replay import distances, first_difference, trained
from experiments.run import run_cell
from settings import read_settings

SMALL = ("--steps 2 --validate-every 2 --prompts-per-step 4 --group-size 4 --minibatches 2 "
         "--validation-problems 4")


def test_every_cell_is_a_run_that_train_would_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, experiment in cells.EXPERIMENTS.items():
        for label, flags in experiment.items():
            s, _ = read_settings([*cells.BASE.split(), *flags.split()])
            assert s.threads == 1 and s.steps in (100, 200), (name, label)
    stress = cells.EXPERIMENTS["stress"]
    assert len(set(stress.values())) == len(stress) == len(cells.ARMS)


def test_every_arm_of_an_experiment_makes_as_many_optimizer_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mild", "stress"):
        counts = set()
        for flags in cells.EXPERIMENTS[name].values():
            s, _ = read_settings([*cells.BASE.split(), *flags.split()])
            counts.add(s.steps * s.epochs * s.minibatches)
        assert len(counts) == 1, (name, counts)


def test_a_run_leaves_its_row_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = run_cell((SMALL, 3))
    assert row == run_cell((SMALL, 3)) | {"cpu_seconds": row["cpu_seconds"]}  # CPU: bit for bit
    assert row["flags"] == SMALL and row["seed"] == 3 and row["failed"] is None
    assert 0 <= row["test_strict"] <= 1 and row["optimizer_steps"] == 8 and row["kl_old_new"] > 0
    assert [step for step, _ in row["validation"]] == [0, 2]
    assert os.listdir() == [] and json.loads(json.dumps(row)) == row


def test_a_replay_repeats_a_run_and_names_where_another_leaves_it():
    import torch
    torch.set_num_threads(1)
    flags = SMALL + " --learning-rate 1e-3 --max-grad-norm 1e9"
    weights, rollouts = trained(f"--alpha 0 {flags}")
    assert sorted(weights) == [0, 1, 2]
    again, _ = trained(f"--objective noclip {flags}", rollouts)  # α = 0 is noclip
    assert distances(weights, again) == {1: 0.0, 2: 0.0}
    other, _ = trained(f"--alpha 0.5 {flags}", rollouts)
    assert all(0 < x < 0.1 for x in distances(weights, other).values())  # AdamW
    sgd = flags + " --optimizer sgd --epochs 1 --minibatches 1 --stop-after 1"
    full, rollouts = trained(f"--alpha 0 {sgd}")
    half, _ = trained(f"--alpha 0.5 {sgd}", rollouts)
    # one step of SGD, half as long: half of the way is missing
    assert distances(full, half)[1] == pytest.approx(0.5, abs=1e-3)
    a, b = (SimpleNamespace(completions=x) for x in ([[1, 2], [3]], [[1, 2], [3, 4]]))
    assert first_difference([(a, 0), (a, 0)], [(a, 0), (b, 0)]) == (2, 2, 2)
    assert first_difference([(a, 0)], [(a, 0)]) is None


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(entry, "EXPERIMENTS", {"one": {"arm": SMALL}})
    monkeypatch.setattr(entry, "SEEDS", range(2))
    (tmp_path / "results.jsonl").write_text(json.dumps({"flags": SMALL, "seed": 0}) + "\n")
    entry.run_missing(["one"], 1)
    assert [row["seed"] for row in entry.recorded()] == [0, 1]


def test_tables_and_figures_say_what_the_rows_say(tmp_path):
    x = [0.5, 0.6, 0.7]
    rows = [{"flags": "a", "seed": seed, "test_strict": value, "kl_old_new": 0.5,
             "clip_removed": 0.25, "gradient_norm": 2.0} for seed, value in enumerate(x)]
    # sd 0.1; the interval of three runs: 0.6 ± 4.3027·0.1/√3 = 0.3516 … 0.8484
    assert statistics.stdev(x) == pytest.approx(0.1)
    text = entry.table(rows, {"A": "a", "B": "b"})
    assert "| A | 3 | 60.0% ± 10.0% [35.2%, 84.8%] | 5.0e-01 | 25.0% | 2.00 |" in text
    assert "| B | 0 | – |" in text
    entry.draw_bars(rows, {"A": "a", "B": "b"}, tmp_path / "bars.png", "bars")
    grid = {f"A | {epochs} | {times}": "a" for epochs in (1, 2) for times in (1, 10)}
    entry.draw_reuse(rows, grid, tmp_path / "reuse.png")
    for name in ("bars.png", "reuse.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"

"""bench/ stays runnable: one tiny round of every command, without the peers."""
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = ["--rounds", "1", "--prompts", "2", "--group-size", "2", "--new-tokens", "4",
         "--threads", "2"]


@pytest.mark.parametrize("command", ["step", *(
    pytest.param(command, marks=pytest.mark.slow) for command in ("update", "memory"))])
def test_a_tiny_round(tmp_path, command):
    small = SMALL + ["--head-tokens", "256"] * (command == "memory")
    done = subprocess.run([sys.executable, "-m", "bench", command, *small, "--out", tmp_path],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (table,), (data,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert table.read_text() in done.stdout
    found = json.loads(data.read_text())
    assert found["command"].startswith(f"python -m bench {command}") and found["device"]


def test_the_acceptance_of_a_gpu_goes_through_every_part_without_one(tmp_path):
    done = subprocess.run([sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--quick",
                           "--threads", "2", "--out", tmp_path], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    n_claims = 9 + bool(importlib.util.find_spec("bitsandbytes"))
    assert len(found["claims"]) == n_claims and all(held for _, held in found["claims"])
    assert (tmp_path / "gpu-cpu.md").read_text().rpartition("\n\n")[0] in done.stdout
    measured = " ".join(measure for measure, _ in found["measures"])
    for words in ("pytest", "sampler_gap_p99", "decode, 8 rows", "update, 2 × 2 × 8", "step, 2 ×",
                  "0.8m within 23 GiB"):
        assert words in measured


def test_a_part_that_fails_leaves_the_others_results_and_an_exit_code(tmp_path, monkeypatch):
    from bench import __main__ as bench
    from bench import gpu

    def good(args, size, claim):
        """Good"""
        claim("two is even", True)
        yield "two", "2"

    def bad(args, size, claim):
        """Bad"""
        yield "three", "3"
        raise RuntimeError("no room")
    for parts, code in (((good, good), 0), ((good, bad, good), 1)):
        monkeypatch.setattr(gpu, "PARTS", parts)
        with pytest.raises(SystemExit) as end:
            bench.main(["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)])
        assert end.value.code == code
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert [value for _, value in found["measures"][1:]] == ["2", "3", "2"]
    assert ["bad runs (RuntimeError: no room)", False] in found["claims"]
    with pytest.raises(SystemExit):  # nothing is begun after the limit, and that is no success
        bench.main(["gpu", "--device", "cpu", "--quick", "--limit-s", "0", "--out", str(tmp_path)])
    assert "left out" in (tmp_path / "gpu-cpu.md").read_text()


def test_given_lengths_are_kept_by_ours():
    from bench import ours
    model = ours.make_model("0.8m")
    s = ours.settings(group_size=2, max_new_tokens=30, rollout_rows=4)
    prompts, lengths = ours.make_prompts(4, 96), [3, 30, 8, 1, 17, 2, 5, 9]
    result = ours.sampling(ours.make_run(model, s), prompts, s, lengths)
    assert [len(ids) for group in result.completions for ids in group] == lengths


def test_rows_wait_where_every_place_for_a_prompt_is_taken():
    from bench import ours
    model = ours.make_model("0.8m")
    s = ours.settings(group_size=4, max_new_tokens=40, rollout_rows=4)
    prompts, lengths = ours.make_prompts(6, 96), [40, 1, 1, 1] * 6  # one of each group stays long
    result = ours.sampling(ours.make_run(model, s), prompts, s, lengths)
    assert [len(ids) for group in result.completions for ids in group] == lengths


@pytest.mark.parametrize("flags, message", [
    (["--device", "cuda"], "torch finds no GPU"), (["--peers", "vllm"], "expected hf, trl")])
def test_what_cannot_run_is_said(flags, message, monkeypatch, capsys):
    import torch

    from bench import __main__ as bench
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["step", *flags])
    assert message in capsys.readouterr().err

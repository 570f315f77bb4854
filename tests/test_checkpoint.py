"""plumbing/checkpoint.py: kills, damage, full disks, locks; nothing lost."""
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill import kill_and_compare
from test_train import ROOT, SMALL, in_empty_folder, metrics, run  # noqa: F401

import train
from model import Qwen2
from plumbing import checkpoint
from plumbing.files import read_rows
from plumbing.settings import read_settings

FOLDER = Path("runs/tiny-pspo-s0")


def test_a_killed_run_ends_as_if_it_had_not_been():
    said = []
    assert kill_and_compare(1, seed=5, say=said.append) == 0, said
    assert " killed " in said[0] and "step_" in said[0], said  # in its middle, not before or after


def resume(*flags):
    return train.main(["--model", "tiny", "--resume", *flags])


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:len(content) // 2])
    else:  # one bit
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])


@pytest.mark.slow
def test_damage_to_any_file_is_named_and_the_checkpoint_before_it_is_used(capsys):
    run("--steps", "6", "--stop-after", "4")
    whole = {p.name: p.read_bytes() for p in (FOLDER / "checkpoints/step_4").iterdir()}
    shutil.copytree("runs", "saved")
    assert resume() == 0
    expected = (FOLDER / "checkpoints/step_6/model.safetensors").read_bytes()
    assert {"model.safetensors", "trainer.pt", "config.json", "checksums.json"} <= whole.keys()
    for i, name in enumerate(whole):
        for how in ("missing", "cut", "flipped"):
            shutil.rmtree("runs")
            shutil.copytree("saved", "runs")
            damage(FOLDER / "checkpoints/step_4" / name, how)
            before = {p: p.read_bytes() for p in (FOLDER / "checkpoints/step_4").iterdir()}
            found = checkpoint.newest_undamaged(FOLDER)
            said = capsys.readouterr().err
            assert found.name == "step_2" and "step_4 is damaged" in said, (name, how)
            assert name in said or name == "checksums.json"  # which accuses another
            assert before == {p: p.read_bytes() for p in before}  # nothing deleted
            if how == "flipped" and i % 3 == 0:
                assert resume() == 0
                assert (FOLDER / "checkpoints/step_6/model.safetensors").read_bytes() == expected
                assert [row["step"] for row in metrics("tiny-pspo-s0")] == list(range(7))
    for path in checkpoint.checkpoints(FOLDER):
        (path / "checksums.json").write_text("[]")
    with pytest.raises(SystemExit, match="every checkpoint of runs/tiny-pspo-s0 is damaged"):
        resume()
    assert checkpoint.checkpoints(FOLDER)  # still there


def test_the_best_weights_of_a_lost_step_are_kept(capsys):
    run("--steps", "6", "--stop-after", "4")
    weights = (FOLDER / "best/model.safetensors").read_bytes()
    damage(FOLDER / "checkpoints/step_4/trainer.pt", "flipped")
    assert resume() == 0
    assert "it is kept as runs/tiny-pspo-s0/best.1" in capsys.readouterr().err
    assert (FOLDER / "best.1/model.safetensors").read_bytes() == weights


def test_the_best_weights_stay_where_the_lost_step_had_not_improved_on_them(monkeypatch):
    rewards = itertools.chain([0.1, 0.9], itertools.repeat(0.5))  # after 0, 2, 4, … steps
    monkeypatch.setattr(train, "validate", lambda run, s: {
        "validation_reward": next(rewards), "validation_accuracy": 0.0})
    run("--steps", "8", "--stop-after", "6")
    best = (FOLDER / "best/model.safetensors").read_bytes()
    assert [p.name for p in checkpoint.checkpoints(FOLDER)] == ["step_4", "step_6"]
    damage(FOLDER / "checkpoints/step_6/trainer.pt", "flipped")
    assert resume("--stop-after", "5") == 0  # copied once
    assert resume() == 0 and not (FOLDER / "best.2").exists() and (FOLDER / "test.json").exists()
    assert (FOLDER / "best/model.safetensors").read_bytes() == best


def test_without_its_checkpoints_a_run_begins_again_and_loses_nothing(capsys):
    run("--stop-after", "2")
    before = {p.name: p.read_bytes() for p in FOLDER.glob("*.jsonl") if p.name != "test.jsonl"}
    weights = (FOLDER / "best/model.safetensors").read_bytes()
    shutil.rmtree(FOLDER / "checkpoints")
    assert resume("--stop-after", "1") == 0
    assert "is kept as runs/tiny-pspo-s0/metrics.jsonl.1" in capsys.readouterr().err
    assert before == {p.name[:-2]: p.read_bytes() for p in FOLDER.glob("*.jsonl.1")}
    assert (FOLDER / "best.1/model.safetensors").read_bytes() == weights


def test_other_problems_are_refused_on_resume():
    lines = (ROOT / "tiny/test.jsonl").read_text().splitlines(True)
    Path("mine.jsonl").write_text("".join(lines[:40]))
    run("--data", "mine.jsonl", "--stop-after", "2")
    Path("mine.jsonl").write_text("".join(lines[1:41]))
    with pytest.raises(SystemExit, match="does not hold the problems that runs/tiny-pspo-s0 began"):
        resume()
    Path("mine.jsonl").write_text("".join(lines[:40]))
    shutil.rmtree(FOLDER / "best")  # noticed at the end: the training is not lost
    assert resume("--stop-after", "3") == 0


def test_a_resumed_run_may_be_fitted_to_the_machine(monkeypatch):
    run("--stop-after", "2", "--threads", "1")
    assert resume("--tokens-per-microbatch", "500", "--checkpoint-activations", "--rollout-rows",
                  "8", "--threads", "2") == 0
    assert metrics("tiny-pspo-s0")[-1]["step"] == 4
    saved = json.loads((FOLDER / "config.json").read_text())
    for value in (True, False):  # whether it was sharded is remembered, where that can be
        saved["settings"]["fsdp"] = value
        (FOLDER / "config.json").write_text(json.dumps(saved))
        assert read_settings(["--model", "tiny", "--resume"])[0].fsdp is False
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert read_settings(["--model", "tiny", "--resume"])[0].fsdp is value
        assert read_settings(["--model", "tiny", "--resume", "--fsdp"])[0].fsdp is True
        monkeypatch.delenv("WORLD_SIZE")


def test_a_run_without_a_checkpoint_begins_again():
    run()
    expected = metrics("tiny-pspo-s0")
    shutil.rmtree(FOLDER / "checkpoints")
    shutil.rmtree(FOLDER / "best")
    assert resume() == 0
    repeatable = [[{k: v for k, v in row.items() if not k.endswith(("_s", "_gib"))} for row in rows]
                  for rows in (expected, metrics("tiny-pspo-s0"))]
    assert repeatable[0] == repeatable[1]


def test_a_full_disk_keeps_what_is_there(monkeypatch):
    run("--stop-after", "2")
    before = {p: p.read_bytes() for p in (FOLDER / "checkpoints").rglob("*") if p.is_file()}
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match=(
            r"cannot write .*step_4: it needs 0.010 GiB, 0.000 GiB are free\n"
            r"last checkpoint: .*step_2; go on with --resume")):
        patched.setattr(checkpoint, "free_bytes", lambda folder: 1000)
        resume()
    assert before == {p: p.read_bytes() for p in (FOLDER / "checkpoints").rglob("*") if p.is_file()}


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="mounts a small tmpfs: Linux")
def test_a_disk_that_fills_while_writing_keeps_what_is_there(tmp_path):
    model = Qwen2.from_pretrained("tiny")
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        checkpoint.save_checkpoint(disk, model, {"step": 1}, keep=2)
        before = {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
        checkpoint_free, checkpoint.free_bytes = checkpoint.free_bytes, lambda folder: 10**12
        try:
            for trainer, free in ({"step": 2}, 10**6), ({"step": 3, "x": torch.zeros(10**6)},
                                                       4 * 10**6):
                (disk / "filler").unlink(missing_ok=True)
                (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))
                before[disk / "filler"] = (disk / "filler").read_bytes()
                with pytest.raises(OSError, match=f"cannot write .*step_{trainer['step']}: "):
                    checkpoint.save_checkpoint(disk, model, trainer, keep=2)
                assert before == {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
        finally:
            checkpoint.free_bytes = checkpoint_free
        assert checkpoint.newest_undamaged(disk).name == "step_1"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import transformers, matplotlib.pyplot, train
begin = train.begin
def limited(*arguments):
    run = begin(*arguments)
    size = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * 2**20,) * 2)
    return run
train.begin = limited
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory: Linux")
@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [5, 80])
def test_too_little_memory_is_said_and_costs_no_checkpoint(megabytes):
    run("--steps", "4", "--stop-after", "2", "--prompts-per-step", "16", "--group-size", "32",
        "--minibatches", "1", "--tokens-per-microbatch", "1000000", "--rollout-rows", "512",
        "--validate-every", "50")
    before = {p: p.read_bytes() for p in (FOLDER / "checkpoints").rglob("*") if p.is_file()}
    # 80 MB more than at the start end in the update, 5 in the sampler
    done = subprocess.run([sys.executable, "-c", LIMITED.format(root=str(ROOT)), str(megabytes),
                           "--model", "tiny", "--resume"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "error: step 3: out of memory" in done.stderr and "tried to alloc" in done.stderr
    assert "lower --tokens-per-microbatch (now 1000000) or --rollout-rows" in done.stderr
    assert before == {p: p.read_bytes() for p in (FOLDER / "checkpoints").rglob("*")
                      if p.is_file()}


@pytest.mark.slow
def test_two_runs_of_one_name_do_not_mix(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "2", "--name", "both"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    ends = [(p.communicate(timeout=900), p.returncode) for p in both]
    assert sorted(code for _, code in ends) in ([0, 1], [0, 2]), ends
    (loser,) = [err for (_, err), code in ends if code]
    assert "in use by another process" in loser or "exists; continue it" in loser \
        or "was begun by another process" in loser
    assert [row["step"] for row in metrics("both")] == [0, 1, 2]


@pytest.mark.parametrize("folder", ["read-only", "a file"])
def test_a_place_that_cannot_be_written_is_one_line(folder, tmp_path):
    if folder == "a file":
        Path("runs").write_text("x")
    else:
        Path("runs").mkdir()
        Path("runs").chmod(0o555)
        try:
            Path("runs/x").mkdir()
            pytest.skip("this user may write anywhere")
        except PermissionError:
            pass
    with pytest.raises(SystemExit, match="^error: .*runs"):
        run()


def test_names_with_spaces_and_letters_of_all_kinds():
    run("--name", "größe α 1", "--stop-after", "2")
    assert train.main(["--model", "tiny", "--name", "größe α 1", "--resume"]) == 0
    assert metrics("größe α 1")[-1]["step"] == 4


def test_rows_are_cut_back_and_damaged_lines_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"step": i}) for i in range(4)]
    rows = [lines[0], "garbage", lines[1], "[]", lines[2], lines[3][:5]]
    path.write_bytes("\n".join(rows).encode() + b"\xff")
    checkpoint.cut_rows(path, 1)
    assert read_rows(path) == [{"step": 0}, {"step": 1}]


def test_an_unfinished_folder_is_no_checkpoint_and_goes_away(tmp_path):
    model = Qwen2.from_pretrained("tiny")
    for name in ("step_9.partial", "step_3.old.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.checkpoints(tmp_path) == [] and checkpoint.newest_undamaged(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, model, {"step": step}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_3"]
    for step in (2, 3):
        damage(tmp_path / f"checkpoints/step_{step}/trainer.pt", "cut")
    checkpoint.save_checkpoint(tmp_path, model, {"step": 1}, keep=1)  # resumed from before them
    assert checkpoint.newest_undamaged(tmp_path).name == "step_1"

"""Several processes by torchrun, gloo on the CPU: the same run as one process makes."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train as train_script
from plumbing.files import read_rows
from plumbing.settings import read_settings

ROOT = Path(train_script.__file__).resolve().parent
SMALL = ["--model", "tiny", "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--steps", "5",
         "--prompts-per-step", "6", "--group-size", "4", "--minibatches", "2", "--validate-every",
         "5", "--validation-problems", "7", "--test-problems", "0", "--learning-rate", "1e-4"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def torchrun(n, *arguments, timeout=900):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n),
               "--standalone", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def train(n, name, *flags):
    if n == 1:
        assert train_script.train(*read_settings([*SMALL, "--name", name, *flags])) == 0
        return rows(name, "metrics")
    done = torchrun(n, ROOT / "train.py", *SMALL, "--name", name, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(name, "metrics")


def rows(name, kind):
    return read_rows(Path(f"runs/{name}/{kind}.jsonl"))


def texts(name):
    return [row["text"] for row in rows(name, "samples")]


def assert_alike(name, expected, found):
    other = [sum(a != b for a, b in zip(texts("one"), texts(name), strict=True)), len(texts(name))]
    print(f"{name}: {other[0]} of {other[1]} recorded completions differ")
    for one, many in zip(expected, found, strict=True):
        assert one.keys() - many.keys() <= {"noise_floor_0.1", "noise_floor_0.2"}
        for key, value in many.items():
            if not key.endswith(("_s", "_per_s", "_gib")):
                assert value == pytest.approx(one[key], abs=1e-5, rel=1e-4), (one["step"], key)
    weights = [load_file(f"runs/{n}/checkpoints/step_5/model.safetensors") for n in ("one", name)]
    start = load_file(ROOT / "tiny/model/model.safetensors")
    for key, x in weights[0].items():
        assert (x - weights[1][key]).abs().max() < 1e-5, key
        assert (x - start[key]).abs().max() > 1e-5, key  # or equality says little


@pytest.mark.parametrize("flags, numbers", [
    ([], (2,)), pytest.param([], (4,), marks=pytest.mark.slow),
    pytest.param(["--objective", "clip", "--beta", "0.1"], (), marks=pytest.mark.slow)],
    ids=["two", "four", "clip, beta"])
def test_one_two_and_four_processes_make_the_same_run(flags, numbers):
    expected = train(1, "one", *flags)
    for n in numbers:  # with four, two have one group a step and two have two; minibatches of three
        assert_alike(f"n{n}", expected, train(n, f"n{n}", *flags))
    assert_alike("sharded", expected, train(2, "sharded", *flags, "--fsdp",  # one group a pass:
                                            "--tokens-per-microbatch", "1"))  # some are idle


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_sharded_or_not():
    expected = train(1, "one")
    train(2, "mixed", "--stop-after", "2", "--fsdp", "--checkpoint-activations")
    for n, *flags in (3, "--stop-after", "3"), (2, "--fsdp"):
        done = torchrun(n, ROOT / "train.py", "--model", "tiny", "--name", "mixed", "--resume",
                        *flags)
        assert done.returncode == 0, done.stderr
    assert_alike("mixed", expected, rows("mixed", "metrics"))


def test_sharding_needs_several_processes(capsys):
    with pytest.raises(SystemExit):
        train_script.main(["--model", "tiny", "--fsdp"])
    assert "start them with torchrun" in capsys.readouterr().err


LOPSIDED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, train
from plumbing import parallel
from plumbing.metrics import update_metrics
from test_train import made_up_rollout, settings
from model import Qwen2
from types import SimpleNamespace
parallel.start("cpu")
s = settings(minibatches=2, fsdp={fsdp})
results = []
for equal in ([], [0], [1], [0, 1], [2, 3], [0, 2], [0, 1, 2, 3]):
    policy = model = Qwen2.from_pretrained("tiny")
    if s.fsdp:
        policy = parallel.shard(model, "cpu").for_sampling()
    rollout, advantage_PG = made_up_rollout()  # four groups, so two a minibatch
    advantage_PG[equal] = 0.0
    if 1 in equal:  # and completions of one token
        rollout.completions[1] = [ids[:1] for ids in rollout.completions[1]]
        rollout.logps[1] = [x[:1] for x in rollout.logps[1]]
    run = SimpleNamespace(model=model, policy=policy, reference=None, state=dict(optimizer_steps=0,
                          skipped_steps=0), optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    minibatches = train.lay_out(rollout, advantage_PG, s, "cpu")
    seen = train.remember_old_policy(run, minibatches, s)
    train.update(run, minibatches, s, seen)
    update_metrics(run, minibatches, s, seen, dict(old_logp_s=1, update_s=1))
    results.append((run.state, [p.detach().clone() for p in policy.parameters()]))
torch.save(results, f"{{parallel.n_processes()}}-{{parallel.rank()}}.pt")
parallel.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("others, files", [
    ((2, True), ("2-0", "2-1")), ((3, False), ("3-0", "3-1", "3-2"))], ids=str)
def test_a_process_with_nothing_to_train_neither_hangs_nor_skews(others, files):
    for n, fsdp in ((1, False), others):
        Path("lopsided.py").write_text(LOPSIDED.format(root=str(ROOT), fsdp=fsdp))
        done = torchrun(n, "lopsided.py")
        assert done.returncode == 0, done.stderr
    expected = torch.load("1-0.pt")
    assert [state["skipped_steps"] for state, _ in expected] == [0, 0, 0, 2, 2, 0, 4]
    for name in files:
        for (state, weights), (other, theirs) in zip(expected, torch.load(f"{name}.pt")):
            assert state == other
            assert max((a - b).abs().max() for a, b in zip(weights, theirs)) < 1e-5, name


@pytest.mark.slow
def test_when_one_process_dies_the_others_end_with_a_message():
    Path("dies.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from plumbing import parallel
real = train.reward
calls = []
def reward(*a, **k):
    calls.append(1)
    if parallel.rank() == 1 and len(calls) > 40:
        os._exit(9)
    return real(*a, **k)
train.reward = reward
sys.exit(train.main())
""")
    done = torchrun(2, "dies.py", *SMALL, "--name", "dies", timeout=900)
    assert done.returncode != 0 and "rank      : 1" in done.stderr, done.stderr
    assert "lost another process" in done.stderr, done.stderr

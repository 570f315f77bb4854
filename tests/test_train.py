"""train.py: the loop, its settings, resuming, and what it refuses."""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import plumbing.run
import rewards
import train
from model import Qwen2
from objectives import OBJECTIVES, noclip
from plumbing import checkpoint, hub, problems
from plumbing.files import read_rows
from plumbing.metrics import exact_log_probs, noise_floor, update_metrics
from rollout import Rollout

ROOT = Path(train.__file__).resolve().parent
SMALL = ["--model", "tiny", "--device", "cpu", "--dtype", "fp32", "--prompts-per-step", "4",
         "--group-size", "4", "--minibatches", "2", "--steps", "4", "--validate-every", "2",
         "--validation-problems", "5", "--checkpoint-every", "2", "--test-problems", "5",
         "--learning-rate", "1e-3"]
NOT_REPEATABLE = ("_s", "_per_s", "_gib")  # seconds, rates and memory


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "stop_on_signals", lambda: [])  # pytest keeps its own Ctrl-C
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*flags):
    assert train.main([*SMALL, *flags]) == 0


def metrics(name):
    return read_rows(Path("runs") / name / "metrics.jsonl")


def repeatable(rows):
    return [{k: v for k, v in row.items() if not k.endswith(NOT_REPEATABLE)} for row in rows]


def weights(folder):
    return dict(Qwen2.from_pretrained(folder).named_parameters())


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# ---------------------------------------------------------------- whole runs

def test_a_run_writes_what_it_promises_and_changes_the_weights(capsys, machine):
    run()
    folder = Path("runs/tiny-pspo-s0")
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl",
                                                  "curves.png", "checkpoints", "best", "test.json",
                                                  "test.jsonl", ".lock"}
    assert [row["step"] for row in metrics("tiny-pspo-s0")] == [0, 1, 2, 3, 4]
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step_2", "step_4"]
    before, after = weights("tiny"), weights(folder / "checkpoints" / "step_4")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["alpha"] == 0.1 and config["settings"]["threads"] >= 1
    assert config["versions"]["torch"] == torch.__version__
    samples = read_rows(folder / "samples.jsonl")
    assert len(samples) == 4 * 4 and {"text", "reward", "advantage"} < samples[0].keys()
    out = capsys.readouterr().out
    assert "8 optimizer steps" not in out and "2 epochs × 2 minibatches = 4 optimizer steps" in out
    assert "prompt 1" in out and "<|user|>" in out and "greedy strict accuracy on 5 test" in out


ARMS = [["--objective", "clip"], ["--objective", "noclip"], ["--beta", "0.01"],
        ["--reduction", "sequence"], ["--reduction", "constant"], ["--dtype", "bf16"],
        ["--advantage-scale", "none"], ["--reward", "paper"], ["--reward", "correct"],
        ["--top-p", "0.95"], ["--top-p", "0.5"], ["--minibatches", "1"], ["--optimizer", "sgd"],
        ["--objective", "cispo"], ["--objective", "sapo"], ["--objective", "scopic"],
        ["--objective", "sapo", "--ratio-level", "sequence"]]


@pytest.mark.parametrize("flags", ARMS, ids=" ".join)
def test_every_arm_runs(flags):
    # rewards that differ within every group: head, backward and optimizer really run
    run("--steps", "2", "--name", "arm", "--test-problems", "0", "--reward", "noise", *flags)
    rows = metrics("arm")
    assert all(row["gradient_norm"] > 0 for row in rows[1:] if "--reward" not in flags)
    if "--beta" in flags:
        assert rows[1]["kl_reference"] >= 0 and rows[1]["equal_groups"] <= 1


def test_changing_the_objective_changes_no_other_setting():
    settings = {}
    for objective in OBJECTIVES:
        s, _ = train.read_settings(["--model", "tiny", "--objective", objective])
        settings[objective] = vars(s)
    for objective in ("clip", "noclip"):
        changed = {k for k, v in settings["pspo"].items() if settings[objective][k] != v}
        assert changed == {"objective", "name"}
    run("--steps", "1", "--name", "a", "--max-grad-norm", "inf")
    run("--steps", "1", "--name", "b", "--max-grad-norm", "inf", "--objective", "clip")
    saved = [json.loads(Path(f"runs/{n}/config.json").read_text())["settings"] for n in "ab"]
    assert train.read_settings(["--model", "tiny", "--name", "a", "--resume"])[0].max_grad_norm == (
        math.inf)
    assert {k for k in saved[0] if saved[0][k] != saved[1][k]} == {"objective", "name"}


def test_objectives_tell_apart_only_after_the_first_optimizer_step():
    for name, flags in (("pspo", ["--alpha", "0"]), ("noclip", ["--objective", "noclip"])):
        run("--name", name, "--steps", "2", *flags)
    assert repeatable(metrics("pspo")) == repeatable(metrics("noclip"))  # α = 0 is noclip
    last = metrics("noclip")[-1]
    assert last["ratio_p1"] < 0.99 < 1.01 < last["ratio_p99"]  # the ratios do leave 1
    assert last["sampler_gap_p99"] < 1e-4


def test_the_largest_batch_is_tried_and_leaves_nothing(monkeypatch, as_on_cuda, capsys):
    s, folder = train.read_settings(["--alpha", "0.1"])
    run = plumbing.run.prepare(s, folder)
    before, sizes = [p.clone() for p in run.model.parameters()], []
    trained = Qwen2.accumulate_gradients

    def watched(self, batch, *arguments):
        sizes.append(len(batch.ids_N))
        return trained(self, batch, *arguments)
    monkeypatch.setattr(Qwen2, "accumulate_gradients", watched)
    answer, answered = plumbing.run.sample_answers, []
    monkeypatch.setattr(plumbing.run, "sample_answers",
                        lambda model, problems, samples, *rest, **more: (
                            answered.append((len(problems), samples, more["max_rows"])),
                            answer(model, problems, samples, *rest, **more)))
    plumbing.run.try_largest_batch(run, s)
    assert answered == [(100, 2, 256)]  # all that validation has in flight
    group = max(map(len, run.prompts)) + 8 * 40
    assert sizes == [group, 2 * group]  # a minibatch of 8 prompts in 4 parts
    assert all(p.grad is None for p in run.model.parameters())
    assert all(map(torch.equal, run.model.parameters(), before)) and not run.optimizer.state

    for bytes_per_token, n_groups in ((1000, 2), (2**31 // group, 1)):  # 1 GiB of memory is free
        sizes.clear()
        s.tokens_per_microbatch = None
        monkeypatch.setattr(torch.cuda, "max_memory_allocated",
                            lambda device: sizes[-1] * bytes_per_token)
        plumbing.run.try_largest_batch(run, s)
        assert sizes == [group, 2 * group, group, 2 * group, n_groups * group]
        assert s.tokens_per_microbatch == n_groups * group
        assert f"micro-batches of {n_groups * group:,} tokens" in capsys.readouterr().out

    def one_group_at_a_time(self, batch, *arguments):
        if len(batch.ids_N) > group:
            raise torch.OutOfMemoryError("no room")
        return trained(self, batch, *arguments)
    monkeypatch.setattr(Qwen2, "accumulate_gradients", one_group_at_a_time)
    s.tokens_per_microbatch = None
    plumbing.run.try_largest_batch(run, s)
    assert s.tokens_per_microbatch == group

    sizes.clear()
    monkeypatch.setattr(Qwen2, "accumulate_gradients", watched)
    s.tokens_per_microbatch, s.minibatches = None, 8  # a minibatch is one group: no two are tried
    plumbing.run.try_largest_batch(run, s)
    assert s.tokens_per_microbatch == group and set(sizes) == {group}
    s.minibatches = 4

    for e, expected, words in (
            (torch.OutOfMemoryError("no room"), ValueError,
             "lower --tokens-per-microbatch .* --checkpoint-activ"),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), ValueError, "lower"),
            (RuntimeError("another"), RuntimeError, "^another$")):
        def fails(*arguments):
            raise e
        monkeypatch.setattr(Qwen2, "accumulate_gradients", fails)
        with pytest.raises(expected, match=words):
            plumbing.run.try_largest_batch(run, s)


def test_a_micro_batch_that_does_not_run_is_halved():
    def bytes_of(n):
        tried.append(n)
        if n > most:
            raise torch.OutOfMemoryError("no room")
    for most, expected in ((9, [8]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])):
        tried = []
        assert plumbing.run.groups_that_run(bytes_of, 8) == expected[-1] and tried == expected
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        plumbing.run.groups_that_run(bytes_of, 8)


def test_the_groups_that_fit_by_hand():
    # one group takes 30, two take 50: 20 a group and 10 beside; three quarters of 200 hold seven
    assert plumbing.run.groups_that_fit(200, 30, 50) == 7
    assert plumbing.run.groups_that_fit(30, 30, 50) == 0  # one is tried all the same


@pytest.mark.parametrize("flags", [
    [], pytest.param(["--beta", "0.1", "--objective", "clip"], marks=pytest.mark.slow),
    pytest.param(["--objective", "sapo", "--ratio-level", "sequence", "--optimizer", "sgd"],
                 marks=pytest.mark.slow)], ids=str)
def test_resuming_is_bit_identical(flags):
    threads = ["--threads", "2"]
    run("--name", "straight", *threads, *flags)
    run("--name", "halves", "--stop-after", "2", *threads, *flags)
    assert [row["step"] for row in metrics("halves")] == [0, 1, 2]
    assert not Path("runs/halves/test.json").exists()
    with open("runs/halves/metrics.jsonl", "a") as file:  # as a killed run may leave it
        file.write('{"step": 3}\n{"step": 4, "rew')
    run("--name", "halves", "--resume", *threads, *flags)
    assert repeatable(metrics("halves")) == repeatable(metrics("straight"))
    for folder in ("checkpoints/step_4", "best"):
        assert_same_weights(f"runs/straight/{folder}", f"runs/halves/{folder}")
    samples = [Path(f"runs/{n}/samples.jsonl").read_text() for n in ("straight", "halves")]
    assert samples[0] == samples[1]


def test_resuming_refuses_a_changed_setting_by_name(capsys):
    run("--stop-after", "2", "--model", "tiny/model")
    with pytest.raises(SystemExit):
        train.main(["--model", "tiny", "--resume", "--learning-rate", "0.5"])
    assert "--learning-rate was 0.001" in capsys.readouterr().err
    # all settings that are not given are the run's own, but for what a machine chose
    path = Path("runs/tiny-pspo-s0/config.json")
    config = json.loads(path.read_text())
    config["settings"] |= {"tokens_per_microbatch": None, "threads": 5000}
    path.write_text(json.dumps(config))
    assert train.main(["--resume", "--model", "tiny/model"]) == 0


@pytest.mark.parametrize("signum", [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(signum):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--threads", "2", "--steps", "40",
               "--name", "stopped"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = Path("runs/stopped/metrics.jsonl")
    deadline = time.time() + 600
    while not (rows.exists() and len(read_rows(rows)) > 2) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signum, output
    assert "finishing this step" in output and "--resume --name stopped" in output
    step = metrics("stopped")[-1]["step"]
    assert checkpoint.checkpoints(Path("runs/stopped"))[-1].name == f"step_{step}" and step < 40
    run("--name", "stopped", "--steps", "40", "--threads", "2", "--resume", "--stop-after",
        str(step + 1))
    assert [row["step"] for row in metrics("stopped")] == list(range(step + 2))


def test_a_second_ctrl_c_leaves_at_once():
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "400",
               "--prompts-per-step", "64", "--group-size", "16", "--validate-every", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("prompt 1"):  # the last before the first step, which takes seconds
            break
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "press Ctrl-C to leave at once" in line:
            break
    process.send_signal(signal.SIGINT)  # the same signal, passed on by another
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "stopped after step" not in rest and not Path("runs/tiny-pspo-s0/metrics.jsonl").exists()


def test_only_the_newest_checkpoints_are_kept():
    run("--checkpoint-every", "1", "--keep", "2")
    found = [p.name for p in checkpoint.checkpoints(Path("runs/tiny-pspo-s0"))]
    assert found == ["step_3", "step_4"]


# ---------------------------------------------------------------- one update, looked at closely

def test_a_step_of_more_than_2_to_the_24_tokens_makes_its_metrics():
    # torch.quantile refuses so many. Log-ratios 0, 1, 2, …, n − 1 times 1/n; gaps alike.
    n = 2**24 + 17
    ramp_M = torch.arange(n, dtype=torch.float32) / n
    micro = SimpleNamespace(old_logp_M=ramp_M, sampler_logp_M=torch.zeros(n),
                            advantage_M=torch.ones(n), weight_M=torch.full((n,), 1 / n),
                            batch=SimpleNamespace(ids_N=range(n)))
    run = SimpleNamespace(reference=None, state={"optimizer_steps": 1})
    seen = SimpleNamespace(log_ratios=[ramp_M], entropies=[ramp_M], kls=[],
                           norms=[torch.tensor(0.5)])
    metrics = update_metrics(run, [[micro]], settings(), seen,
                                   {"old_logp_s": 0, "update_s": 1})
    assert metrics["ratio_p50"] == pytest.approx(math.exp(0.5))
    assert metrics["ratio_p99"] == pytest.approx(math.exp(0.99), rel=1e-6)
    assert metrics["sampler_gap_p99"] == pytest.approx(0.99)



def settings(**changes):
    s, _ = train.read_settings([*SMALL, "--name", "unused"])
    return SimpleNamespace(**{**vars(s), **changes})


def made_up_rollout(P=4, G=4, seed=0):
    """Random prompts and completions of different lengths; rewards differ within every group."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, 200, (n,), generator=g).tolist()
    completions = [[ids(1, 20) for _ in range(G)] for _ in range(P)]
    rollout = Rollout([ids(5, 15) for _ in range(P)], completions,
                      [[[-1.0] * len(c) for c in group] for group in completions],
                      [[True] * G] * P, 1.0)
    reward_PG = torch.rand(P, G, generator=g)
    return rollout, train.group_advantages(reward_PG)


def updated(equal=(), **changes):
    """The run and its minibatches after one update on a made-up rollout."""
    s = settings(**changes)
    model = Qwen2.from_pretrained("tiny", s.device, s.dtype)
    rollout, advantage_PG = made_up_rollout()
    advantage_PG[list(equal)] = 0.0
    run = SimpleNamespace(model=model, reference=None, state={"optimizer_steps": 0,
                                                              "skipped_steps": 0},
                          optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.0))
    minibatches = train.lay_out(rollout, advantage_PG, s, s.device)
    train.update(run, minibatches, s, train.remember_old_policy(run, minibatches, s))
    return run, minibatches


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_before_the_first_optimizer_step_old_and_new_log_probs_are_equal(
        monkeypatch, dtype, minibatches, machine):
    calls = []
    policy_loss = train.policy_loss

    def watched(logp, old, *rest):
        calls.append((logp - old).abs().max().item())
        return policy_loss(logp, old, *rest)
    monkeypatch.setattr(train, "policy_loss", watched)
    _, batches = updated(dtype=dtype, minibatches=minibatches, tokens_per_microbatch=60)
    first = len(batches[0])
    assert first >= 2, "several micro-batches, or this shows little"
    assert calls[:first] == [0.0] * first  # the first minibatch, before its optimizer step
    assert max(calls[first:]) > 0  # afterwards the ratios leave 1


def test_micro_batches_change_no_update(machine):
    whole, one = updated(tokens_per_microbatch=10**6)
    split, many = updated(tokens_per_microbatch=1)
    assert [len(m) for m in one] == [1, 1] and [len(m) for m in many] == [2, 2]
    start = weights("tiny")
    for (name, p), q in zip(whole.model.named_parameters(), split.model.parameters()):
        moved = (p - start[name]).norm()
        assert (p - q).norm() < 0.01 * moved, name  # AdamW magnifies rounding of tiny gradients


def test_equal_groups_are_left_out_but_their_tokens_stay_in_the_divisor():
    rollout, advantage_PG = made_up_rollout()
    s = settings(minibatches=1)
    full = train.lay_out(rollout, advantage_PG, s, "cpu")
    advantage_PG[1] = 0.0
    part = train.lay_out(rollout, advantage_PG, s, "cpu")
    assert sum(len(m.batch.lengths) for m in full[0]) == 16
    assert sum(len(m.batch.lengths) for m in part[0]) == 12
    assert part[0][0].weight_M[0] == full[0][0].weight_M[0] == pytest.approx(1 / rollout.n_tokens)
    with_kl = train.lay_out(rollout, advantage_PG, settings(minibatches=1, beta=0.1), "cpu")
    assert sum(len(m.batch.lengths) for m in with_kl[0]) == 16


def test_a_rollout_of_equal_groups_makes_no_optimizer_step_while_the_schedule_advances():
    start = weights("tiny")
    run, minibatches = updated(equal=range(4))
    assert minibatches == [[], []]
    assert all(torch.equal(p, start[name]) for name, p in run.model.named_parameters())
    assert run.state == {"optimizer_steps": 4, "skipped_steps": 4}


def test_an_advantage_reaches_every_token_of_its_own_completion():
    rollout, advantage_PG = made_up_rollout()
    minibatches = train.lay_out(rollout, advantage_PG, settings(tokens_per_microbatch=60), "cpu")
    seen = []
    for micro in (m for minibatch in minibatches for m in minibatch):
        for b in range(len(micro.batch.lengths)):
            mine = micro.batch.sequence_M == b
            (advantage,) = micro.advantage_M[mine].unique().tolist()
            seen.append((micro.batch.target_M[mine].tolist(), pytest.approx(advantage)))
    assert seen == list(zip([ids for group in rollout.completions for ids in group],
                            advantage_PG.flatten().tolist()))


def test_exact_log_probs_are_not_tf32_and_leave_the_setting():
    precisions = []
    model = SimpleNamespace(compute_dtype=torch.bfloat16, completion_log_probs=lambda *_: (
        precisions.append((model.compute_dtype, torch.get_float32_matmul_precision())), None))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        exact_log_probs(model, SimpleNamespace(batch=None), 1.0)
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == [(torch.float32, "highest")]
    assert (model.compute_dtype, after) == (torch.bfloat16, "high")


def test_without_git_a_run_has_no_commit(monkeypatch):
    assert len(plumbing.run.git("rev-parse", "HEAD")) in (0, 40)  # 0: not a clone
    monkeypatch.setenv("PATH", "")
    assert plumbing.run.git("rev-parse", "HEAD") == ""


def test_the_noise_floor_is_zero_in_fp32_and_not_in_bf16():
    s = settings()
    rollout, advantage_PG = made_up_rollout()
    minibatches = train.lay_out(rollout, advantage_PG, s, "cpu")
    model = Qwen2.from_pretrained("tiny")
    assert noise_floor(model, minibatches, 1.0) == {"noise_floor_0.1": 0,
                                                          "noise_floor_0.2": 0}
    assert noise_floor(model, [[], []], 1.0) == {}
    model = Qwen2.from_pretrained("tiny", dtype="bf16")
    floor = noise_floor(model, minibatches, 0.1)  # a low temperature magnifies the rounding
    assert 0 < floor["noise_floor_0.2"] < floor["noise_floor_0.1"] < 1
    assert model.compute_dtype == torch.bfloat16


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, capsys):
    def broken(ratio, advantage):
        return noclip(ratio, advantage) * float("nan")
    monkeypatch.setitem(OBJECTIVES, "noclip", broken)
    with pytest.raises(SystemExit, match=r"(?s)step 1: the gradient norm is nan .*; prompts "
                                         r"\['tiny.*step_0; it leads there again; start a new run"):
        run("--objective", "noclip", "--reward", "noise")


@pytest.mark.parametrize("broken, message", [
    (lambda *_, **__: float("inf"), "the reward is inf, expected a finite number,"
     " for tiny/train/.* completion '"),
    (lambda *_, **__: 1 / 0, r"grading raised ZeroDivisionError.* on tiny/train/.*completion '")])
def test_a_reward_that_is_none_is_an_error_with_its_text(monkeypatch, broken, message):
    monkeypatch.setattr(train, "reward", broken)
    with pytest.raises(SystemExit, match=message):
        run("--validate-every", "100")


def test_a_grader_that_raises_is_an_error_with_its_text(monkeypatch):
    monkeypatch.setattr(rewards, "has_format", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit, match=r"step 1: grading raised ZeroDivisionError.* on "
                                         r"tiny/train/.*completion '.*\nlast checkpoint: none yet"):
        run("--validate-every", "100")


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    def broken(ratio, advantage):
        raise RuntimeError("the size of tensor a must match")
    monkeypatch.setitem(OBJECTIVES, "noclip", broken)
    monkeypatch.setattr("plumbing.settings.check_settings", lambda *_: None)
    with pytest.raises(RuntimeError, match="the size of tensor a"):
        run("--objective", "noclip", "--reward", "noise", "--validate-every", "100")


# ---------------------------------------------------------------- schedules

def test_the_learning_rate_by_hand():
    s = SimpleNamespace(steps=5, epochs=2, minibatches=1, warmup_steps=4, learning_rate=1.0)
    # ten optimizer steps: four of warm-up, then 6/6 … 1/6
    found = [train.learning_rate(s, n) for n in range(1, 11)]
    assert found == pytest.approx([1/4, 2/4, 3/4, 1, 1, 5/6, 4/6, 3/6, 2/6, 1/6])


def test_an_optimizer_step_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    run = SimpleNamespace(model=model, state={"optimizer_steps": 2},
                          optimizer=torch.optim.SGD(model.parameters(), lr=123.0))
    s = SimpleNamespace(steps=5, epochs=2, minibatches=1, warmup_steps=4, learning_rate=1.0,
                        max_grad_norm=1.0)
    model.weight.data.zero_()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert train.optimizer_step(run, s).item() == 5  # the norm before the limit
    # the limit leaves (0.6, 0.8), warm-up half of the rate
    assert model.weight.data.flatten().tolist() == pytest.approx([-0.3, -0.4], rel=1e-5)
    model.weight.data.zero_()
    model.weight.grad = torch.tensor([[0.3, 0.4]])
    run.state["optimizer_steps"] = 6
    train.optimizer_step(run, s)  # within the limit; 5/6 of the rate
    assert model.weight.data.flatten().tolist() == pytest.approx([-0.25, -1 / 3], rel=1e-5)


def test_the_loss_of_a_micro_batch_by_hand(monkeypatch):
    losses = []

    def accumulate_gradients(batch, temperature, loss, entropy):
        logp_M = torch.tensor([0.5, 0.5]).log()
        losses.append(loss(logp_M, slice(0, 2)).item())
        return logp_M, torch.zeros(2)
    monkeypatch.setattr(train, "optimizer_step", lambda run, args: torch.tensor(0.0))
    s, _ = train.read_settings(["--model", "tiny", "--objective", "noclip", "--beta", "0.1",
                                "--epochs", "1", "--minibatches", "1"])
    micro = SimpleNamespace(old_logp_M=None, weight_M=torch.tensor([0.25, 0.75]),
                            advantage_M=torch.tensor([2.0, -1.0]),
                            reference_logp_M=torch.tensor([0.25, 0.5]).log(),
                            batch=SimpleNamespace(sequence_M=torch.tensor([0, 1])))
    run = SimpleNamespace(model=SimpleNamespace(accumulate_gradients=accumulate_gradients),
                          reference=object(), state={"optimizer_steps": 0, "skipped_steps": 0})
    seen = train.Seen()
    train.update(run, [[micro]], s, seen)
    # r = 1: −(0.25·2 − 0.75·1) = 0.25. k3 of the first token: 0.25/0.5 − log(0.25/0.5) − 1
    assert losses == [pytest.approx(0.25 + 0.1 * 0.25 * (0.5 + math.log(2) - 1))]
    assert seen.kls[0].tolist() == pytest.approx([0.5 + math.log(2) - 1, 0])


def test_each_pass_visits_every_problem_once_in_a_new_order():
    passes = [[i for step in range(5 * k + 1, 5 * k + 6)
               for i in problems.prompt_order(10, 2, step, seed=0)] for k in range(3)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert problems.prompt_order(10, 2, 1, seed=1) != passes[0][:2]
    assert len({i for s in (1, 2, 3) for i in problems.prompt_order(11, 3, s, seed=0)}) == 9


def test_the_files_problems_are_split_three_ways_without_overlap():
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(30)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = settings(data="mine.jsonl", validation_problems=5, test_problems=7, seed=0)
    splits = problems.split_problems(s)
    assert [len(split) for split in splits] == [18, 5, 7]
    assert len({p.id for split in splits for p in split}) == 30
    other = problems.split_problems(SimpleNamespace(**{**vars(s), "seed": 1}))
    assert other == splits  # every seed is measured on the same problems


def test_a_set_keeps_its_own_validation_split(monkeypatch):
    s = SimpleNamespace(data="mine", validation_problems=5, test_problems=7, prompts_per_step=1)
    monkeypatch.setitem(problems.SETS, "mine", problems.SETS["tiny"]._replace(latex=True))
    train_, validation, test = problems.split_problems(s)
    assert [p.id for p in validation] == [f"mine/validation/{i}" for i in range(5)]
    everything = len(train_)
    monkeypatch.setitem(problems.SETS, "mine", problems.SETS["mine"]._replace(
        splits=problems.TRAIN_AND_TEST))
    train_, validation, test = problems.split_problems(s)
    assert len(train_) == everything - 5 and {p.id[:11] for p in validation} == {"mine/train/"}


def test_a_run_in_bf16_is_tested_as_evaluate_tests_it(monkeypatch):
    dtypes = []
    answered = plumbing.run.answer_problems
    monkeypatch.setattr(plumbing.run, "answer_problems", lambda model, *rest, **more: (
        dtypes.append((model.compute_dtype, more["max_rows"])), answered(model, *rest, **more))[1])
    run("--steps", "1", "--dtype", "bf16", "--rollout-rows", "32")
    assert dtypes == 2 * [(torch.float32, 32)]

    def no_room(*rest, **more):
        raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(plumbing.run, "answer_problems", no_room)
    with pytest.raises(SystemExit, match="but not its test: no room; try again with --resume "
                                         "--name large --rollout-rows and less than 256"):
        run("--steps", "1", "--name", "large")


def test_presets_do_not_depend_on_the_objective_and_hold_the_papers_values():
    s, _ = train.read_settings(["--model", "Qwen/Qwen2.5-1.5B", "--data", "gsm8k"])
    assert (s.group_size, s.prompts_per_step, s.epochs, s.minibatches) == (4, 16, 2, 1)
    assert (s.temperature, s.top_p, s.max_new_tokens, s.beta) == (0.8, 0.9, 128, 0)
    assert (s.learning_rate, s.warmup_steps, s.steps) == (5e-7, 140, 7000 // 16 * 3)
    s, _ = train.read_settings(["--model", "someone/else", "--epochs", "3"])
    assert (s.data, s.epochs, s.steps) == ("gsm8k", 3, 1311)


def test_one_optimizer_step_per_rollout_is_warned_about(capsys):
    run("--epochs", "1", "--minibatches", "1", "--steps", "1")
    assert "keeps every ratio at 1" in capsys.readouterr().err


@pytest.mark.parametrize("has, dtype, warned", [
    ({"avx2": True}, "bf16", True), ({"avx2": True}, "fp32", False),
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "bf16", True),
    ({"avx512_bf16": True}, "bf16", False), ({"amx_bf16": True}, "bf16", False),
    ({"architecture": "aarch64"}, "bf16", False)])
def test_bf16_on_a_processor_without_units_for_it_is_warned_about(
        has, dtype, warned, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **has})
    for program, flags in ((train, [*SMALL, "--model", "no/such/folder"]),
                           (evaluate, ["no/such/folder", "--device", "cpu", "--data", "tiny"])):
        with pytest.raises(SystemExit, match="no/such/folder: neither a model folder"):
            program.main([*flags, "--dtype", dtype])  # the warning comes first
        slow = "bf16 is several times slower on it than --dtype fp32"
        assert (slow in capsys.readouterr().err) == warned


@pytest.mark.parametrize("n_busy, given, taken", [
    (0, None, 4), (0.4, None, 4), (1, None, 3), (2.9, None, 1), (4, None, 1), (1, 2, 2)])
def test_threads_are_as_many_as_cores_are_free(n_busy, given, taken, monkeypatch, capsys):
    clock = itertools.count()  # seconds
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hub.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(hub.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    busy = itertools.count(1000, n_busy)
    monkeypatch.setattr(hub, "busy_seconds", lambda: next(busy))
    torch.set_num_threads(4)
    assert hub.use_threads(given) == taken == torch.get_num_threads()
    said = f"{taken} instead of 4: other programs keep {round(n_busy)} of 4 cores busy"
    assert (said in capsys.readouterr().err) == (taken < 4 and given is None)


def test_the_number_of_threads_in_the_environment_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(hub, "busy_seconds", lambda: pytest.fail("it looked"))
    torch.set_num_threads(2)
    assert hub.use_threads() == 2


@pytest.mark.skipif(not hub.PROC_STAT.exists(), reason="no /proc/stat to read")
def test_busy_seconds_count_what_programs_compute():
    before, began = hub.busy_seconds(), time.process_time()
    while time.process_time() - began < 0.2:
        pass
    assert hub.busy_seconds() - before > 0.15


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("flags, message", [
    (["--alhpa", "0.1"], "unrecognized arguments: --alhpa"),
    (["--alph", "0.1"], "unrecognized arguments: --alph"),
    (["--objective", "ppo"], "invalid choice: 'ppo'.*pspo.*clip.*noclip"),
    (["--alpha", "1.5"], r"alpha is 1.5; expected a value in \[0, 1\]"),
    (["--alpha", "-0.1"], r"alpha is -0.1; expected a value in \[0, 1\]"),
    (["--alpha", "0.1", "--objective", "clip"], "--alpha is a setting of --objective pspo"),
    (["--epsilon-low", "0.1"], "--epsilon-low is a setting of --objective clip"),
    (["--group-size", "1"], "--group-size is 1; expected 2 or more"),
    (["--minibatches", "3"], "--minibatches 3 does not divide --prompts-per-step 4"),
    (["--temperature", "0"], "--temperature is 0; training needs"),
    (["--top-p", "0"], "--top-p is 0"), (["--steps", "0"], "--steps is 0; expected 1 or more"),
    (["--max-grad-norm", "0"], "--max-grad-norm is 0.0; expected a value above 0, or inf"),
    (["--max-grad-norm", "nan"], "--max-grad-norm is nan"),
    (["--learning-rate", "-1"], "--learning-rate is -1"), (["--beta", "nan"], "--beta is nan"),
    (["--rollout-rows", "3"], "--rollout-rows 3 does not hold one group of 4"),
    (["--resume"], "no run in runs/tiny-pspo-s0"),
    (["--data", "gms8k"], "unknown data set 'gms8k'; expected tiny, onestep"),
    (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--model", "no/such/folder"], "no/such/folder: neither a model folder here nor"),
    (["--max-new-tokens", "250"], "longest prompt has .* tokens.*context holds 256"),
    (["--data", "few.jsonl", "--test-problems", "0"], "leaves 0 training.*lower these three"),
    (["--threads", "5000"], "--threads is 5000; this machine has"),
    (["--data", "math500"], "math500 has no split 'train'"),
    (["--device", "cuda:77"], "--device is cuda:77; expected cpu, or cuda where"),
    (["--name", "../up"], "--name is '../up'; expected a plain folder name"),
    (["--stop-after", "0"], "--stop-after is 0; expected 1 or more"),
    (["--wandb", "mine"], "--wandb needs the package wandb")])
def test_bad_input_is_refused_in_one_line(flags, message, capsys):
    Path("few.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 5)
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, *flags])
    lines = (capsys.readouterr().err + str(stop.value.code)).strip().splitlines()
    assert stop.value.code not in (0, None) and re.search(message, "\n".join(lines)), lines
    errors = [line for line in lines if "error" in line]
    assert len(errors) == 1 and not Path("runs").exists()


def test_a_run_on_a_file_leaves_its_test_problems_for_evaluate():
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    Path("my file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--data", "my file.jsonl", "--steps", "2")
    held_out = read_rows(Path("runs/tiny-pspo-s0/test.jsonl"))
    samples = read_rows(Path("runs/tiny-pspo-s0/samples.jsonl"))
    trained_on = {row["question"] for row in samples if "question" in row}
    assert len(held_out) == 5 and all(row in rows for row in held_out)
    assert trained_on and not trained_on & {row["question"] for row in held_out}


@pytest.mark.parametrize("objective, message", [
    (lambda ratio, advantage, gamma: ratio, "setting gamma of mine needs a number as its default"),
    (lambda ratio, advantage, mode="x": ratio, "setting mode of mine needs a number"),
    (lambda ratio, advantage, alpha=0.3: ratio, "two settings are named --alpha; rename the one"),
    (lambda ratio, advantage, seed=3: ratio, "two settings are named --seed; rename"),
    (lambda ratio: ratio, "--objective mine: .*takes 1 positional argument but 2 were given"),
    (lambda ratio, advantage: (ratio * advantage).mean(), "expected a number for each ratio"),
    (lambda ratio, advantage: ratio.detach(), "expected a number for each .* with a gradient")])
def test_a_mistake_in_a_new_objective_is_named(objective, message, monkeypatch, capsys):
    monkeypatch.setitem(OBJECTIVES, "mine", objective)
    with pytest.raises(SystemExit) as stop:
        train.read_settings(["--model", "tiny", "--objective", "mine"])
    assert re.search(message, capsys.readouterr().err + str(stop.value.code))


def test_a_run_without_a_test_names_no_problems_that_it_trained_on(capsys):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--data", "mine.jsonl", "--steps", "1", "--test-problems", "0")
    assert "runs/tiny-pspo-s0/best --data OTHER_PROBLEMS.jsonl" in capsys.readouterr().out


def test_settings_are_shown_whether_the_run_is_there_or_not():
    Path("runs/tiny-pspo-alpha0.25-s0").mkdir(parents=True)
    Path("runs/tiny-pspo-alpha0.25-s0/config.json").touch()
    done = subprocess.run([sys.executable, "-m", "plumbing.settings", "--model", "tiny", "--alpha",
                           "0.25"], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert "--alpha                    0.25\n" in done.stdout, done.stderr


@pytest.mark.parametrize("flags, name", [
    (["--alpha", "0.1"], "tiny-pspo-s0"), (["--alpha", "0"], "tiny-pspo-alpha0-s0"),
    (["--objective", "clip", "--epsilon-high", "0.28", "--seed", "3"],
     "tiny-clip-epsilon_high0.28-s3"), (["--alpha", "0", "--name", "control"], "control")])
def test_runs_with_other_settings_of_the_objective_have_other_names(flags, name):
    s, folder = train.read_settings(["--model", "tiny", *flags])
    assert (s.name, folder) == (name, Path("runs") / name)


def test_a_run_folder_that_exists_is_refused(capsys):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/thesis.tex").touch()
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--name", "mine"])
    assert "runs/mine exists; continue it with --resume" in capsys.readouterr().err


# ---------------------------------------------------------------- the real thing, small

@pytest.mark.slow
def test_the_default_path_of_qwen_on_gsm8k_through_the_hub(hub, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--model", "Qwen/Qwen2.5-0.5B", "--alpha",
               "0.1", "--steps", "1", "--reward", "noise", "--prompts-per-step", "2",
               "--group-size", "2", "--max-new-tokens", "4", "--learning-rate", "1e-4",
               "--warmup-steps", "0", "--name", "hub"]
    done = subprocess.run(command, env=hub, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<|im_start|>system" in done.stdout and "7000 training problems, 473" in done.stdout
    check = f"""
import torch
from transformers import AutoModelForCausalLM
import sys; sys.path.insert(0, {str(ROOT)!r})
from model import Qwen2, SharedPromptAttention
trained = "runs/hub/checkpoints/step_1"
ours, base = Qwen2.from_pretrained(trained), Qwen2.from_pretrained("Qwen/Qwen2.5-0.5B")
assert ours.stop_ids == [151643, 151645] and ours.n_real_ids == 151665, ours.stop_ids
assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), base.parameters()))
theirs = AutoModelForCausalLM.from_pretrained(trained)
assert theirs.dtype == torch.float32
ids = torch.arange(100, 120)
with torch.no_grad():
    attend = SharedPromptAttention([20], [[]])
    difference = (ours.logits(ours(ids, torch.arange(20), attend)) - theirs(ids[None]).logits[0])
print(f"maximum difference of logits from transformers: {{difference.abs().max():.1e}}")
assert difference.abs().max() < 1e-5
"""
    done = subprocess.run([sys.executable, "-c", check], env=hub, cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.slow
def test_an_unreachable_hub_says_what_was_wanted_and_what_to_do(tmp_path):
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--model",
                               "Qwen/Qwen2.5-0.5B"], env={**env, "HF_HUB_OFFLINE": offline},
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        error = done.stderr.strip().splitlines()[-1]
        assert error.startswith("error: Qwen/Qwen2.5-0.5B: ") and "local model folder" in error
        assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()

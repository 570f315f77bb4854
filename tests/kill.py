"""Kill -9 a tiny run at random moments, resume it, and compare with a run that was never killed.

A moment is a number of rows in metrics.jsonl and a time after that, so that it does not depend on
how busy the machine is.

python tests/kill.py 50        a line for each kill; exits 1 where anything differs
"""
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--model", "tiny", "--device", "cpu", "--dtype", "fp32", "--threads", "2", "--steps", "12",
       "--prompts-per-step", "4", "--group-size", "4", "--minibatches", "2", "--epochs", "2",
       "--validate-every", "3", "--validation-problems", "10", "--checkpoint-every", "2",
       "--test-problems", "5", "--learning-rate", "1e-3", "--name", "run"]
NOT_REPEATABLE = ("_s", "_per_s", "_gib")  # seconds, rates and memory


def start(folder, *flags):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *RUN, *flags], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def begin(folder, *flags):
    """Start a run, and wait until it has begun: importing torch is no part of it."""
    process = start(folder, *flags)
    while process.poll() is None and not (Path(folder) / "runs/run/config.json").exists():
        time.sleep(0.001)
    return process, time.time()


def finish(folder, *flags):
    process = start(folder, *flags)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def exact(x):
    """Something whose equality is that of every bit of a trainer's state."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), hashlib.sha256(x.numpy().tobytes()).hexdigest()
    if isinstance(x, dict):
        return {k: exact(v) for k, v in x.items()}
    return [exact(v) for v in x] if isinstance(x, (list, tuple)) else x


def outcome(folder):
    """All that must not depend on where a run was killed: name -> content or hash."""
    run = Path(folder) / "runs" / "run"
    found = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in (*(run / "best").iterdir(), *(run / "checkpoints").rglob("*"))
             if p.is_file() and p.name not in ("trainer.pt", "checksums.json")}
    for p in (run / "checkpoints").rglob("trainer.pt"):  # pickles differ where contents do not
        found[str(p.relative_to(run))] = exact(torch.load(p, weights_only=True))
    for name in ("metrics.jsonl", "samples.jsonl", "test.jsonl"):
        found[name] = [{k: v for k, v in json.loads(line).items() if not k.endswith(NOT_REPEATABLE)}
                       for line in (run / name).read_text().splitlines()]
    found["test.json"] = (run / "test.json").read_text()
    return found


def n_rows(folder):
    metrics = Path(folder) / "runs/run/metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill_and_compare(n, seed=0, flags=(), say=print):
    """Kill n runs, each at one random moment of its life; the number that ended differently."""
    draw, bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        process, began = begin(whole, *flags)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        expected, n_whole = outcome(whole), n_rows(whole)
        a_step = (time.time() - began) / n_whole
        for i in range(n):
            killed = Path(folder) / "killed"
            killed.mkdir()
            process, _ = begin(killed, *flags)
            row, later = draw.randint(0, n_whole), draw.uniform(0, a_step)
            while process.poll() is None and n_rows(killed) < row:
                time.sleep(0.001)
            try:
                process.communicate(timeout=later)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
            left = sorted(p.name for p in killed.glob("runs/run/checkpoints/*"))
            ended = process.returncode == 0
            if not ended:
                finish(killed, *flags, "--resume")
            found = outcome(killed)
            different = [k for k in {*expected, *found} if expected.get(k) != found.get(k)]
            bad += bool(different)
            say(f"{i + 1:3} {'ended' if ended else 'killed'} {later:4.2f} s after {row} rows, "
                f"{', '.join(left) or 'no checkpoint'}: "
                + (f"DIFFERENT {different}" if different else "identical"))
            shutil.rmtree(killed)
    return bad


if __name__ == "__main__":
    failures = kill_and_compare(int(sys.argv[1]), flags=sys.argv[2:])
    print(f"{failures} of {sys.argv[1]} ended differently")
    sys.exit(bool(failures))

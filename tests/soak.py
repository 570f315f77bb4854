"""A long run in small: memory and open files must stay where they are after the first steps.

python tests/soak.py 2000        steps; a line every tenth of them; exits 1 where something grows
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def soak(steps, say=print):
    """[(step, resident MiB, open files)] at every tenth of a run, the first after a twentieth."""
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--model", "tiny", "--steps", str(steps),
             "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--prompts-per-step", "4",
             "--group-size", "4", "--minibatches", "2", "--validate-every", "50",
             "--validation-problems", "20", "--checkpoint-every", "20", "--test-problems", "0",
             "--name", "soak"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics, proc = Path(folder) / "runs/soak/metrics.jsonl", Path(f"/proc/{process.pid}")
        due = steps // 20
        while process.poll() is None:
            n = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if n > due:
                status = (proc / "status").read_text()
                seen.append((n - 1, int(status.split("VmRSS:")[1].split()[0]) / 1024,
                             len(list((proc / "fd").iterdir()))))
                say("step {:5}: {:.1f} MiB resident, {} open files".format(*seen[-1]))
                due += steps // 10
            time.sleep(0.02)
    assert process.returncode == 0
    return seen


if __name__ == "__main__":
    found = soak(int(sys.argv[1]))
    growth = max(mib for _, mib, _ in found[1:]) / found[0][1] - 1
    files = {n for _, _, n in found}
    print(f"resident memory grew by {growth:.1%} after step {found[0][0]}; open files: {files}")
    sys.exit(growth > 0.02 or max(files) - min(files) > 2)

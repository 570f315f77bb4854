"""The fixtures `hub`, a local server in the place of the model hub for tests that load by name, and
`as_on_cuda`, which makes the CPU behave as CUDA does."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Read when torch is imported: tests run side by side (-n 2), so one thread each, and where a test
# asks for two, they do not spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent
# Of the caller's: where it caches, its tokens, its offline switches. None of it may reach a test.
CALLERS = re.compile(r"(HF|HUGGING_?FACE_HUB|TRANSFORMERS)_"
                     r"(.*CACHE|.*TOKEN.*|.*OFFLINE|ENDPOINT|HOME)")


@pytest.fixture
def as_on_cuda(monkeypatch):
    from as_on_cuda import make_cpu_like_cuda  # it imports torch
    make_cpu_like_cuda(monkeypatch)


@pytest.fixture(params=["cpu", "as_on_cuda"])
def machine(request):
    """Runs a test twice; `python -m pytest -k as_on_cuda` picks all that run as on CUDA."""
    if request.param == "as_on_cuda":
        request.getfixturevalue("as_on_cuda")
    return request.param


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Environment for subprocesses whose hub is a local server with models of two layers.

    The libraries read it when they are imported, so it works in a new process only. The server is
    $PSPO_HUB/serve.py (or the file $PSPO_HUB), else ../shared/hub/serve.py; without it the tests
    that need it are skipped.
    """
    place = Path(os.environ.get("PSPO_HUB") or ROOT.parent / "shared" / "hub")
    script = place / "serve.py" if place.is_dir() else place
    if not script.is_file():
        pytest.skip(f"no hub server: {script} is not a file; set PSPO_HUB to the folder of one")
    folder = tmp_path_factory.mktemp("hub")
    with open(folder / "stderr.txt", "w") as stderr:
        server = subprocess.Popen([sys.executable, str(script), "--port", "0", "--layers", "2"],
                                  stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        ready = server.stdout.readline()  # export HF_ENDPOINT=http://127.0.0.1:<port> …
        address = re.search(r"HF_ENDPOINT=(http://\S+)", ready)
        assert address, f"{script} said {ready!r}; {(folder / 'stderr.txt').read_text()}"
        env = {k: v for k, v in os.environ.items() if not CALLERS.fullmatch(k)}
        env.update(HF_ENDPOINT=address[1], HF_HOME=str(folder / "home"), HF_HUB_DISABLE_XET="1",
                   HF_HUB_DISABLE_TELEMETRY="1", PYTHONPATH=str(ROOT))
        for name in ("NO_PROXY", "no_proxy"):
            env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1"]))
        yield env
    finally:
        server.terminate()
        server.wait()

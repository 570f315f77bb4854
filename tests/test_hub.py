"""A hub that fails half-way: what it cost is said, and nothing half-written is used afterwards."""
import http.client
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

WEIGHTS, ROWS = r"resolve/.*/model\.safetensors$", r"resolve/.*jsonl$"


class Faulty(BaseHTTPRequestHandler):
    """Passes every request on to the server at `hub`, but for those that match `pattern`:
    'stops' closes after 1 MB or half the file, 'refuses' answers 500, 'stalls' sends nothing
    more, 'slow' sends 40 KB at a time, 'cut' sends a part as if that were all of it."""
    protocol_version = "HTTP/1.1"
    hub, pattern, fault, n_faults = None, "", None, 0

    def do_GET(self):
        path, cls = self.path, type(self)
        failing = cls.fault and self.command == "GET" and re.search(cls.pattern, path.split("?")[0])
        if failing:
            cls.n_faults += 1
            if cls.fault == "refuses":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                return self.end_headers()
        upstream = http.client.HTTPConnection(cls.hub, timeout=60)
        self.close_connection = True
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (
            "host", "connection", "accept-encoding")}
        upstream.request(self.command, path, headers=headers)
        reply = upstream.getresponse()
        length = int(reply.headers.get("Content-Length", 0))
        given = min(length // 2, 2**20) if failing and cls.fault != "slow" else length
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            if key.lower() == "content-length" and failing and cls.fault == "cut":
                value = str(given)
            if key.lower() not in ("connection", "server", "date", "transfer-encoding"):
                self.send_header(key, value.replace(f"http://{cls.hub}", cls.here))
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while self.command != "HEAD" and given > 0:
                part = reply.read(min(given, 40_000 if failing else 2**20))
                self.wfile.write(part)
                given -= len(part)
                if failing and cls.fault == "slow":
                    time.sleep(0.05)
            if failing and cls.fault == "stalls":
                time.sleep(15)
        except OSError:
            pass
        upstream.close()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def faulty(hub, tmp_path):
    Faulty.hub, Faulty.fault, Faulty.n_faults = urlsplit(hub["HF_ENDPOINT"]).netloc, None, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.daemon_threads = True
    Faulty.here = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {**hub, "HF_ENDPOINT": Faulty.here, "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
    server.shutdown()
    server.server_close()


MODEL = """
import sys
from plumbing.hub import fingerprint, model_folder
try:
    print(fingerprint(model_folder("Qwen/Qwen2.5-0.5B")))
except (ValueError, OSError) as e:
    sys.exit(f"error: {e}")
"""
DATA = """
import sys
from rewards import load_problems
try:
    print(len(load_problems("gsm8k", "train")))
except (ValueError, OSError) as e:
    sys.exit(f"error: {e}")
"""
SLOW = pytest.mark.slow


@pytest.mark.parametrize("what, fault, said", [
    pytest.param(MODEL, "stops", "peer closed connection", marks=SLOW),
    (DATA, "refuses", "500 Internal Server Error"),
    (DATA, "cut", "file should be of size 4166206 but has size 1048576"),
    pytest.param(MODEL, "refuses", "500 Internal Server Error", marks=SLOW),
    pytest.param(MODEL, "cut", "file should be of size", marks=SLOW),
    pytest.param(MODEL, "stalls", "timed out", marks=SLOW),
    pytest.param(DATA, "stops", "peer closed connection", marks=SLOW),
    pytest.param(DATA, "stalls", "timed out", marks=SLOW)],
    ids=lambda x: {MODEL: "model", DATA: "data"}.get(x, x))
def test_what_a_hub_delivers_in_part_is_not_used(what, fault, said, hub, faulty, tmp_path):
    def load(env):
        return subprocess.run([sys.executable, "-c", what], env=env, cwd=tmp_path, text=True,
                              capture_output=True)
    Faulty.fault, Faulty.pattern = fault, WEIGHTS if what == MODEL else ROWS
    for env in (faulty, {**faulty, "HF_HUB_OFFLINE": "1"}):  # then with what came so far
        done = load(env)
        assert done.returncode == 1 and Faulty.n_faults > 0, done.stderr
        error = done.stderr.strip().splitlines()[-1]
        assert error.startswith(("error: Qwen/Qwen2.5-0.5B: ", "error: cannot load openai/gsm8k"))
        assert "Traceback" not in done.stderr and (said in error or env is not faulty), error
    Faulty.fault = None
    found, expected = load(faulty), load(hub)
    assert found.returncode == expected.returncode == 0, found.stderr
    assert found.stdout == expected.stdout  # every byte of the model; every row


@SLOW
def test_a_slow_hub_is_waited_for(faulty, tmp_path):
    Faulty.fault, Faulty.pattern = "slow", ROWS
    done = subprocess.run([sys.executable, "-c", DATA], env=faulty, cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.stdout == "7473\n" and Faulty.n_faults > 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's malloc of Linux")
def test_kept_memory_is_given_back():
    seen = subprocess.run([sys.executable, "-c", """
import torch
from plumbing.hub import give_memory_back, keep_freed_memory

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_freed_memory()
tensors = [torch.ones(2**20) for _ in range(50)]  # 4 MiB each
last = torch.ones(2**20)  # lies above them
del tensors
before = resident_mib()
give_memory_back()
print(before - resident_mib())
"""], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout
    assert 190 < float(seen) < 210

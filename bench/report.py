"""Tables, and the files of results with what they were measured on."""
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from plumbing.run import git

ROOT = Path(__file__).resolve().parent.parent


def ratio(theirs, mine):
    """Median of the per-round ratios."""
    return statistics.median(a / b for a, b in zip(theirs, mine))


def table(headings, rows):
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(name, args, text, data, quiet=False):
    """Print the table; write it and the data, with what they were measured on."""
    device = device_name(args)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in needed(args.peers):
        versions[package] = __import__(package).__version__
    commit = git("describe", "--always", "--dirty")
    used = f"python -m bench {' '.join(sys.argv[1:])}"
    about = (f"{device}; {args.dtype}; " + ", ".join(f"{k} {v}" for k, v in versions.items())
             + f"; commit {commit or 'unknown'}; `{used}`")
    if not quiet:
        print(f"\n{text}\n\n{about}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(f"{text}\n\n{about}\n", encoding="utf-8")
    (args.out / f"{name}.json").write_text(json.dumps(
        {"device": device, "dtype": args.dtype, "versions": versions, "commit": commit,
         "command": used, **data}, indent=1) + "\n", encoding="utf-8")


def device_name(args):
    if args.device != "cpu":
        return torch.cuda.get_device_name(args.device)
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                  if line.startswith("model name")), "") if sys.platform == "linux" else ""
    return f"{args.threads} threads of {os.cpu_count()} cores, {model or platform.processor()}"


def needed(peers_named):
    """The packages of these peers."""
    return ["transformers"] * bool(peers_named) + ["trl"] * ("trl" in peers_named)

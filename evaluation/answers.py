"""The answers of an evaluation on disk: an interrupted one goes on where it stopped.

What it does    reads a file of answers as far as it is whole, shows progress, and says how many
                answers may be in flight at once.
What it leaves  sampling to evaluate.py.
"""
import hashlib
import json
import os
import time

import torch
from tqdm import tqdm

from model import DTYPES
from plumbing.files import read_json
from plumbing.hub import checked_config

CHUNK = 6  # chosen: answers are kept in chunks of 6 × the rows in flight; a kill costs one chunk


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_answers(path, settings, expected, chunk):
    """(rows, bytes they take) of a file of answers: all of them, or those of its whole chunks.

    expected: (problem id, sample) of every row; chunk: rows that were written at once.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for i, line in enumerate(lines[:len(expected) + 1]):
        try:
            row = json.loads(line)
            if i == 0 and row != settings:
                raise OSError(f"{path} holds answers under other settings; move it away")
            if i and ((row["problem"], row["sample"]) != expected[i - 1] or type(row["text"]) is
                      not str or {type(row[k]) for k in ("n_tokens", "tokens_after")} != {int}
                      or type(row["finished"]) is not bool):
                break
        except (ValueError, LookupError, TypeError):  # damaged; the rest is answered again
            break
        rows.append(row)
    n = max(len(rows) - 1, 0)
    n = n if n == len(expected) else n // chunk * chunk
    return rows[1:n + 1], sum(len(line) + 1 for line in lines[:n + 1]) if n else 0


class Progress:
    """One bar over all answers of an evaluation, with the tokens a second of its sampling."""

    def __init__(self, total):
        self.bar = tqdm(total=total, unit="answer", smoothing=0.05, dynamic_ncols=True)
        self.answers, self.tokens, self.seconds = 0, 0, 0.0  # of the rollouts that have ended

    def start(self, label):
        self.bar.set_description(label)
        self.began = time.perf_counter()
        return self

    def __call__(self, n_ended, tokens_ended, tokens_others):
        self.bar.update(self.answers + n_ended - self.bar.n)
        self.now = (self.tokens + tokens_ended + tokens_others,
                    self.seconds + time.perf_counter() - self.began)
        self.bar.set_postfix_str(f"{self.now[0] / self.now[1]:,.0f} tokens/s", refresh=False)

    def end(self):
        self.answers, (self.tokens, self.seconds) = self.bar.n, self.now


def rows_that_fit(folder, device, dtype, max_new_tokens):
    """Completions in flight that memory allows, at most 1,024, on a CPU 256 (more gain nothing).

    Of the device's whole memory, so that the same command finds its answers again: 80 % of it
    without the weights (masters and the sampler's copy), by a row's cache with two prompts of 512
    tokens and its four rows of logits.
    """
    c = checked_config(read_json(folder / "config.json"))
    if device == "cpu":
        most, memory = 256, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        most, memory = 1024, torch.cuda.get_device_properties(device).total_memory
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cached = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    tokens = min(max_new_tokens + 1024, 3 * c["max_position_embeddings"])
    row = tokens * cached * DTYPES[dtype].itemsize + 16 * c["vocab_size"]
    fit = int((0.8 * memory - 3 * weights) / row)
    return min(most, 1 << fit.bit_length() - 1) if fit > 0 else 1

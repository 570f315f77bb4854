"""The answers of an evaluation on disk: an interrupted one goes on where it stopped.

What it does    reads a file of answers as far as it is whole, and completes it, a chunk at a time.
                Also says how many answers may be in flight at once.
Not here        sampling: `AnswerFile.complete` is given a function. Grades are not kept either:
                answers on disk are graded anew each time.
"""
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from model import DTYPES
from plumbing.checkpoint import locked
from plumbing.files import json_lines, read_json
from plumbing.hub import checked_config, fingerprint
from rewards import INSTRUCTION

CHUNK = 6  # chosen: answers are written in chunks of 6 × the rows in flight; a kill costs one chunk


class Cell(NamedTuple):
    """One model on one set at one temperature."""
    model: str
    data: str
    temperature: float

    def __str__(self):
        return f"{self.model} {self.data} T={self.temperature:g}"


class AnswerFile(NamedTuple):
    """The answers of one model to one set at one temperature: one line of settings, then a line for
    each answer, problem after problem.

    settings: dict, all that the answers depend on; `samples` answers to each problem,
    `problems_per_chunk` of which are written at once.
    """
    path: Path
    settings: dict
    problems: list

    def expected(self):
        """(problem id, sample) of every answer, in the order of the file."""
        return [(p.id, sample) for p in self.problems for sample in range(self.settings["samples"])]

    def read(self):
        """(the rows of the whole chunks, the number of bytes up to their end).

        Every chunk counts as whole when no answer is missing. Raises OSError where the file holds
        answers under other settings.
        """
        rows, ends = [], []  # first the line of settings, then the answers
        expected = self.expected()
        lines = json_lines(self.path) if self.path.exists() else ()
        for (line, row, fault), which in zip(lines, [None, *expected]):
            if fault or not line.endswith(b"\n"):
                break
            if which is None and row != self.settings:
                raise OSError(f"{self.path} holds answers under other settings; move it away")
            if which is not None and not is_answer(row, which):
                break
            rows.append(row)
            ends.append(len(line) + (ends[-1] if ends else 0))
        n = max(len(rows) - 1, 0)
        if n < len(expected):
            n -= n % (self.settings["problems_per_chunk"] * self.settings["samples"])
        return rows[1:n + 1], ends[n] if n else 0

    def complete(self, sample):
        """Have every answer that is missing sampled and written, a chunk at a time: all rows.

        sample(problems, first) -> rows of these problems, in order; `first` is the number of the
            first of them in the set.
        """
        samples, per_chunk = self.settings["samples"], self.settings["problems_per_chunk"]
        with locked(self.path, f"{self.path} is being written by another evaluation"):
            rows, end = self.read()
            self.keep_if_damaged(len(rows), end)
            with open(self.path, "r+b") as file:
                file.truncate(end)
                file.seek(end)
                lines = [] if end else [self.settings]
                for first in range(len(rows) // samples, len(self.problems), per_chunk):
                    new = sample(self.problems[first:first + per_chunk], first)
                    file.write("".join(json.dumps(x) + "\n" for x in lines + new).encode())
                    file.flush()
                    rows, lines = rows + new, []
        return rows

    def keep_if_damaged(self, n_rows, end):
        """Copy a file that is about to lose more behind `end` than a killed process leaves."""
        n_lost = self.path.read_bytes()[end:].count(b"\n") - (not end)  # less the line of settings
        if n_lost >= self.settings["problems_per_chunk"] * self.settings["samples"]:
            kept = self.path.with_name(self.path.name + ".damaged")
            shutil.copy(self.path, kept)
            print(f"warning: {self.path} is damaged in answer {n_rows + 1} or soon after it; "
                  f"{n_lost} answers are sampled again, the old file is kept as {kept}",
                  file=sys.stderr)


def is_answer(row, which):
    """Whether a row is the answer to `which`, (problem id, sample), with all that an answer has."""
    types = {"text": str, "finished": bool, "n_tokens": int, "tokens_after": int}
    return ((row.get("problem"), row.get("sample")) == which
            and all(type(row.get(key)) is kind for key, kind in types.items()))


def places(cells):
    """Every (data, temperature) of these cells, once."""
    return dict.fromkeys((cell.data, cell.temperature) for cell in cells)


def answer_files(args, folders, sets):
    """{Cell: AnswerFile} of every model, set and temperature; a greedy cell has one sample."""
    files = {}
    for name, folder in folders.items():
        weights = fingerprint(folder)
        rows_in_flight = args.rollout_rows or rows_that_fit(folder, args.device, args.dtype,
                                                            args.max_new_tokens)
        for data, problems in sets.items():
            for temperature in dict.fromkeys(args.temperature):
                samples = args.samples if temperature else 1
                settings = {
                    "model": name, "weights": weights, "data": data, "temperature": temperature,
                    "problems": digest(INSTRUCTION, problems), "samples": samples,
                    "problems_per_chunk": max(CHUNK * rows_in_flight // samples, 1),
                    "rows_in_flight": rows_in_flight, "top_p": args.top_p, "seed": args.seed,
                    "max_new_tokens": args.max_new_tokens, "dtype": args.dtype,
                    "device": args.device.split(":")[0]}
                slug = re.sub(r"[^\w.-]+", "-", f"{name}-{Path(data).stem}-T{temperature:g}")
                path = args.out / "answers" / f"{slug}-{digest(settings)[:8]}.jsonl"
                files[Cell(name, data, temperature)] = AnswerFile(path, settings, problems)
    return files


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def rows_that_fit(folder, device, dtype, max_new_tokens):
    """How many completions in flight memory allows, at most 1,024, on a CPU 256: more gain nothing.

    The device's whole memory counts, not the free one, so that the same command finds its answers
    again: 80 % of it, less the weights (masters and the sampler's copy), divided by what one row
    takes: its cache with two prompts of 512 tokens, and four rows of logits.
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

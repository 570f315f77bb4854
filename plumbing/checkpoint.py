"""The files of a run: checkpoints that survive a crash, rows that no step writes twice.

What it does    writes a checkpoint whole or not at all, finds the newest undamaged one, cuts the
                logs back to that checkpoint, and lets one process at a time into a run's folder.
Not here        what is in a checkpoint (run.py), the format of the model (model.py), JSON lines
                (files.py).
Run it alone    python -m plumbing.checkpoint RUN …      checks every file of every checkpoint
Where to fork   another store (a bucket, a second disk): `save_checkpoint` and `newest_undamaged`.

runs/<name>/checkpoints/step_N/ holds a model folder, trainer.pt and, written last, checksums.json:
the SHA-256 of every other file. A folder under another name is unfinished.
"""
import fcntl
import os
import shutil
import sys
from pathlib import Path

import torch

from plumbing.files import json_lines, read_json, sha256, write_json, write_whole

SUMS = "checksums.json"
BYTES_PER_PARAMETER = 16.5  # fp32 weights, both moments of AdamW, and perhaps a copy as best/


# ------------------------------------------------------------------ checkpoints

def save_checkpoint(folder, model, trainer, keep, weights=None):
    """Write checkpoints/step_N/, N = trainer["step"], and return it; only the newest `keep` stay.

    model: a Qwen2. trainer: a dict that torch.load reads back with weights_only=True. weights: as
    in Qwen2.save_pretrained.
    Raises OSError where the disk is full or cannot be written; earlier checkpoints stay.
    """
    final = folder / "checkpoints" / f"step_{trainer['step']}"
    unfinished = final.with_name(final.name + ".partial")
    try:
        for old in (folder / "checkpoints").glob("*.partial"):  # of a run that was killed
            shutil.rmtree(old)
        unfinished.mkdir(parents=True)
        needed = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
        free = free_bytes(folder)
        if free < needed:
            raise OSError(f"it needs {needed / 2**30:.3f} GiB, {free / 2**30:.3f} GiB are free")
        model.save_pretrained(unfinished, weights)
        torch.save(trainer, unfinished / "trainer.pt")
        write_json(unfinished / SUMS, {p.name: sha256(p) for p in sorted(unfinished.iterdir())})
        for path in (*unfinished.iterdir(), unfinished, *folder.glob("*.json*"), folder):
            flush(path)
    except (OSError, RuntimeError) as e:  # torch.save raises the second
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"cannot write {final}: {str(e).partition(chr(10))[0]}") from e
    remove_checkpoint(final)  # a damaged one of this step, or one that is made again
    unfinished.rename(final)
    flush(final.parent)
    found = checkpoints(folder)  # newer ones are damaged: they do not push an undamaged one out
    for old in found[:max(found.index(final) + 1 - keep, 0)]:
        remove_checkpoint(old)
    return final


def copy_model(checkpoint, folder):
    """Make `folder` the model of a checkpoint, each file at once or not at all."""
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        if path.name not in ("trainer.pt", SUMS):
            part = folder / f"{path.name}.part"
            shutil.copyfile(path, part)
            flush(part)
            part.replace(folder / path.name)
    flush(folder)


def set_aside(path):
    """Move a folder or file of a run out of the way, to best.1, best.2, …, and say so."""
    if path.exists():
        path.rename(warn_and_name(path))


def keep_copy(folder):
    """Copy a model's folder to best.1, best.2, … and say so, unless a copy has the same weights."""
    if folder.exists():
        copies = [p / "model.safetensors" for p in earlier(folder)]
        if sha256(folder / "model.safetensors") not in [sha256(p) for p in copies if p.exists()]:
            shutil.copytree(folder, warn_and_name(folder))


def earlier(path):
    """What was kept of a path before: best.1, best.2, … of best."""
    return [p for p in path.parent.glob(f"{path.name}.*") if p.name[len(path.name) + 1:].isdigit()]


def warn_and_name(path):
    """The next free of the names best.1, best.2, …; a warning says that the path is kept there."""
    kept = path.with_name(f"{path.name}.{len(earlier(path)) + 1}")
    print(f"warning    {path} may be of a step that is lost; it is kept as {kept}", file=sys.stderr)
    return kept


def free_bytes(folder):
    return shutil.disk_usage(folder).free


def remove_checkpoint(path):
    """Remove a checkpoint. A half-removed one bears a name under which `checkpoints` skips it."""
    if path.exists():
        gone = path.rename(path.with_name(path.name + ".old.partial"))
        shutil.rmtree(gone)


def flush(path):
    """Have the system write a file or a folder's list of names to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder):
    """The checkpoints of a run, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def damage_of(checkpoint):
    """What is wrong with the files of a checkpoint, in words, or None."""
    try:
        sums = read_json(checkpoint / SUMS)
    except (OSError, ValueError) as e:
        return f"{SUMS} cannot be read: {e}"
    if "trainer.pt" not in sums or "model.safetensors" not in sums:
        return f"{SUMS} is not whole"
    for name, expected in sums.items():
        try:
            if sha256(checkpoint / name) != expected:
                return f"{name} is not what was written"
        except (OSError, ValueError) as e:
            return f"{name} cannot be read: {getattr(e, 'strerror', e)}"
    return None


def newest_undamaged(folder):
    """The newest undamaged checkpoint of a run, or None where the run has no checkpoint yet.

    A warning names each damaged checkpoint; its files stay. Raises ValueError if all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint
        print(f"warning    {checkpoint} is damaged ({damage}); it is left as it is, the one before "
              "is tried", file=sys.stderr)
    if found:
        raise ValueError(f"--resume: every checkpoint of {folder} is damaged; start again under "
                         "another --name, or put back a file that is named above")
    return None


# ------------------------------------------------------------------ rows and the lock

def cut_rows(path, step):
    """Drop the rows of later steps, which will be made again, and damaged lines."""
    if path.exists():
        write_whole(path, b"".join(
            line for line, row, _ in json_lines(path)
            if row and line.endswith(b"\n") and isinstance(row.get("step"), (int, float))
            and row["step"] <= step))


def lock_run(folder):
    """Make a run's folder and lock it until the returned file is closed, at the latest when this
    process ends. Raises OSError where another process has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / ".lock",
                  f"{folder} is in use by another process; choose another --name")


def locked(path, why_not):
    """Open a file, made if need be, and lock it until it is closed: the file.

    Raises OSError(why_not) where another process has the lock.
    """
    lock = open(path, "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise OSError(why_not) from e
    return lock


if __name__ == "__main__":
    found = []
    for run in map(Path, sys.argv[1:] or ["runs/tiny-pspo-s0"]):
        for checkpoint in checkpoints(run):
            found.append(damage_of(checkpoint))
            print(f"{checkpoint}: {found[-1] or 'whole'}")
        if not checkpoints(run):
            sys.exit(f"error: {run} has no checkpoint; expected the folder of a run")
    sys.exit(any(found))

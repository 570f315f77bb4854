"""Files: JSON, one object or one a line; written at once or not at all; and the hub's failures.

Not here        what stands in the files of a model (hub.py), of a run (checkpoint.py), of a set
                of problems (problems.py) and of an evaluation (evaluation/answers.py).
torch is never imported here: rewards.py depends on this file.
"""
import hashlib
import json
from pathlib import Path


def json_object(text):
    """(the JSON object in a text or bytes, None), or (None, what is there instead)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, nested too deep
        detail = getattr(e, "msg", "not UTF-8, a number too long or nested too deep")
        return None, f"not JSON, expected one object a line: {detail}"
    if not isinstance(value, dict):
        return None, f"expected an object a line, found {type(value).__name__}"
    return value, None


def json_lines(path):
    """Yield (line, row, fault) for every line of a JSON-lines file.

    line: bytes, with the newline that ends it. row: its object, a dict, or None. fault: what is
    wrong with the line, or None. A run that is killed leaves a torn last line.
    """
    with open(path, "rb") as file:
        for line in file:
            yield line, *json_object(line)


def read_rows(path):
    """The rows of a JSON-lines file, blank lines left out; ValueError names a damaged line."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path):
    """(number of the line, row) for every line that is not blank; ValueError as of `read_rows`."""
    for n, (line, row, fault) in enumerate(json_lines(path), 1):
        if line.strip():
            if fault:
                raise ValueError(f"{path}, line {n}: {fault}")
            yield n, row


def read_json(path):
    """The JSON object in a file; ValueError where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise ValueError(f"{path}: expected a JSON file, found: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_rows(path, rows):
    """Write a JSON-lines file at once or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_rows(path, *rows):
    """Add rows to a JSON-lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_whole(path, content):
    """Write a file, text or bytes, at once or not at all."""
    part = Path(f"{path}.part")
    part.write_bytes(content if isinstance(content, bytes) else content.encode())
    part.replace(path)


def hash_file(total, path):
    """Add a file's content to a hash."""
    with open(path, "rb") as file:
        while part := file.read(2**24):
            total.update(part)


def sha256(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    total = hashlib.sha256()
    hash_file(total, path)
    return total.hexdigest()


def hub_errors():
    """The errors that huggingface_hub raises where the hub does not deliver.

    They are the bases of its own error: OSError, and the error of the HTTP library that it is built
    on, whose name differs from version to version.
    """
    from huggingface_hub.errors import HfHubHTTPError
    return OSError, *HfHubHTTPError.__bases__

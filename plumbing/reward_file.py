"""A reward of one's own: the function `reward(text, gold, finished)` in a file of the user's.

What it does    runs the file once, checks its function before a run begins, and calls it; what goes
                wrong is said with the file's name and line.
Not here        the rewards of the project: rewards.py.
Run it alone    python -m plumbing.reward_file mine.py TEXT GOLD     the reward of one completion

The file is the user's own program: it is run, like any module that is imported. Its hash goes into
a run's config.json; what the file imports has no part in the hash.
"""
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback

ARGUMENTS = ("text", "gold", "finished")
loaded = {}  # absolute path of a file: (its function, SHA-256 of what was run)


class RewardFileError(Exception):
    """An error within a file of the user's: it shows as NameError("…") in mine.py, line 7."""

    def __init__(self, path, error):
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == os.path.abspath(path)]
        what = repr(error)
        if isinstance(error, SyntaxError) and not lines:
            what, lines = f"SyntaxError({error.msg!r})", [error.lineno]
        super().__init__(f"{what} in {path}" + "".join(f", line {n}" for n in lines[-1:]))

    __repr__ = Exception.__str__


def load_reward_file(path):
    """Run a file, anew even where it was run before, and return its SHA-256.

    Raises ValueError where the file is missing, fails, or has no such function.
    """
    here = os.path.abspath(path)
    try:
        with open(here, "rb") as file:
            source = file.read()
    except OSError as e:
        raise ValueError(f"{path}: no file that can be read ({e.strerror}); expected a .py file "
                         f"with a function reward({', '.join(ARGUMENTS)})") from e
    spec = importlib.util.spec_from_file_location(f"reward_file {here}", here)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:  # not spec.loader, which may run an older .pyc: what is hashed is what is run
        exec(compile(source, here, "exec"), vars(module))
    except (Exception, SystemExit) as e:
        raise ValueError(f"{path} fails when it is imported: {RewardFileError(path, e)}") from e
    function = getattr(module, "reward", None)
    if not takes_the_arguments(function):
        found = "no function" if not callable(function) else f"reward{inspect.signature(function)}"
        raise ValueError(f"{path}: expected a function reward({', '.join(ARGUMENTS)}), found "
                         f"{found}")
    loaded[here] = function, hashlib.sha256(source).hexdigest()
    return loaded[here][1]


def takes_the_arguments(function):
    """Whether a function can be called with text, gold and finished, in this order."""
    try:
        parameters = inspect.signature(function)
        parameters.bind(*ARGUMENTS)
    except TypeError:  # the second also where it is no function
        return False
    names = list(parameters.parameters)
    return all(names.index(name) == i for i, name in enumerate(ARGUMENTS) if name in names)


def file_reward(path, text, gold, finished):
    """The reward that a file gives a completion, a float; any other value as the file returns it.

    Raises RewardFileError for an error in the file.
    """
    if os.path.abspath(path) not in loaded:
        load_reward_file(path)
    function, _ = loaded[os.path.abspath(path)]
    try:
        value = function(text, gold, finished)
        return float(value) if hasattr(type(value), "__float__") else value
    except (Exception, SystemExit) as e:
        raise RewardFileError(path, e) from e


def sha256_of_reward(path):
    """The SHA-256 of a file as it was run; None for a path that was not, such as "correct"."""
    return loaded.get(os.path.abspath(path), (None, None))[1]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m plumbing.reward_file mine.py TEXT GOLD")
    try:
        print(file_reward(*sys.argv[1:], finished=True))
    except (ValueError, RewardFileError) as e:
        sys.exit(f"error: {e}")

"""The README says what the code does: its flags, metrics, line counts and commands."""
import argparse
import re
from pathlib import Path

import pytest

import checkpoint
import evaluate
import settings
import train

ROOT = Path(train.__file__).resolve().parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "docs/flags.md", "docs/metrics.md", "docs/evaluate.md")}
README = PAGES["README.md"]


def rows_of_table(heading, page="README.md"):
    """The cells of the first table after a heading, without its two header lines."""
    lines = PAGES[page].split(heading, 1)[1].split("\n")
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            break
    return table[2:]


def test_every_flag_of_train_is_in_the_table_with_its_default():
    parser = settings.make_parser()
    by_device = {"model", "device", "dtype", "threads"}
    flags = {}
    for action in parser._actions:
        if action.dest != "help":
            default = "by device" if action.dest in by_device else str(action.default)
            embedded = settings.PRESETS["tiny"].get(action.dest, "")
            flags[action.option_strings[0]] = (default, str(embedded))
    found = {row[0].strip("`"): (row[2], row[3])
             for row in rows_of_table("# All flags", "docs/flags.md")}
    assert found == flags


def test_the_glossary_is_exactly_what_a_run_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "stop_on_signals", lambda: [])
    train.main(["--model", "tiny", "--steps", "1", "--validate-every", "1", "--beta", "0.1",
                "--validation-problems", "2", "--test-problems", "0", "--reward", "noise"])
    logged = set().union(*checkpoint.read_rows(Path("runs/tiny-pspo-s0/metrics.jsonl")))
    glossary = {key for row in rows_of_table("# The logged metrics", "docs/metrics.md")
                for key in re.findall(r"`([^`]+)`", row[0])}
    assert glossary == logged


def test_the_reading_order_names_every_file_with_about_its_length():
    files = {row[0].strip("`"): int(row[1]) for row in rows_of_table("## Read it")}
    assert set(files) == {p.name for p in ROOT.glob("*.py")} | {"tiny/make.py"}
    for name, n_lines in files.items():
        real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(n_lines - real) <= 0.1 * real, (name, n_lines, real)


def test_the_commands_of_the_readme_parse():
    parsers = {"train.py": settings.make_parser, "evaluate.py": evaluate.make_parser}
    commands = re.findall(r"(?:^|&& )python (train|evaluate)\.py +(.*?)(?:#.*)?$",
                          "\n".join(PAGES.values()),
                          re.M)
    assert len(commands) > 8
    for script, arguments in commands:
        words = re.findall(r'"[^"]*"|\S+', arguments)
        parsed = parsers[script + ".py"]().parse_args(words)
        assert isinstance(parsed, argparse.Namespace)


def test_the_methods_of_the_readme_are_settings_that_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = [flags.strip("`") for _, flags in rows_of_table("### Which flags make")]
    assert len(methods) > 8
    for flags in methods:
        settings.read_settings(["--model", "tiny", *flags.split()])


def test_the_lines_of_code_that_the_readme_quotes_stand_there():
    quoted = rows_of_table("The lines of code that make them")
    assert len(quoted) == 5
    source = (ROOT / "objectives.py").read_text(encoding="utf-8")
    for _, line, function in quoted:
        body = source.split(f"def {function.strip('`')}(", 1)[1].split("\ndef ", 1)[0]
        assert line.strip("`") in body, line


def test_the_two_promises_are_marked():
    for name in ("run", "test"):
        assert re.search(rf"<!-- fresh: {name} -->\n```\n.+\n```", README)


def test_the_python_of_the_readme_works_as_it_says(monkeypatch):
    import torch

    import objectives
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    exec(code, vars(objectives))
    value = objectives.OBJECTIVES["halfway"](torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]))
    assert value.tolist() == pytest.approx([1.9, -2.0])  # 0.9·2 + 0.1 where A > 0; −2 elsewhere
    assert list(settings.objective_settings("clip")) == ["epsilon_low", "epsilon_high"]

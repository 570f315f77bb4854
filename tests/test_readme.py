"""The pages say what the code does: its flags, metrics, files and commands; every link leads there.

Pages are README.md and the .md files of docs/, experiments/ and bench/. What is checked is the
text of the page itself, so that a change of the code that a page does not follow fails here.
"""
import argparse
import re
from pathlib import Path

import pytest

import evaluation.settings
import train
from plumbing import settings
from plumbing.files import read_rows

ROOT = Path(train.__file__).resolve().parent
NOT_OURS = {"runs", "evaluations"}  # written by commands, and not in git
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in sorted(ROOT.rglob("*.md"))
         if not any(part.startswith(".") or part in NOT_OURS
                    for part in path.relative_to(ROOT).parts)}
README = PAGES["README.md"]


def rows_of_table(page, heading):
    """The cells of the first table after a heading, without its two header lines."""
    lines = PAGES[page].split(heading, 1)[1].split("\n")
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            break
    return table[2:]


def outside_code(text):
    """The text of a page without its blocks and spans of code, in which nothing is a link."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchor(heading):
    """What GitHub makes of a heading: lower case, letters, digits, _ and - only, spaces as -."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {anchor(heading) for heading in headings}


def broken_links(pages):
    """(page, link) of every relative link of the pages that leads to no file or no heading."""
    broken = []
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)", outside_code(text)):
            if re.match(r"\w+:", link):
                continue
            path, _, name = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            if not target.exists():
                broken.append((page, link))
            elif name:
                there = pages.get(str(target.resolve().relative_to(ROOT)), "")
                if name not in anchors(there):
                    broken.append((page, link))
    return broken


# ------------------------------------------------------------------ pages and links

def test_the_readme_is_a_few_screens():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 20_000


def test_the_first_screen_says_that_smoothing_was_not_shown_to_help():
    first_screen = " ".join(README.splitlines()[:40])
    assert "Smoothing by itself was not shown to help" in first_screen


def test_every_relative_link_of_every_page_leads_to_a_file_and_a_heading():
    assert PAGES.keys() >= {"README.md", "experiments/README.md", "bench/README.md",
                            "docs/evaluate.md", "docs/promises.md", "docs/metrics.md",
                            "docs/flags.md", "docs/files.md", "docs/paper.md"}
    assert broken_links(PAGES) == []


def test_a_link_that_leads_nowhere_is_found():
    text = ("# A clip at ε = 0\n[here](#a-clip-at-ε--0) [gone](#a-clip) [file](nothing.md)\n"
            "![a picture\nof two lines](figures/none.png) [out](https://example.org/#none)\n"
            "`[code](none.md)`\n```\n[code](none.md)\n# no heading\n```\n[no](#no-heading)\n"
            "[train](train.py) [there](docs/flags.md#b-c) [not there](docs/flags.md#b)\n")
    found = broken_links({"README.md": text,
                          "docs/flags.md": "## B, c!\n[up](../README.md#top) [down](#b-c)\n"})
    assert found == [("README.md", "#a-clip"), ("README.md", "nothing.md"),
                     ("README.md", "figures/none.png"), ("README.md", "#no-heading"),
                     ("README.md", "docs/flags.md#b"), ("docs/flags.md", "../README.md#top")]


def test_every_page_can_be_reached_from_the_readme():
    reached, left = set(), ["README.md"]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            for link in re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", outside_code(PAGES[page])):
                target = ((ROOT / page).parent / link).resolve()
                # a link to a folder leads to what lies in it
                left += [other for other in PAGES
                         if target in (ROOT / other, (ROOT / other).parent) and target != ROOT]
    assert reached == PAGES.keys()


# ------------------------------------------------------------------ what the pages say of the code

def test_every_flag_of_train_is_in_the_table_with_its_default():
    parser = settings.make_parser()
    by_device = {"model", "device", "dtype", "threads", "tokens_per_microbatch"}
    flags = {}
    for action in parser._actions:
        if action.dest != "help":
            default = "by device" if action.dest in by_device else str(action.default)
            presets = [str(preset.get(action.dest, "")) for preset in settings.PRESETS.values()]
            flags[action.option_strings[0]] = [default, *presets]
    found = {row[0].strip("`"): row[2:]
             for row in rows_of_table("docs/flags.md", "# All flags")}
    assert found == flags


def test_the_glossary_is_exactly_what_a_run_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "stop_on_signals", lambda: [])
    train.main(["--model", "tiny", "--steps", "1", "--validate-every", "1", "--beta", "0.1",
                "--validation-problems", "2", "--test-problems", "0", "--reward", "noise"])
    logged = set().union(*read_rows(Path("runs/tiny-pspo-s0/metrics.jsonl")))
    glossary = {key for row in rows_of_table("docs/metrics.md", "# The logged metrics")
                for key in re.findall(r"`([^`]+)`", row[0])}
    assert glossary == logged


def test_the_reading_order_is_the_seven_files():
    files = [row[0].strip("`") for row in rows_of_table("README.md", "## Read it")]
    assert files == ["train.py", "objectives.py", "test_objectives.py", "rollout.py", "model.py",
                     "rewards.py", "evaluate.py"]
    for name in files:
        assert (ROOT / name).is_file(), name


def test_no_other_file_of_python_stands_at_the_top_level():
    files = {row[0].strip("`") for row in rows_of_table("README.md", "## Read it")}
    assert files == {path.name for path in ROOT.glob("*.py")}


COMMAND = re.compile(r"^(?:.*&& )?(?:python|.*torchrun .*?) ?(train|evaluate)\.py"
                     r"(.*?)(?:#.*|`.*)?$", re.M)


def test_the_commands_of_the_pages_parse():
    parsers = {"train": settings.make_parser, "evaluate": evaluation.settings.make_parser}
    commands = [found for page in PAGES.values() for found in COMMAND.findall(page)]
    assert len(commands) > 12
    for script, arguments in commands:
        words = re.findall(r'"[^"]*"|\S+', arguments)
        parsed = parsers[script]().parse_args(words)
        assert isinstance(parsed, argparse.Namespace)


def test_every_file_of_the_two_folders_is_in_the_table():
    files = [row[0].strip("`") for row in rows_of_table("docs/files.md", "# The two folders")]
    assert sorted(files) == sorted(f"{folder}/{path.name}" for folder in ("plumbing", "evaluation")
                                   for path in (ROOT / folder).glob("*.py")
                                   if path.name != "__init__.py")


def test_every_program_that_the_pages_run_is_there():
    """`python x.py` and `python -m a.b` name a file; `python -m a` a file or a package."""
    commands = {found for page in PAGES.values()
                for found in re.findall(r"python (?:-m ([a-z0-9_.]+)|([a-z_/]+\.py))", page)}
    assert len(commands) > 10
    for module, script in commands - {("pytest", "")}:
        path = ROOT / (script or module.replace(".", "/") + ".py")
        assert path.is_file() or (path.with_suffix("") / "__main__.py").is_file(), path


def test_the_methods_of_the_readme_are_settings_that_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = [flags.strip("`") for _, flags in rows_of_table("README.md", "## Which flags make")]
    assert len(methods) >= 8
    for flags in methods:
        settings.read_settings(["--model", "tiny", *flags.split()])


def test_the_lines_of_code_that_the_readme_quotes_stand_there():
    quoted = rows_of_table("README.md", "The lines of code that make them")
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

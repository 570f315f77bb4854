"""Which file may import which: the top level is built on the two rooms, never the other way."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"train", "evaluate", "rollout"}
EXCEPTIONS = {("plumbing.run", "rollout"), ("plumbing.run", "evaluate")}  # only train.py has it


def imports_of(path):
    """The modules that a file names in imports as it is loaded, not those inside functions."""
    todo = list(ast.parse(path.read_text(encoding="utf-8")).body)
    for node in todo:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)


def house():
    """{file of the top level or of a room: the files among them that it imports}."""
    paths = [p for room in (".", "plumbing", "evaluation") for p in (ROOT / room).glob("*.py")
             if p.name != "__init__.py"]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    return {name: set(imports_of(path)) & names.keys() for name, path in names.items()}


def test_the_rooms_do_not_import_the_programs():
    found = {(name, other) for name, others in house().items() for other in others & PROGRAMS
             if "." in name}
    assert found == EXCEPTIONS


def test_no_file_imports_itself_by_way_of_others():
    assert len(list(TopologicalSorter(house()).static_order())) == len(house()) > 15


def test_what_stands_at_the_top_level():
    assert {p.stem for p in ROOT.glob("*.py")} == PROGRAMS | {
        "objectives", "test_objectives", "model", "rewards"}


def test_rewards_and_all_that_it_imports_do_without_torch():
    files, seen = house(), set()
    todo = ["rewards"]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += files[name]
            assert "torch" not in set(imports_of(ROOT / (name.replace(".", "/") + ".py"))), name
    assert "plumbing.latex" in seen

"""The shape of the package: rooms import from rooms above them only, no circle, nothing too long to read in one sitting."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

from command import ROOT

PACKAGE = ROOT / "jsublim"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "checkpoints" not in path.parts)
# A room, or a file beside the rooms, imports from its own line and from those above.
ORDER = (
    ("errors",), ("core",), ("runtime",), ("models",),
    ("text",), ("inference",), ("judge",), ("evals",), ("transforms",), ("distill",),
    ("attribution",), ("report",), ("config",), ("pipeline",), ("executors",), ("forecast",), ("digits",), ("exchange",), ("serve",), ("api",),
    ("cli",), ("__main__",),
)  # fmt: skip
LINES, FUNCTION_LINES, FIELDS = 400, 60, 15


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


# The same inside `pipeline/`: a floor stands on those before it.
FLOORS = (
    ("store", "artifact", "remote", "parts", "readings", "row_log", "verifying"), ("arms",), ("setup",), ("cost", "context"),
    ("stage",), ("values",), ("publish", "training", "served"), ("stages",), ("origins",), ("arguments",), ("evaluated",), ("graph",),
    ("experiment",), ("checking",), ("results",), ("run", "rescoring", "showing"), ("listing",),
)  # fmt: skip


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return {name for name in found if name.split(".")[0] == "jsublim" and name in MODULES} - {module(path)}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "jsublim"


def test_no_import_goes_in_a_circle():
    graph = {name: imported(path) for name, path in MODULES.items() if name != "jsublim"}
    # A package's own file lists what is in it: whoever imports a module of it needs that module alone.
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_point_to_rooms_above():
    place = {each: i for i, line in enumerate(ORDER) for each in line}
    below = {
        (name, other)
        for name in MODULES
        if name != "jsublim"
        for other in imported(MODULES[name])
        if place[room(other)] > place[room(name)]
    }
    assert not below


def test_imports_inside_the_pipeline_point_to_floors_below():
    place = {each: i for i, floor in enumerate(FLOORS) for each in floor}
    inside = {name: name.split(".")[2] for name in MODULES if name.startswith("jsublim.pipeline.")}
    upward = {
        (name, other)
        for name, own in inside.items()
        for other in imported(MODULES[name])
        if other in inside and place[inside[other]] > place[own]
    }
    assert not upward


def test_nothing_is_too_long_to_read_in_one_sitting():
    assert [found for path in FILES for found in too_long(path)] == []


def too_long(path: Path) -> Iterator[str]:
    """What of a file is: the file itself, a function, a class without a word on its fields."""
    if path.read_text(encoding="utf-8").count("\n") > LINES:
        yield f"{path} has more than {LINES} lines"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES + _docstring_lines(node):  # fmt: skip
            yield f"{path}: {node.name} has more than {FUNCTION_LINES} lines"
        if isinstance(node, ast.ClassDef):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            if len(fields) > FIELDS and "fields" not in (ast.get_docstring(node) or ""):
                yield f"{path}: {node.name} has {len(fields)} fields"


def _docstring_lines(node: ast.FunctionDef) -> int:
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if is_text else 0

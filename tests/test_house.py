"""The house: which room may know which, and how large a file may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import entroflow

SOURCE = Path(entroflow.__file__).parent
ROOMS = (
    "cli", "llm", "checks", "comparison", "training", "report", "runs", "recipe", "evaluation",
    "exploration", "allocation", "credit", "objectives", "rewards", "attention", "sampling",
    "policies", "shapes", "ground floor",
)  # fmt: skip
"""From top to bottom: a room imports from itself and from those after it."""
MOST_LINES, MOST_ARGUMENTS = 450, 8
STILL_MANY = {
    "evaluation/images.py: draw",
    "objectives/update.py: update",
    "sampling/plan.py: with_children",
    "sampling/solver.py: integrate",
    "sampling/solver.py: sample",
}
"""Functions that take more arguments: none may join them, and one that is mended leaves."""
FACES = ("__init__.py", "__main__.py")
"""Of the package: what hands names on to users, from every room."""


def files():
    return sorted(
        path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name not in FACES
    )


def room_of(parts):
    return parts[0] if len(parts) > 1 else "ground floor"


def imported(tree):
    """Dotted names of modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("entroflow."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entroflow"):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                path = SOURCE.joinpath(*module.split(".")[1:])
                yield module if path.is_dir() or path.with_suffix(".py").is_file() else node.module


def edges():
    """(importing room, imported room, where) of every import that leaves a room."""
    for path in files():
        room = room_of(path.relative_to(SOURCE).parts)
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            parts = module.split(".")[1:]
            if parts:
                is_room = len(parts) > 1 or SOURCE.joinpath(*parts).is_dir()
                other = parts[0] if is_room else "ground floor"
                if other != room:
                    yield room, other, f"{path.relative_to(SOURCE)} imports {module}"


def test_every_room_has_its_place():
    assert {room_of(path.relative_to(SOURCE).parts) for path in files()} == set(ROOMS)


def test_imports_go_down():
    upwards = [where for room, other, where in edges() if ROOMS.index(other) < ROOMS.index(room)]
    assert upwards == []


def test_the_graph_is_not_empty():
    """A check of imports that sees none would pass as well."""
    pairs = {(room, other) for room, other, _ in edges()}
    assert {("training", "sampling"), ("sampling", "policies"), ("cli", "training")} <= pairs
    assert len(pairs) > 60


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_can_be_read_at_once(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_few_arguments():
    """No function but a constructor has many: what belongs together is passed as one."""
    many = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
                spec = node.args
                named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
                count = len([each for each in named if each.arg not in ("self", "cls")])
                if count > MOST_ARGUMENTS:
                    many.append(f"{path.relative_to(SOURCE)}: {node.name}")
    assert set(many) == STILL_MANY

"""Files, functions and parameter lists are short enough to be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "flora").rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 50, 6
# Longer for a reason that is said.
EXCUSED: dict[str, str] = {
    "core/registry.py: option": "what an option may be: four bounds and a list of choices, each optional",
    "runs/loop.py: simulate": "the public way in: all but the configuration is optional",
    "runs/loop.py: resume": "as `simulate`",
}


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield f"{path.relative_to(ROOT / 'flora')}: {node.name}", node


def num_parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def too_long(path: Path) -> list[str]:
    found = []
    lines = len(path.read_text().splitlines())
    if lines > MAX_LINES:
        found.append(f"{path.relative_to(ROOT / 'flora')}: {lines} lines")
    for name, function in functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        if length > MAX_FUNCTION_LINES and name not in EXCUSED:
            found.append(f"{name}: {length} lines")
        if num_parameters(function) > MAX_PARAMETERS and name not in EXCUSED:
            found.append(f"{name}: {num_parameters(function)} parameters")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "flora")))
def test_files_functions_and_parameter_lists_are_short(path: Path) -> None:
    assert not too_long(path)


def test_only_what_is_there_is_excused() -> None:
    known = {name for path in FILES for name, _ in functions(path)}
    assert EXCUSED.keys() <= known

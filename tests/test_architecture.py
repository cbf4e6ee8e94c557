"""Imports between the rooms point one way: down the list in ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "flora").rglob("*.py"))


def rooms() -> list[str]:
    """The rooms as ARCHITECTURE.md lists them, the lowest first."""
    block = re.search(r"## The rooms.*?```\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert block is not None
    names = [re.match(r"(?:\w+ )+", line) for line in block[1].splitlines() if line[:1].strip()]
    return [name for each in reversed(names) if each is not None for name in each[0].split()]


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_room_is_in_the_list() -> None:
    found = {path.name if path.is_dir() else path.stem for path in (ROOT / "flora").iterdir()}
    assert set(rooms()) == {
        name for name in found if name not in ("__init__", "__main__", "__pycache__", "assets", "presets", "py")
    }


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down_the_list(path: Path) -> None:
    order, own = rooms(), module_of(path)
    if own in ("flora.__init__", "flora.__main__"):  # above all rooms
        return
    for module in imports(path):
        if module.startswith("flora.") and room_of(module) != room_of(own):
            assert order.index(room_of(module)) < order.index(room_of(own)), f"{own} imports {module}"


def test_one_file_imports_open_clip() -> None:
    importing = [module_of(path) for path in FILES if any(each.split(".")[0] == "open_clip" for each in imports(path))]
    assert importing == ["flora.clip.backbone"]


def test_modules_of_a_room_do_not_import_each_other_in_circles() -> None:
    known = {module_of(path): path for path in FILES}
    graph = {
        module: {name for each in imports(path) for name in (each, each.rpartition(".")[0]) if name in known}
        for module, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())

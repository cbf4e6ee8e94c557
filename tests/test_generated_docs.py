"""The generated parts of the pages are what the code says now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_with(part: str) -> list[Path]:
    return [path for path in (ROOT / "docs").glob("*.md") if f"<!-- BEGIN {part} -->" in path.read_text()]


@pytest.mark.parametrize("part", ["sections", "components", "records", "figures", "clients", "rules", "strategies"])
def test_a_page_is_not_stale(generate: ModuleType, part: str) -> None:
    (page,) = pages_with(part)
    found = re.search(rf"<!-- BEGIN {part} -->\n(.*?)\n<!-- END {part} -->", page.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == generate.PARTS[part](), f"{page.name}: make docs"


def test_a_stale_page_is_named_and_written_anew(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    page = folder / "page.md"
    page.write_text("before\n<!-- BEGIN rules -->\nold\n<!-- END rules -->\nafter\n")
    monkeypatch.setattr(generate, "FOLDER", folder)
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/page.md: stale: make docs\n"
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert page.read_text() == f"before\n<!-- BEGIN rules -->\n{generate.rules()}\n<!-- END rules -->\nafter\n"

"""The page in a real browser: no error, nothing fetched, tables that are sorted, no wider than a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flora.config.parse import parse_config
from flora.report.page import write_page
from flora.report.reading import read_files
from flora.simulate import simulate

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path is not None), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: one of {', '.join(NAMES)}")


@pytest.fixture(scope="module")
def pages(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of one run and of two, with a class that would be a script if it were not escaped."""
    folder = tmp_path_factory.mktemp("pages")
    raw: dict[str, Any] = {
        "output": str(folder / "runs"),
        "rounds": 2,
        "backbone": {"model": tiny_model, "weights": "random"},
        "data": {"name": "patterns"},
        "partition": {"name": "dirichlet", "concentration": 0.5, "minimum_examples": 3},
        "prompts": {"class_names": {"thing 1": "<script>console.error('ran')</script>", "thing 0": "<b" + "x" * 90}},
        "clients": {"number": 6, "cohort": {"fraction": 0.5}},
        "local": {"learning_rate": 0.01, "batch_size": 8},
    }
    runs = []
    for name, rank in (("one", 2), ("a name without a space " + "n" * 80, 1)):
        result = simulate(parse_config({**raw, "name": name, "adapter": {"name": "lora", "rank": rank}}))
        runs.append(read_files(result.directory))
    write_page(runs[:1], folder / "one.html")
    write_page(runs, folder / "two.html")
    return {"one": folder / "one.html", "two": folder / "two.html"}


def look(path: Path, folder: Path) -> tuple[str, list[str]]:
    """What a browser makes of a page, as HTML, and the lines of its console."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def changed(path: Path, folder: Path, more: str, *, keeps_policy: bool = False) -> Path:
    """The page with something more at its end and, if not said, without what forbids scripts."""
    content = path.read_text()
    if not keeps_policy:
        content, number = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", content)
        assert number == 1
    other = folder / "changed.html"
    other.write_text(content.replace("</body>", f"{more}</body>"))
    return other


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_page_has_no_error_in_the_console_and_shows_pictures(
    pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    content, console = look(pages[name], tmp_path)
    assert console == []
    assert content.count("<figure>") > 5 and "<h2>" in content
    assert "<button" in content  # the script has run


@pytest.mark.parametrize(
    "more", ["<script>1</script>", '<img src="http://127.0.0.1:9/x.png">', '<script src="x.js"></script>']
)
def test_the_console_would_tell_of_other_scripts_and_of_what_is_fetched(
    pages: dict[str, Path], more: str, tmp_path: Path
) -> None:
    _, console = look(changed(pages["one"], tmp_path, more, keeps_policy=True), tmp_path)
    assert len(console) == 1 and "Content Security Policy" in console[0]


def test_a_click_on_a_title_sorts_a_table(pages: dict[str, Path], tmp_path: Path) -> None:
    click = """<script>
      const tables = [...document.querySelectorAll("table.sortable")];
      const table = tables.find((each) => each.tHead.textContent.includes("num train"));
      const place = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === "num train");
      const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[place].textContent));
      const button = table.tHead.rows[0].cells[place].firstChild;
      button.click(); const up = column(); button.click();
      document.title = JSON.stringify([up, column()]);
    </script>"""
    content, console = look(changed(pages["one"], tmp_path, click), tmp_path)
    assert console == []
    title = re.search(r"<title>\[\[(.*?)\],\[(.*?)\]\]</title>", content)
    assert title is not None
    up, down = ([int(each) for each in part.split(",")] for part in title.groups())
    assert len(set(up)) > 1 and up == sorted(up) and down == sorted(up, reverse=True)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_page_is_no_wider_than_a_phone(pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    # No window is as narrow as a phone, a frame is.
    around = tmp_path / "around.html"
    around.write_text(
        f"""<iframe width="360" height="800" style="border:0" srcdoc="{html.escape(pages[name].read_text())}"></iframe>
        <script>onload = () => {{
          const inside = document.querySelector("iframe").contentDocument;
          for (const each of inside.querySelectorAll("details")) each.open = true;
          const texts = [...inside.querySelectorAll("figure > svg text")];
          const lowest = Math.min(...texts.map((each) => each.getBoundingClientRect().height));
          document.title = [inside.documentElement.scrollWidth, lowest].join(" ");
        }}</script>""",
        encoding="utf-8",
    )
    content, _ = look(around, tmp_path)
    title = re.search(r"<title>(\d+) ([\d.]+)</title>", content)
    assert title is not None
    needed, lowest_text = (float(each) for each in title.groups())
    assert 330 < needed <= 360  # less a scroll bar
    assert lowest_text > 8

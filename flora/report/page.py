"""A page of one run or of several: one file that fetches nothing, for any browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from flora.core.errors import UserError
from flora.core.files import read_bytes, write_whole
from flora.evaluation.summary import percent
from flora.report import one_run, several_runs
from flora.report.elements import Html, contents, element, joined
from flora.report.pictures import require_matplotlib
from flora.report.reading import Absent, RunFiles

PAGE_NAME = "report.html"
# What shows that a file is such a page, which another may take the place of.
MARK = '<meta name="generator" content="flora report">'
# After how many seconds a browser reads the page of a run on its way anew.
REFRESH_SECONDS = 15


def page(runs: Sequence[RunFiles]) -> str:
    """Return the page of one or more runs as HTML. Raises `UserError` if matplotlib is missing."""
    require_matplotlib()
    if len(runs) == 1:
        (run,) = runs
        title, sections = run.name, one_run.sections(run)
        head = [element("p", _sentence(run), class_="lead"), _state(run)]
    else:
        title, sections = f"{len(runs)} runs", several_runs.sections(runs)
        head = [
            element("p", ", ".join(run.name for run in runs[:12]) + (", …" if len(runs) > 12 else ""), class_="lead")
        ]
    header = element("header", element("p", "FLoRA", class_="kicker"), element("h1", title), *head)
    shown = [name for name, content in sections.items() if content]
    body = joined([header, contents(shown), element("main", *sections.values()), _footer()])
    return _document(title, body, is_live=any(run.summary is None and not run.was_interrupted for run in runs))


def _sentence(run: RunFiles) -> str:
    try:
        return one_run.sentence(run)
    except Absent as reason:
        return str(reason)


def _state(run: RunFiles) -> Html:
    if run.summary is None:
        rounds = f"round {run.records[-1].round} of {run.setting('rounds')}"
        if run.was_interrupted:
            return element("p", f"Interrupted after {rounds}; how to go on is below.", class_="live")
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return element("p", f"On its way: {rounds}, at {now}.", class_="live")
    frozen, last = run.figure("zero_shot_accuracy"), run.figure("last_accuracy")
    if not run.records[-1].round:
        return element("p", element("b", percent(frozen)), " zero-shot; nothing was trained.", class_="claim")
    return element(
        "p", "From ", element("b", percent(frozen)), " zero-shot to ", element("b", percent(last)), ".", class_="claim"
    )


def _footer() -> Html:
    note = (
        "A result is the last round, never the best one, which is chosen on the test set. Accuracies are of the common "
        "test images unless they are said to be of clients' own."
    )
    return element("footer", note)


def _document(title: str, body: Html, *, is_live: bool) -> str:
    """The whole file. Its policy lets a browser fetch nothing, and run no script but the one that sorts tables."""
    style, script = (files("flora").joinpath(f"assets/report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if is_live else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f'<link rel="icon" href="data:,">\n{element("title", title)}\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def write_page(runs: Sequence[RunFiles], path: Path) -> None:
    """Write the page of some runs. Raises `UserError` if `path` is another file, or can't be written."""
    refuse_other_file(path)
    content = page(runs).encode("utf-8", "backslashreplace")
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from None


def refuse_other_file(path: Path) -> None:
    """Raise `UserError` if there is something at `path` that is no such page."""
    try:
        if MARK.encode() not in read_bytes(path)[:1000]:
            raise UserError(f"{path}: is there already, and is no page of flora report; choose another --output")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None

"""HTML made of elements, in which every text is escaped unless it is HTML itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class Html(str):
    """Text that is HTML; any other text is escaped where it goes into an element."""


def markup(content: Any) -> Html:
    """Return `content` as HTML: as it is if it is HTML, else as escaped text."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def element(name: str, *content: Any, **attributes: Any) -> Html:
    """Return one element with its content and attributes; those that are None are left out.

    A trailing underscore keeps an attribute's name from being a word of Python (`class_`), others are hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def joined(parts: Iterable[Any]) -> Html:
    """Return the parts one after another."""
    return Html("".join(map(markup, parts)))


def section(title: str, *content: Any) -> Html:
    """Return a section of the page under its title; nothing without content."""
    inside = joined(content)
    return element("section", element("h2", title), inside, id=_anchor(title)) if inside else Html("")


def contents(titles: Iterable[str]) -> Html:
    """Return links to sections."""
    return element("nav", *(element("a", title, href=f"#{_anchor(title)}") for title in titles))


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())


def folded(title: str, *content: Any) -> Html:
    """Return what is shown when its title is clicked."""
    return element("details", element("summary", title), *content)


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, and the number by which its column is sorted."""

    shown: Any
    value: float | None = None


def table(titles: Sequence[Any], rows: Iterable[Sequence[Any]], *, sortable: bool = False) -> Html:
    """Return a table that scrolls by itself where it is too wide; numbers are to the right."""
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = joined(element("tr", *map(_cell, row)) for row in rows)
    inside = element("table", element("thead", head), element("tbody", body), class_="sortable" if sortable else None)
    return element("div", inside, class_="scroll")


def _cell(content: Any) -> Html:
    cell = content if isinstance(content, Cell) else Cell(content, content if _is_number(content) else None)
    number = None if cell.value is None else "number"
    return element("td", cell.shown, class_=number, data_value=cell.value)


def _is_number(content: Any) -> bool:
    return isinstance(content, int | float) and not isinstance(content, bool)


def facts(pairs: Iterable[tuple[Any, Any]]) -> Html:
    """Return figures with what they are, as a row of tiles that wraps."""
    tiles = [element("div", element("dt", title), element("dd", value)) for title, value in pairs]
    return element("dl", *tiles, class_="facts") if tiles else Html("")


def bars(rows: Iterable[tuple[str, float, str, str]]) -> Html:
    """Return fractions as bars: a name, the fraction, what is shown of it, and whether it is the result."""
    lines = [
        element(
            "div",
            element("span", name, class_="name"),
            element("span", element("span", style=f"width:{100 * min(max(fraction, 0), 1):.2f}%"), class_="track"),
            element("span", shown, class_="value"),
            class_=f"bar {kind}".strip(),
        )
        for name, fraction, shown, kind in rows
    ]
    return element("div", *lines, class_="bars") if lines else Html("")

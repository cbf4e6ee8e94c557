"""Pictures as inline SVG in the page's colours, light or dark. Needs the extra `[report]`."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flora.core.errors import UserError
from flora.report.curves import COLOURS, FAR, GREY, STYLE, scale_axis, scale_numbers
from flora.report.elements import Html, element

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches; text of 10 points stays readable where the picture is as wide as a phone.
SIZE = (4.6, 2.9)
GRID, PAPER = "#e6e6e6", "#fefefe"
# The page's style sheet says what these are, for light and for dark paper.
VARIABLES = {
    **{colour.lower(): f"var(--s{place})" for place, colour in enumerate(COLOURS)},
    "#000000": "currentColor", GREY.lower(): "var(--quiet)", GRID: "var(--grid)", PAPER: "var(--paper)",
}  # fmt: skip
# What a cell of a heat map is at its highest; its opacity says how high, so it suits either paper.
HEAT = (0.20, 0.48, 0.93)
DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2), (1, 3))
# Cells of a heat map with their number in it, and names along a side of a picture, at most.
MAX_CELLS, MAX_NAMES = 12, 24
# Points of a line, and columns of a heat map, that a picture has room for.
MAX_COLUMNS = 1500


def require_matplotlib() -> None:
    """Raise `UserError` if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("a page needs matplotlib: pip install 'flora-clip[report]' (or matplotlib)") from None


@dataclass(frozen=True)
class Line:
    """A line of a picture: its points, a band from `low` to `high` if there is one, and its place among the styles.

    Of the style None it is grey, of no importance by itself. `is_level`: one to compare others with, as high all along.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int | None = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    is_level: bool = False

    @property
    def colour(self) -> str:
        """Its colour in the picture, for which the page's own comes."""
        return GREY if self.style is None else COLOURS[self.style % len(COLOURS)]

    @property
    def dashes(self) -> tuple[int, ...]:
        """Lengths of its dashes and gaps; none for a solid line."""
        if self.style is None or self.is_level:
            return (2, 3) if self.style is None else (6, 3)
        return DASHES[self.style // len(COLOURS) % len(DASHES)]

    def look(self) -> dict[str, Any]:
        """Return what matplotlib's `plot` takes."""
        is_quiet = self.style is None or self.is_level
        look: dict[str, Any] = {"color": self.colour, "linewidth": 1.3 if is_quiet else 1.8}
        if self.dashes:
            look["dashes"] = self.dashes
        if not is_quiet and len(self.xs) <= 12:
            look |= {"marker": "o", "markersize": 4}
        return look


def svg(draw: Callable[[Figure], None], about: str, size: tuple[float, float] = SIZE) -> Html:
    """Return what `draw` draws on a figure, as an SVG element; `about` is what a screen reader says of it."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style_of_figure = {
        "font.size": 10.0, "axes.labelsize": 10.0, "axes.titlesize": 10.0, "legend.fontsize": 10.0,
        "grid.color": GRID, "svg.fonttype": "none", "svg.hashsalt": about, "image.interpolation": "none",
        "figure.facecolor": "none", "axes.facecolor": "none",
    }  # fmt: skip
    content = io.StringIO()
    with style.context(["default", STYLE, style_of_figure]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has its own fonts
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(content, metadata={"Date": None, "Creator": None})  # `savefig` draws everything twice
    return _inline(content.getvalue(), about)


def _inline(text: str, about: str) -> Html:
    """The SVG element of a file, in the page's colours and font, without names that another picture may have, too."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)
    text = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {VARIABLES.get(found[2], found[2])}", text
    )
    # matplotlib's versions differ in how they write fonts.
    text = re.sub(r"(style=\"[^\"]*)font-family: [^;\"]*", r"\1font-family: var(--font)", text)
    text = re.sub(r"(style=\"[^\"]*)font: ([\d.]+px) [^;\"]*", r"\1font: \2 var(--font)", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    label = element("svg", role="img", aria_label=about).removesuffix("></svg>")
    return Html(f"{label} {box[0]}>" + text[text.index(">") + 1 :].strip())


def lines_picture(
    lines: Sequence[Line],
    about: str,
    x_title: str,
    *,
    percent: bool = False,
    has_legend: bool | None = None,
    numbers: Sequence[float] = (),
) -> Html:
    """Return lines over `x_title`, in percent or as they are; with a legend, if not said, where they are several.

    `numbers` are those of a setting that they are over, if it is one, in ascending order.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [max(line.xs) for line in lines if len(line.xs)]
        is_far = not numbers and max(ends) > FAR * min(ends) > 0
        for line in lines:
            _draw_line(axes, line, 100 if percent else 1, above_zero=is_far)
        axes.set_xlabel(x_title)
        axes.margins(x=0.02)
        if percent:
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(bottom, -2), min(top, 102))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        if numbers:
            scale_numbers(axes, numbers)
        elif is_far:
            scale_axis(axes, over_bytes=True)
        elif all(float(x).is_integer() for line in lines for x in line.xs):
            scale_axis(axes, over_bytes=False)

    shows = len(lines) > 1 if has_legend is None else has_legend
    return Html(svg(draw, about) + (legend(lines) if shows else ""))


def _draw_line(axes: Axes, line: Line, scale: float, *, above_zero: bool) -> None:
    """Draw a line and its band; `above_zero` without what logarithms have no place for."""
    xs = np.array(line.xs, float)
    shown = xs > 0 if above_zero else np.isfinite(xs)
    axes.plot(xs[shown], scale * np.array(line.ys)[shown], **line.look())
    if line.low is not None and line.high is not None:
        low, high = (scale * np.array(side)[shown] for side in (line.low, line.high))
        axes.fill_between(xs[shown], low, high, color=line.colour, alpha=0.15, linewidth=0)


def bars_along(axes: Axes, heights: np.ndarray, colour: str, most: int) -> None:
    """Draw a bar for each height or, for more than `most`, the outline of all, thinned where they are very many."""
    if len(heights) <= most:
        axes.bar(range(len(heights)), heights, color=colour, width=0.75)
    else:
        places = thinned(len(heights))
        axes.fill_between(places, heights[places], color=colour, linewidth=0)
        axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)


def thinned(number: int) -> np.ndarray:
    """Return the places `(N,)` of so many things, or of as many of them as a picture has room for, evenly."""
    return np.unique(np.linspace(0, number - 1, min(number, MAX_COLUMNS)).round().astype(int))


def legend(lines: Sequence[Line], *, of_points: bool = False) -> Html:
    """Return the names of lines, or of points, with a sample of each, which wrap as text does; one of each name."""
    unique = {line.name: line for line in lines}
    show = _point if of_points else sample
    return element("ul", *(element("li", show(line), line.name) for line in unique.values()), class_="legend")


def _point(line: Line) -> Html:
    colour = VARIABLES[line.colour.lower()]
    fill = colour if line.style == 0 else "none"
    circle = element("circle", cx=5, cy=5, r=3.6, style=f"stroke:{colour};stroke-width:1.5;fill:{fill}")
    return element("svg", circle, width=10, height=10, aria_hidden="true")


def sample(line: Line) -> Html:
    """Return a short piece of a line."""
    colour, dashes = VARIABLES[line.colour.lower()], " ".join(map(str, line.dashes)) or "none"
    piece = element(
        "line", x1=1, y1=5, x2=23, y2=5, style=f"stroke:{colour};stroke-width:2.5;stroke-dasharray:{dashes}"
    )
    return element("svg", piece, width=24, height=10, aria_hidden="true")


def heat_map(
    counts: np.ndarray, rows: Sequence[str], columns: Sequence[str], about: str, titles: tuple[str, str]
) -> Html:
    """Return `counts` `(R, C)` as cells, the darker the more; `titles` say what the columns and the rows are.

    Of very many columns the first ones.
    """
    counts, columns = counts[:, :MAX_COLUMNS], columns[:MAX_COLUMNS]
    shares = counts / max(float(counts.max(initial=0)), 1e-12)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        cells = np.empty((*counts.shape, 4))
        cells[..., :3], cells[..., 3] = HEAT, 0.95 * np.sqrt(np.clip(shares, 0, 1))
        axes.imshow(cells, aspect="auto")
        axes.grid(visible=False)
        _name_ticks(axes, rows, columns)
        if max(counts.shape) <= MAX_CELLS:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=9)
        axes.set_xlabel(titles[0])
        axes.set_ylabel(titles[1])

    height = min(max(0.24 * len(rows) + 1.0, 2.4), 4.6)
    return svg(draw, about, (SIZE[0], height))


def _name_ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names along both sides where there is room, else numbers."""
    if len(rows) <= MAX_NAMES:
        axes.set_yticks(range(len(rows)), [shortened(name) for name in rows])
    if len(columns) <= MAX_NAMES:
        is_long = sum(max(len(name), 2) for name in map(shortened, columns)) > 36
        axes.set_xticks(range(len(columns)), [shortened(name) for name in columns], rotation=90 if is_long else 0)


def shortened(name: str, most: int = 16) -> str:
    """Return a name as it fits at the side of a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"

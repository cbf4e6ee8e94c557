"""Lines in panels as pictures; a sweep's accuracy over rounds and over the bytes sent. Needs the extra `[report]`."""

from __future__ import annotations

import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flora.core.errors import UserError
from flora.core.files import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/) without its yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
GREY = "#555555"
ZERO_SHOT: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.0}
# Lines of a panel whose zero-shot accuracies lie closer than this (different seeds) share one dotted line.
SAME_ZERO_SHOT = 0.01
# Lines of a panel, and panels of a picture; more of them go into further panels and pictures.
MAX_LINES, MAX_PANELS = 14, 12
# How many numbers a setting has at least that is drawn over, and at most where each of them has a tick.
MIN_NUMBERS, MAX_TICKS = 3, 10
# Numbers of which the greatest is so many times the least are drawn over logarithms, and so are lines of which one goes
# so many times further than another.
FAR = 8
STYLE = {
    "font.size": 9.0, "axes.titlesize": 9.5, "axes.labelsize": 9.5, "legend.fontsize": 9.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.linewidth": 0.7,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": "black", "ytick.labelcolor": "black",
    # A dollar sign in a name is a dollar sign.
    "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Points:
    """A line of a panel: fractions over `xs`, and their deviation over seeds, None without several.

    `zero_shot` is the level that it is to be compared with, if there is one.
    """

    xs: tuple[float, ...]
    means: tuple[float, ...]
    deviation: tuple[float, ...] | None = None
    zero_shot: float | None = None


Panels = Mapping[str, Mapping[str, Points]]
"""Lines by their names, by the titles of their panels."""


@dataclass(frozen=True)
class Axis:
    """What lines go over and what they show, and how the axis below them is laid out."""

    x_title: str
    y_title: str
    scale: Callable[[Axes], None]


@dataclass(frozen=True)
class Curve:
    """One run: the evaluated rounds, 0 first, the bytes that all clients sent up and down by then, and the accuracy."""

    panel: str
    line: str
    rounds: tuple[int, ...]
    sent_bytes: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Average:
    """The mean of runs that differ in nothing but their seeds; `deviation` (n - 1) is None for a single run."""

    rounds: tuple[int, ...]
    sent_bytes: tuple[float, ...]
    accuracy: tuple[float, ...]
    deviation: tuple[float, ...] | None

    @property
    def zero_shot(self) -> float | None:
        """The accuracy of round 0, if that was evaluated."""
        return self.accuracy[0] if self.rounds[:1] == (0,) else None

    def over_rounds(self) -> Points:
        """The line over rounds."""
        return Points(self.rounds, self.accuracy, self.deviation, self.zero_shot)

    def over_bytes(self) -> Points:
        """The line over megabytes: a logarithmic axis has no place for 0, where zero-shot is the dotted level."""
        places = [place for place, sent in enumerate(self.sent_bytes) if sent > 0]
        return Points(
            tuple(self.sent_bytes[place] / 1e6 for place in places),
            tuple(self.accuracy[place] for place in places),
            None if self.deviation is None else tuple(self.deviation[place] for place in places),
            self.zero_shot,
        )


def average(runs: Sequence[Curve]) -> Average:
    """Mean and standard deviation of one or more runs at the rounds that all of them evaluated."""
    tables = [dict(zip(run.rounds, zip(run.sent_bytes, run.accuracy, strict=True), strict=True)) for run in runs]
    rounds = sorted(set.intersection(*(set(table) for table in tables)))
    points = [[table[round] for table in tables] for round in rounds]
    accuracies = [[accuracy for _, accuracy in point] for point in points]
    return Average(
        rounds=tuple(rounds),
        sent_bytes=tuple(statistics.fmean(sent for sent, _ in point) for point in points),
        accuracy=tuple(statistics.fmean(each) for each in accuracies),
        deviation=tuple(statistics.stdev(each) for each in accuracies) if len(runs) > 1 else None,
    )


def averages(curves: Sequence[Curve]) -> dict[str, dict[str, Average]]:
    """The average of each line of each panel, both in order of appearance.

    Runs without a point are left out, and so are lines whose runs were never evaluated at the same round.
    """
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        if curve.rounds:
            groups.setdefault((curve.panel, curve.line), []).append(curve)
    panels: dict[str, dict[str, Average]] = {}
    for (panel, line), runs in groups.items():
        averaged = average(runs)
        if averaged.rounds:
            panels.setdefault(panel, {})[line] = averaged
    return panels


def undrawn(curves: Sequence[Curve]) -> list[str]:
    """The lines that `averages` leaves out, as "panel: line"."""
    drawn = {(panel, line) for panel, lines in averages(curves).items() for line in lines}
    every = dict.fromkeys((curve.panel, curve.line) for curve in curves)
    return [f"{panel}: {line}" for panel, line in every if (panel, line) not in drawn]


def _of_readable_size(panels: Panels) -> list[Panels]:
    """The panels of each picture; one with too many lines is several."""
    small: dict[str, Mapping[str, Points]] = {}
    for panel, lines in panels.items():
        parts = [list(lines.items())[start : start + MAX_LINES] for start in range(0, len(lines), MAX_LINES)]
        for number, part in enumerate(parts, start=1):
            small[panel if len(parts) == 1 else f"{panel} ({number} of {len(parts)})"] = dict(part)
    items = list(small.items())
    return [dict(items[start : start + MAX_PANELS]) for start in range(0, len(items), MAX_PANELS)]


def zero_shot_levels(of_lines: Sequence[float | None]) -> list[float]:
    """The zero-shot accuracies to show in a panel: one for all its lines if they agree, else each."""
    levels = sorted({each for each in of_lines if each is not None})
    return [statistics.fmean(levels)] if levels and levels[-1] - levels[0] < SAME_ZERO_SHOT else levels


def draw_curves(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Write `accuracy_over_rounds.png` and `accuracy_over_bytes.png` into `folder`; return their paths.

    Runs of one panel and line are seeds: drawn are their mean and a band of one standard deviation to either side. The
    rest is as for `draw_lines`.
    """
    panels = averages(curves)

    def over(of: Callable[[Average], Points]) -> Panels:
        return {panel: {name: of(line) for name, line in lines.items()} for panel, lines in panels.items()}

    pictures = {
        "accuracy_over_rounds": (over(Average.over_rounds), ROUNDS),
        "accuracy_over_bytes": (over(Average.over_bytes), BYTES),
    }
    return draw_lines(pictures, folder)


def draw_lines(pictures: Mapping[str, tuple[Panels, Axis]], folder: Path) -> list[Path]:
    """Write each picture as `NAME.png` into `folder`; return the paths.

    What is too much for one goes on in `NAME-2.png` and so on; such pictures of an earlier call are removed. The same
    lines give the same bytes (with one version of matplotlib). A picture without a line is not written. Raises
    `UserError` if matplotlib is missing or a file can't be written.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise UserError("curves need matplotlib: pip install 'flora-clip[report]' (or matplotlib)") from None
    contents: dict[Path, bytes] = {}
    for name, (panels, axis) in pictures.items():
        lines = list(dict.fromkeys(line for lines in panels.values() for line in lines))
        # The user's own matplotlibrc has no say: the pictures of two machines are to look alike.
        with style.context(["default", STYLE]):
            for number, some in enumerate(_of_readable_size(panels), start=1):
                path = folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png")
                contents[path] = png(_figure(some, lines, axis))
        for old in folder.glob(f"{name}-[0-9]*.png") if panels else ():
            if old not in contents:
                old.unlink(missing_ok=True)
    for path, content in contents.items():
        write_picture(path, content)
    return list(contents)


def _figure(panels: Panels, names: Sequence[str], axis: Axis) -> Figure:
    """The panels in one to three columns with one y axis for all, and the legend below."""
    from matplotlib.figure import Figure

    num_columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_columns)
    width = {1: 6.4, 2: 8.4, 3: 10.8}[num_columns]
    height = num_rows * {1: 3.8, 2: 3.0, 3: 2.6}[num_columns] + 0.3
    handles = _handles(panels, names)
    labels = [textwrap.fill(str(handle.get_label()), 60) for handle in handles]
    num_legend_columns = _legend_columns(labels, width)
    legend_height = 0.2 * _legend_lines(labels, num_legend_columns) + 0.15
    figure = Figure(figsize=(width, height + legend_height), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[height, legend_height]).flatten()
    grid = top.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for axes, (panel, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(textwrap.fill(panel, int(13 * width / num_columns)))
        _draw_panel(axes, lines, names)
        axis.scale(axes)
    for axes in grid[len(panels) :]:
        axes.remove()
    low, high = grid[0].get_ylim()
    grid[0].set_ylim(max(low, -2), min(high, 102))  # a band may leave the possible; markers need room
    top.supxlabel(axis.x_title, fontsize=9.5)
    top.supylabel(axis.y_title, fontsize=9.5)
    bottom.legend(handles, labels, loc="upper center", ncols=num_legend_columns, handlelength=4, frameon=False)
    return figure


def _draw_panel(axes: Axes, lines: Mapping[str, Points], names: Sequence[str]) -> None:
    for level in zero_shot_levels([line.zero_shot for line in lines.values()]):
        axes.axhline(100 * level, **ZERO_SHOT)
    for name, line in lines.items():
        order, means = names.index(name), [100 * mean for mean in line.means]
        markers = None if len(line.xs) <= 10 else (0.1 * order / len(names), 0.1)
        axes.plot(line.xs, means, markevery=markers, **line_style(order))
        if line.deviation is not None:
            low = [mean - 100 * each for mean, each in zip(means, line.deviation, strict=True)]
            high = [mean + 100 * each for mean, each in zip(means, line.deviation, strict=True)]
            axes.fill_between(line.xs, low, high, color=line_style(order)["color"], alpha=0.13, linewidth=0)


def line_style(order: int) -> dict[str, Any]:
    """Return the style of the line of this number; up to 70 lines differ in marker or dashes, without their colours."""
    turn = order // len(MARKERS)
    colour = COLOURS[(order + 3 * turn) % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[order % len(MARKERS)],
        "markerfacecolor": "white" if turn % 2 else colour,
        "linestyle": DASHES[order % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.3,
    }


def scale_axis(axes: Axes, *, over_bytes: bool) -> None:
    """Set whole rounds, or megabytes in plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not over_bytes:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return
    if not math.isfinite(axes.dataLim.minposx):  # nothing was sent
        axes.set_xlim(1, 10)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 3 * low:  # too short for more than one of 1, 2, 5 and 10
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda megabytes, _: f"{megabytes:,.9g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def scale_numbers(axes: Axes, numbers: Sequence[float]) -> None:
    """Set a tick at each of a setting's numbers, of few; on a logarithmic axis where they lie far apart."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    if numbers[-1] >= FAR * numbers[0] > 0:
        axes.set_xscale("log")
    if len(numbers) <= MAX_TICKS:
        axes.set_xticks(numbers)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


TEST_ACCURACY = "accuracy on the common test set, %"
ROUNDS = Axis("round", TEST_ACCURACY, partial(scale_axis, over_bytes=False))
BYTES = Axis("megabytes sent, up and down, all clients", TEST_ACCURACY, partial(scale_axis, over_bytes=True))


def _handles(panels: Panels, names: Sequence[str]) -> list[Artist]:
    """The legend's entries: the lines that there are to see, and what else there is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn = [line for lines in panels.values() for line in lines.values()]
    seen = {name for lines in panels.values() for name, line in lines.items() if line.xs}
    handles: list[Artist] = [
        Line2D([], [], label=name, **line_style(order)) for order, name in enumerate(names) if name in seen
    ]
    if any(line.zero_shot is not None for line in drawn):
        handles.append(Line2D([], [], label="zero-shot", **ZERO_SHOT))
    if any(line.deviation is not None for line in drawn):
        handles.append(Patch(color=GREY, alpha=0.25, linewidth=0, label="± 1 standard deviation"))
    return handles


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """In how many columns the labels fit into a figure of that many inches."""
    # 0.07 inches a character of 9 points, and 0.9 for the sample of the line and the gaps.
    lengths = [0.07 * max(map(len, label.split("\n"))) + 0.9 for label in labels]
    fitting = (number for number in range(len(labels), 1, -1) if sum(map(max, _columns(lengths, number))) < width)
    return next(fitting, 1)


def _legend_lines(labels: Sequence[str], num_columns: int) -> int:
    """Return how many lines of text the tallest column has."""
    return max(map(sum, _columns([label.count("\n") + 1 for label in labels], num_columns)))


def _columns(entries: Sequence[T], number: int) -> list[list[T]]:
    """The entries in columns, the first ones longer by one where it doesn't come out even, as a legend has them."""
    whole, rest = divmod(len(entries), number)
    starts = [column * whole + min(column, rest) for column in range(number + 1)]
    return [list(entries[start:end]) for start, end in itertools.pairwise(starts)]


def png(figure: Figure) -> bytes:
    """The figure as PNG, without a date or a version in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure)  # takes the place of the figure's own canvas
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def write_picture(path: Path, content: bytes) -> None:
    """Write a picture whole. Raises `UserError` if that is not possible."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from None

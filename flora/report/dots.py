"""A sweep's results as a picture: a dot for each method, with the deviation over seeds. Needs the extra `[report]`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flora.core.errors import UserError
from flora.report.curves import COLOURS, STYLE, png, write_picture

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Panels of a picture, beside each other.
MAX_COLUMNS = 4


@dataclass(frozen=True)
class Dot:
    """A method's result in a panel: a fraction, and its deviation over seeds, None without several."""

    panel: str
    method: str
    figure: str
    mean: float
    deviation: float | None


def _of_all(grid: Sequence[Axes]) -> tuple[list[Artist], list[str]]:
    """The legend's entries, each label once, whichever of the panels has it."""
    by_label: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    return list(by_label.values()), list(by_label)


def draw_dots(dots: Sequence[Dot], path: Path) -> list[Path]:
    """Write one picture: a panel for each data set, a row for each method, a colour for each figure; return its path.

    Nothing is written without a dot. Raises `UserError` if matplotlib is missing or the file can't be written.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'flora-clip[report]' (or matplotlib)") from None
    if not dots:
        return []
    panels, methods, figures = (
        list(dict.fromkeys(getattr(dot, part) for dot in dots)) for part in ("panel", "method", "figure")
    )
    num_columns = min(len(panels), MAX_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    size = 1.8 + 2.6 * num_columns, num_rows * (0.9 + 0.24 * len(methods)) + 0.4 + 0.2 * len(figures)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            if len(panels) > 1:
                axes.set_title(textwrap.fill(panel, 30))
            axes.tick_params(labelbottom=True)  # above a place without a panel, too
            for order, name in enumerate(figures):
                some = [dot for dot in dots if dot.panel == panel and dot.figure == name]
                if not some:
                    continue
                # Dots of one method lie a little below each other, so that none hides another.
                shift = (order - (len(figures) - 1) / 2) * 0.6 / len(figures)
                axes.errorbar(
                    [100 * dot.mean for dot in some],
                    [methods.index(dot.method) + shift for dot in some],
                    xerr=[100 * (dot.deviation or 0.0) for dot in some],
                    fmt="o", markersize=4.5, capsize=2, linewidth=1.2, color=COLOURS[order % len(COLOURS)], label=name,
                )  # fmt: skip
            axes.set_yticks(range(len(methods)), methods)
            axes.set_ylim(len(methods) - 0.5, -0.5)
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.supxlabel("accuracy, %; bars: ± 1 standard deviation over seeds", fontsize=9.5)
        # 0.07 inches a character of 9 points, and 0.8 for the sample and the gaps.
        fitting = int(size[0] / (0.07 * max(map(len, figures)) + 0.8))
        handles, labels = _of_all(list(grid[: len(panels)]))
        figure.legend(
            handles, labels, loc="outside upper center", ncols=max(min(len(labels), fitting), 1), frameon=False
        )
        write_picture(path, png(figure))
    return [path]

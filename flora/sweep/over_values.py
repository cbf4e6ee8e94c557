"""A sweep's results over a setting whose values are numbers: a line for each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from flora.report.curves import MIN_NUMBERS, SAME_ZERO_SHOT, Axis, Panels, Points, scale_numbers
from flora.sweep.outcomes import frozen
from flora.sweep.results import title_of
from flora.sweep.table import Row, keys_of_panels, panel_and_method


def pictures_over_values(rows: Sequence[Row], figures: Sequence[str]) -> dict[str, tuple[Panels, Axis]]:
    """The pictures of figures over each swept setting that has several numbers, as `draw_lines` takes them."""
    pictures = {}
    for key in dict.fromkeys(key for row in rows for key in row.labels):
        numbers = sorted({number for row in rows if (number := _number(row, key)) is not None})
        if len(numbers) >= MIN_NUMBERS:
            axis = Axis(key, "accuracy, %", partial(scale_numbers, numbers=numbers))
            pictures[f"results_over_{key}"] = _panels(rows, key, figures), axis
    return pictures


def _number(row: Row, key: str) -> float | None:
    """The number that a setting is in a row; None where it is none, or where no run has finished."""
    try:
        number = float(row.labels.get(key, ""))
    except ValueError:
        return None
    return number if math.isfinite(number) and row.outcomes else None


def _panels(rows: Sequence[Row], key: str, figures: Sequence[str]) -> Panels:
    """The lines of figures over the numbers of a setting: a panel for each data set, partition and figure."""
    numbered = [(number, row) for row in rows if (number := _number(row, key)) is not None]
    points = [
        (number, replace(row, labels={name: value for name, value in row.labels.items() if name != key}))
        for number, row in sorted(numbered, key=lambda pair: pair[0])
    ]
    panel_keys = keys_of_panels([row for _, row in points])
    lines: dict[tuple[str, str, str], list[tuple[float, Row]]] = {}
    for number, row in points:
        for figure in figures:
            if row.mean(figure) is not None:
                place = (*panel_and_method(row, panel_keys.__contains__), figure)
                lines.setdefault(place, []).append((number, row))
    panels: dict[str, dict[str, Points]] = {}
    for (panel, line, figure), some in lines.items():
        title = title_of(figure) if panel == "all runs" else f"{panel}: {title_of(figure)}"
        panels.setdefault(title, {})[line] = _points(some, figure)
    return panels


def _points(points: Sequence[tuple[float, Row]], figure: str) -> Points:
    """The line of a figure through rows, each at its number; its zero-shot level where all have the same."""
    rows, of_frozen = [row for _, row in points], frozen(figure)
    deviations = [row.deviation(figure) for row in rows]
    levels = [level for row in rows if of_frozen and (level := row.mean(of_frozen)) is not None]
    is_level = bool(levels) and max(levels) - min(levels) < SAME_ZERO_SHOT
    return Points(
        xs=tuple(number for number, _ in points),
        means=tuple(row.mean(figure) or 0.0 for row in rows),
        deviation=tuple(each or 0.0 for each in deviations) if any(each is not None for each in deviations) else None,
        zero_shot=statistics.fmean(levels) if is_level else None,
    )

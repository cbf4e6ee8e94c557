"""What runs come to over a setting whose values are numbers: a line for all that differ in nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial

from flora.report.charts import picture
from flora.report.curves import MIN_NUMBERS
from flora.report.elements import Html
from flora.report.groups import Group, alike_but_for, differing, name_by, naming
from flora.report.one_run import grid
from flora.report.pictures import Line, lines_picture

FIGURES = {"Accuracy": "last_accuracy", "Accuracy on clients' own images": "client_accuracy_mean"}


def over_settings(groups: Sequence[Group]) -> Html:
    """Return the last round's accuracies over each setting that has several numbers; nothing without one."""
    pictures = []
    for key in differing([group.settings for group in groups]):
        numbers = sorted({number for group in groups if (number := _number(group, key)) is not None})
        if len(numbers) < MIN_NUMBERS:
            continue
        for title, figure in FIGURES.items():
            lines = _lines([group for group in groups if _number(group, key) is not None], key, figure)
            if any(len(line.xs) > 1 for line in lines):
                whole = f"{title} over {key}"
                draw = partial(lines_picture, lines, f"{whole}, all runs", key, percent=True, numbers=numbers)
                pictures.append(picture(whole, draw))
    return grid(*pictures)


def _number(group: Group, key: str) -> float | None:
    """The number that a setting is in a group's runs; None where it is none."""
    value = group.settings.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _lines(groups: Sequence[Group], key: str, figure: str) -> list[Line]:
    """The lines of a figure over a setting, means over seeds with a band of one standard deviation (n - 1)."""
    alike = alike_but_for(groups, key)
    keys = [name for name in naming([group.settings for group in groups]) if name != key]
    lines = []
    for style, some in enumerate(alike):
        points = []
        for group in some:
            values, number = (
                [value for run in group.runs if (value := run.figure(figure)) is not None],
                _number(group, key),
            )
            if values and number is not None:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((number, statistics.fmean(values), spread))
        points.sort()
        xs, means, spreads = ([point[place] for point in points] for place in range(3))
        low, high = ([mean + sign * each for mean, each in zip(means, spreads, strict=True)] for sign in (-1, 1))
        band = (low, high) if any(spreads) else (None, None)
        lines.append(Line(name_by(some[0].settings, keys) or "all runs", xs, means, style, *band))
    return lines

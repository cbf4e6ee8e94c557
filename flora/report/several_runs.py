"""The sections of a page that shows several runs side by side; those that differ in their seed alone are one line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flora.evaluation.metrics import FIGURES
from flora.evaluation.summary import percent, shown
from flora.report import charts
from flora.report.charts import picture
from flora.report.elements import Cell, Html, bars, element, folded, joined, section, table
from flora.report.groups import NONE, Group, alike_but_for, differing, groups_of, name_by, naming, plain
from flora.report.one_run import grid, sentence
from flora.report.over_settings import over_settings
from flora.report.pictures import Line, lines_picture, sample
from flora.report.reading import Absent, RunFiles, numbers

# Lines of a picture, bars of the headline, groups whose clients are shown.
MAX_LINES, MAX_BARS, MAX_SHOWN = 35, 20, 8
# The setting that says which domain nobody trains on.
DOMAIN = "split.domain"


def sections(runs: Sequence[RunFiles]) -> dict[str, Html]:
    """Return the sections by title; those with nothing in them are empty."""
    groups = groups_of(runs)
    made = {
        "Results": (_headline(groups), _means(groups), folded("Every run", _results(groups))),
        "Over settings": (over_settings(groups),),
        "Over rounds": (_overlaid(groups),),
        "Differences in settings": (_differences(groups),),
        "Side by side": (_side_by_side(groups),),
    }
    return {title: section(title, *content) for title, content in made.items()}


def _columns(runs: Sequence[RunFiles]) -> list[str]:
    """The figures that a sweep's table shows, too, of which there are some, and the fairness of clients."""
    return [
        name
        for name, figure in FIGURES.items()
        if figure.column is not None and any(run.figure(name) is not None for run in runs)
    ]


def _gini(run: RunFiles) -> float | None:
    try:
        value = charts.gini(numbers(run.columns("clients.csv")["accuracy"]))
    except (Absent, KeyError, ValueError):
        return None
    return None if value != value else value


def _headline(groups: Sequence[Group]) -> Html:
    """The accuracies of all groups as bars, means over their seeds."""
    parts = []
    for title, first, last in (
        ("on the common test images", "zero_shot_accuracy", "last_accuracy"),
        ("on clients' own held-out images, mean", None, "client_accuracy_mean"),
    ):
        rows = _zero_shot(groups, first) if first else []
        means = [
            (group.name, statistics.fmean(found), "result") for group in groups if (found := _known(group.runs, last))
        ]
        if means:
            lines = [(name, value, percent(value), kind) for name, value, kind in rows + means[:MAX_BARS]]
            left_out = len(means) - MAX_BARS
            note = f"The first {MAX_BARS}; {left_out} more are in the table."
            notes = [element("p", note, class_="note")] * (left_out > 0)
            parts.append(element("div", element("h3", f"Accuracy {title}"), bars(lines), *notes))
    return grid(*parts)


def _zero_shot(groups: Sequence[Group], figure: str) -> list[tuple[str, float, str]]:
    """The frozen model's bars: one for each data set, on which it is not alike; the mean over its runs."""
    by_data: dict[str, list[RunFiles]] = {}
    for run in (run for group in groups for run in group.runs):
        by_data.setdefault(str(run.setting("data.name")), []).append(run)
    known = {name: found for name, runs in by_data.items() if (found := _known(runs, figure))}
    return [
        (f"zero-shot, {name}" if len(known) > 1 else "zero-shot", statistics.fmean(found), "")
        for name, found in known.items()
    ]


def _known(runs: Sequence[RunFiles], figure: str) -> list[float]:
    return [value for run in runs if (value := run.figure(figure)) is not None]


def _means(groups: Sequence[Group]) -> Html:
    """A row a group: the mean over its seeds, and the standard deviation (n - 1)."""
    runs = [run for group in groups for run in group.runs]
    names = _columns(runs)
    titles = ["", "runs", *(FIGURES[name].column or name for name in names), "Gini of clients"]
    rows = []
    for place, group in enumerate(groups):
        cells: list[Any] = [
            element("span", sample(Line("", (), (), place)), group.name, class_="sampled"),
            len(group.runs),
        ]
        cells += [_mean_cell(FIGURES[name].unit, [run.figure(name) for run in group.runs]) for name in names]
        rows.append([*cells, _mean_cell("number", [_gini(run) for run in group.runs])])
    rows += [_domain_row(some, groups, names) for some in alike_but_for(groups, DOMAIN) if len(some) > 1]
    note = "Means over runs that differ in their seed alone, ± the standard deviation (n − 1) where they differ."
    several = any(len(group.runs) > 1 for group in groups)
    return joined([table(titles, rows, sortable=True), element("p", note, class_="note") if several else ""])


def _domain_row(some: Sequence[Group], groups: Sequence[Group], names: Sequence[str]) -> list[Any]:
    """The row of a mean over domains: of each seed that all of them have, then over these seeds."""
    keys = [key for key in naming([group.settings for group in groups]) if key != DOMAIN]
    rest = name_by(some[0].settings, keys)
    by_seed = [{run.setting("seed"): run for run in group.runs} for group in some]
    seeds = [seed for seed in by_seed[0] if all(seed in runs for runs in by_seed)]
    cells: list[Any] = [f"mean of {len(some)} domains" + (f", {rest}" if rest else ""), len(seeds)]
    for name in names:
        means = []
        for seed in seeds:
            known = [value for runs in by_seed if (value := runs[seed].figure(name)) is not None]
            means.append(statistics.fmean(known) if len(known) == len(by_seed) else None)
        cells.append(_mean_cell(FIGURES[name].unit, means))
    return [*cells, Cell(NONE)]


def _mean_cell(unit: str, values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell(NONE)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Cell(shown(unit, mean), mean)
    deviation = statistics.stdev(known)
    return Cell(f"{shown(unit, mean)} ± {shown(unit, deviation)}" if deviation else shown(unit, mean), mean)


def _results(groups: Sequence[Group]) -> Html:
    runs = [run for group in groups for run in group.runs]
    names = _columns(runs)
    titles = ["run", "", "seed", *(FIGURES[name].column or name for name in names)]
    rows = []
    for group in groups:
        for run in group.runs:
            cells = [_mean_cell(FIGURES[name].unit, [run.figure(name)]) for name in names]
            rows.append([run.name, group.name, run.setting("seed"), *cells])
    return table(titles, rows, sortable=True)


def averaged(name: str, runs: Sequence[Mapping[int, tuple[float, float]]], style: int) -> Line | None:
    """Return the mean line of runs at the rounds that all have, with a band of one standard deviation (n - 1).

    Each run is `(x, y)` by round. None without a common round.
    """
    rounds = sorted(set.intersection(*(set(run) for run in runs)))
    if not rounds:
        return None
    xs = [statistics.fmean(run[round][0] for run in runs) for round in rounds]
    ys = [statistics.fmean(run[round][1] for run in runs) for round in rounds]
    if len(runs) == 1:
        return Line(name, xs, ys, style)
    spread = [statistics.stdev(run[round][1] for run in runs) for round in rounds]
    low, high = ([y + sign * each for y, each in zip(ys, spread, strict=True)] for sign in (-1, 1))
    return Line(name, xs, ys, style, low, high)


def _overlaid(groups: Sequence[Group]) -> Html:
    """Accuracies and loss of all groups over rounds, bytes, simulated time and privacy, as far as they have these."""
    pictures, some = [], groups[:MAX_LINES]
    for title, metric in (
        ("Accuracy", "accuracy"),
        ("Accuracy on clients' own images", "client_accuracy_mean"),
        ("Loss", "loss"),
    ):
        for over, (x_title, places) in _axes(some).items():
            lines = _lines(some, metric, places)
            if any(len(line.xs) > 1 for line in lines):
                about = f"{title} over {over}, all runs"
                draw = partial(lines_picture, lines, about, x_title, percent=metric != "loss", has_legend=True)
                pictures.append(picture(f"{title} over {over}", draw))
    left_out = len(groups) - len(some)
    note = f"The first {MAX_LINES} lines; {left_out} more are in the table." if left_out else ""
    return joined([element("p", note) if note else "", grid(*pictures)])


Places = dict[int, dict[int, float]]
"""Where rounds lie along an axis, by the id of the run's object; only of runs that have such a place."""


def _axes(groups: Sequence[Group]) -> dict[str, tuple[str, Places]]:
    """The axes that curves can go over, by name: the axis's title, and the places of rounds along it."""
    runs = [run for group in groups for run in group.runs]
    sent = {id(run): charts.sent_bytes(run) for run in runs}
    clocks = {id(run): seconds for run in runs if (seconds := charts.elapsed(run)) is not None}
    unit, length = charts.time_unit(max((max(each.values()) for each in clocks.values()), default=0.0))
    rounds: Places = {id(run): {record.round: float(record.round) for record in run.records} for run in runs}
    return {
        "rounds": ("round", rounds),
        "bytes": (charts.SENT, {key: charts.scaled(each, 1e6) for key, each in sent.items() if max(each.values())}),
        "simulated time": (f"simulated {unit}", {key: charts.scaled(each, length) for key, each in clocks.items()}),
        "privacy spent": (charts.SPENT, {id(run): each for run in runs if (each := charts.spent(run)) is not None}),
    }


def _lines(groups: Sequence[Group], metric: str, places: Places) -> list[Line]:
    lines = []
    for style, group in enumerate(groups):
        tables = [
            {round: (places[id(run)][round], value) for round, value in run.points(metric)}
            for run in group.runs
            if id(run) in places
        ]
        line = averaged(group.name, tables, style) if tables else None
        lines += [] if line is None else [line]
    return lines


def _differences(groups: Sequence[Group]) -> Html:
    keys = differing([group.settings for group in groups])
    if not keys:
        return element("p", "None but seeds: they are one experiment.")
    titles = ["setting", *(group.name for group in groups)]
    rows = [[element("code", key), *(plain(group.settings.get(key, NONE)) for group in groups)] for key in keys]
    return table(titles, rows)


def _side_by_side(groups: Sequence[Group]) -> Html:
    """The pictures of clients and classes of each group's first run."""
    parts = []
    for title, draw in (
        ("Clients' own held-out images", charts.client_strip),
        ("Who has what", charts.partition_map),
        ("Who is taken for whom, %", charts.confusion_map),
        ("Is its confidence to be believed?", charts.reliability),
    ):
        pictures = [picture(f"{title}: {group.name}", partial(draw, group.runs[0])) for group in groups[:MAX_SHOWN]]
        parts.append(folded(title, grid(*pictures)))
    said = [element("li", element("b", group.name), ": ", _said(group.runs[0])) for group in groups[:MAX_SHOWN]]
    note = (
        f"The first run of each line, of the first {MAX_SHOWN}."
        if len(groups) > MAX_SHOWN
        else "The first run of each line."
    )
    return joined([element("p", note, class_="note"), element("ul", *said), *parts])


def _said(run: RunFiles) -> str:
    try:
        return sentence(run)
    except Absent as reason:
        return str(reason)

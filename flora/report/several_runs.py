"""The sections of a page that shows several runs side by side; those that differ in their seed alone are one line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora.evaluation.metrics import FIGURES
from flora.evaluation.summary import shown
from flora.report import charts
from flora.report.charts import picture
from flora.report.elements import Cell, Html, element, folded, joined, section, table
from flora.report.one_run import grid, sentence
from flora.report.pictures import Line, lines_picture, sample
from flora.report.reading import Absent, RunFiles, numbers
from flora.runs.resume import CHANGEABLE

# Settings by which runs of one line may differ: their names, their seeds, and what decides nothing.
NOT_COMPARED = ("name", "output", "seed", "preset", "device", *CHANGEABLE)
# Settings that a line is named by, lines of a picture, and groups whose clients and classes are shown.
MAX_NAMED, MAX_LINES, MAX_SHOWN = 4, 35, 8
NONE = "–"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seeds, under the name that tells them from others."""

    name: str
    runs: tuple[RunFiles, ...]
    settings: Mapping[str, Any]


def groups_of(runs: Sequence[RunFiles]) -> list[Group]:
    """Return the runs by what they differ in, in their order, each group named by it."""
    flat = {id(run): _compared(_flat(run.settings, "")) for run in runs}
    gathered: dict[str, list[RunFiles]] = {}
    for run in runs:
        gathered.setdefault(json.dumps(flat[id(run)], sort_keys=True, default=str), []).append(run)
    settings = [flat[id(members[0])] for members in gathered.values()]
    keys = naming(differing(settings))
    names = [_name(own, keys) for own in settings]
    if len(keys) > MAX_NAMED or len(set(names)) < len(names) or not keys:
        names = [members[0].name for members in gathered.values()]
    return [
        Group(name, tuple(members), own)
        for name, members, own in zip(names, gathered.values(), settings, strict=True)
    ]


def _flat(nested: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _compared(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in NOT_COMPARED)
    }


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all."""
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if len({_plain(own.get(key, NONE)) for own in settings}) > 1]


def naming(keys: Sequence[str]) -> list[str]:
    """Return the keys that tell runs apart: where a component is another, its own options need not be named."""
    components = [key.removesuffix("name") for key in keys if key.endswith(".name")]
    return [key for key in keys if key.endswith(".name") or not any(key.startswith(each) for each in components)]


def _name(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        value, short = _plain(settings.get(key, NONE)), key.rpartition(".")[2].replace("_", " ")
        parts.append(value if short == "name" else f"{short} {value}")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def sections(runs: Sequence[RunFiles]) -> dict[str, Html]:
    """Return the sections by title; those with nothing in them are empty."""
    groups = groups_of(runs)
    made = {
        "Results": (_means(groups), folded("Every run", _results(groups))),
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


def _means(groups: Sequence[Group]) -> Html:
    """A row a group: the mean over its seeds, and the standard deviation (n - 1)."""
    runs = [run for group in groups for run in group.runs]
    names = _columns(runs)
    titles = ["", "runs", *(FIGURES[name].column or name for name in names), "Gini of clients"]
    rows = []
    for place, group in enumerate(groups):
        cells: list[Any] = [joined([sample(place % MAX_LINES), " ", group.name]), len(group.runs)]
        cells += [_mean_cell(FIGURES[name].unit, [run.figure(name) for run in group.runs]) for name in names]
        rows.append([*cells, _mean_cell("number", [_gini(run) for run in group.runs])])
    note = "Means over runs that differ in their seed alone, ± the standard deviation (n − 1)."
    several = any(len(group.runs) > 1 for group in groups)
    return joined([table(titles, rows, sortable=True), element("p", note, class_="note") if several else ""])


def _mean_cell(unit: str, values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell(NONE)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Cell(shown(unit, mean), mean)
    return Cell(f"{shown(unit, mean)} ± {shown(unit, statistics.stdev(known))}", mean)


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
    """Accuracy and loss of all groups over rounds, over bytes and, where all have a clock, over simulated time."""
    found = []
    metrics = (("Accuracy", "accuracy", True), ("Accuracy on clients' own images", "client_accuracy_mean", True))
    for title, metric, percent in (*metrics, ("Loss", "loss", False)):
        for over in (0, 1, 2):
            lines, x_title = _lines(groups, metric, over)
            if any(len(line.xs) > 1 for line in lines):
                whole = f"{title} over {('rounds', 'bytes', 'simulated time')[over]}"

                def draw(lines=lines, whole=whole, x_title=x_title, percent=percent) -> Html:  # type: ignore[no-untyped-def]
                    return lines_picture(lines, f"{whole}, all runs", x_title, percent=percent)

                found.append(picture(whole, draw))
    left_out = len(groups) - MAX_LINES
    note = f"The first {MAX_LINES} lines; {left_out} more are in the table." if left_out > 0 else ""
    return joined([element("p", note) if note else "", grid(*found)])


def _lines(groups: Sequence[Group], metric: str, over: int) -> tuple[list[Line], str]:
    lines = []
    title = ("round", "megabytes sent, up and down, all clients", "simulated minutes")[over]
    for style, group in enumerate(groups[:MAX_LINES]):
        tables = []
        for run in group.runs:
            places = _places(run, over)
            if places is not None:
                tables.append({round: (places[round], value) for round, value in run.points(metric)})
        line = averaged(group.name, tables, style) if tables else None
        lines += [] if line is None else [line]
    return lines, title


def _places(run: RunFiles, over: int) -> dict[int, float] | None:
    if over == 0:
        return {record.round: float(record.round) for record in run.records}
    if over == 1:
        sent = charts.sent_bytes(run)
        return {round: value / 1e6 for round, value in sent.items()} if max(sent.values()) else None
    seconds = charts.elapsed(run)
    return None if seconds is None else {round: value / 60 for round, value in seconds.items()}


def _differences(groups: Sequence[Group]) -> Html:
    keys = differing([group.settings for group in groups])
    if not keys:
        return element("p", "None but seeds: they are one experiment.")
    titles = ["setting", *(group.name for group in groups)]
    rows = [[element("code", key), *(_plain(group.settings.get(key, NONE)) for group in groups)] for key in keys]
    return table(titles, rows)


def _side_by_side(groups: Sequence[Group]) -> Html:
    """What the first run of each group says of its clients and classes."""
    parts = []
    for title, draw in (
        ("Clients' own held-out images", charts.client_strip),
        ("Who has what", charts.partition_map),
        ("Who is taken for whom, %", charts.confusion_map),
        ("Is its confidence to be believed?", charts.reliability),
    ):
        pictures = [
            picture(f"{title}: {group.name}", lambda draw=draw, run=group.runs[0]: draw(run))  # type: ignore[misc]
            for group in groups[:MAX_SHOWN]
        ]
        parts.append(folded(title, grid(*pictures)))
    said = [element("li", element("b", group.name), ": ", _said(group.runs[0])) for group in groups[:MAX_SHOWN]]
    note = f"The first run of each line, of the first {MAX_SHOWN}." if len(groups) > MAX_SHOWN else "The first run of each line."
    return joined([element("p", note, class_="note"), element("ul", *said), *parts])


def _said(run: RunFiles) -> str:
    try:
        return sentence(run)
    except Absent as reason:
        return str(reason)

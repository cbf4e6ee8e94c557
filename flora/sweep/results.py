"""What a sweep of a scenario comes to: means over the domains that are left out, and one table of its results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from flora.core.metrics import Figure
from flora.evaluation.metrics import FIGURES
from flora.report.dots import Dot
from flora.sweep.outcomes import IMPLIED, Outcome, frozen
from flora.sweep.table import Row, accuracy_cell, figure_cell, panel_and_method

DOMAIN = "split.domain"
# What the frozen model is called among the methods.
ZERO_SHOT = "zero-shot"
# What a method costs, in the table of a scenario's results.
COSTS = ("trainable_parameters", "uplink_bytes_per_client_round", "step_seconds")


def with_domain_means(rows: Sequence[Row]) -> list[Row]:
    """The rows, and below those that differ in the domain that is left out the mean over the domains.

    The mean is taken for each seed that all of these rows have, so that the deviation is that over seeds; there is none
    where no seed has all domains, and where only one domain was left out.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        if DOMAIN in row.labels:
            groups.setdefault(_without_domain(row), []).append(row)
    rows_and_means = []
    for row in rows:
        rows_and_means.append(row)
        group = groups.get(_without_domain(row), [])
        if group and row is group[-1]:
            rows_and_means += [mean for mean in [_mean_over(group)] if mean.outcomes and len(group) > 1]
    return rows_and_means


def _without_domain(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in row.labels.items() if key != DOMAIN)


def _mean_over(group: Sequence[Row]) -> Row:
    """The mean of rows over what they differ in, for each of their common seeds; it has no rounds to draw."""
    by_seed = [dict(zip(row.seeds, row.outcomes, strict=True)) for row in group]
    seeds = tuple(seed for seed in by_seed[0] if all(seed in each for each in by_seed))
    outcomes = tuple(_mean_outcome([each[seed] for each in by_seed]) for seed in seeds)
    return Row({**group[0].labels, DOMAIN: f"mean of {len(group)}"}, outcomes, seeds=seeds)


def _mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean of each figure; None where one of them has none."""
    figures = {}
    for name in outcomes[0].figures:
        known = [value for outcome in outcomes if (value := outcome.figures.get(name)) is not None]
        figures[name] = statistics.fmean(known) if len(known) == len(outcomes) else None
    return Outcome((), figures)


def dots_of(rows: Sequence[Row], figures: Sequence[str]) -> list[Dot]:
    """The figures of the rows that have them, as fractions, by panel and method; those of the frozen model first."""
    dots = [
        Dot(panel, ZERO_SHOT, title_of(name), mean, row.deviation(of))
        for panel, row in _first_rows(rows).items()
        for name in figures
        if (of := frozen(name)) is not None and (mean := row.mean(of)) is not None
    ]
    for row in rows:
        panel, method = panel_and_method(row)
        for name in figures:
            mean = row.mean(name)
            if mean is not None:
                dots.append(Dot(panel, method, title_of(name), mean, row.deviation(name)))
    return dots


def _first_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """Each panel's first row that has a finished run: its frozen model stands for the panel's."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.outcomes:
            first.setdefault(panel_and_method(row)[0], row)
    return first


def title_of(name: str) -> str:
    """What a table calls a figure."""
    return _figure(name).column or name.replace("_", " ")


def _figure(name: str) -> Figure:
    return IMPLIED[name][0] if name in IMPLIED else FIGURES[name]


def to_results(rows: Sequence[Row], figures: Sequence[str]) -> list[list[str]]:
    """The results as cells: a line for each method, columns for each panel and figure, then the costs.

    The first line is the frozen model, where it has such a figure. Each is the mean over seeds, with the deviation
    (n - 1). A cost that is not the same in all panels is given from its least to its most.
    """
    panels = list(dict.fromkeys(panel_and_method(row)[0] for row in rows))
    methods = list(dict.fromkeys(panel_and_method(row)[1] for row in rows))
    place = {panel_and_method(row): row for row in rows if row.outcomes}
    columns = [(panel, name) for panel in panels for name in figures]
    head = ["method", *(_head(panel, name, len(panels), len(figures)) for panel, name in columns)]
    first = _first_rows(rows)
    zero_shot = [
        accuracy_cell(first[panel], of) if panel in first and (of := frozen(name)) is not None else "-"
        for panel, name in columns
    ]
    lines = [[*head, *(title_of(name) for name in COSTS)], [ZERO_SHOT, *zero_shot, *["-"] * len(COSTS)]]
    for method in methods:
        own = {panel: row for panel in panels if (row := place.get((panel, method))) is not None}
        cells = [accuracy_cell(own[panel], name) if panel in own else "-" for panel, name in columns]
        lines.append([method, *cells, *(_cost(list(own.values()), name) for name in COSTS)])
    kept = [any(line[column] != "-" for line in lines[1:]) for column in range(len(lines[0]))]
    return [[cell for cell, keep in zip(line, kept, strict=True) if keep] for line in lines]


_ESCAPED = str.maketrans(
    {each: rf"\{each}" for each in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
)


def to_latex(lines: Sequence[Sequence[str]]) -> str:
    """The cells of `to_results` as a LaTeX table; a column of percentages has the sign in its head alone."""
    columns = []
    for head, *cells in zip(*lines, strict=True):
        if any(cell.endswith(" %") for cell in cells):
            head, cells = f"{head} (%)", [cell.removesuffix(" %") for cell in cells]
        columns.append([head, *cells])
    head, frozen, *methods = (
        " & ".join(cell.translate(_ESCAPED) for cell in line) + r" \\" for line in zip(*columns, strict=True)
    )
    return "\n".join(
        [
            r"% Mean and standard deviation (n - 1) over the seeds, last round. It needs \usepackage{booktabs}.",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            *(r"\toprule", head, r"\midrule", frozen, r"\midrule", *methods, r"\bottomrule"),
            "\\end{tabular}\n",
        ]
    )


def _head(panel: str, name: str, num_panels: int, num_figures: int) -> str:
    """What a column is called: by its panel if there are several, by its figure if there are several."""
    parts = [panel] * (num_panels > 1) + [title_of(name)] * (num_figures > 1 or num_panels == 1)
    return ": ".join(parts)


def _cost(rows: Sequence[Row], name: str) -> str:
    """A cost of a method's rows: one figure, or the least and the most."""
    known = sorted(((mean, row) for row in rows if (mean := row.mean(name)) is not None), key=lambda pair: pair[0])
    if not known:
        return "-"
    least, most = (figure_cell(row, _figure(name)) for _, row in (known[0], known[-1]))
    return least if least == most else f"{least} to {most}"

"""What an audit found: as the lines that it prints, and as a section of a run's page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flora.report.elements import Html, element, joined, table
from flora.report.reading import RunFiles
from flora.runs.run_directory import read_json

HEADER = ("attack", "on", "AUC (95 %)", "TPR at 1 % FPR")
UNITS = {"client": "a client", "example": "an example"}


def audits(run: RunFiles) -> Html:
    """Return what the audits of a run found, one after the other; nothing if there are none that can be read."""
    parts = []
    for path in sorted((run.path / "audits").glob("*.json")):
        content = read_json(path)
        try:
            said = list(guarantee_lines(content))
            if content.get("canaries") is not None:
                said.append(canary_line(content["canaries"], content["guarantee"]))
            shown = [element("h3", path.stem), table(HEADER, rows_of(content)), *(element("p", line) for line in said)]
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # damaged, or another version's
        parts.append(element("div", *shown))
    return joined(parts)


def lines(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that say what an audit found, from its record."""
    yield from guarantee_lines(content)
    rows = [HEADER, *rows_of(content)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    canaries = content.get("canaries")
    if canaries is not None:
        yield canary_line(canaries, content["guarantee"])


def guarantee_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the run guarantees, a line for a client and one for an example."""
    for unit, epsilon in content["guarantee"].items():
        yield f"guarantee for {UNITS[unit]}: " + ("none" if epsilon is None else f"epsilon {epsilon:.3g}")


def rows_of(content: Mapping[str, Any]) -> list[Sequence[str]]:
    """Return the table's rows: a line for each attack that was made, and what it was made on."""
    rows = []
    for each in (content.get("membership") or {}).get("attacks", ()):
        rows.append(_row(f"membership, {each['attack']}", f"adapter after round {each['round']}", each))
    clients = content.get("clients")
    if clients is not None:
        on = f"{clients['num_in']} clients in, {clients['num_out']} out"
        rows.append(_row("who took part", on, clients))
        rows += (_row(f"who took part, {name}", on, each) for name, each in clients.get("ratios", {}).items())
    for each in (content.get("updates") or {}).get("rounds", ()):
        rows.append(_row("classes that a client holds", f"its update of round {each['round']}", each))
    canaries = content.get("canaries")
    if canaries is not None:
        rows.append(_row("canaries", f"the last adapter, {canaries['num_canaries']} {canaries['unit']}s", canaries))
    return rows


def canary_line(canaries: Mapping[str, Any], guarantee: Mapping[str, float | None]) -> str:
    """Return what the canaries show, in one sentence, beside the guarantee."""
    bound, unit = canaries["epsilon_lower_bound"], canaries["unit"]
    line = (
        f"canaries: {canaries['num_right']} of {canaries['num_guesses']} guesses right: epsilon for {UNITS[unit]} is "
        f"at least {bound:.3g} (delta {canaries['delta']:g}, {100 * canaries['confidence']:g} % sure)"
    )
    epsilon = guarantee[unit]
    if epsilon is not None and bound > epsilon:
        line += f": MORE than the {epsilon:.3g} that the run states"
    return line


def _row(attack: str, on: str, success: Mapping[str, Any]) -> Sequence[str]:
    if success["auc"] is None:
        return attack, on, "nobody to tell apart", "-"
    low, high = success["interval"]
    rate = success["tpr_at_fpr"].get("0.01")
    area = f"{success['auc']:.3f} ({low:.3f} to {high:.3f})"
    return attack, on, area, "-" if rate is None else f"{100 * rate['tpr']:.1f} %"

"""Write the generated parts of the pages in this folder: what stands between `<!-- BEGIN x -->` and `<!-- END x -->`.

`make docs` runs it; `python docs/generate.py --check` says which pages are stale, with exit status 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora import catalogue  # noqa: F401  (registers the components)
from flora.config import listing
from flora.config.combinations.table import RULES
from flora.config.listing import option_rows, summary_of
from flora.config.parse import parse_config
from flora.config.presets import SCENARIOS, lines, read_scenario
from flora.config.rules import check_experiment
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.registry import Options, components, kinds
from flora.evaluation.metrics import FIGURES, METRICS
from flora.runs.client_table import CLIENT_COLUMNS
from flora.server.strategies.base import Strategy

FOLDER = Path(__file__).parent
# An option that so many components of a kind have alike is said once for all.
MANY = 3


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *escaped))


def sections() -> str:
    """Every key of an experiment that is no component's option."""
    parts = [option_table(ExperimentConfig)]
    for path, section in listing.sections():
        parts += [f"### `{path}`", summary_of(section), option_table(section)]
    return "\n\n".join(parts)


def all_components() -> str:
    """Every component with its options, by kind; options that several have alike are said once, above the table."""
    parts = []
    for kind in sorted(kinds(), key=lambda kind: kind.__name__):
        parts += [f"### {kind.__name__}", summary_of(kind)]
        shipped = {name: each for name, each in components(kind).items() if each.__module__.startswith("flora.")}
        options = {name: [described(*row) for row in option_rows(component)] for name, component in shipped.items()}
        counts = Counter(option for of_one in options.values() for option in of_one).most_common()
        most = {name_in(option): option for option, count in reversed(counts) if count >= MANY}
        common = [option for option in dict(counts) if most.get(name_in(option)) == option]
        if common:
            parts += [
                "Options that several have alike, which the table only names:",
                "\n".join(f"- {option}" for option in common),
            ]
        rows = []
        for name, component in shipped.items():
            by_name = [name_in(option) for option in options[name] if option in common]
            cell = [", ".join(by_name)] * bool(by_name) + [each for each in options[name] if each not in common]
            rows.append([f"`{name}`", summary_of(component), "<br>".join(cell)])
        parts.append(table(["name", "what it is", "options (default)"], rows))
    return "\n\n".join(parts)


def described(key: str, default: str, about: str, allowed: str) -> str:
    """An option in a line: "`rank` (4): rank of B A [a number at least 1]"."""
    shown = "must be given" if default == "(required)" else default
    return f"`{key}` ({shown}): {about}" + (f" [{allowed}]" if allowed else "")


def option_table(cls: type[Options]) -> str:
    """The options of a class: key, default, what it is, what is allowed."""
    rows = [[f"`{key}`", default, about, allowed] for key, default, about, allowed in option_rows(cls)]
    return table(["key", "default", "what it is", "allowed"], rows)


def records() -> str:
    """The metrics of a line of rounds.jsonl."""
    notes = {True: "", False: " (not covered by `privacy`)"}
    rows = [[f"`{each.name}`", each.unit, each.about + notes[each.is_covered], each.of] for each in METRICS.values()]
    return table(["key of `rounds.jsonl`", "unit", "what it is", "of"], rows)


def figures() -> str:
    """The keys of summary.json."""
    rows = [[f"`{each.name}`", each.unit, each.about] for each in FIGURES.values()]
    return table(["key of `summary.json`", "unit", "what it is"], rows)


def clients() -> str:
    """The columns of clients.csv."""
    return table(["column of `clients.csv`", "what it is"], [[f"`{name}`", about] for name, about in CLIENT_COLUMNS])


def rules() -> str:
    """The rules of what combines with what, a line for each; those that begin with "and" go on with the one before."""
    lines = []
    for rule in RULES:
        goes_on = rule.what.startswith(("and ", "nor "))
        lines.append(f"{'  ' if goes_on else ''}- {rule.what} (`{rule.setting}`)")
    return "\n".join(lines)


def scenarios() -> str:
    """The scenarios: what each is, its settings, what it needs beside them, and its results."""
    rows = []
    for name in SCENARIOS:
        scenario = read_scenario(name)
        needed = [f"`{key}` (to be given)" for key in scenario.needs]
        settings = [*needed, *(f"`{line}`" for line in lines(scenario))]
        rows.append(
            [f"`{name}`", scenario.about, "<br>".join(settings), ", ".join(f"`{key}`" for key in scenario.results)]
        )
    return table(["`scenario:`", "what it is", "settings", "results"], rows)


def name_in(option: str) -> str:
    """The name at the beginning of an option's line, as Markdown."""
    return option.partition(" ")[0]


FEATURES: dict[str, dict[str, Any]] = {
    "another aggregator": {"server": {"aggregator": "median"}},
    "server momentum": {"server": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
    "scaffold": {"local": {"correction": "scaffold", "optimizer": "sgd"}},
    "kept optimiser": {"local": {"optimizer_state": "kept"}},
    "ditto": {"personal": "ditto"},
    "own ranks": {"clients": {"ranks": {"name": "drawn", "values": [2, 4]}}},
    "quantised broadcast": {"communication": {"broadcast": "uniform"}},
    "sparse upload": {"communication": {"upload": "top_k"}},
    "error feedback": {"communication": {"upload": "top_k", "error_feedback": True}},
    "buffered": {"server": {"schedule": {"name": "buffered", "buffer": 2}}, "network": "preset"},
}


def strategies() -> str:
    """Which strategy goes with what, as the rules say."""
    rows = []
    for name, component in components(Strategy).items():
        if not component.__module__.startswith("flora."):  # a user's own
            continue
        cells = []
        for feature in FEATURES.values():
            raw: dict[str, Any] = {"data": "digits", "partition": "iid", "backbone": {"model": "quickstart"}}
            raw |= {key: value for key, value in feature.items() if key != "server"}
            raw["server"] = {"strategy": name, **feature.get("server", {})}
            cells.append("yes" if is_allowed(raw) else "-")
        rows.append([f"`{name}`", *cells])
    return table(["strategy", *FEATURES], rows)


def is_allowed(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is accepted."""
    try:
        check_experiment(parse_config(raw))
    except UserError:
        return False
    return True


PARTS: dict[str, Callable[[], str]] = {
    "sections": sections,
    "components": all_components,
    "records": records,
    "figures": figures,
    "clients": clients,
    "rules": rules,
    "strategies": strategies,
    "scenarios": scenarios,
}


def regenerated(text: str) -> str:
    """A page with its generated parts as they should be."""

    def part(match: re.Match[str]) -> str:
        return f"<!-- BEGIN {match[1]} -->\n{PARTS[match[1]]()}\n<!-- END {match[1]} -->"

    return re.sub(r"<!-- BEGIN (\w+) -->\n.*?<!-- END \1 -->", part, text, flags=re.DOTALL)


def stale() -> Iterator[tuple[Path, str]]:
    """The pages that are not as they should be, with what they should be."""
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text()
        expected = regenerated(text)
        if expected != text:
            yield path, expected


def main(arguments: Sequence[str]) -> int:
    """Write the pages that are stale, or with --check only name them."""
    found = list(stale())
    for path, expected in found:
        if "--check" not in arguments:
            path.write_text(expected)
        print(f"{path.relative_to(FOLDER.parent)}: {'stale: make docs' if '--check' in arguments else 'written'}")
    return int("--check" in arguments and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

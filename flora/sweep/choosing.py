"""Choose a setting by a search on validation images, write the search down, and use what was chosen in other sweeps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.files import read_text
from flora.data.splits import Splitter, Validation
from flora.sweep.outcomes import Outcome, read_outcome

Run = tuple[Path | None, str, dict[str, str]]
"""A finished run's directory (None: it isn't finished), its config file, and the values of the swept keys."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for the runs that have the labels `where`: a config file's stem and the other swept values.

    `tried` is the mean accuracy after the last round with each value that was tried, none of it on test images.
    """

    where: Mapping[str, str]
    value: str
    tried: Mapping[str, float]


@dataclass(frozen=True)
class Choices:
    """What a search chose of the setting `key`."""

    key: str
    choices: tuple[Choice, ...]

    def override(self, config: str, values: Mapping[str, str]) -> str | None:
        """Return `key=value` for a run of a config file with these swept values; None if it was not searched for."""
        labels = labels_of(config, values)
        value = next((each.value for each in self.choices if each.where.items() <= labels.items()), None)
        return None if value is None or self.key in values else f"{self.key}={value}"

    def updated(self, search: Choices) -> Choices:
        """Return these choices with those of a later search, which replace what was chosen for the same runs."""
        searched = [each.where for each in search.choices]
        return Choices(self.key, (*(each for each in self.choices if each.where not in searched), *search.choices))

    def without(self, runs: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
        """Return the stems of the config files of which a run, with these swept values, was not searched for."""
        return sorted(
            {
                Path(config).stem
                for config, values in runs
                if self.key not in values and self.override(config, values) is None
            }
        )


def labels_of(config: str, values: Mapping[str, str]) -> dict[str, str]:
    """The labels of a run: its config file and its swept values, but for the seed."""
    return {"experiment": Path(config).stem, **{key: value for key, value in values.items() if key != "seed"}}


def check_search(key: str, axes: Sequence[str], configs: Sequence[ExperimentConfig], earlier: Choices | None) -> None:
    """Raise `UserError` unless `key` is swept, as in an earlier search, and all runs read validation images."""
    if key not in axes:
        raise UserError(f"--choose: {key} is not swept; write {key}=value,value")
    if earlier is not None and earlier.key != key:
        raise UserError(f"--chosen: expected choices of {key}, as --choose says, or a new file; it has {earlier.key}")
    if not all(_reads_no_test_images(config.split) for config in configs):
        raise UserError("--choose: expected split validation, or one of it: what is chosen on test images is no result")


def _reads_no_test_images(split: Splitter) -> bool:
    inner = getattr(split, "of", None)
    return isinstance(split, Validation) or (inner is not None and _reads_no_test_images(inner))


def choose(key: str, runs: Sequence[Run]) -> Choices:
    """Return, for the runs that differ in `key` and in seeds alone, the value with the best mean accuracy.

    That is the accuracy after the last round: of clients' own adapters on their held-out images, where clients have
    some, else of the server's. Of equal ones the first is taken. Only values that all seeds have finished with count,
    and runs without any are left out.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[str, list[float | None]]] = {}
    for directory, config, values in runs:
        labels = labels_of(config, values)
        value = labels.pop(key)
        accuracy = None if directory is None else _accuracy(read_outcome(directory))
        groups.setdefault(tuple(labels.items()), {}).setdefault(value, []).append(accuracy)
    choices = []
    for where, by_value in groups.items():
        tried = {
            value: statistics.fmean(accuracies) for value, each in by_value.items() if (accuracies := _all_known(each))
        }
        if tried:
            choices.append(Choice(dict(where), max(tried, key=lambda value: tried[value]), tried))
    return Choices(key, tuple(choices))


def _accuracy(outcome: Outcome) -> float | None:
    personal = outcome.figures["personal_accuracy_mean"]
    return outcome.figures["last_accuracy"] if personal is None else personal


def _all_known(values: Sequence[float | None]) -> list[float]:
    """The values; empty if one is None."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def to_json(choices: Choices) -> str:
    """The search as a file that `read_choices` reads."""
    entries = [
        {
            "where": dict(each.where),
            "value": each.value,
            "tried": {value: round(accuracy, 4) for value, accuracy in each.tried.items()},
        }
        for each in choices.choices
    ]
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f'{{"key": {json.dumps(choices.key)}, "chosen": [\n{lines}\n]}}\n'


def read_choices(path: Path) -> Choices:
    """Read what a search chose. Raises `UserError` if the file is missing or no such file."""
    try:
        content = json.loads(read_text(path))
        entries = [Choice(dict(each["where"]), str(each["value"]), dict(each["tried"])) for each in content["chosen"]]
        return Choices(str(content["key"]), tuple(entries))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not what --choose writes: expected `key` and `chosen`") from None

"""Tell trackers of a run: each round once, whatever stops on the way, and never at the run's cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flora.config.parse import flat_settings
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.records import RoundRecord
from flora.core.registry import name_of
from flora.runs.run_directory import RunDirectory, read_json
from flora.runs.sinks import Finished, Sink
from flora.trackers.base import Following, TrackedRun


class Trackers(Sink):
    """Tells each tracker of the rounds that it does not have. One that fails is left, with a line in the log.

    `trackers.json` in the run directory has the id of each tracked run, and the last round that it was told of. Raises
    `UserError` where a library is missing, and once the run directory is there where a tracker's option is wrong.
    """

    def __init__(self, directory: RunDirectory, config: ExperimentConfig, log: Callable[[str], object]) -> None:
        self._directory, self._config, self._log = directory, config, log
        self._following: dict[str, Following] = {}
        self._is_finished = False
        for tracker in config.trackers:
            tracker.require()
        stored = read_json(directory.path / "trackers.json")
        self._known: dict[str, dict[str, Any]] = stored if isinstance(stored, dict) else {}

    def opened(self, path: Path) -> None:
        for tracker in self._config.trackers:
            name = name_of(tracker)
            try:
                self._following[name] = tracker.follow(self._tracked(name))
                self._note(name)
            except UserError:
                raise
            except Exception as error:
                self._leave(name, error)

    def record(self, record: RoundRecord) -> None:
        for name in list(self._following):
            self._try(name, partial(self._tell, name, record))

    def finish(self, finished: Finished) -> None:
        for name in list(self._following):
            self._try(name, lambda following: following.finish(finished.summary.figures))
        self._is_finished = True

    def close(self) -> None:
        for name in list(self._following):
            self._try(name, lambda following: following.close(is_finished=self._is_finished))

    def _tracked(self, name: str) -> TrackedRun:
        known = self._known.get(name, {})
        path = self._directory.path
        # An address of one tracker, which may hold a password, is no other's business; whoever knows the seed knows
        # the noise that hides clients.
        private = self._config.privacy
        left_out = {"trackers"} if private is None or private.publish else {"trackers", "seed"}
        settings = {key: value for key, value in flat_settings(self._config).items() if key not in left_out}
        return TrackedRun(path.resolve().name, path, settings, known.get("id"), known.get("last_round", -1))

    def _tell(self, name: str, record: RoundRecord, following: Following) -> None:
        """Tell of a round, and before it of those that it has missed, because it failed or was not asked for."""
        if record.round <= following.last_round:
            return
        missed = {}
        if record.round > following.last_round + 1:
            missed = self._directory.readable_records(record.round - 1)
        for each in [*(missed[number] for number in missed if number > following.last_round), record]:
            following.round(each.round, figures_of(each))
        self._note(name)

    def _note(self, name: str) -> None:
        following = self._following[name]
        self._known[name] = {"id": following.id, "last_round": following.last_round}
        self._directory.write_trackers(self._known)

    def _try(self, name: str, call: Callable[[Following], object]) -> None:
        try:
            call(self._following[name])
        except Exception as error:
            self._leave(name, error)

    def _leave(self, name: str, error: Exception) -> None:
        self._following.pop(name, None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._log(f"warning: tracker {name} failed and is left, the run goes on: {reason}")


def figures_of(record: RoundRecord) -> dict[str, float | None]:
    """The numbers of a record by name, `metric/key` where a metric has one for each of several.

    How many clients were rejected is None where the record doesn't say who took part.
    """
    figures: dict[str, float | None] = {}
    for name, value in record.metrics.items():
        named = {f"{name}/{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
        figures |= {key: each for key, each in named.items() if each is None or isinstance(each, int | float)}
    figures["rejected_clients"] = None if record.cohort is None else len(record.rejected_clients)
    return figures

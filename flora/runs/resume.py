"""Find the configuration and the checkpoint with which a stopped run goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.config.overrides import apply_overrides
from flora.config.parse import flat_settings, parse_config
from flora.config.plain_yaml import read_yaml
from flora.config.schema import ExperimentConfig
from flora.core.errors import ConfigError, UserError
from flora.core.records import RoundRecord
from flora.core.registry import OptionError, show
from flora.core.states import ClientState, ServerState
from flora.privacy.rounds import PrivateRounds
from flora.runs.checkpoints import Checkpoint, CheckpointFolder, DamagedError
from flora.runs.run_directory import RunDirectory, read_json

# What may be changed without changing what comes out, apart from the last bits of sums; where things are, too:
# `environment.json` holds digests of the weights and the data.
CHANGEABLE = (
    "clients.per_block",
    "threads",
    "cache.enabled",
    "cache.folder",
    "cache.memory_bytes",
    "checkpoints",
    "evaluation.batch_size",
    "output",
    "name",
    "data.root",
    "data.path",
    "data.download",
    "network.path",
    "prompts.descriptions",
    "server.text_rounds.descriptions",
    *(
        f"server.{section}.data.{key}"
        for section in ("synthetic", "distillation")
        for key in ("root", "path", "download")
    ),
    "adapter.start",
    "trackers",
    "backbone.model",
    "backbone.weights",
)
# Rounds that a message names.
MAX_NAMED = 10
# One of these shows that a folder with a config.yaml is a run's.
TRACES = ("lock", "log.txt", "environment.json", "rounds.jsonl", "checkpoints")


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on: the server's state, the records so far, and how long they took.

    `clients_per_block`: how many clients shared a step in the end, if that is known.
    """

    state: ServerState
    records: tuple[RoundRecord, ...] = ()
    wall_seconds: float = 0.0
    clients_per_block: int | None = None


def resumed_config(
    path: Path, overrides: Sequence[str], warn: Callable[[str], object] = lambda line: None
) -> ExperimentConfig:
    """The configuration to go on with: the run's own, and what `overrides` change of it.

    Raises `UserError` if there is none, or with the difference if something is changed that decides the results.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run directory")
    if not any((path / name).exists() for name in TRACES):
        raise UserError(f"{path}: not a run directory: it has none of {', '.join(TRACES)}")
    stored = _stored_config(path)
    current = _current_config(path, stored, warn)
    apply_overrides(current, overrides, ExperimentConfig)
    try:
        config = parse_config(current, is_complete=True)
        before = parse_config(stored, is_complete=True)
    except OptionError as error:
        raise ConfigError(f"{path}: {error}") from None
    _refuse_changes(path, before, config)
    return config


def refuse_other_settings(path: Path, config: ExperimentConfig) -> None:
    """Raise `UserError` with the difference if the run in `path` has settings that `config` can't go on with."""
    try:
        before = parse_config(_stored_config(path), is_complete=True)
    except OptionError as error:
        raise ConfigError(f"{path}: {error}") from None
    _refuse_changes(path, before, config)


@dataclass(frozen=True, eq=False)
class RunFiles:
    """A stopped run's records and checkpoints, of which the newest `keep` stay; what is wrong with them is logged."""

    directory: RunDirectory
    checkpoints: CheckpointFolder
    log: Callable[[str], object]
    keep: int

    @property
    def aside(self) -> Path:
        """Where files are put that are damaged, or belong to rounds that are run again."""
        return self.directory.path / "set-aside"


def find_start(
    files: RunFiles, initial: ServerState, *, client_like: ClientState, accept_lost_records: bool = False
) -> Start:
    """The newest checkpoint that is whole and whose records are; the beginning if no checkpoint is whole.

    What is wrong with newer ones is logged; they are set aside. Records after it are taken away, and so are checkpoints
    before it but the newest `keep`. Raises `UserError` if a checkpoint can't be read, or if a finished run has none.
    Where checkpoints are whole and the records of none are, that is an error, too, which asks for
    `accept_lost_records`: then the newest is gone on from, with those records that can be read.
    """
    directory, checkpoints, log = files.directory, files.checkpoints, files.log
    without_records: Checkpoint | None = None
    for round in checkpoints.rounds():
        try:
            checkpoint = checkpoints.load(round, like=initial, client_like=client_like)
        except DamagedError as error:
            log(f"warning: {error}; trying the checkpoint before it")
            continue
        if not directory.has_records(checkpoint.records_bytes, checkpoint.records_sha256):
            log(f"warning: {directory.path / 'rounds.jsonl'}: the records up to round {round} are not those written")
            without_records = without_records or checkpoint
            continue
        records = directory.rewind(checkpoint.records_bytes)
        checkpoints.tidy(round, keep=files.keep, set_aside=files.aside)
        log(f"going on after round {round}")
        return Start(checkpoint.state, tuple(records), checkpoint.wall_seconds, checkpoint.clients_per_block)
    if without_records is not None:
        return _start_without_all_records(files, without_records, accept_lost_records)
    if finished_rounds(directory.path) is not None:
        raise UserError(
            f"{directory.path}: this run is finished, and has no good checkpoint that more rounds could follow"
        )
    directory.set_records_aside(files.aside)
    checkpoints.tidy(0, keep=files.keep, set_aside=files.aside)
    log("there is no checkpoint to go on from: starting from the beginning")
    return Start(initial)


def _start_without_all_records(files: RunFiles, checkpoint: Checkpoint, accept_lost_records: bool) -> Start:
    """Go on from a whole checkpoint with the records that can be read, if the user accepts that."""
    directory, log = files.directory, files.log
    path, round = directory.path / "rounds.jsonl", checkpoint.state.round
    records = directory.readable_records(round)
    lost = [number for number in range(round + 1) if number not in records]
    which = "the records are not those that were written"
    if lost:
        shown = ", ".join(map(str, lost[:MAX_NAMED])) + (", ..." if len(lost) > MAX_NAMED else "")
        which = f"{len(lost)} of {round + 1} records can't be read (round {shown})"
    if not accept_lost_records:
        raise UserError(
            f"{path}: {which}, though the checkpoint of round {round} is whole; to go on from it with the records that "
            "can be read: --accept-lost-records"
        )
    directory.replace_records(records.values(), files.aside)
    files.checkpoints.tidy(round, keep=files.keep, set_aside=files.aside)
    log(f"warning: {path}: {which}; sums over all rounds leave them out; the file as it was is in {files.aside}")
    log(f"going on after round {round}")
    return Start(checkpoint.state, tuple(records.values()), checkpoint.wall_seconds, checkpoint.clients_per_block)


def finished_rounds(path: Path) -> int | None:
    """Return how many rounds the finished run in `path` has; None if it is not finished."""
    return _whole_number(read_json(path / "summary.json"), "rounds")


def why_over(path: Path, config: ExperimentConfig) -> str | None:
    """Return why the run in `path` has no more rounds to do with `config`; None if it has some, or no end yet."""
    finished = finished_rounds(path)
    if finished is None:
        return None
    if finished >= config.rounds:
        return f"this run is finished, after {finished} rounds; for more of them: rounds=NUMBER"
    num_clients = _whole_number(read_json(path / "summary.json"), "num_clients")
    if config.privacy is None or config.privacy.budget_epsilon is None or not num_clients:
        return None
    attendance = config.clients.cohort.attendance(num_clients)
    if PrivateRounds.of(config.privacy, attendance, config.rounds).last_round > finished:
        return None
    return (
        f"this run is finished: privacy.budget_epsilon {config.privacy.budget_epsilon:g} ended it after {finished} "
        "rounds, and a budget can't become more"
    )


def recorded_clients_per_block(path: Path) -> int | None:
    """Return how many clients shared a step when the run in `path` began; None if that is not known."""
    return _whole_number(read_json(path / "environment.json"), "clients_per_block")


def recorded_threads(path: Path) -> int | None:
    """Return how many threads an operation had when the run in `path` began; None if that is not known."""
    return _whole_number(read_json(path / "environment.json"), "num_threads") or None


def changeable_overrides(config: ExperimentConfig) -> list[str]:
    """The settings of `config` that a run may go on with though it began with others, as overrides."""
    settings = flat_settings(config)
    return [f"{key}={json.dumps(value)}" for key, value in settings.items() if _is_changeable(key)]


def _whole_number(content: Any, key: str) -> int | None:
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, int) and value >= 0 else None


def _stored_config(path: Path) -> dict[str, Any]:
    """The configuration that the newest checkpoint was made with; without one, what `config.yaml` says."""
    checkpoints = CheckpointFolder(path / "checkpoints")
    for round in checkpoints.rounds():
        try:
            stored: dict[str, Any] = checkpoints.manifest(round)["config"]
            return stored
        except DamagedError:
            continue
    return read_yaml(path / "config.yaml")


def _current_config(path: Path, stored: Mapping[str, Any], warn: Callable[[str], object]) -> dict[str, Any]:
    """Return what `config.yaml` says now; the checkpoint's configuration where it can't be read."""
    try:
        return read_yaml(path / "config.yaml")
    except ConfigError as error:
        warn(f"warning: {error}; going on with the configuration in the checkpoint")
        return copy.deepcopy(dict(stored))


def _refuse_changes(path: Path, before: ExperimentConfig, now: ExperimentConfig) -> None:
    old, new = flat_settings(before), flat_settings(now)
    changes = [
        f"{key}: {show(old.get(key))} then, {show(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key != "rounds" and not _is_changeable(key)
    ]
    if now.rounds < before.rounds:
        changes.append(f"rounds: {before.rounds} then, {now.rounds} now; they can only become more")
    if now.rounds > before.rounds and now.local.schedule.needs_num_rounds:
        changes.append("rounds: they can't become more, because the learning rates of local.schedule depend on them")
    if now.rounds > before.rounds and now.privacy is not None and now.privacy.target_epsilon is not None:
        changes.append("rounds: they can't become more, because privacy.target_epsilon is for as many as there were")
    if changes:
        raise UserError(f"{path}: a run goes on as it began; what differs: {'; '.join(changes)}")


def _is_changeable(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)

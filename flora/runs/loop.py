"""A run from its first round to its last, in a run directory: `simulate` begins one, `resume` goes on with one."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flora.config.parse import config_to_dict
from flora.config.rules import check_experiment
from flora.config.schema import ExperimentConfig
from flora.core import tree
from flora.core.command_line import imported
from flora.core.errors import DivergedError, UserError
from flora.core.hooks import Hooks
from flora.core.memory import peak_memory_bytes
from flora.core.progress import StepBar, bar, has_line, image_progress, on_terminal, round_line
from flora.core.records import RoundRecord, Summary
from flora.core.states import ServerState
from flora.core.tree import State
from flora.evaluation import summary as report
from flora.experiment import Experiment, build_experiment, choose_device
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.runs.checkpoints import Checkpoint, CheckpointFolder
from flora.runs.inventory import EXAMPLE_COLUMNS, examples_as_used, prompts_as_used
from flora.runs.measure import (
    ClientResults,
    LocalOnlyResults,
    client_columns,
    compare_held_out,
    local_only_figures,
    measure,
    measure_clients,
    measure_local_only,
)
from flora.runs.resume import (
    Start,
    find_start,
    finished_rounds,
    recorded_clients_per_block,
    recorded_threads,
    resumed_config,
)
from flora.runs.run_directory import RunDirectory, environment
from flora.runs.threads import choose_threads
from flora.server.screening import refusal

# Unreadable images that are named on the terminal; log.txt names all.
MAX_SHOWN = 10
# Rounds in a row without one usable update after which a run is given up.
MAX_LOST_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class RunResult:
    """What `simulate` returns: the summary, a record a round, the final adapter, and where it all was written."""

    summary: Summary
    records: tuple[RoundRecord, ...]
    adapter: State
    directory: Path


def simulate(
    config: ExperimentConfig,
    *,
    numbered: bool = False,
    echo: Callable[[str], object] | None = None,
    hooks: Hooks | None = None,
    notes: Sequence[str] = (),
) -> RunResult:
    """Run an experiment into a new run directory.

    `numbered`: if a run of that name exists, use the first free of name-2, name-3, ...; else that is an error.
    `echo` is given the lines that go to the log, but for `notes`, its first ones. Raises `UserError` for anything that
    the user can mend; a directory in which not even round 0 was recorded is taken away again.
    """
    check_experiment(config)
    hooks = hooks or Hooks()
    directory = RunDirectory.create(config.output, config.name, numbered=numbered, before_write=hooks.before_write)
    try:
        directory.write_config(config)
        for line in notes:
            directory.log(line)
        return _run_in(directory, config, hooks, echo, lambda experiment, log: Start(experiment.initial_state()))
    except BaseException:
        directory.remove_if_nothing_ran()
        raise
    finally:
        directory.close()


def resume(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    echo: Callable[[str], object] | None = None,
    hooks: Hooks | None = None,
    accept_lost_records: bool = False,
) -> RunResult:
    """Go on with the run in `path` from its newest good checkpoint, as if it had never stopped.

    On the machine and device class that it began on, what comes out is the same, bit for bit. Raises `UserError` if the
    run is finished, in use, or was begun with other settings or data; and where checkpoints are whole but records are
    not, unless `accept_lost_records`: then round 0 and the checkpoint's round are measured anew, the others are lost.
    """
    config = resumed_config(Path(path), overrides, echo or (lambda line: None))
    check_experiment(config)
    hooks = hooks or Hooks()
    directory = RunDirectory(Path(path), hooks.before_write)
    try:
        finished = finished_rounds(directory.path)
        if finished is not None and finished >= config.rounds:
            raise UserError(f"{path}: this run is finished, after {finished} rounds; for more of them: rounds=NUMBER")
        checkpoints = CheckpointFolder(directory.path / "checkpoints", hooks.before_write)

        def start(experiment: Experiment, log: Callable[[str], object]) -> Start:
            for line in directory.what_differs(environment(experiment.federation.engine.model.device, config.seed, 0)):
                log(f"warning: this run began elsewhere: {line}; the last bits may differ")
            initial = experiment.initial_state()
            found = find_start(
                directory,
                checkpoints,
                initial,
                log,
                client_like=experiment.federation.client_state(initial.adapter),
                keep=config.checkpoints.keep,
                accept_lost_records=accept_lost_records,
            )
            found = _with_first_and_last_record(experiment, found, directory)
            directory.write_config(config)
            if config.clients.per_block is None and found.clients_per_block:
                experiment.federation.engine.clients_per_block = found.clients_per_block
            return found

        return _run_in(directory, config, hooks, echo, start)
    finally:
        directory.close()


def _with_first_and_last_record(experiment: Experiment, start: Start, directory: RunDirectory) -> Start:
    """Measure anew what a summary needs if its record was lost: the frozen model, and the state to go on from."""
    records = {record.round: record for record in start.records}
    missing = [state for state in (experiment.initial_state(), start.state) if state.round not in records]
    if not missing or not start.state.round:
        return start
    for state in missing:
        records[state.round], _ = measure(experiment, state, None)
    ordered = tuple(record for _, record in sorted(records.items()))
    directory.replace_records(ordered, directory.path / "set-aside")
    return replace(start, records=ordered)


def _run_in(
    directory: RunDirectory,
    config: ExperimentConfig,
    hooks: Hooks,
    echo: Callable[[str], object] | None,
    find: Callable[[Experiment, Callable[[str], object]], Start],
) -> RunResult:
    """Build the experiment and run it in `directory` from the start that `find` comes to."""

    def log(line: str) -> None:
        if echo is not None:
            echo(line)
        directory.log(line)

    threads, steps = torch.get_num_threads(), StepBar()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        started = time.perf_counter()
        memory_before = peak_memory_bytes(choose_device(config.device))
        per_block = recorded_clients_per_block(directory.path)

        def after_step(done: int, total: int) -> None:
            steps.show(done, total)
            hooks.after_step(done, total)

        experiment = build_experiment(
            config,
            progress=image_progress(log),
            log=log,
            hooks=replace(hooks, after_step=after_step),
            clients_per_block=per_block,
        )
        _set_threads(config, directory, experiment, log)
        federation = experiment.federation
        for number, line in enumerate(experiment.unreadable):
            (log if number < MAX_SHOWN else directory.log)(f"left out: {line}")
        directory.write_start(
            config,
            device=federation.engine.model.device,
            clients_per_block=federation.engine.clients_per_block,
            clients=federation.clients,
            labels=federation.engine.features.labels.numpy(),
            class_names=experiment.class_names,
            digests=experiment.digests,
            value_range=experiment.value_range,
            num_test=len(experiment.test),
            left_out=experiment.left_out,
        )
        directory.write_prompts(prompts_as_used(experiment))
        directory.write_examples(EXAMPLE_COLUMNS, examples_as_used(experiment))
        experiment = replace(experiment, data=None)
        result = _run(experiment, directory, find(experiment, log), started, memory_before, echo)
    finally:
        steps.close()
        torch.set_num_threads(threads)
    for line in report.lines(result.summary, config):
        directory.log(line)
    return result


def _set_threads(
    config: ExperimentConfig, directory: RunDirectory, experiment: Experiment, log: Callable[[str], object]
) -> None:
    """As many threads as the configuration says, as the run so far has had, or as are fastest now."""
    recorded = recorded_threads(directory.path)
    if config.threads is None and recorded is not None:
        torch.set_num_threads(min(recorded, torch.get_num_threads()))
    elif config.threads is None:
        choose_threads(experiment, log)


def _run(
    experiment: Experiment,
    directory: RunDirectory,
    start: Start,
    started: float,
    memory_before: int,
    echo: Callable[[str], object] | None,
) -> RunResult:
    config, federation = experiment.config, experiment.federation
    saver = _Saver(federation, config, directory, start, started)
    state = recorded = start.state
    records = list(start.records)
    clients: ClientResults | None = None

    def add(record: RoundRecord) -> None:
        records.append(record)
        directory.append_round(record)
        if has_line(record.round, config.rounds):
            line = round_line(record, config.rounds)
            directory.log(line)
            if echo is not None and not on_terminal():  # on a terminal there is a bar
                echo(line)

    try:
        _stop_if_diverged(records)
        if not records:
            record, clients = measure(experiment, state, None)
            add(record)
        with bar("rounds", config.rounds, "round", initial=state.round) as rounds:
            while state.round < config.rounds:
                state, result = run_round(federation, state)
                record, clients = measure(experiment, state, result)
                add(record)
                recorded = state
                saver.after_round(state)
                _stop_if_diverged(records)
                rounds.update()
                rounds.set_postfix(_postfix(record, records))
        alone = _alone(experiment, state, log=directory.log)
    except BaseException as error:
        # Whatever it is that ends the run, nothing of what it has done is lost, if it can still be written.
        with suppress(UserError):
            saver.save(recorded)
        if directory.records_end[0] and not isinstance(error, DivergedError):
            with suppress(UserError):
                federation.engine.log(f"to go on: {_program()} --resume {shlex.quote(str(directory.path))}")
        raise
    if clients is None:  # the run was stopped behind its last round
        clients = measure_clients(experiment, state)
    directory.write_clients(client_columns(experiment, clients, alone, records))
    directory.write_adapter(state.adapter, config)
    summary = report.summarise(
        records,
        name=directory.path.resolve().name,
        num_clients=len(federation.clients),
        **local_only_figures(alone),
        **compare_held_out(clients, alone),
        wall_seconds=time.perf_counter() + saver.wall_offset,
        peak_memory_bytes=peak_memory_bytes(federation.engine.model.device),
        memory_before_bytes=memory_before,
        trainable_parameters=tree.count(tree.select(state.adapter, federation.roles.ever_trained(state.adapter))),
        backbone_parameters=experiment.backbone_parameters,
        num_unreadable=len(experiment.unreadable),
    )
    directory.write_summary(summary)
    return RunResult(summary, tuple(records), state.adapter, directory.path)


class _Saver:
    """Saves checkpoints when they are due. `wall_offset` added to the clock is how long the run has taken."""

    def __init__(
        self, federation: Federation, config: ExperimentConfig, directory: RunDirectory, start: Start, started: float
    ) -> None:
        self._federation, self._directory = federation, directory
        self._options, self._config = config.checkpoints, config_to_dict(config)
        self._folder = CheckpointFolder(directory.path / "checkpoints", federation.engine.hooks.before_write)
        self._saved = start.state.round
        self.wall_offset = start.wall_seconds - started

    def after_round(self, state: ServerState) -> None:
        """Save a checkpoint if one is due."""
        every, last = self._options.every, self._config["rounds"]
        if state.round == last or (every is not None and state.round % every == 0):
            self.save(state)

    def save(self, state: ServerState) -> None:
        """Save a checkpoint, unless that round's was the last one to be saved or gone on from."""
        if state.round == self._saved:
            return
        num_bytes, sha256 = self._directory.records_end
        wall_seconds = time.perf_counter() + self.wall_offset
        checkpoint = Checkpoint(
            state, self._config, num_bytes, sha256, wall_seconds, self._federation.engine.clients_per_block
        )
        self._folder.save(checkpoint, keep=self._options.keep)
        self._saved = state.round


def _stop_if_diverged(records: Sequence[RoundRecord]) -> None:
    """Raise `UserError` if not one update was fit to be averaged in each of the last rounds."""
    last = records[-MAX_LOST_ROUNDS:]
    if len(last) == MAX_LOST_ROUNDS and all(
        record.num_clients and len(record.rejected_clients) == record.num_clients for record in last
    ):
        first = refusal(last[0].round, last[0].rejected_clients[0], last[0].learning_rate or 0.0)
        raise DivergedError(f"{first} (no update could be used in {MAX_LOST_ROUNDS} rounds in a row)")


def _alone(experiment: Experiment, state: ServerState, log: Callable[[str], object]) -> LocalOnlyResults:
    """What those clients reach that also train without the others, if there are to be any."""
    if not experiment.config.evaluation.num_local_only:
        return LocalOnlyResults.of_nobody(len(experiment.federation.clients))
    started = time.perf_counter()
    with bar("alone", experiment.config.rounds, "round") as rounds:
        alone = measure_local_only(experiment, state, advance=rounds.update)
    log(f"{np.sum(~np.isnan(alone.test))} clients trained alone in {time.perf_counter() - started:.1f} s")
    return alone


def _postfix(record: RoundRecord, records: Sequence[RoundRecord]) -> dict[str, str]:
    last = next((each.accuracy for each in reversed(records) if each.accuracy is not None), None)
    return {
        "accuracy": "-" if last is None else f"{last:.1%}",
        "loss": f"{record.train_loss:.3f}" if record.train_loss is not None else "-",
        "clients/s": f"{record.num_clients / max(record.train_seconds, 1e-9):.1f}",
    }


def _program() -> str:
    """What to type to run this program again: a user's own file that calls `main`, or this module."""
    own = (
        sys.argv[0] if sys.argv[0].endswith(".py") and getattr(sys.modules["__main__"], "__spec__", 1) is None else None
    )
    program = f"{shlex.quote(sys.executable)} {'-m flora.simulate' if own is None else shlex.quote(own)}"
    return " ".join([program, *(f"--import {shlex.quote(os.path.abspath(path))}" for path in imported)])

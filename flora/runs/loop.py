"""A run from its first round to its last, in a run directory: `simulate` begins one, `resume` goes on with one."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from flora.config.rules import check_experiment, departures
from flora.config.schema import ExperimentConfig
from flora.core import tree
from flora.core.command_line import imported
from flora.core.counts import counted
from flora.core.devices import choose_device
from flora.core.errors import DivergedError, UserError
from flora.core.hooks import Hooks
from flora.core.memory import peak_memory_bytes
from flora.core.processes import ALONE, Processes
from flora.core.progress import StepBar, image_progress, on_terminal
from flora.core.records import RoundRecord, Summary
from flora.core.states import ServerState
from flora.core.tree import State, state_digest
from flora.engine.together import Member
from flora.evaluation import summary as report
from flora.evaluation.metrics import METRICS
from flora.experiment.build import Experiment
from flora.federated.round import RoundResult, run_round
from flora.runs.building import Listeners, built
from flora.runs.checkpoints import CheckpointFolder
from flora.runs.client_table import client_columns
from flora.runs.environment import environment
from flora.runs.measure import (
    ClientResults,
    LocalOnlyResults,
    compare_held_out,
    local_only_figures,
    measure,
    measure_centralized,
    measure_clients,
    measure_local_only,
)
from flora.runs.resume import (
    RunFiles,
    Start,
    find_start,
    resumed_config,
    why_over,
)
from flora.runs.run_directory import RunDirectory
from flora.runs.saving import Saver
from flora.runs.sinks import DirectorySink, Finished, RoundBar, RoundLines, Sink
from flora.runs.tables import last_tables
from flora.runs.together import shared_config, shared_directory, shared_start
from flora.runs.tracking import Trackers
from flora.server.screening import refusal

Result = TypeVar("Result")

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
    sinks: Sequence[Sink] = (),
    progress: bool = False,
    processes: Processes = ALONE,
    member: Member | None = None,
) -> RunResult:
    """Run an experiment into a new run directory.

    `numbered`: if a run of that name exists, use the first free of name-2, name-3, ...; else that is an error.
    `echo` is given the lines that go to the log, but for `notes`, its first ones. `sinks` are told of the records, as
    the run directory is. `progress` shows bars where standard error is a terminal. All `processes` of a run call this
    alike; process 0 alone writes and talks. `member` is for a run whose clients train together with those of others.
    Raises `UserError` for anything that the user can mend; a directory in which not even round 0 was recorded is taken
    away again.
    """
    config = shared_config(processes, lambda: config)
    check_experiment(config)
    listeners = Listeners(echo, hooks or Hooks(), tuple(sinks), progress, processes, member).of_process()
    before_write = listeners.hooks.before_write
    directory = shared_directory(
        processes,
        lambda: RunDirectory.create(config.output, config.name, numbered=numbered, before_write=before_write),
    )
    try:
        directory.write_config(config)
        for line in notes:
            directory.log(line)
        return _run_in(directory, config, listeners, lambda experiment, log: Start(experiment.initial_state()))
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
    sinks: Sequence[Sink] = (),
    progress: bool = False,
    processes: Processes = ALONE,
    member: Member | None = None,
) -> RunResult:
    """Go on with the run in `path` from its newest good checkpoint, as if it had never stopped.

    On the machine and device class that it began on, what comes out is the same, bit for bit. Raises `UserError` if the
    run is finished, in use, or was begun with other settings or data; and where checkpoints are whole but records are
    not, unless `accept_lost_records`: then round 0 and the checkpoint's round are measured anew, the others are lost.
    The others are as for `simulate`; `sinks` are told of the records that are still to come.
    """
    listeners = Listeners(echo, hooks or Hooks(), tuple(sinks), progress, processes, member).of_process()
    config = shared_config(processes, lambda: resumed_config(Path(path), overrides, echo or (lambda line: None)))
    check_experiment(config)
    directory = shared_directory(processes, lambda: RunDirectory(Path(path), listeners.hooks.before_write))
    try:
        over = why_over(directory.path, config) if processes.is_first else None
        if over is not None:
            raise UserError(f"{path}: {over}")
        checkpoints = CheckpointFolder(directory.path / "checkpoints", listeners.hooks.before_write)

        def start(experiment: Experiment, log: Callable[[str], object]) -> Start:
            device = experiment.federation.engine.model.device
            for line in directory.what_differs(listeners.call(lambda: environment(device, config.seed, 0))):
                log(f"warning: this run began elsewhere: {line}; the last bits may differ")
            for name in sorted(_recorded_metrics(directory) - METRICS.keys()):
                log(f"warning: nothing computes the metric {name!r} any more: --import the file that declares it")
            initial = experiment.initial_state()
            files = RunFiles(directory, checkpoints, log, config.checkpoints.keep)
            begun = find_start(
                files,
                initial,
                client_like=experiment.federation.client_state(initial.adapter),
                accept_lost_records=accept_lost_records,
            )
            directory.write_config(config)
            return begun

        return _run_in(directory, config, listeners, start)
    finally:
        directory.close()


def _recorded_metrics(directory: RunDirectory) -> set[str]:
    """The names of the metrics that the run's record of round 0 has."""
    return {name for record in directory.readable_records(0).values() for name in record.metrics}


def _with_first_and_last_record(experiment: Experiment, start: Start, directory: RunDirectory) -> Start:
    """Measure anew what a summary needs if its record was lost: the frozen model, and the state to go on from.

    Blocks are as large as they were in the end.
    """
    if experiment.config.clients.per_block is None and start.clients_per_block:
        experiment.federation.engine.clients_per_block = start.clients_per_block
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
    listeners: Listeners,
    find: Callable[[Experiment, Callable[[str], object]], Start],
) -> RunResult:
    """Build the experiment and run it in `directory` from the start that `find` comes to."""

    def log(line: str) -> None:
        if listeners.echo is not None:
            listeners.echo(line)
        directory.log(line)

    threads, steps, processes = torch.get_num_threads(), StepBar(log), listeners.processes
    hooks = Hooks(after_step=steps.show).then(listeners.hooks) if listeners.progress else listeners.hooks
    sinks = _sinks(directory, config, listeners, log) if processes.is_first else []
    try:
        for line in departures(config):
            log(line)
        for sink in sinks:
            sink.opened(directory.path)
        started = time.perf_counter()
        memory_before = peak_memory_bytes(choose_device(config.device, processes))
        experiment = built(directory, config, replace(listeners, hooks=hooks), log)
        for number, line in enumerate(experiment.unreadable):
            (log if number < MAX_SHOWN else directory.log)(f"left out: {line}")
        for sink in sinks:
            listeners.call(partial(sink.start, experiment))
        experiment = replace(experiment, data=None)
        start = _with_first_and_last_record(
            experiment, shared_start(processes, partial(find, experiment, log)), directory
        )
        run = _Run(
            experiment, directory, sinks, Saver(experiment, directory, start, started), list(start.records), start.state
        )
        result = run.to_its_end(start.state, memory_before, shows_bars=listeners.progress)
    finally:
        for sink in sinks:
            sink.close()
        steps.close()
        torch.set_num_threads(threads)
    for line in report.lines(result.summary, config):
        directory.log(line)
    return result


def _sinks(
    directory: RunDirectory, config: ExperimentConfig, listeners: Listeners, log: Callable[[str], object]
) -> list[Sink]:
    """Who is told of the records: the run directory first, the log, a bar if there is one, trackers, the caller's."""
    bars: list[Sink] = [RoundBar(config)] if listeners.progress else []
    echo = None if bars and on_terminal() else listeners.echo  # there the bar shows the rounds
    lines = RoundLines(config, directory.log, echo)
    trackers = [Trackers(directory, config, log)] if config.trackers else []
    return [DirectorySink(directory, config), lines, *bars, *trackers, *listeners.sinks]


@dataclass(eq=False)
class _Run:
    """A run on its way: its records so far, who is told of them, and what saves its state."""

    experiment: Experiment
    directory: RunDirectory
    sinks: Sequence[Sink]
    saver: Saver
    records: list[RoundRecord]
    recorded: ServerState
    """The state whose record is the last one in the run directory: what may be saved beside it."""

    def to_its_end(self, state: ServerState, memory_before: int, *, shows_bars: bool) -> RunResult:
        """Run all rounds after `state`, measure what is measured in the end, and tell of it."""
        experiment = self.experiment
        clients: ClientResults | None = None
        try:
            _stop_if_diverged(self.records)
            if not self.records:
                clients = self._record(state, None)
            while state.round < experiment.last_round:
                state, result = run_round(experiment.federation, state)
                self._check_same(state)
                clients = self._record(state, result)
                self.saver.after_round(state)
                experiment.federation.engine.hooks.after_round(self.records[-1], state)
                _stop_if_diverged(self.records)
            _say_that_budget_ends(experiment)
            local_only = _compared(experiment, state, log=self.directory.log, shows_bar=shows_bars)
        except BaseException as error:
            self._save_last_recorded(error)
            raise
        if clients is None:  # the run was stopped behind its last round
            clients = measure_clients(experiment, state)
        return self._finish(state, clients, local_only, memory_before)

    def _check_same(self, state: ServerState) -> None:
        """Raise `UserError` if the processes have come to different states in a round."""
        processes = self.experiment.federation.engine.processes
        if processes.size > 1:
            processes.check_same(state_digest(state.adapter), when=f"round {state.round}")

    def _record(self, state: ServerState, result: RoundResult | None) -> ClientResults | None:
        """Measure a round, tell of it, and return what was measured of clients."""
        record, clients = measure(self.experiment, state, result)
        self.records.append(record)
        for sink in self.sinks:
            sink.record(record)
            self.recorded = state  # the directory is the first one that is told
        return clients

    def _save_last_recorded(self, error: BaseException) -> None:
        """Save the last recorded state, if it can still be written, and log how to go on, whatever ended the run."""
        with suppress(UserError):
            self.saver.save(self.recorded)
        if self.directory.records_end[0] and not isinstance(error, DivergedError):
            with suppress(UserError):
                to_go_on = f"{_program()} --resume {shlex.quote(str(self.directory.path))}"
                self.experiment.federation.engine.log(f"to go on: {to_go_on}")

    def _finish(
        self, state: ServerState, clients: ClientResults, local_only: LocalOnlyResults, memory_before: int
    ) -> RunResult:
        experiment, federation = self.experiment, self.experiment.federation
        summary = report.summarise(
            self.records,
            name=self.directory.path.resolve().name,
            num_clients=len(federation.clients),
            num_unseen=len(experiment.unseen),
            **local_only_figures(local_only),
            **compare_held_out(clients, local_only),
            wall_seconds=self.saver.wall_seconds,
            peak_memory_bytes=peak_memory_bytes(federation.engine.model.device),
            memory_before_bytes=memory_before,
            trainable_parameters=tree.count(tree.select(state.adapter, federation.roles.ever_trained(state.adapter))),
            backbone_parameters=experiment.backbone_parameters,
            num_unreadable=len(experiment.unreadable),
            noise_multiplier=None if federation.privacy is None else federation.privacy.noise_multiplier,
        )
        columns = client_columns(experiment, state, clients, local_only, self.records)
        if not experiment.publishes:
            columns = {"client": columns["client"]}
        finished = Finished(summary, state, columns, last_tables(experiment, state, clients))
        for sink in self.sinks:
            sink.finish(finished)
        return RunResult(summary, tuple(self.records), state.adapter, self.directory.path)


def _say_that_budget_ends(experiment: Experiment) -> None:
    """Log why a run has fewer rounds than were asked for."""
    private, last = experiment.federation.privacy, experiment.last_round
    if private is not None and last < experiment.config.rounds:
        experiment.federation.engine.log(
            f"stopped after round {last} of {experiment.config.rounds}: round {last + 1} would spend epsilon "
            f"{private.epsilon(last + 1):.4g}, more than privacy.budget_epsilon {private.mechanism.budget_epsilon:g}"
        )


def _stop_if_diverged(records: Sequence[RoundRecord]) -> None:
    """Raise `UserError` if not one update was fit to be averaged in each of the last rounds."""
    last = records[-MAX_LOST_ROUNDS:]
    if len(last) == MAX_LOST_ROUNDS and all(
        record.num_clients and len(record.rejected_clients) == record.num_clients for record in last
    ):
        first = refusal(last[0].round, last[0].rejected_clients[0], last[0].learning_rate or 0.0)
        raise DivergedError(f"{first} (no update could be used in {MAX_LOST_ROUNDS} rounds in a row)")


def _compared(
    experiment: Experiment, state: ServerState, log: Callable[[str], object], *, shows_bar: bool
) -> LocalOnlyResults:
    """Return what clients reach without the others, and all images in one place, as far as that is asked for."""
    options, rounds = experiment.config.evaluation, experiment.config.rounds
    results = LocalOnlyResults.of_nobody(len(experiment.federation.clients))
    progress = image_progress(experiment.federation.engine.log, shows_bars=shows_bar, unit="round")
    if options.num_local_only:
        started = time.perf_counter()
        results = measure_local_only(experiment, state, advance=progress("alone", rounds))
        who = counted(int(np.sum(~np.isnan(results.test))), "client")
        log(f"{who} trained alone in {time.perf_counter() - started:.1f} s")
    if options.centralized:
        started = time.perf_counter()
        centralized = measure_centralized(experiment, advance=progress("all images in one place", rounds))
        log(f"trained on all images in one place in {time.perf_counter() - started:.1f} s")
        results = replace(results, centralized=centralized)
    return results


def _program() -> str:
    """Return what to type to run this program again: a user's own file that calls `main`, or this module."""
    script = (
        sys.argv[0] if sys.argv[0].endswith(".py") and getattr(sys.modules["__main__"], "__spec__", 1) is None else None
    )
    program = f"{shlex.quote(sys.executable)} {'-m flora.simulate' if script is None else shlex.quote(script)}"
    return " ".join([program, *(f"--import {shlex.quote(os.path.abspath(path))}" for path in imported)])

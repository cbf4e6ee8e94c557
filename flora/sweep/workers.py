"""Run tasks in processes of their own, several at once, and report how each of them ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from flora.core import command_line
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.interrupts import Interrupted, Interrupts

# Seconds after which the parent looks whether it has been asked to stop.
PATIENCE = 0.2

# What every run imports: also what this program imports only where it is used.
PRELOADED = ["flora.simulate", "flora.catalogue", "torchvision", "open_clip"]

Work = Callable[[Any, Hooks], dict[str, str | None] | None]
"""`work(task, hooks)`: a function at the top of a module, so that another process can find it.

What it returns says how each part of the task ended, where it has parts.
"""


def work_through(
    work: Work, tasks: Sequence[Any], *, jobs: int, check: Callable[[], object]
) -> Iterator[tuple[int, dict[str, str | None] | str | None]]:
    """Do `work` for each task in a process of its own, at most `jobs` at once.

    Yields (index of the task, what it returned or how it failed) as they end. `check` is called again and again;
    what it raises stops all work at the next good place. So does the end of this process, whatever it is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    threads = max(1, torch.get_num_threads() // jobs) if jobs > 1 else None
    _start_server()
    waiting = list(enumerate(tasks))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, task = waiting.pop(0)
                ours, theirs = context.Pipe()
                given = theirs, work, task, threads, tuple(command_line.imported)
                started = context.Process(target=_work, args=given)
                started.start()
                theirs.close()
                running[ours] = index, started
            for ready in wait(list(running), timeout=PATIENCE):
                assert isinstance(ready, Connection)
                index, process = running[ready]
                outcome = _outcome(ready, process)
                del running[ready]
                yield index, outcome
            check()
    finally:
        for connection in running:
            connection.close()
        for _, process in running.values():
            process.join()


def _start_server() -> None:
    """Start the process that the others are forked from, so that Ctrl-C doesn't reach it while it imports."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(connection: Connection, process: BaseProcess) -> dict[str, str | None] | str | None:
    """Return what a process that has ended, or is about to, came to."""
    outcome: dict[str, str | None] | str | None
    try:
        outcome = connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        outcome = f"its process was ended by {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
    connection.close()
    process.join()
    return outcome


def problem_of(error: BaseException) -> str:
    """Return what ended a run, in words: one line for what a user can mend, else where it happened."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Interrupted):
        return f"stopped by {error}"
    return "".join(traceback.format_exception(error)).rstrip()


def _work(connection: Connection, work: Work, task: Any, threads: int | None, imports: Sequence[str]) -> None:
    """Do one task in its process, with the files of `--import`.

    Its log is where the run is; the terminal belongs to the parent.
    """
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    with Interrupts() as interrupts:
        # Ctrl-C reaches every process of a terminal; the parent says when to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        done = threading.Event()
        threading.Thread(target=_stop_with_the_parent, args=(connection, done), daemon=True).start()
        outcome: dict[str, str | None] | str | None
        try:
            for path in imports:
                command_line.import_components(path)
            if threads is not None:
                torch.set_num_threads(threads)
            outcome = work(task, Hooks(before_block=lambda round, clients: interrupts.check()))
        except BaseException as error:
            outcome = problem_of(error)
        done.set()
        try:
            connection.send(outcome)
        except OSError:  # the parent has gone, or doesn't want to know
            sys.exit(1)


def _stop_with_the_parent(connection: Connection, done: threading.Event) -> None:
    with suppress(EOFError, OSError):
        connection.recv()
    if not done.is_set():
        os.kill(os.getpid(), signal.SIGTERM)

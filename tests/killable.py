"""Runs in processes of their own that can be killed at any moment. Started by `test_resume.py`, and cheap to start."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import helpers  # noqa: F401  (registers the data set "patterns", and uses one thread)
from several import forking

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.interrupts import Interrupts
from flora.runs.run_directory import RunDirectory
from flora.simulate import resume, simulate


def start(raw: dict[str, Any], directory: Path, kill_at_write: int | None = None) -> BaseProcess:
    """Begin the run, or go on with it if it has begun.

    It kills itself before write number `kill_at_write`, if that is given.
    """
    return _started(work, raw, directory, kill_at_write)


def work(raw: dict[str, Any], directory: Path, kill_at_write: int | None) -> None:
    os.environ["HOME"] = str(directory.parent)
    writes = 0

    def before_write(path: Path) -> None:
        nonlocal writes
        writes += 1
        (directory.parent / "writes").write_text(str(writes))
        if writes == kill_at_write:
            os.kill(os.getpid(), signal.SIGKILL)

    hooks = Hooks(before_write=before_write)
    if not (directory / "config.yaml").exists():
        if directory.exists():
            directory.rename(directory.with_name(f"{directory.name}-{time.time_ns()}"))
        simulate(parse_config(raw), hooks=hooks)
        return
    try:
        resume(directory, hooks=hooks)
    except UserError as error:
        if "this run is finished" not in str(error):
            raise


def hold(directory: Path) -> BaseProcess:
    """Have a process open a run directory, and keep it open."""
    return _started(_hold, directory)


def _hold(directory: Path) -> None:
    held = RunDirectory(directory)
    time.sleep(60)
    held.close()


def terminate_twice(raw: dict[str, Any], errors: Path) -> BaseProcess:
    """Have a process begin the run, and send itself two signals in round 3; its standard error goes to a file."""
    return _started(_terminate_twice, raw, errors)


def _terminate_twice(raw: dict[str, Any], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    with Interrupts() as interrupts:

        def before_block(round: int, clients: tuple[int, ...]) -> None:
            interrupts.check()
            if round == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

        simulate(parse_config(raw), hooks=Hooks(before_block=before_block))


def _started(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = forking().Process(target=function, args=arguments, daemon=True)
    process.start()
    return process

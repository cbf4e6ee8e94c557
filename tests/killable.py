"""A run in a process of its own that can be killed at any moment. Started by `test_resume.py`, and cheap to start."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import helpers  # noqa: F401  (registers the data set "patterns", and uses one thread)
from several import forking

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.simulate import resume, simulate


def start(raw: dict[str, Any], directory: Path, kill_at_write: int | None = None) -> BaseProcess:
    """Begin the run, or go on with it if it has begun.

    It kills itself before write number `kill_at_write`, if that is given.
    """
    process = forking().Process(target=work, args=(raw, directory, kill_at_write), daemon=True)
    process.start()
    return process


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

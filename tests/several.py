"""Programs in processes of their own, also several of one run as torchrun would start them, and cheap to start."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import helpers  # noqa: F401  (registers the data set "patterns", and uses one thread)
import torch

from flora.core.hooks import Hooks
from flora.core.states import ClientUpdate
from flora.sweep.workers import PRELOADED


@dataclass(frozen=True)
class Mischief:
    """What goes wrong in process `rank`, before its block number `block`, counted from 0 over all rounds."""

    kind: str
    rank: int = 1
    block: int = 0

    def hooks(self) -> Hooks:
        blocks = 0

        def before_block(round: int, clients: tuple[int, ...]) -> None:
            nonlocal blocks
            blocks += 1
            if blocks == self.block + 1:
                self._happen()
            if (self.kind == "memory" and len(clients) > 2) or self.kind == "memory of one":
                raise MemoryError

        def update(round: int, update: ClientUpdate) -> ClientUpdate:
            delta = {name: tensor * 2 for name, tensor in update.delta.items()}
            return replace(update, delta=delta) if self.kind == "other numbers" else update

        return Hooks(before_block=before_block, update=update)

    def _happen(self) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "error":
            raise ValueError("a mistake in the program")
        elif self.kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, and what it wrote."""

    status: int | None
    out: str
    err: str


def run(
    number: int, arguments: Sequence[str], folder: Path, mischief: Mischief | None = None, *, stem_batch: int = 256
) -> list[Ended]:
    """How `number` processes of `flora.simulate ARGUMENTS` end, by their ranks."""
    processes = start(number, arguments, folder, mischief, stem_batch=stem_batch)
    return ended(processes, folder)


def forking() -> ForkServerContext:
    """Where processes come from: forks of one that has imported all they need, which takes them seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "helpers", "pytest"])
    return context


def start(
    number: int,
    arguments: Sequence[str],
    folder: Path,
    mischief: Mischief | None = None,
    *,
    stem_batch: int = 256,
    program: str = "flora.simulate",
) -> list[BaseProcess]:
    """Start `number` processes of a program, whose output goes to files in `folder`."""
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HOME": str(folder),
    }
    processes: list[BaseProcess] = []
    for rank in range(number):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {"HOME": str(folder)}
        happens = mischief if mischief is not None and mischief.rank == rank else None
        given = (own, [program, *arguments], folder / f"process-{rank}", happens, stem_batch)
        for stream in ("out", "err"):  # it may be killed before it opens them
            (folder / f"process-{rank}.{stream}").write_text("")
        # A sweep starts processes, which a daemon may not.
        processes.append(context.Process(target=work, args=given, daemon=program == "flora.simulate"))
        processes[-1].start()
    return processes


def ended(processes: Sequence[BaseProcess], folder: Path) -> list[Ended]:
    """Wait for the processes."""
    for process in processes:
        process.join(120)
    return [
        Ended(process.exitcode, *((folder / f"process-{rank}.{stream}").read_text() for stream in ("out", "err")))
        for rank, process in enumerate(processes)
    ]


def work(
    environment: dict[str, str], command: list[str], output: Path, mischief: Mischief | None, stem_batch: int
) -> None:
    os.environ.update(environment)
    os.chdir(Path(__file__).parents[1])  # whatever it was in the test that needed the first process
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    import flora.core.processes as processes
    import flora.features.reading as reading

    reading.STEM_BATCH_SIZE = stem_batch
    processes.LONGEST_START = timedelta(
        seconds=30
    )  # a process that is killed before it has joined is missed after this
    program, *arguments = command
    hooks = {} if mischief is None else {"hooks": mischief.hooks()}
    sys.exit(importlib.import_module(program).main(arguments, **hooks))

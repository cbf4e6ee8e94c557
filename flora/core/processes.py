"""The processes of one run, each of which has the model: what they tell each other, and how what ends one ends all.

All of them do the same things in the same order, and meet where they exchange something. Whoever comes to such a
meeting with an error, or interrupted, says so there, so nobody waits for it: they all raise.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flora.core.errors import UserError
from flora.core.interrupts import Interrupted
from flora.core.tree import State, StateLike

# What torchrun, or whoever else starts the processes, says in the environment.
VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
# A process that dies closes its connections, which the others notice at once; no block of clients takes this long.
LONGEST_WAIT = timedelta(days=7)
# One that dies before it has any is missed after this. Processes are started together, but some import more slowly.
LONGEST_START = timedelta(minutes=5)
# Seconds between two looks at whether the others have come: signals are answered between them.
SHORTEST_LOOK, LONGEST_LOOK = 2e-5, 2e-3
# How a process comes to a meeting: to exchange something, done with its work, failed; or stopped by a signal, as this
# and the signal's number.
WORKING, DONE, FAILED, STOPPED = 0, 1, 2, 1000
CUT_OFF = "another process of this run has ended, or can't be reached any more"


@dataclass(frozen=True, eq=False)
class Message:
    """What a process tells the others: `fields` of plain JSON, and tensors on the CPU by name, in their order."""

    fields: Any = None
    tensors: StateLike = field(default_factory=dict)

    def pack(self) -> Tensor:
        """The message as bytes `(n,)` uint8: the length of a JSON text, the text, the tensors' numbers."""
        layout = [
            [name, str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in self.tensors.items()
        ]
        head = json.dumps([self.fields, layout]).encode()
        parts = [torch.tensor([len(head)]).view(torch.uint8), torch.frombuffer(bytearray(head), dtype=torch.uint8)]
        parts += [each.detach().contiguous().flatten().view(torch.uint8) for each in self.tensors.values()]
        return torch.cat(parts)

    @classmethod
    def unpack(cls, packed: Tensor) -> Message:
        """The inverse of `pack`, an empty message of no bytes; its tensors have memory of their own."""
        if not len(packed):
            return cls()
        start = 8 + int(packed[:8].clone().view(torch.int64))
        fields, layout = json.loads(packed[8:start].numpy().tobytes())
        tensors: State = {}
        for name, dtype_name, shape in layout:
            dtype = getattr(torch, dtype_name)
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            tensors[name] = packed[start:stop].clone().view(dtype).view(shape)
            start = stop
        return cls(fields, tensors)


class Processes:
    """This process's place among those of a run: number `rank` of `size`, `local_rank` of `local_size` on its machine.

    A context, which has to be left for the others to learn how this process ended. One process alone exchanges nothing.
    `num_bytes` are all bytes that have been exchanged.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.num_bytes = 0
        self._is_cut_off = False

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Processes:
        """This process among those that torchrun started; alone if it didn't. Raises `UserError` for odd numbers."""
        if any(name not in environment for name in VARIABLES):
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            rank, size, local_rank, local_size = (
                int(environment.get(name, default)) for name, default in zip(names, ("0", "1", "0", "1"), strict=True)
            )
        except ValueError:
            raise UserError(
                f"{', '.join(names)}: expected whole numbers in the environment, as torchrun sets"
            ) from None
        return cls(rank, size, local_rank, local_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    def exchange(self, message: Message) -> list[Message]:
        """Return what every process says, in the order of their ranks; all have to call this at the same place.

        Raises what ended another one: `Interrupted`, or `UserError`.
        """
        if self.size == 1:
            return [message]
        is_empty = message.fields is None and not message.tensors
        states, packed = self._meet(WORKING, torch.empty(0, dtype=torch.uint8) if is_empty else message.pack())
        if any(state != WORKING for state in states):
            raise _ending(states, packed)
        return [message if rank == self.rank else Message.unpack(each) for rank, each in enumerate(packed)]

    def first(self, make: Callable[[], Message]) -> Message:
        """Return what process 0 makes, in all processes."""
        if self.size == 1:
            return make()
        return self.exchange(make() if self.is_first else Message())[0]

    def anybody(self, says_so: bool) -> bool:
        """Whether one process says so at least."""
        return any(message.fields for message in self.exchange(Message(says_so)))

    @contextmanager
    def one_first(self, *, if_needed: bool) -> Iterator[None]:
        """Have one process of each machine do something before the others, for whom it is done then: a download."""
        waits = if_needed and self.size > 1
        if waits and self.local_rank:
            self.exchange(Message())
        yield
        if waits and not self.local_rank:
            self.exchange(Message())

    def check_same(self, digest: str, *, when: str) -> None:
        """Raise `UserError` if processes have come to different adapters, by their digests."""
        digests = [message.fields for message in self.exchange(Message(digest))]
        other = next((rank for rank, each in enumerate(digests) if each != digests[0]), None)
        if other is not None:
            raise UserError(
                f"{when}: processes 0 and {other} have come to different adapters; machines of different kinds, or "
                "with other versions or numbers of threads, round differently: use machines that are alike"
            )

    def __enter__(self) -> Processes:
        if self.size > 1:
            # What is exchanged lies on the CPU, whatever clients are trained on.
            try:
                dist.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=LONGEST_START)
            except RuntimeError as error:
                reason = " ".join(str(error).split()).rpartition("] ")[2]
                raise UserError(f"the processes have not found each other ({reason})") from None
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(LONGEST_WAIT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        others: BaseException | None = None
        if not self._is_cut_off:
            others = self._say_goodbye(error)
        if self._is_cut_off:
            self._leave(error)
        dist.destroy_process_group()
        if not self.is_first and isinstance(error or others, UserError | Interrupted | KeyboardInterrupt):
            raise SystemExit(_exit_status(error or others)) from None  # without a word
        if error is None and others is not None:
            raise others

    def _say_goodbye(self, error: BaseException | None) -> BaseException | None:
        """Tell the others how this process ended, until all have heard; return what ended one of them, if it did."""
        state = _state_after(error)
        text = torch.tensor(list(_text(error).encode()), dtype=torch.uint8)
        cause: BaseException | None = None
        with suppress(UserError):  # cut off: nobody is left to be told
            while True:
                states, packed = self._meet(state, text)
                if any(each not in (WORKING, DONE) for each in states):
                    cause = cause or _ending(states, packed)
                if WORKING not in states:
                    break
        return cause

    def _leave(self, error: BaseException | None) -> None:
        """End this process at once, after a line by one of those that are left."""
        was_stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        if self.is_first if was_stopped else self._is_first_to_notice():
            line = f"stopped by {error or 'SIGINT'}" if was_stopped else _text(error) or CUT_OFF
            print(" ".join(line.splitlines()), file=sys.stderr, flush=True)
        os._exit(_exit_status(error) or 2)

    def _is_first_to_notice(self) -> bool:
        """Whether no other process has said that one is gone."""
        try:
            store = dist.distributed_c10d._get_default_store()
            return bool(store.add("flora: a process is gone", 1) == 1)
        except Exception:
            return True

    def _meet(self, state: int, payload: Tensor) -> tuple[list[int], list[Tensor]]:
        """Exchange how each process comes, and bytes `(n,)` of each; return both in the order of ranks."""
        heads = [torch.zeros(2, dtype=torch.int64) for _ in range(self.size)]
        self._wait(dist.all_gather(heads, torch.tensor([state, len(payload)]), async_op=True))
        states, sizes = ([int(head[column]) for head in heads] for column in (0, 1))
        self.num_bytes += sum(sizes)
        with_something = [rank for rank, size in enumerate(sizes) if size]
        payloads = [torch.empty(0, dtype=torch.uint8) for _ in sizes]
        if len(with_something) == 1:
            source = with_something[0]
            payloads[source] = payload if source == self.rank else torch.empty(sizes[source], dtype=torch.uint8)
            self._wait(dist.broadcast(payloads[source], source, async_op=True))
        elif with_something:
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(payload)] = payload
            payloads = [torch.empty_like(padded) for _ in sizes]
            self._wait(dist.all_gather(payloads, padded, async_op=True))
        return states, [each[:size] for each, size in zip(payloads, sizes, strict=True)]

    def _wait(self, work: Any) -> None:
        """Wait for the others. Raises `UserError` if one is gone, and what signals raise meanwhile."""
        pause = SHORTEST_LOOK
        self._is_cut_off = True  # whatever is raised from here on, the others can't count on this process
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK)
        try:
            work.wait()
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rpartition("] ")[2]
            raise UserError(f"{CUT_OFF} ({reason})") from None
        self._is_cut_off = False


ALONE = Processes()
"""One process, as without torchrun."""


def refuse_several(program: str) -> None:
    """Raise `UserError` if torchrun has started several processes of a program that is one."""
    if Processes.of_environment().size > 1:
        raise UserError(f"{program} is one process and not to be started by torchrun, which is for flora.simulate")


def _state_after(error: BaseException | None) -> int:
    if isinstance(error, Interrupted):
        return STOPPED + error.number
    if isinstance(error, KeyboardInterrupt):
        return STOPPED + signal.SIGINT
    return DONE if error is None else FAILED


def _exit_status(error: BaseException | None) -> int:
    state = _state_after(error)
    if state > STOPPED:
        return 128 + state - STOPPED
    return 0 if state == DONE else 2 if isinstance(error, UserError) else 1


def _text(error: BaseException | None) -> str:
    """An error in a line."""
    if error is None:
        return ""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | Interrupted) else f"{type(error).__name__}: {text}"


def _ending(states: list[int], packed: list[Tensor]) -> BaseException:
    """The error that all processes end with when one of them comes to a meeting in one of these `states`."""
    stopped = next((state for state in states if state > STOPPED), None)
    if stopped is not None:
        return Interrupted(stopped - STOPPED)
    rank = next((rank for rank, state in enumerate(states) if state == FAILED), None)
    if rank is None:
        return UserError(f"process {states.index(DONE)} has ended before the others")
    return UserError(f"process {rank}: {packed[rank].numpy().tobytes().decode()}")

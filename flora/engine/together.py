"""Several runs whose clients share steps: each run in a thread of its own, of which only one is at work at a time.

A run that wants clients trained or adapters evaluated waits until all others do; then that is done for all of them in
one call, in the main thread. So a run's code does not know of the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from flora.core.hooks import Hooks
from flora.core.low_rank import is_residual
from flora.core.shared import Shared
from flora.core.tree import StateLike
from flora.engine.dealing import Item, Travel
from flora.engine.engine import Engine
from flora.engine.tasks import ClientResult, ClientTask
from flora.features.joined import can_be_joined, joined

Result = TypeVar("Result")

# Runs whose clients fill so many blocks go into one call; more would only hold more results in memory.
BLOCKS_PER_CALL = 4
# Adapters that are evaluated at once.
MAX_ADAPTERS = 32
# Clients' ids of the runs of one call are told apart by multiples of this.
CLIENT_IDS = 2**40


@dataclass(frozen=True, eq=False)
class _Call:
    """A run wants something computed in the main thread, by itself."""

    function: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class _Training:
    """A run wants its clients trained."""

    tasks: Sequence[ClientTask]


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """A run wants something computed of adapters `(K, ...)`; what has the same `key` may be computed together."""

    key: Hashable
    adapters: StateLike | None
    compute: Callable[[StateLike | None], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class _Aside:
    """A run is waiting for something of its own, such as a disk, and needs nobody: others may go on."""


Request = _Call | _Training | _Evaluation | _Aside


@dataclass(frozen=True, eq=False)
class _Reply:
    """The answer to a run's request: a value, or an error to be raised."""

    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class Member:
    """One of several runs that train together, as its own code sees it."""

    work: Callable[[Member], object]
    number: int
    num_members: int
    shared: Shared
    asks: SimpleQueue[Request | None]
    replies: SimpleQueue[_Reply] = field(default_factory=SimpleQueue)
    engine: SharedEngine | None = None
    request: _Training | _Evaluation | _Aside | None = None
    error: BaseException | None = None
    in_call: bool = False
    spent_seconds: float = 0.0
    resumed_at: float = 0.0

    def join(self, engine: Engine) -> SharedEngine:
        """Return the engine of this run, whose clients train together with the others' from now on."""
        self.engine = SharedEngine(
            engine.model, engine.features, engine.clients_per_block, engine.hooks, engine.log,
            memory_bytes=engine.memory_bytes, member=self,
        )  # fmt: skip
        return self.engine

    def call(self, function: Callable[[], Result]) -> Result:
        """Compute something in the main thread, which has all of the machine's threads to compute with."""
        if self.in_call:
            return function()
        value: Result = self.ask(_Call(function))
        return value

    def once(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Return what a function comes to that only the first run to ask for `key` computes, in the main thread."""
        return self.call(lambda: self.shared.of(key, function))

    def seconds(self) -> float:
        """A clock that runs while this run is at work, and for its share of what is done for several."""
        return self.spent_seconds + time.perf_counter() - self.resumed_at

    def ask(self, request: Request) -> Any:
        """Hand over to the main thread until it has done what is asked for; return what comes of it."""
        self.asks.put(request)
        reply = self.replies.get()
        if reply.error is not None:
            raise reply.error
        return reply.value

    def aside(self, function: Callable[[], object]) -> None:
        """Do something that mostly waits for a disk in this run's own thread, while other runs go on."""
        if self.in_call:
            function()
            return
        self.asks.put(_Aside())
        try:
            function()
        finally:
            self.replies.get()

    @property
    def group(self) -> Hashable:
        """The key of the run's request: those of several runs that have the same one are answered together."""
        if isinstance(self.request, _Evaluation):
            return self.request.key
        assert self.engine is not None
        return self.engine.key

    @property
    def share(self) -> float:
        """The weight of this run when the seconds of a common answer are divided among its runs: its local steps."""
        return float(sum(task.num_steps for task in self.request.tasks)) if isinstance(self.request, _Training) else 1.0

    def live(self) -> None:
        """Do the run's work from the first reply on, for its thread."""
        # What is left for these threads is small, and a pool of threads of each one's would disturb the main one's.
        torch.set_num_threads(1)
        reply = self.replies.get()
        self.error = reply.error
        if self.error is None:
            try:
                self.work(self)
            except BaseException as error:
                self.error = error
        self.asks.put(None)


@dataclass(eq=False)
class SharedEngine(Engine):
    """A run's engine where its clients train together with those of other runs."""

    member: Member = field(kw_only=True)

    @property
    def num_runs(self) -> int:
        return self.member.num_members

    @property
    def key(self) -> Hashable:
        """The key of this engine: runs with the same one, a model and features to be joined, train together."""
        return id(self.model), True if can_be_joined(self.features) else id(self.member)

    def seconds(self) -> float:
        return self.member.seconds()

    def aside(self, function: Callable[[], object]) -> None:
        self.member.aside(function)

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        if self.member.in_call:
            yield from super().train(tasks)
        elif tasks:
            yield from self.member.ask(_Training(tasks))

    def in_blocks(
        self,
        items: Sequence[Item],
        compute: Callable[[Sequence[Item]], Result],
        *,
        setting: str = "evaluation.batch_size",
        travel: Travel[Result] | None = None,
    ) -> Iterator[Result]:
        def in_main_thread(some: Sequence[Item]) -> Result:
            return self.member.call(lambda: compute(some))

        yield from super().in_blocks(items, in_main_thread, setting=setting, travel=travel)

    def evaluate(
        self,
        key: Hashable,
        adapters: StateLike | None,
        compute: Callable[[StateLike | None], Sequence[Result]],
    ) -> Sequence[Result]:
        if self.member.in_call:
            return compute(adapters)
        shapes = [(name, tensor.shape[1:]) for name, tensor in (adapters or {}).items()]
        # A residual has no axis for several adapters, and some adapters are too large for two of them.
        is_alone = any(is_residual(name) for name, _ in shapes) or self.model.adapter.max_clients_per_block is not None
        whole_key = key, tuple(shapes), id(self) if is_alone else None
        results: Sequence[Result] = self.member.ask(_Evaluation(whole_key, adapters, compute))
        return results


class Together:
    """Runs several pieces of work, each a run's whole life, so that their clients share steps."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._members: list[Member] = []
        self._engines: dict[Hashable, _CommonEngine] = {}
        self._stop: BaseException | None = None

    def run(self, works: Sequence[Callable[[Member], object]]) -> list[BaseException | None]:
        """Do all `works`, and return how each ended: None, or with which error. What ends one leaves others alone."""
        shared = Shared()
        asks: SimpleQueue[Request | None] = SimpleQueue()
        self._members = [Member(work, number, len(works), shared, asks) for number, work in enumerate(works)]
        for member in self._members:
            threading.Thread(target=member.live, daemon=True).start()
            self._go_on(member, _Reply(error=self._stop))
        while waiting := [member for member in self._members if member.request is not None]:
            if back := [member for member in waiting if isinstance(member.request, _Aside)]:
                for member in back:
                    self._go_on(member, _Reply())
                continue
            chosen = self._chosen(waiting)
            for member, reply in zip(chosen, self._replies(chosen), strict=True):
                self._go_on(member, reply)
        return [member.error for member in self._members]

    def _go_on(self, member: Member, reply: _Reply) -> None:
        """Let a run work until it wants something that is done for several, or has ended."""
        while True:
            member.resumed_at = time.perf_counter()
            member.replies.put(reply)
            request = self._next_request(member)
            if isinstance(request, _Call):
                member.in_call = True
                reply = self._try(request.function)
                member.in_call = False
            member.spent_seconds += time.perf_counter() - member.resumed_at
            if not isinstance(request, _Call):
                member.request = request
                return

    def _next_request(self, member: Member) -> Request | None:
        while True:
            try:
                return member.asks.get()
            except BaseException as error:  # a signal has come; the run has to be waited for all the same
                self._stop = error

    def _try(self, function: Callable[[], Any]) -> _Reply:
        """Return what a function comes to. What is no mere error, such as Ctrl-C, stops all runs."""
        try:
            if self._stop is not None:
                raise self._stop
            return _Reply(function())
        except Exception as error:
            return _Reply(error=error)
        except BaseException as error:
            self._stop = error
            return _Reply(error=error)

    def _chosen(self, waiting: Sequence[Member]) -> list[Member]:
        """The runs whose requests are next: of the kind that most have, and no more than it takes to fill steps."""
        training = [member for member in waiting if isinstance(member.request, _Training)]
        if 2 * len(training) <= len(waiting):
            return [member for member in waiting if member not in training]
        chosen: list[Member] = []
        number = 0
        for member in training:
            assert isinstance(member.request, _Training) and member.engine is not None
            if number >= BLOCKS_PER_CALL * member.engine.clients_per_block:
                break
            number += len(member.request.tasks)
            chosen.append(member)
        return chosen

    def _replies(self, members: Sequence[Member]) -> list[_Reply]:
        """Do what the chosen runs want, and return what each of them gets."""
        groups: dict[Hashable, list[Member]] = {}
        for member in members:
            groups.setdefault(member.group, []).append(member)
        replies: dict[int, _Reply] = {}
        for group in groups.values():
            started = time.perf_counter()
            outcome = self._try(partial(self._common, group))
            seconds = time.perf_counter() - started
            shares = [member.share for member in group]
            for place, member in enumerate(group):
                member.spent_seconds += seconds * shares[place] / sum(shares)
                replies[member.number] = _Reply(outcome.value[place]) if outcome.error is None else outcome
        return [replies[member.number] for member in members]

    def _common(self, members: Sequence[Member]) -> Sequence[Any]:
        """Answer the requests of several runs, all of one kind, and return each run's answer."""
        requests = [member.request for member in members]
        evaluations = [request for request in requests if isinstance(request, _Evaluation)]
        return _evaluated(evaluations) if evaluations else self._engine(members[0]).train(members)

    def _engine(self, member: Member) -> _CommonEngine:
        """The engine of all runs with a run's model. By the time that it is asked for, all runs have been built."""
        assert member.engine is not None
        key = member.engine.key
        if key not in self._engines:
            engines = [each.engine for each in self._members if each.engine is not None]
            self._engines[key] = _CommonEngine([each for each in engines if each.key == key], self._hooks)
        return self._engines[key]


class _CommonEngine:
    """The engine of several runs that have one model."""

    def __init__(self, engines: Sequence[SharedEngine], hooks: Hooks) -> None:
        model = engines[0].model
        if can_be_joined(engines[0].features):
            features, starts = joined([each.features for each in engines])
            model.release_stems()
        else:
            features, starts = engines[0].features, [0]
        self._starts = {each.member.number: start for each, start in zip(engines, starts, strict=True)}
        bounds = [each.memory_bytes for each in engines]
        memory_bytes = None if None in bounds else max(each for each in bounds if each is not None)
        number = max(each.clients_per_block for each in engines)
        self._engine = Engine(model, features, number, hooks, memory_bytes=memory_bytes)

    def train(self, members: Sequence[Member]) -> list[list[ClientResult]]:
        """Train the clients that each of the runs wants trained, and return each run's results."""
        self._engine.log = lambda line: [member.engine.log(line) for member in members if member.engine is not None]
        tasks = []
        for place, member in enumerate(members):
            assert isinstance(member.request, _Training)
            start = self._starts[member.number]
            tasks += [
                replace(
                    task,
                    client=place * CLIENT_IDS + task.client,
                    examples=task.examples + start,
                    unlabelled=task.unlabelled + start,
                )
                for task in member.request.tasks
            ]
        found: list[list[ClientResult]] = [[] for _ in members]
        for result in self._engine.train(tasks):
            place, client = divmod(result.client, CLIENT_IDS)
            found[place].append(replace(result, client=client))
        return found


def _evaluated(requests: Sequence[_Evaluation]) -> list[Sequence[Any]]:
    """Evaluate the adapters of several requests of one key together, and return the results of each request."""
    adapters = [request.adapters for request in requests if request.adapters is not None]
    if not adapters:  # the frozen model, which is the same for all
        return [requests[0].compute(None)] * len(requests)
    numbers = [len(next(iter(each.values()))) for each in adapters]
    stack = {name: torch.cat([each[name] for each in adapters]) for name in adapters[0]}
    results: list[Any] = []
    for start in range(0, sum(numbers), MAX_ADAPTERS):
        results += requests[0].compute({name: tensor[start : start + MAX_ADAPTERS] for name, tensor in stack.items()})
    ends = np.cumsum(numbers)
    return [results[end - number : end] for number, end in zip(numbers, ends.tolist(), strict=True)]

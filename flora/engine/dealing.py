"""Deal parts of the work out among the processes of a run, and exchange what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from flora.core import tree
from flora.core.memory import is_out_of_memory
from flora.core.processes import Message, Processes
from flora.core.states import ClientState
from flora.core.tree import State, StateLike
from flora.engine.tasks import ClientResult

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Travel(Generic[Result]):
    """Packs a result into a message on the process that computed it, and unpacks it on the others."""

    pack: Callable[[Result], Message]
    unpack: Callable[[Message], Result]


@dataclass(frozen=True)
class Work(Generic[Item, Result]):
    """A computation on several items at once, with `advice`: what to lower where these don't fit into memory.

    With `travel` each part is computed by one process, the most expensive by `cost` first; without it by all of them.
    """

    compute: Callable[[Sequence[Item]], Result]
    advice: Callable[[], str]
    travel: Travel[Result] | None = None
    cost: Callable[[Sequence[Item]], float] = len


def parts_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in parts of at most `size`, in their order."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def compute_all(processes: Processes, parts: Sequence[Sequence[Item]], work: Work[Item, Result]) -> list[list[Result]]:
    """Return each part's result in a list, which is empty if memory ran out, in all processes the same."""
    if work.travel is not None and processes.size > 1:
        return _dealt_out(processes, parts, work, work.travel)
    done = [unless_out_of_memory(work.compute, part) for part in parts]
    if processes.size > 1:
        everyone = processes.exchange(Message([len(each) for each in done]))
        fits = [all(counts) for counts in zip(*(message.fields for message in everyone), strict=True)]
        done = [each if fit else [] for each, fit in zip(done, fits, strict=True)]
    return done


def _dealt_out(
    processes: Processes, parts: Sequence[Sequence[Item]], work: Work[Item, Result], travel: Travel[Result]
) -> list[list[Result]]:
    """Have each part computed by one process, and exchange the results."""
    owners = deal([work.cost(part) for part in parts], processes.size)
    done = [
        unless_out_of_memory(work.compute, part) if owner == processes.rank else []
        for part, owner in zip(parts, owners, strict=True)
    ]
    messages = {place: travel.pack(each[0]) for place, each in enumerate(done) if each}
    tensors: State = {}
    for place, message in messages.items():
        tensors |= tree.add_prefix(f"{place}.", message.tensors)
    fields = {str(place): message.fields for place, message in messages.items()}
    for rank, everything in enumerate(processes.exchange(Message(fields, tensors))):
        if rank != processes.rank:
            by_place = _by_place(everything.tensors)
            for place, own in everything.fields.items():
                done[int(place)] = [travel.unpack(Message(own, by_place.get(place, {})))]
    return done


def _by_place(tensors: StateLike) -> dict[str, State]:
    by_place: dict[str, State] = {}
    for name, tensor in tensors.items():
        place, _, own = name.partition(".")
        by_place.setdefault(place, {})[own] = tensor
    return by_place


def deal(costs: Sequence[float], size: int) -> list[int]:
    """Return which of `size` processes each part goes to: the most expensive first, to whoever has the least to do.

    The same in all processes: of equals it is the first.
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += costs[place]
    return owners


def unless_out_of_memory(function: Callable[..., Result], *arguments: object) -> list[Result]:
    """Return a function's result in a list, which is empty if memory ran out; its tensors are let go of by then."""
    try:
        return [function(*arguments)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return []


# The parts of a client's result that are state dicts.
_STATES: Mapping[str, Callable[[ClientResult], StateLike]] = {
    "adapter": lambda result: result.adapter,
    "optimizer": lambda result: result.state.optimizer,
    "correction": lambda result: result.state.correction,
    "sent": lambda result: result.sent_correction,
}
_FIELDS = ("client", "loss", "num_steps", "failed_step", "report")


def _pack_results(results: list[ClientResult]) -> Message:
    """A block's results with each tensor once for all clients, `(K, ...)`."""
    tensors: State = {}
    for part, state_of in _STATES.items():
        states = [state_of(result) for result in results]
        tensors |= tree.add_prefix(f"{part}.", tree.stack(states) if states[0] else {})
    rows = [[getattr(result, name) for name in _FIELDS] for result in results]
    return Message(rows, tensors)


def _unpack_results(message: Message) -> list[ClientResult]:
    """The inverse of `_pack_results`. As where they were computed, only adapters are parts of larger tensors."""
    stacks = {part: tree.strip_prefix(f"{part}.", message.tensors) for part in _STATES}
    results = []
    for row, (values, adapter) in enumerate(zip(message.fields, tree.unstack(stacks["adapter"]), strict=True)):
        optimizer, correction, sent = (
            {name: tensor[row].clone() for name, tensor in stacks[part].items()}
            for part in ("optimizer", "correction", "sent")
        )
        fields: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
        state = ClientState(optimizer=optimizer, correction=correction)
        results.append(ClientResult(**fields, adapter=adapter, state=state, sent_correction=sent))
    return results


RESULTS = Travel(_pack_results, _unpack_results)
ARRAYS: Travel[np.ndarray] = Travel(
    lambda array: Message(None, {"array": torch.from_numpy(np.ascontiguousarray(array))}),
    lambda message: message.tensors["array"].numpy(),
)

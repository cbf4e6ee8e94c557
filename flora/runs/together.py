"""What the processes of a run agree on before its first round: process 0 finds it, and tells the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from flora.config.parse import config_to_dict, parse_config
from flora.config.schema import ExperimentConfig
from flora.core import tree
from flora.core.processes import Message, Processes
from flora.core.records import RoundRecord
from flora.core.tree import State, StateLike
from flora.runs.resume import Start
from flora.runs.run_directory import RunDirectory
from flora.runs.stored_state import client_state, client_tensors, server_state, server_tensors


class Elsewhere(RunDirectory):
    """The run directory as the other processes have it: what process 0 alone writes, they don't."""

    def _locked(self) -> IO[bytes] | None:
        return None

    def _write(self, name: str, content: str | bytes) -> None:
        pass

    def _append(self, name: str, line: str, *, durable: bool = False) -> None:
        pass

    def remove_if_nothing_ran(self) -> None:
        pass

    def close(self) -> None:
        pass

    def replace_records(self, records: Iterable[RoundRecord], set_aside: Path) -> None:
        pass


def shared_directory(processes: Processes, open_it: Callable[[], RunDirectory]) -> RunDirectory:
    """The run directory that process 0 opens; `Elsewhere` in the others."""
    directory = open_it() if processes.is_first else None
    message = processes.first(lambda: Message(str(directory.path) if directory is not None else None))
    return directory if directory is not None else Elsewhere(Path(message.fields))


def shared_config(processes: Processes, find: Callable[[], ExperimentConfig]) -> ExperimentConfig:
    """The configuration that process 0 finds."""
    config = find() if processes.is_first else None
    message = processes.first(lambda: Message(None if config is None else config_to_dict(config)))
    return config if config is not None else parse_config(message.fields, is_complete=True)


def shared_start(processes: Processes, find: Callable[[], Start]) -> Start:
    """The state, and the records so far, from which process 0 finds that the run goes on."""
    start = find() if processes.is_first else None
    message = processes.first(lambda: Message() if start is None else _start_message(start))
    return start if start is not None else _start_of(message)


def _start_message(start: Start) -> Message:
    state = start.state
    tensors = tree.add_prefix("adapter.", state.adapter) | tree.add_prefix("server.", server_tensors(state))
    for client, carried in state.clients.items():
        tensors |= tree.add_prefix(f"clients.{client}.", client_tensors(carried))
    fields = {
        "round": state.round,
        "clients": [int(client) for client in state.clients],
        "records": [record.to_dict() for record in start.records],
        "wall_seconds": start.wall_seconds,
        "clients_per_block": start.clients_per_block,
    }
    return Message(fields, tensors)


def _start_of(message: Message) -> Start:
    fields, tensors = message.fields, message.tensors
    clients = _by_client(tree.strip_prefix("clients.", tensors))
    state = server_state(
        fields["round"],
        tree.strip_prefix("adapter.", tensors),
        tree.strip_prefix("server.", tensors),
        {client: client_state(clients.get(client, {})) for client in fields["clients"]},
    )
    records = tuple(RoundRecord.from_dict(each) for each in fields["records"])
    return Start(state, records, fields["wall_seconds"], fields["clients_per_block"])


def _by_client(tensors: StateLike) -> dict[int, State]:
    by_client: dict[int, State] = {}
    for name, tensor in tensors.items():
        client, _, own = name.partition(".")
        by_client.setdefault(int(client), {})[own] = tensor
    return by_client

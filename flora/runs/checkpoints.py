"""Checkpoints of the server's state: whole or not there at all, verified before they are believed.

`checkpoints/round-0007/` holds three safetensors files and `manifest.json` with the SHA-256 of each, of the records up
to that round, and of itself. It is written under another name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from flora.core import tree
from flora.core.errors import UserError
from flora.core.files import free_name, read_bytes
from flora.core.states import ClientState, ServerState
from flora.core.tree import State, StateLike
from flora.runs.stored_state import client_layout as layout_of_client
from flora.runs.stored_state import client_state, client_tensors, server_state, server_tensors

FORMAT = "flora-checkpoint-2"
PARTS = ("adapter", "server", "clients")
MANIFEST_TYPES: dict[str, Any] = {
    "format": str,
    "round": int,
    "config": dict,
    "sha256": dict,
    "records_bytes": int,
    "records_sha256": str,
    "wall_seconds": float,
    "clients_per_block": int,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds besides the state.

    `config` is the resolved configuration; the records of all rounds up to this one are the first `records_bytes` bytes
    of `rounds.jsonl`, with digest `records_sha256`; `wall_seconds` is how long the run has taken so far, and
    `clients_per_block` how many clients shared a step in the end.
    """

    state: ServerState
    config: Mapping[str, Any]
    records_bytes: int
    records_sha256: str
    wall_seconds: float
    clients_per_block: int


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


class CheckpointFolder:
    """The checkpoints of one run. `before_write` is told of each file before it is touched."""

    def __init__(self, path: Path, before_write: Callable[[Path], object] = lambda path: None) -> None:
        self.path = path
        self._before_write = before_write

    def rounds(self) -> list[int]:
        """The rounds of which there is a checkpoint, whatever its condition, the newest first."""
        matches = [re.fullmatch(r"round-([0-9]{4,9})", path.name) for path in self.path.glob("round-*")]
        return sorted({int(match[1]) for match in matches if match}, reverse=True)

    def save(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Write a checkpoint, then take away all but the newest `keep`.

        Raises `UserError` if it can't be written; what was there before then still is.
        """
        path = self._folder(checkpoint.state.round)
        part = path.with_name(f"part-{path.name}")
        try:
            self._write(part, checkpoint)
            if path.exists():  # a program may save a round twice
                self._remove(path)
            self._before_write(path)
            part.rename(path)
            _flush(self.path)
            for old in self.rounds()[keep:]:
                self._remove(self._folder(old))
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None

    def load(self, round: int, *, like: ServerState, client_like: ClientState) -> Checkpoint:
        """Read and verify the checkpoint of `round`.

        `like` has the shapes to expect, `client_like` all that one client may carry. Raises `DamagedError` that says
        what is wrong with it, and `UserError` if it can't be read, or is of another format: then it may well be good.
        """
        path = self._folder(round)
        manifest = self.manifest(round)
        parts = {name: self._part(round, name, manifest) for name in PARTS}
        clients = _by_client(parts["clients"], path / "clients.safetensors")
        server_like, client_layout = server_tensors(like), layout_of_client(client_like)
        comparisons: list[tuple[str, State, StateLike]] = [
            ("adapter", parts["adapter"], like.adapter),
            ("server", parts["server"], server_like),
            *(("clients", own, _kinds_of(own, client_layout)) for own in clients.values()),
        ]
        for name, tensors, expected in comparisons:
            wrong = _difference(tensors, expected)
            if wrong:
                raise DamagedError(f"{path / name}.safetensors: {wrong}")
        # Safetensors orders names in its own way; what is flattened in the order of names must find its places.
        states = {
            client: client_state({key: own[key] for key in client_layout if key in own})
            for client, own in clients.items()
        }
        adapter, server = tree.select(parts["adapter"], like.adapter), tree.select(parts["server"], server_like)
        return Checkpoint(
            state=server_state(round, adapter, server, states),
            **{key: manifest[key] for key in MANIFEST_TYPES if key not in ("format", "round", "sha256")},
        )

    def client(self, round: int, client: int) -> ClientState:
        """Read what one client carries from the checkpoint of `round`; empty if it is nothing. Raises as `load`."""
        flat = self._part(round, "clients", self.manifest(round))
        return client_state(_by_client(flat, self._folder(round) / "clients.safetensors").get(client, {}))

    def tidy(self, round: int, *, keep: int, set_aside: Path) -> None:
        """Make room for a run that goes on after `round`: later checkpoints are moved to `set_aside`.

        Unfinished ones are taken away, and those of `round` and before it but the newest `keep`. Raises
        `UserError` if the folder can't be changed.
        """
        try:
            for rubbish in self.path.glob("part-*"):
                shutil.rmtree(rubbish, ignore_errors=True)
            for other in self.rounds():
                if other > round:
                    self._before_write(self._folder(other))
                    set_aside.mkdir(exist_ok=True)
                    self._folder(other).rename(free_name(set_aside, self._folder(other).name))
            for old in self.rounds()[keep:]:
                self._remove(self._folder(old))
        except OSError as error:
            raise UserError(f"{self.path}: can't be written: {error.strerror or error}") from None

    def manifest(self, round: int) -> dict[str, Any]:
        """The manifest of a checkpoint. Raises as `load` does."""
        file = self._folder(round) / "manifest.json"
        changed = DamagedError(f"{file}: its contents are not those that were written (SHA-256)")
        try:
            outer = json.loads(_read(file))
            manifest, sha256 = outer["manifest"], outer["sha256"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise DamagedError(f"{file}: not a checkpoint's manifest") from None
        if not isinstance(manifest, dict) or _digest(manifest) != sha256:
            raise changed
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{file}: format {manifest.get('format')!r}, which another version of this program has written; "
                f"this one reads {FORMAT}"
            )
        if any(not isinstance(manifest.get(key), kind) for key, kind in MANIFEST_TYPES.items()):
            raise changed
        if manifest["round"] != round:
            raise DamagedError(f"{file}: it belongs to round {manifest['round']}")
        return manifest

    def _part(self, round: int, name: str, manifest: Mapping[str, Any]) -> State:
        """One of a checkpoint's files, verified."""
        file = self._folder(round) / f"{name}.safetensors"
        content = _read(file)
        if hashlib.sha256(content).hexdigest() != manifest["sha256"].get(name):
            raise DamagedError(f"{file}: its contents are not those that were written (SHA-256)")
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise DamagedError(f"{file}: {error}") from None

    def _folder(self, round: int) -> Path:
        return self.path / f"round-{round:04d}"

    def _write(self, part: Path, checkpoint: Checkpoint) -> None:
        self.path.mkdir(exist_ok=True)
        self._before_write(part)
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed here
        part.mkdir()
        state, digests = checkpoint.state, {}
        for name, tensors in (
            ("adapter", state.adapter),
            ("server", server_tensors(state)),
            ("clients", _flat({client: client_tensors(each) for client, each in state.clients.items()})),
        ):
            content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
            digests[name] = hashlib.sha256(content).hexdigest()
            self._write_file(part / f"{name}.safetensors", content)
        manifest = {
            "format": FORMAT,
            "round": state.round,
            "config": checkpoint.config,
            "sha256": digests,
            "records_bytes": checkpoint.records_bytes,
            "records_sha256": checkpoint.records_sha256,
            "wall_seconds": checkpoint.wall_seconds,
            "clients_per_block": checkpoint.clients_per_block,
        }
        outer = {"sha256": _digest(manifest), "manifest": manifest}
        self._write_file(
            part / "manifest.json", (json.dumps(outer) + "\n").encode()
        )  # indented it takes ten times as long
        _flush(part)

    def _write_file(self, path: Path, content: bytes) -> None:
        self._before_write(path)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _remove(self, path: Path) -> None:
        """Take a checkpoint away so that at no moment a part of it looks like a whole one."""
        self._before_write(path)
        rubbish = path.with_name(f"part-{path.name}-old")
        shutil.rmtree(rubbish, ignore_errors=True)
        path.rename(rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)


def _kinds_of(own: StateLike, like: StateLike) -> StateLike:
    """Return what of `like` a client's state must have: all of a kind, `own.x` and `own.y`, or nothing of it."""
    kinds = {name.partition(".")[0] for name in own}
    return {name: tensor for name, tensor in like.items() if name.partition(".")[0] in kinds}


def _flat(clients: Mapping[int, StateLike]) -> State:
    """The clients' states as one state dict, `17.mean` being client 17's `mean`."""
    return {f"{client}.{name}": tensor for client, own in clients.items() for name, tensor in own.items()}


def _by_client(flat: StateLike, file: Path) -> dict[int, State]:
    """The inverse of `_flat`. Raises `DamagedError` naming the file if a name is none that it makes."""
    clients: dict[int, State] = {}
    for key, tensor in flat.items():
        client, _, name = key.partition(".")
        if not re.fullmatch("[0-9]{1,12}", client):
            raise DamagedError(f"{file}: {key!r} names no client")
        clients.setdefault(int(client), {})[name] = tensor
    return clients


def _read(file: Path) -> bytes:
    """The content of a file. Raises `DamagedError` if it is not there, `UserError` if it can't be read."""
    try:
        return read_bytes(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{file}: {error.strerror}") from None
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror or error}") from None


def _difference(tensors: StateLike, expected: StateLike) -> str | None:
    """The first thing in which names, shapes or types differ; None if nothing does. A size of 0 stands for any."""
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong here"
        ours, theirs = tensors[name], expected[name]
        if not tree.fits(ours, theirs):
            return f"{name} is {tuple(ours.shape)} {ours.dtype}, expected {tuple(theirs.shape)} {theirs.dtype}"
    return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

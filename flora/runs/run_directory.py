"""The run directory `runs/NAME/`: what a run leaves behind. Its format is a promise: docs/run_directory.md."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import yaml

from flora.clip.adapters.files import ADAPTER_FORMAT
from flora.config.parse import config_to_dict
from flora.config.schema import ExperimentConfig
from flora.core.errors import DivergedError, UserError
from flora.core.files import free_name, open_regular, read_bytes, refuse_irregular, write_whole
from flora.core.records import RoundRecord, Summary
from flora.core.tree import StateLike, state_digest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunDirectory:
    """One run's folder. Files appear whole or not at all, except `rounds.jsonl` and `log.txt`, which grow by lines.

    It is locked until it is closed: two processes in one folder would spoil both runs. `before_write` is told of each
    file before it is touched.
    """

    def __init__(self, path: Path, before_write: Callable[[Path], object] = lambda path: None) -> None:
        self.path = path
        self._before_write = before_write
        self._lock = self._locked()
        self._records_bytes = 0
        self._records_sha256 = hashlib.sha256()

    def _locked(self) -> IO[bytes] | None:
        return lock_file(self.path / "lock")

    @classmethod
    def create(
        cls, output: str, name: str, *, numbered: bool, before_write: Callable[[Path], object] = lambda path: None
    ) -> RunDirectory:
        """Make a new folder below `output`; an existing run is never touched.

        `numbered`: if `name` is taken, use the first free of name-2, name-3, ...; else that is a `UserError`.
        """
        for number in range(1, 10_000):
            path = Path(output) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                try:
                    return cls(path, before_write)
                except BaseException:
                    shutil.rmtree(path, ignore_errors=True)
                    raise
            except FileExistsError:
                if not Path(output).is_dir():
                    raise UserError(f"output: {output} is not a folder") from None
                if not numbered:
                    raise UserError(f"name: {path} exists already; choose another name or remove it") from None
            except OSError as error:
                raise UserError(f"output: {path} can't be made: {error.strerror}") from None
        raise UserError(f"name: there are too many runs called {name} in {output}")

    @staticmethod
    def remove_unbegun(path: Path) -> None:
        """Take away a folder in which a run was about to begin when its process ended: it has no `config.yaml` yet.

        Anything else is left alone. Raises `UserError` if a process is at work in it.
        """
        if path.is_dir() and {each.name for each in path.iterdir()} <= {"lock", "config.yaml.part", "log.txt"}:
            lock = lock_file(path / "lock")
            shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                lock.close()

    def remove_if_nothing_ran(self) -> None:
        """Take the folder away again if the run failed before its first record."""
        if not self._records_bytes:
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            (self.path / "lock").unlink(missing_ok=True)
            self._lock.close()

    @property
    def records_end(self) -> tuple[int, str]:
        """How many bytes of records there are, and their SHA-256."""
        return self._records_bytes, self._records_sha256.hexdigest()

    def what_differs(self, now: Mapping[str, Any]) -> list[str]:
        """Return how the environment that the run began in differs from `now` in what can change the last bits."""
        before = read_json(self.path / "environment.json")
        before = before if isinstance(before, dict) else {}
        keys = [key for key in ("device", "num_threads", "packages") if before.get(key, now[key]) != now[key]]
        return [f"{key} {before[key]} then, {now[key]} now" for key in keys]

    def has_records(self, num_bytes: int, sha256: str) -> bool:
        """Whether `rounds.jsonl` begins with the records that had this length and digest."""
        return hashlib.sha256(self._read_records(num_bytes)).hexdigest() == sha256

    def rewind(self, num_bytes: int) -> list[RoundRecord]:
        """Take away all records but those in the first `num_bytes` bytes; return these.

        Raises `UserError` if the folder can't be written.
        """
        content = self._read_records(num_bytes)
        self._records_bytes, self._records_sha256 = len(content), hashlib.sha256(content)
        path = self.path / "rounds.jsonl"
        self._before_write(path)
        try:
            with suppress(FileNotFoundError):
                os.truncate(path, len(content))
            (self.path / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None
        return [RoundRecord.from_dict(json.loads(line)) for line in content.splitlines()]

    def set_records_aside(self, folder: Path) -> None:
        """Move the records into `folder`, under a name that is free, and begin anew. Raises `UserError` if it can't."""
        path = self.path / "rounds.jsonl"
        if path.exists():
            self._before_write(path)
            try:
                folder.mkdir(exist_ok=True)
                path.rename(free_name(folder, "rounds-1.jsonl"))
            except OSError as error:
                raise UserError(f"{path}: can't be set aside: {error.strerror or error}") from None
        self.rewind(0)

    def readable_records(self, last_round: int) -> dict[int, RoundRecord]:
        """The records by round, up to `last_round`, of the lines that can be read; of two with one round the first."""
        records: dict[int, RoundRecord] = {}
        for line in self._read_records(-1).splitlines():
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                record = RoundRecord.from_dict(json.loads(line))
                if type(record.round) is int and 0 <= record.round <= last_round:
                    records.setdefault(record.round, record)
        return dict(sorted(records.items()))

    def replace_records(self, records: Iterable[RoundRecord], set_aside: Path) -> None:
        """Write `records` in place of those that are there, which are set aside."""
        self.set_records_aside(set_aside)
        for record in records:
            self.append_round(record)

    def _read_records(self, num_bytes: int) -> bytes:
        try:
            with open_regular(self.path / "rounds.jsonl") as file:
                return file.read(num_bytes)
        except OSError:
            return b""

    def log(self, line: str) -> None:
        """Append a line, with the time, to `log.txt`."""
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._append("log.txt", f"{stamp} {' '.join(line.splitlines())}")

    def write_config(self, config: ExperimentConfig) -> None:
        """Write `config.yaml`."""
        self._write("config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True))

    def write_start(self, environment: Mapping[str, Any], partition: Mapping[str, Any]) -> None:
        """Write `environment.json` and `partition.json`.

        Raises `UserError` if they are there already, and the weights, the data or the partition are others.
        """
        before = read_json(self.path / "environment.json")
        if isinstance(before, dict):
            self._refuse_other_data(before, environment)
        path = self.path / "partition.json"
        earlier = read_json(path)
        if earlier is not None and earlier != json.loads(_encode(_json(partition, None))):
            raise UserError(f"{path}: the data are not those that this run began with; if they are, remove this file")
        if not isinstance(before, dict):
            self._write_json("environment.json", environment)
        self._write_json("partition.json", partition, indent=None)

    def _refuse_other_data(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raise `UserError` if what the environment says of weights and data is not what it was."""
        limits = now.get("value_range")
        if before.get("value_range", limits) != limits:
            raise UserError(
                f"{self.path}: values of images range over {before['value_range']} then, {limits} now: the data are "
                "not those that this run began with"
            )
        for name in (name for name in now if name.endswith("_sha256")):
            if before.get(name, now[name]) != now[name]:
                what = name.removesuffix("_sha256")
                verb = "are" if what.endswith("s") else "is"
                raise UserError(f"{self.path}: the {what} {verb} not what this run began with (SHA-256)")

    def write_prompts(self, content: Mapping[str, Any]) -> None:
        """Write `prompts.json`. Raises `UserError` if it is there already, and the prompts are others."""
        path = self.path / "prompts.json"
        earlier, now = read_json(path), json.loads(_encode(_json(content, None)))
        if isinstance(earlier, dict) and any(earlier.get(key) != now.get(key) for key in ("classes", "new_classes")):
            raise UserError(
                f"{path}: the prompts are not those that this run began with: another version of this program may have "
                "others for this data set; go on with the one in environment.json"
            )
        self._write_json("prompts.json", content)

    def write_examples(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Write `examples.csv`, unless it is there: a run that goes on has the examples that it began with."""
        if not (self.path / "examples.csv").exists():
            self._write("examples.csv", _csv(columns, rows))

    def append_round(self, record: RoundRecord) -> None:
        """Append one object to `rounds.jsonl`. Raises `DivergedError` if a result is not finite."""
        fields = record.to_dict()
        broken = [name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            raise DivergedError(
                f"round {record.round}: {' and '.join(broken)} not finite: the model's outputs are out of range; "
                "look at backbone.weights, adapter.alpha, local.learning_rate and server.optimizer.learning_rate"
            )
        line = json.dumps(fields, allow_nan=False)
        self._append("rounds.jsonl", line, durable=True)
        self._records_bytes += len(_encode(line + "\n"))
        self._records_sha256.update(_encode(line + "\n"))

    def write_adapter(self, adapter: StateLike, config: ExperimentConfig) -> None:
        """Write `adapter.safetensors`, what it belongs to as JSON in its metadata's `flora`."""
        described = config_to_dict(config)
        tensors = {name: tensor.contiguous() for name, tensor in adapter.items()}
        description = {"format": ADAPTER_FORMAT, "sha256": state_digest(tensors)}
        description |= {key: described[key] for key in ("adapter", "backbone", "prompts")}
        # One entry only: safetensors writes several in a new order each time.
        self._write("adapter.safetensors", safetensors.torch.save(tensors, metadata={"flora": json.dumps(description)}))

    def write_clients(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write `clients.csv`, a row a client; a missing result is an empty cell."""
        self._write("clients.csv", _csv(list(columns), zip(*columns.values(), strict=True)))

    def write_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV file."""
        self._write(name, _csv(columns, rows))

    def write_trackers(self, content: Mapping[str, Any]) -> None:
        """Write `trackers.json`."""
        self._write_json("trackers.json", content)

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`, the last file of a finished run."""
        self._write_json("summary.json", dict(summary.figures))

    def _write_json(self, name: str, content: Any, indent: int | None = 2) -> None:
        self._write(name, _json(content, indent))

    def _write(self, name: str, content: str | bytes) -> None:
        """Write a file under another name first, so that under its own it is never half-written."""
        path = self.path / name
        try:
            self._before_write(path)
            write_whole(path, _encode(content) if isinstance(content, str) else content)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None

    def _append(self, name: str, line: str, *, durable: bool = False) -> None:
        """Add a line to a file; a line that doesn't fit on the disk is taken back."""
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            self._before_write(path)
            refuse_irregular(path)
            with path.open("ab") as file:
                file.write(_encode(line + "\n"))
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None


def check_free_name(folder: Path, name: str | None) -> None:
    """Raise `UserError` if `--name` is given and is no plain file name, or a folder has a JSON file of that name."""
    if name is None:
        return
    if not re.fullmatch(r"[\w][\w .-]*", name):
        raise UserError(f"--name: expected a plain file name, got {name!r}")
    if (folder / f"{name}.json").exists():
        raise UserError(f"{folder / f'{name}.json'}: exists already; choose another --name")


def write_json(folder: Path, name: str, content: Any, *, numbered: bool) -> Path:
    """Write a new JSON file into a folder of a run, which is made if it does not exist; return its path.

    `numbered`: if there is one of that name, use the first free of name-2, name-3, ...; else that is a `UserError`.
    """
    path = folder / name
    try:
        folder.mkdir(exist_ok=True)
        path = free_name(folder, name) if numbered else path
        if path.exists():
            raise UserError(f"{path}: exists already")
        write_whole(path, _encode(_json(content, 2)))
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}") from None
    return path


def read_json(path: Path) -> Any:
    """The content of a file; None if it is not there, or damaged."""
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return None


def lock_file(path: Path) -> IO[bytes] | None:
    """The open lock file of a run or a sweep; the system lets go of it when the process ends, however it ends.

    Raises `UserError` if another process has it. None where the system has no such locks.
    """
    if fcntl is None:
        return None
    while True:
        try:
            file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read(20).decode(errors="replace").strip()
            file.close()
            raise UserError(f"{path.parent}: in use by another process ({other}); wait for it, or stop it") from None
        except OSError:  # a file system without locks
            return file
        # Whoever had it may have taken the file away on closing, between our opening and locking it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(b"%d\n" % os.getpid())
    file.flush()
    return file


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _json(content: Any, indent: int | None) -> str:
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _encode(text: str) -> bytes:
    """UTF-8; bytes of file names that are no UTF-8 become escapes, which JSON understands."""
    return text.encode(errors="backslashreplace")

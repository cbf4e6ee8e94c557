"""The run directory `runs/NAME/`: what a run leaves behind. Its format is a promise; the README describes it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml

from flora.config import ExperimentConfig, config_to_dict
from flora.errors import UserError
from flora.records import ClientData, RoundRecord, Summary
from flora.tree import StateLike

ADAPTER_FORMAT = "flora-adapter-1"


class RunDirectory:
    """One run's folder. Files appear whole or not at all, except `rounds.jsonl` and `log.txt`, which grow by lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[RoundRecord] = []

    @classmethod
    def create(cls, output: str, name: str, *, numbered: bool) -> RunDirectory:
        """Make a new folder below `output`; an existing run is never touched.

        `numbered`: if `name` is taken, use the first free of name-2, name-3, ...; else that is a `UserError`.
        """
        for number in range(1, 10_000):
            path = Path(output) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if not Path(output).is_dir():
                    raise UserError(f"output: {output} is not a folder") from None
                if not numbered:
                    raise UserError(f"name: {path} exists already; choose another name or remove it") from None
            except OSError as error:
                raise UserError(f"output: {path} can't be made: {error.strerror}") from None
        raise UserError(f"name: there are too many runs called {name} in {output}")

    def remove_if_nothing_ran(self) -> None:
        """Take the folder away again if the run failed before its first record."""
        if not self._records:
            shutil.rmtree(self.path, ignore_errors=True)

    def log(self, line: str) -> None:
        """Append a line, with the time, to `log.txt`."""
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._append("log.txt", f"{stamp} {' '.join(line.splitlines())}")

    def write_start(
        self, config: ExperimentConfig, *, device: torch.device, clients_per_block: int, clients: Sequence[ClientData],
        labels: np.ndarray, class_names: Sequence[str],
    ) -> None:  # fmt: skip
        """Write `config.yaml`, `environment.json` and `partition.json`."""
        self._write("config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True))
        self._write_json("environment.json", environment(device, config.seed, clients_per_block))
        rows = []
        for index, client in enumerate(clients):
            counts = np.bincount(labels[client.train], minlength=len(class_names))
            present = {name: int(count) for name, count in zip(class_names, counts, strict=True) if count}
            rows.append(
                {
                    "client": index,
                    "num_train": len(client.train),
                    "num_held_out": len(client.held_out),
                    "class_counts": present,
                }
            )
        self._write_json("partition.json", {"class_names": list(class_names), "clients": rows}, indent=None)

    def append_round(self, record: RoundRecord) -> None:
        """Append one object to `rounds.jsonl`. Raises `UserError` if a result is not finite."""
        fields = dataclasses.asdict(record)
        broken = [name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            raise UserError(
                f"round {record.round}: {' and '.join(broken)} not finite: the model's outputs are out of range; "
                "look at backbone.weights, adapter.alpha and local.learning_rate"
            )
        self._append("rounds.jsonl", json.dumps(fields, allow_nan=False))
        self._records.append(record)

    def write_adapter(self, adapter: StateLike, config: ExperimentConfig) -> None:
        """Write `adapter.safetensors`, what it belongs to as JSON in its metadata's `flora`."""
        described = config_to_dict(config)
        description = {"format": ADAPTER_FORMAT} | {key: described[key] for key in ("adapter", "backbone", "prompts")}
        tensors = {name: tensor.contiguous() for name, tensor in adapter.items()}
        # One entry only: safetensors writes several in a new order each time.
        self._write("adapter.safetensors", safetensors.torch.save(tensors, metadata={"flora": json.dumps(description)}))

    def write_clients(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write `clients.csv`, a row a client; a missing result is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        self._write("clients.csv", text.getvalue())

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`, the last file of a finished run."""
        self._write_json("summary.json", dataclasses.asdict(summary))

    def _write_json(self, name: str, content: Any, indent: int | None = 2) -> None:
        self._write(name, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")

    def _write(self, name: str, content: str | bytes) -> None:
        """Write a file under another name first, so that under its own it is never half-written."""
        part = self.path / f"{name}.part"
        try:
            part.write_bytes(_encode(content) if isinstance(content, str) else content)
            os.replace(part, self.path / name)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise UserError(f"{self.path / name}: can't be written: {error.strerror or error}") from None

    def _append(self, name: str, line: str) -> None:
        """Add a line to a file; a line that doesn't fit on the disk is taken back."""
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(_encode(line + "\n"))
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None


def _encode(text: str) -> bytes:
    """UTF-8; bytes of file names that are no UTF-8 become escapes, which JSON understands."""
    return text.encode(errors="backslashreplace")


def environment(device: torch.device, seed: int, clients_per_block: int) -> dict[str, Any]:
    """What a run depends on besides its configuration: versions, device, threads, seed, git revision."""
    packages = ("flora-clip", "torch", "torchvision", "open_clip_torch", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages} | {"torch": str(torch.__version__)},  # with its build
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "num_threads": torch.get_num_threads(),
        "clients_per_block": clients_per_block,
        "seed": seed,
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the checkout that this package runs from, with -dirty if it was changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None

"""What a run depends on besides its configuration: versions, device, threads, the code's revision."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device, seed: int, clients_per_block: int, num_processes: int = 1) -> dict[str, Any]:
    """Return what a run depends on besides its configuration: versions, device, threads, seed, git revision."""
    packages = ("flora-clip", "torch", "torchvision", "open_clip_torch", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages} | {"torch": str(torch.__version__)},  # with its build
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "clients_per_block": clients_per_block,
        "seed": seed,
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _git_revision() -> str | None:
    """The revision of the checkout that this package runs from, with -dirty if it was changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None

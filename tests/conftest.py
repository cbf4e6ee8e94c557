"""A tiny OpenCLIP model with random weights, images with something to learn, and a config that uses both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import write_model

from flora import catalogue  # noqa: F401  (registers the components)


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names of new folders. `mktemp` would look through all that there are, for each of thousands of tests."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def home(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, so that no test meets another's feature cache, or the user's."""
    folder = next(homes)
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the tiny model's JSON config."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny.json")


@pytest.fixture
def raw_config(tiny_model: str, tmp_path: Path) -> dict[str, Any]:
    """A config, as YAML would give it, that runs in about a second."""
    return {
        "name": "test",
        "output": str(tmp_path / "runs"),
        "rounds": 2,
        "backbone": {"model": tiny_model, "weights": "random"},
        "adapter": {"name": "lora", "rank": 2},
        "data": {"name": "patterns"},
        "partition": {"name": "dirichlet", "concentration": 0.5, "minimum_examples": 3},
        "clients": {"number": 4},
        "local": {"learning_rate": 0.01, "batch_size": 8},
    }

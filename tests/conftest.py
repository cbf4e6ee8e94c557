"""A tiny OpenCLIP model with random weights, images with something to learn, and a config that uses both."""

from __future__ import annotations

import copy
import gc
import itertools
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from helpers import write_model
from torch import nn

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip import backbone
from flora.core.rng import Rng

BUILD = backbone._build


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: nothing of it need be looked through for garbage again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def models_are_built_once() -> Iterator[None]:
    """Small models with random weights are copies of one: to build each takes longer than most of what follows."""

    @lru_cache(maxsize=32)
    def built(name: str, config: str, rng: Rng) -> nn.Module:
        return BUILD(name, json.loads(config), rng)

    def copied(name: str, config: dict[str, Any], rng: Rng) -> nn.Module:
        if config["embed_dim"] > 64:  # a copy of a large one would lie in memory for nothing
            return BUILD(name, config, rng)
        return copy.deepcopy(built(name, json.dumps(config), rng))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "_build", copied)
        yield


@pytest.fixture
def built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build every model, for tests of how that is done."""
    monkeypatch.setattr(backbone, "_build", BUILD)


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

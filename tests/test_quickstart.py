"""The shipped experiments, and the README's examples, for real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import SHARED

from flora.config.parse import load_config
from flora.core.rng import Rng
from flora.simulate import simulate

ROOT = Path(__file__).parents[1]


def test_quickstart_gains_more_than_twenty_points_and_beats_clients_alone(tmp_path: Path) -> None:
    """In the first six of its twenty rounds, against clients that train alone for as long."""
    config = load_config(ROOT / "experiments/quickstart.yaml", ["rounds=6", f"output={tmp_path}"])
    summary = simulate(config).summary
    assert summary.last_accuracy > summary.zero_shot_accuracy + 0.2
    assert summary.local_only_accuracy_best is not None
    assert summary.last_accuracy > summary.local_only_accuracy_best + 0.1
    assert summary.uplink_bytes_per_client_round < 30_000


def test_the_backbone_run_learns_from_generated_characters(tmp_path: Path) -> None:
    """A small version of the run that made the quickstart's backbone: three characters, from random weights."""
    overrides = ["data.characters=0XK", "data.num_train=1200", "data.num_test=300", "rounds=4", "local.batch_size=32"]
    config = load_config(ROOT / "experiments/quickstart_backbone.yaml", [*overrides, f"output={tmp_path}"])
    summary = simulate(config).summary
    assert summary.last_accuracy > 0.5  # chance is a third
    assert summary.trainable_parameters == summary.backbone_parameters


@pytest.mark.parametrize("name", ["eurosat", "fashion_mnist", "caltech101"])
def test_experiments_on_real_images_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / "data").is_dir() or not (SHARED / "weights").is_dir():
        pytest.skip("needs ../shared/data and ../shared/weights")
    monkeypatch.chdir(ROOT)
    config = load_config(f"experiments/{name}.yaml", [f"output={tmp_path}", f"data.root={SHARED / 'data'}"])
    data = config.data.load(Rng(0))
    assert len(data.train) > 5000
    parts = config.partition.split(data.train.labels, config.clients.number, Rng(0))
    assert sum(map(len, parts)) == len(data.train)


def readme_block(language: str, marker: str) -> str:
    """The README's code block in `language` that contains `marker`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if marker in block)


def test_the_readmes_use_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = readme_block("python", "simulate(config)").replace('"rounds=5"', f'"rounds=1", "output={tmp_path}"')
    assert str(tmp_path) in code
    monkeypatch.chdir(ROOT)
    exec(code, {})

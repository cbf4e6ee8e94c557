"""What is wrong is found before images are read, and what looks wrong is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.experiment import images as experiment_images
from flora.simulate import simulate


def images(root: Path, counts: dict[str, int]) -> str:
    """Folders with so many images each."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8)).save(root / name / f"{index}.png")
    return str(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"partition": {"name": "dirichlet", "concentration": 1, "minimum_examples": 16}},
            "partition.minimum_examples: 4 clients share 60",
        ),
        ({"clients": {"number": 61}}, "clients.number: expected 1 to 60"),
        ({"partition": "natural"}, "natural"),
        ({"data": {"name": "patterns", "num_classes": 1}}, "data: 'thing 0' is the only class"),
        ({"data": {"name": "patterns", "num_train": 2}, "clients": {"number": 1}}, "class 'thing 2' has no training"),
        ({"adapter": "full", "clients": {"number": 4, "per_block": 2}}, "clients.per_block: expected at most 1"),
    ],
)
def test_mistakes_are_found_before_images_are_read(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr(experiment_images, "load_features", read)
    with pytest.raises(UserError, match=message):
        simulate(parse_config({**raw_config, **changes}))
    with pytest.raises(AssertionError, match="features were computed"):
        simulate(parse_config(raw_config))


def test_the_partition_is_that_of_the_images_that_can_be_read(raw_config: dict[str, Any], tmp_path: Path) -> None:
    root = images(tmp_path / "images", {"a": 10, "b": 10})
    data = {"name": "image_folder", "root": root, "unreadable": "skip", "test_fraction": 0.5}
    raw = {**raw_config, "data": data, "partition": "iid", "clients": {"number": 10}}
    simulate(parse_config(raw))
    for path in (tmp_path / "images" / "a").iterdir():
        path.write_text("")
    with pytest.raises(UserError, match="data: class 'a' has no training image"):
        simulate(parse_config(raw), numbered=True)


def test_a_run_says_once_what_its_data_left_out(raw_config: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "images"
    images(root / "train", {"a": 6, "b": 6, "c": 6})
    images(root / "test", {"a": 6})
    (root / "train" / "a" / "x.heic").write_text("")
    raw = {**raw_config, "data": {"name": "image_folder", "root": str(root)}, "partition": "iid"}
    raw["prompts"] = {"class_names": {"a": "cat " * 90}, "templates": ["{}"]}
    lines: list[str] = []
    simulate(parse_config(raw), echo=lines.append)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert "left out: images of types that are not read: 1 .heic" in warnings[0]
    assert "1 prompts of 1 classes are cut off" in warnings[1] and "92 tokens" in warnings[1]
    assert warnings[2] == "warning: data: 2 of 3 classes have no test image: b, c"

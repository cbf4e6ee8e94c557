"""Augmented images: each look is another one, drawn from the client's own stream; features are computed live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, TOLERANCE, adapt
from PIL import Image

from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.states import ClientData, ServerState
from flora.data.augmentation import CropFlip, NoAugmentation
from flora.data.datasets.base import ImageArrays, ImageFiles, Split
from flora.engine.engine import Engine
from flora.features.live import LiveFeatures, live_features
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.federated.synchronous import Synchronous
from flora.simulate import simulate

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 24, 3), dtype=np.uint8)


def split() -> Split:
    return Split(ImageArrays(PIXELS, "noise"), np.arange(12), np.arange(12) % len(CLASSES))


def live(model: AdaptedClip, augmentation: CropFlip | NoAugmentation) -> LiveFeatures:
    features, problems = live_features(
        split(), model, augmentation, skip_unreadable=False, progress=lambda title, total: lambda done: None
    )
    assert not problems
    return features


def gradient_image(width: int, height: int) -> Image.Image:
    """Red grows to the right from 0 to 250, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


def test_the_part_has_the_area_and_the_ratio_that_were_asked_for() -> None:
    image, augmentation = gradient_image(400, 300), CropFlip(min_area=0.3, max_stretch=1.5, flip=0.0)
    shares = []
    for number in range(200):
        part = np.asarray(augmentation.apply(image, (32, 32), Rng(number)), dtype=float)
        # What is left of each colour's range is what is left of the side; edges are averaged over a pixel.
        width = (part[..., 0].max() - part[..., 0].min()) / 250 * 32 / 31
        height = (part[..., 1].max() - part[..., 1].min()) / 250 * 32 / 31
        shares.append(width * height)
        assert 0.3 * 0.75 < width * height < 1.05
        assert 1 / 1.6 < (width * 400) / (height * 300) < 1.6
        assert (np.diff(part[..., 0].mean(axis=0)) >= 0).all()
    assert min(shares) < 0.4
    assert max(shares) > 0.85


def test_the_whole_image_and_its_mirror() -> None:
    image = gradient_image(32, 32)
    whole = CropFlip(min_area=1.0, max_stretch=1.0, flip=0.0).apply(image, (32, 32), Rng(0))
    assert np.array_equal(np.asarray(whole), np.asarray(image))
    mirrored = CropFlip(min_area=1.0, max_stretch=1.0, flip=1.0).apply(image, (32, 32), Rng(0))
    assert np.array_equal(np.asarray(mirrored), np.asarray(image)[:, ::-1])
    flipped = [np.asarray(CropFlip(flip=0.5).apply(image, (32, 32), Rng(seed)))[0, 0, 0] > 125 for seed in range(300)]
    assert 0.4 < np.mean(flipped) < 0.6


def test_size_is_height_and_width() -> None:
    assert CropFlip().apply(gradient_image(50, 40), (20, 30), Rng(0)).size == (30, 20)


def test_live_features_are_the_stems_of_the_images(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(towers=("vision",), layers=(1,)))
    indices = torch.tensor([3, 3, 11, 0])
    for features in (live(model, CropFlip()), live(model, NoAugmentation())):
        pixels = torch.stack([model.clip.preprocess(Image.fromarray(PIXELS[index])) for index in indices])
        expected = model.vision.stem(pixels)
        torch.testing.assert_close(features.take(indices, CPU), expected, atol=TOLERANCE, rtol=0)
        some = features.subset(np.array([11, 3])).take(torch.tensor([1, 0]), CPU)
        torch.testing.assert_close(some, expected[1:3], atol=TOLERANCE, rtol=0)
        changed = features.take(indices, CPU, [Rng(1), Rng(2)])
        is_same = torch.allclose(changed, expected, atol=TOLERANCE, rtol=0)
        assert is_same == isinstance(features.augmentation, NoAugmentation)
        assert torch.equal(changed, features.take(indices, CPU, iter([Rng(1), Rng(2)])))
    first, second = live(model, CropFlip()).take(torch.tensor([3, 3]), CPU, [Rng(1)])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("augmentation", [NoAugmentation(), CropFlip()])
def test_a_clients_images_do_not_depend_on_the_block(tiny_model: str, augmentation: Any) -> None:
    model = adapt(tiny_model, Lora(towers=("vision", "text"), targets=TARGETS))
    results = []
    for per_block in (1, 3):
        federation = Federation(
            engine=Engine(model, live(model, augmentation), per_block),
            participation=Participation(Uniform(), np.array([3, 2, 7])),
            schedule=Synchronous(),
            clients=[ClientData(own, own[:0]) for own in np.split(np.arange(12), [3, 5])],
            local=LocalTraining(batch_size=2, learning_rate=0.1, optimizer=Sgd(), augmentation=augmentation),
            num_rounds=2,
            rng=Rng(7),
        )
        state = ServerState(0, model.adapter.initial_state(Rng(1)))
        for _ in range(2):
            state, _ = run_round(federation, state)
        results.append(state.adapter)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=TOLERANCE, rtol=0)


def test_features_kept_and_computed_live_train_the_same_adapter(raw_config: dict[str, Any]) -> None:
    raw_config["backbone"]["precision"] = "fp64"
    kept = simulate(parse_config(raw_config), numbered=True)
    computed = simulate(parse_config({**raw_config, "cache": {"enabled": False}}), numbered=True)
    for name, tensor in kept.adapter.items():
        torch.testing.assert_close(computed.adapter[name], tensor, atol=TOLERANCE, rtol=0)
    assert [record.accuracy for record in computed.records] == [record.accuracy for record in kept.records]


def test_an_augmented_run(raw_config: dict[str, Any], home: Path) -> None:
    raw_config["local"]["augmentation"] = "crop_flip"
    lines: list[str] = []
    first, second = (simulate(parse_config(raw_config), numbered=True, echo=lines.append) for _ in range(2))
    assert any(line == "features of the training images: computed at each use" for line in lines)
    assert all(torch.equal(first.adapter[name], second.adapter[name]) for name in first.adapter)
    del raw_config["local"]["augmentation"]
    plain = simulate(parse_config(raw_config), numbered=True)
    assert plain.records[0].accuracy == first.records[0].accuracy  # nothing is augmented but what is trained on
    assert any(not torch.equal(plain.adapter[name], first.adapter[name]) for name in plain.adapter)


def test_augmented_and_kept_is_a_contradiction(raw_config: dict[str, Any]) -> None:
    raw_config["local"]["augmentation"] = "crop_flip"
    raw_config["cache"] = {"enabled": True}
    with pytest.raises(UserError, match=r"cache\.enabled: expected false or null where local\.augmentation changes"):
        check_experiment(parse_config(raw_config))
    raw_config["cache"] = {"enabled": False}
    check_experiment(parse_config(raw_config))


def test_images_that_cannot_be_read(tiny_model: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, pixels in zip(paths, PIXELS, strict=False):
        Image.fromarray(pixels).save(path)
    paths[1].write_text("no image")
    files, model = Split(ImageFiles(paths), np.arange(3), np.array([0, 1, 2])), adapt(tiny_model)
    seen: list[int] = []
    quiet = {"progress": lambda title, total: seen.append}
    features, problems = live_features(files, model, CropFlip(), skip_unreadable=True, **quiet)  # type: ignore[arg-type]
    assert features.labels.tolist() == [0, 2]
    assert features.split_indices.tolist() == [0, 2]
    assert len(problems) == 1
    assert problems[0].startswith(f"{paths[1]}: can't be read as an image")
    assert sum(seen) == 3
    features, problems = live_features(files, model, CropFlip(), skip_unreadable=False, **quiet)  # type: ignore[arg-type]
    assert not problems
    with pytest.raises(UserError, match=r"1\.png: can't be read as an image"):
        features.take(torch.arange(3), CPU)
    paths[2].unlink()  # in the middle of a run
    with pytest.raises(UserError, match=r"2\.png: can't be read as an image: .*No such file"):
        features.take(torch.tensor([2]), CPU)
    with pytest.raises(UserError, match="none of the 1 images of a split can be read"):
        live_features(files.subset(np.array([1])), model, CropFlip(), skip_unreadable=True, **quiet)  # type: ignore[arg-type]

"""Features are computed once for every readable image; evaluation equals OpenCLIP's own zero-shot classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, TOLERANCE, adapt, load_plain, random_adapters, random_pixels
from PIL import Image

from flora.clip.adapters.lora import TARGETS, Lora
from flora.core.errors import UserError
from flora.core.progress import Tell
from flora.data.datasets.base import ImageFiles, Split
from flora.engine import capacity as memory
from flora.engine.capacity import choose_clients_per_block, clients_at_once
from flora.evaluation.accuracy import evaluate
from flora.features.cache import CacheOptions
from flora.features.features import StoredFeatures
from flora.features.loading import load_features

LABELS = torch.arange(20) % len(CLASSES)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("towers", [("text",), ("vision",), ("text", "vision")], ids="-".join)
def test_evaluation_of_k_adapters_equals_merged_models(
    tiny_model: str, towers: tuple[str, ...], batch_size: int
) -> None:
    model, pixels = adapt(tiny_model, Lora(towers=towers, targets=TARGETS)), random_pixels(20)
    stack = random_adapters(model, 2)
    features = StoredFeatures(model.vision.stem(pixels), torch.arange(20), LABELS, np.arange(20))
    results = evaluate(model, stack, features, batch_size=batch_size)
    for client, result in enumerate(results):
        plain = load_plain(tiny_model)
        own = {name: tensor[client] for name, tensor in stack.items()}
        plain.model.load_state_dict(model.adapter.merged_state_dict(plain.model.state_dict(), own))
        tokens = plain.tokenize([f"a photo of a {name}." for name in CLASSES])
        with torch.no_grad():
            images, texts, scale = plain.model(pixels, tokens)
        logits = scale * images @ texts.T
        expected = F.cross_entropy(logits, LABELS, reduction="none")
        np.testing.assert_allclose(result.losses, expected.numpy(), atol=TOLERANCE)
        margin = (logits.topk(2).values[:, 0] - logits.topk(2).values[:, 1]) > 1e-3
        assert np.array_equal(result.correct[margin], (logits.argmax(dim=1) == LABELS)[margin].numpy())


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Six images of several sizes and modes; number 3 is not an image, number 4 is cut short."""
    paths = []
    for index, mode in enumerate(["RGB", "L", "RGBA", "RGB", "RGB", "P"]):
        path = tmp_path / f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 255, (20 + 9 * index, 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        paths.append(path)
    paths[3].write_text("not an image")
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    return Split(ImageFiles(paths), np.arange(6), np.array([0, 1, 0, 1, 2, 1]))


def compute(split: Split, model, *, skip: bool, seen: list[int] | None = None):  # type: ignore[no-untyped-def]
    (features,), problems = load_features(
        [split],
        model,
        cache=CacheOptions(folder=None),
        skip_unreadable=skip,
        tell=Tell(lambda title, total: (seen if seen is not None else []).append, lambda line: None),
    )
    return features, problems


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_unreadable_images_are_named_and_left_out(
    tiny_model: str, split: Split, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flora.features.reading.STEM_BATCH_SIZE", batch_size)
    model, seen = adapt(tiny_model), []  # type: ignore[var-annotated]
    features, problems = compute(split, model, skip=True, seen=seen)
    assert sum(seen) == 6
    assert features.split_indices.tolist() == [0, 1, 2, 5]
    assert features.labels.tolist() == [0, 1, 0, 1]
    assert [Path(problem.split(": ")[0]).name for problem in problems] == ["3.png", "4.png"]
    stem = features.take(torch.tensor([3, 0]), torch.device("cpu"))
    for row, index in zip(stem, (5, 0), strict=True):
        expected = model.clip.model.encode_image(model.clip.preprocess(split.open(index)).unsqueeze(0).double())  # type: ignore[operator]
        torch.testing.assert_close(row, expected[0], atol=TOLERANCE, rtol=0)


def test_an_unreadable_image_is_fatal_by_default(tiny_model: str, split: Split) -> None:
    with pytest.raises(UserError, match=r"3\.png: can't be read as an image.*; set data\.unreadable=skip"):
        compute(split, adapt(tiny_model), skip=False)


def test_an_image_that_would_be_absurdly_large_is_refused(
    tiny_model: str, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow refuses twice as many: 20 x 31 pixels are too many
    with pytest.raises(UserError, match=r"0\.png: can't be read as an image: .*decompression bomb"):
        compute(split, adapt(tiny_model), skip=False)


def test_no_readable_image_at_all(tiny_model: str, split: Split) -> None:
    with pytest.raises(UserError, match="none of the 2 images of a split can be read"):
        compute(split.subset(np.array([3, 4])), adapt(tiny_model), skip=True)


def test_clients_per_block_follow_the_size_of_a_step_and_the_memory(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, vision = adapt(tiny_model), adapt(tiny_model, Lora(towers=("vision",)), precision="fp32")
    images = 1000 * 5 * 32  # a thousand images of 5 tokens of width 32: the residual stream of a client's step
    monkeypatch.setattr(memory, "MAX_STREAM_ON_CPU", 7 * images + 1)
    assert clients_at_once(vision, batch_size=1000) == 7
    assert clients_at_once(vision, batch_size=8000) == 1
    assert clients_at_once(text, batch_size=8000) > 32
    assert choose_clients_per_block(vision, batch_size=1000) == 32
    # Two blocks of 20 numbers a token and channel, four bytes each, in a quarter of the memory.
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: 4 * 4 * 20 * 2 * images * 3)
    assert choose_clients_per_block(vision, batch_size=1000) == 2  # three would fit
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: 4 * 4 * 20 * 2 * images * 7)
    assert choose_clients_per_block(vision, batch_size=1000) == 32  # no more than seven go through the model at once
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: 0)
    assert choose_clients_per_block(text, batch_size=8) == 1

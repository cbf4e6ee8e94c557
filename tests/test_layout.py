"""A layout of some classes' prompts gives the same features as one of all, and holds no more than it needs."""

from __future__ import annotations

import pytest
import torch
from helpers import ALL_ON, TOLERANCE, adapt, random_adapters, write_model
from hypothesis import given
from hypothesis import strategies as st

from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip

NAMES = tuple(f"{size}{animal}" for size in ("", "big ", "big bad ") for animal in ("cat", "dog", "frog", "fire truck"))
TEMPLATES = ("a photo of a {}.", "{}", "a drawing of the {} by a child.")
TEXTS = {"causal": {}, "read first": {"pool_type": "first"}, "not causal": {"no_causal_mask": True}}
SPEEDS = {
    "packed": SpeedOptions(),
    "cut": SpeedOptions(share_prefixes=False),
    "padded": SpeedOptions(cut_prompts=False),
    "whole last block": SpeedOptions(trim_last_block=False),
}


def model_of(path: str, speed: SpeedOptions = ALL_ON) -> AdaptedClip:
    return adapt(path, Lora(targets=TARGETS), class_names=NAMES, templates=TEMPLATES, speed=speed)


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS.keys())
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@torch.no_grad()
def test_some_classes_have_the_features_that_they_have_among_all(tmp_path, text, speed: SpeedOptions) -> None:  # type: ignore[no-untyped-def]
    model = model_of(write_model(tmp_path / "model.json", text=text, custom_text=True), speed)
    classes = torch.tensor([[3, 0, 11], [5, 5, 5], [1, 2, 1]])
    with model.adapter.bind(random_adapters(model, 3)):
        every = model.class_features(3)
        some = model.class_features(3, classes)
    assert (every[0] - every[1]).abs().max() > 1e-2
    torch.testing.assert_close(some, every[torch.arange(3).unsqueeze(1), classes], atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def packed(tiny_model: str) -> AdaptedClip:
    return model_of(tiny_model)


@given(data=st.data())
def test_labels_keep_their_classes(packed: AdaptedClip, data: st.DataObject) -> None:
    model = packed
    number, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, len(NAMES) - 1), min_size=size, max_size=size)
    labels = torch.tensor(data.draw(st.lists(rows, min_size=number, max_size=number)))
    selected = model.select_classes(labels)
    assert selected is not None  # at most six of twelve classes
    classes, places = selected
    assert torch.equal(classes.gather(1, places), labels)
    assert all(set(own.tolist()) == set(row.tolist()) for own, row in zip(classes, labels, strict=True))
    layout = model.prompts.of_classes(classes)
    assert layout.slots is not None
    assert layout.slots.shape[1] <= model.prompts.tokens.shape[1]


def test_what_one_class_needs_is_small(tiny_model: str) -> None:
    model = model_of(tiny_model)
    tokens = model.clip.tokenize([template.format("dog") for template in TEMPLATES]).tolist()
    nodes = {tuple(row[: end + 1]) for row in tokens for end in range(row.index(49407) + 1)}
    layout = model.prompts.of_classes(torch.tensor([[1]]))
    assert layout.slots is not None
    num_groups = len(model.prompts.tokens)
    # The nodes of the class's own prefix tree, were they not spread over groups.
    assert layout.slots.shape[1] <= len(nodes)
    assert layout.slots.numel() >= len(nodes)
    assert len(layout.slots) == num_groups


def test_nothing_is_selected_where_it_brings_nothing(tiny_model: str) -> None:
    labels = torch.arange(len(NAMES)).unsqueeze(0)
    assert model_of(tiny_model).select_classes(labels) is None
    assert model_of(tiny_model, SpeedOptions(batch_classes=False)).select_classes(labels[:, :2]) is None
    assert adapt(tiny_model, Lora(dropout=0.1), class_names=NAMES).select_classes(labels[:, :2]) is None
    assert adapt(tiny_model, Lora(towers=("vision",)), class_names=NAMES).select_classes(labels[:, :2]) is None

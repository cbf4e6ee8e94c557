"""Packed prompts: every token keeps its position and sees its own prefix, nothing else; nothing is stored twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CLASSES, TOLERANCE, load_clip, load_plain
from hypothesis import given
from hypothesis import strategies as st

from flora.clip.layers import LoraAttention
from flora.clip.towers.packing import Packing, one_by_one, pack
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.text import TextTower

sequences_strategy = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=1, max_size=30)


def read_back(packing: Packing, index: int) -> list[int]:
    """The tokens that the end of sequence `index` can see, in the order of their positions."""
    group, slot = divmod(int(packing.ends[index]), packing.tokens.shape[1])
    seen = np.flatnonzero(packing.visible[group, slot])
    assert sorted(packing.positions[group, seen]) == list(range(len(seen)))
    return [int(token) for token in packing.tokens[group, seen[np.argsort(packing.positions[group, seen])]]]


@given(sequences=sequences_strategy)
def test_every_sequence_is_found_again(sequences: list[list[int]]) -> None:
    for packing in (pack(sequences, width=2), pack(sequences, width=512), one_by_one(sequences)):
        assert [read_back(packing, index) for index in range(len(sequences))] == sequences
        # A slot sees exactly what its own prefix is made of: the prefix's slots see the same, up to themselves.
        for group, visible in enumerate(packing.visible):
            for slot in range(len(visible)):
                assert visible[slot, slot]
                for other in np.flatnonzero(visible[slot]):
                    assert set(np.flatnonzero(visible[other])) <= set(np.flatnonzero(visible[slot]))
                    assert packing.positions[group, other] <= packing.positions[group, slot]


def test_shared_prefixes_are_stored_once() -> None:
    packing = pack([[1, 2, 3, 9], [1, 2, 4, 5, 9], [1, 2, 3, 9], [1, 2, 3, 7]], width=512)
    assert packing.tokens.tolist() == [[1, 2, 3, 7, 9, 4, 5, 9]]
    assert packing.positions.tolist() == [[0, 1, 2, 3, 3, 2, 3, 4]]
    assert packing.ends.tolist() == [4, 7, 4, 3]
    assert packing.visible[0, 7].tolist() == [True, True, False, False, False, True, True, True]
    assert one_by_one([[1, 2], [1]]).tokens.tolist() == [[1, 2], [1, 0]]


@pytest.mark.parametrize("number", [1, 7, 60])
@torch.no_grad()
def test_all_layouts_give_the_same_features(tiny_model: str, number: int) -> None:
    names = [f"{CLASSES[i % 3]} {'very ' * (i % 5)}number {i}" for i in range(number)]
    templates = ("a photo of a {}.", "{}", "a drawing of the {} by a child.")
    expected = None
    for speed in (SpeedOptions(cut_prompts=False), SpeedOptions(share_prefixes=False), SpeedOptions()):
        tower = TextTower(load_clip(tiny_model), 1, speed)
        prompts = tower.prompts(names, templates)
        features = tower.suffix(tower.stem(prompts), prompts.for_clients(2))
        expected = features if expected is None else expected
        torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)
    packed, padded = prompts.tokens.numel(), number * 3 * 77
    assert packed < padded / 5


@torch.no_grad()
def test_our_attention_is_openclips(tiny_model: str) -> None:
    attention = load_plain(tiny_model).text.transformer.resblocks[0].attn
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    expected = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
    ours = LoraAttention(attention, {})(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)

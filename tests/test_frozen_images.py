"""What the frozen model makes of clients' images: computed once, where an adapter is compared with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import LABELS, LOCAL, PIXELS, SIZES, TOLERANCE, adapt, assert_states_close, federation, rounds, variant
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.penalties import Distillation, ProGrad
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.deep_prompts import PromptSrc
from flora.clip.adapters.lora import Lora
from flora.clip.towers.towers import AdaptedClip
from flora.core.rng import Rng
from flora.engine.blocks import Block
from flora.engine.frozen import FrozenImages
from flora.engine.tasks import ClientTask, TrainingSetup
from flora.features.features import StoredFeatures
from flora.features.joined import joined
from flora.federated.federation import Federation
from flora.privacy.examples import ExamplePrivacy

BOTH_TOWERS = Lora(rank=2, towers=("text", "vision"))


@dataclasses.dataclass(frozen=True, eq=False)
class Looks(StoredFeatures):
    """The same features, of which nobody knows that they never change: the frozen model sees them at each step."""

    is_constant: ClassVar[bool] = False


def parts(model: AdaptedClip, local: LocalTraining, per_block: int, *, knows: bool = True) -> Federation:
    made = federation(model, local, per_block=per_block)
    features: Any = made.engine.features
    return variant(made, features=features if knows else Looks(features.stem, features.rows, LABELS, np.arange(33)))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the frozen model has seen at a time."""
    numbers: list[int] = []
    plain = AdaptedClip.frozen_image_features

    def counted(self: AdaptedClip, stem: Tensor) -> Tensor:
        numbers.append(len(stem))
        return plain(self, stem)

    monkeypatch.setattr(AdaptedClip, "frozen_image_features", counted)
    return numbers


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (PromptSrc(num_tokens=2, depth=1), {}),
        (BOTH_TOWERS, {"penalty": Distillation(weight=0.5)}),
        (BOTH_TOWERS, {"penalty": ProGrad()}),
        (PromptSrc(num_tokens=2, depth=1), {"privacy": ExamplePrivacy(clip_norm=0.5), "steps": 2}),
    ],
    ids=["prompt_src", "distillation", "prograd", "private"],
)  # fmt: skip
def test_they_are_computed_once_and_change_nothing(
    tiny_model: str, adapter: Adapter, changes: dict[str, Any], per_block: int, looked_at: list[int]
) -> None:
    model = adapt(tiny_model, adapter, templates=adapter.templates(("a photo of a {}.",)))
    local = dataclasses.replace(LOCAL, learning_rate=0.01, **changes)
    (*_, once), results = rounds(parts(model, local, per_block), 2)
    assert sorted(looked_at) == sorted(SIZES)
    (*_, each), others = rounds(parts(model, local, per_block, knows=False), 2)
    assert len(looked_at) == len(SIZES)
    assert_states_close(once.adapter, each.adapter)
    for result, other in zip(results, others, strict=True):
        assert result.train_loss == pytest.approx(other.train_loss, abs=TOLERANCE)


def test_where_the_stem_gives_them_nothing_is_kept(tiny_model: str, looked_at: list[int]) -> None:
    rounds(parts(adapt(tiny_model, Lora(rank=2)), dataclasses.replace(LOCAL, penalty=Distillation()), 5), 1)
    assert looked_at == []


@pytest.mark.parametrize(("num_kept", "num_again"), [(0, 13), (4, 9), (12, 5), (13, 0), (None, 0)])
def test_no_more_of_them_are_kept_than_may_be(
    tiny_model: str, num_kept: int | None, num_again: int, looked_at: list[int]
) -> None:
    model, number = adapt(tiny_model, BOTH_TOWERS), len(LABELS)
    features = StoredFeatures(model.vision.stem(PIXELS), torch.arange(number), LABELS, np.arange(number))
    blocks = [block(each) for each in ((8, 3, 5, 1), (3, 2, 9, 8), (4, 7, 0, 6, 2))]
    frozen = FrozenImages(model, features, None if num_kept is None else num_kept * 16 * torch.float64.itemsize)
    first = [frozen.of_block(each) for each in blocks]
    looked_at.clear()
    for before, each in zip(first, blocks, strict=True):
        again = frozen.of_block(each)
        assert before is not None and again is not None and torch.equal(before.features, again.features)
    assert sum(looked_at) == num_again


def block(*places: Iterable[int]) -> Block:
    """A step of clients of these examples, each of which sees all of them but for the last one."""
    setup = TrainingSetup(round=1, local=LOCAL, learning_rate=0.1, trained=(), width=3)
    tasks = [
        ClientTask(client, {}, np.array(each), Rng(client), setup) for client, each in enumerate(map(list, places))
    ]
    indices = torch.from_numpy(np.stack([task.examples[:-1] for task in tasks])).unsqueeze(0)
    return Block(tuple(tasks), (1,) * len(tasks), indices, torch.ones_like(indices, dtype=torch.bool))


def test_they_are_those_of_the_examples_in_any_order_and_company(tiny_model: str) -> None:
    model, number = adapt(tiny_model, BOTH_TOWERS), len(LABELS)
    features = StoredFeatures(model.vision.stem(PIXELS), torch.arange(number), LABELS, np.arange(number))
    expected = model.frozen_image_features(features.stem)
    frozen = FrozenImages(model, features)
    several = frozen.of_block(block((8, 3, 5, 1), (3, 2, 9, 8), (4, 7, 0, 6)))
    assert several is not None
    torch.testing.assert_close(
        several.of_step(0, 2, None), expected[torch.tensor([[8, 3, 5], [3, 2, 9]])], atol=TOLERANCE, rtol=0
    )
    alone = FrozenImages(model, features).of_block(block((4, 7, 0, 6)))
    assert alone is not None
    assert torch.equal(alone.of_step(0, 1, 2)[0], several.of_step(0, 3, 2)[2])


def test_they_are_known_of_several_runs_examples(tiny_model: str) -> None:
    model, number = adapt(tiny_model, BOTH_TOWERS), len(LABELS)
    stem, rows = model.vision.stem(PIXELS), torch.arange(number)
    runs = [StoredFeatures(stem, each, LABELS, np.arange(number)) for each in (rows, rows.flip(0))]
    features, (_, start) = joined(runs)
    found = FrozenImages(model, features).of_block(block((2, 0, 1), (start + 2, start + 4, start + 1)))
    assert found is not None
    expected = model.frozen_image_features(stem)
    torch.testing.assert_close(
        found.of_step(0, 2, None), expected[torch.tensor([[2, 0], [number - 3, number - 5]])], atol=TOLERANCE, rtol=0
    )

"""An adapter of a user's own that mixes clients, or trains what changes nothing, is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import load_clip
from torch import Tensor

from flora.clip.adapter_check import check_adapter
from flora.clip.adapters.base import Adapter, AttachedAdapter
from flora.clip.adapters.outside import AttachedOutside, FitsEveryModel
from flora.clip.frozen import FrozenClip
from flora.clip.towers.text import with_classes
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.core import registry
from flora.core.errors import UserError
from flora.core.registry import components
from flora.core.rng import Rng
from flora.core.tree import State
from flora.experiment.build import build_experiment

NAMES = ("cat", "dog", "fox", "hen", "owl")


class AttachedScale(AttachedOutside):
    """A factor for each number of an image's features, and what a test makes of it."""

    def __init__(self, options: Scale, clip: FrozenClip) -> None:
        super().__init__(clip)
        self.options, self.width = options, clip.architecture.embed_dim
        self.trained_from.update(options.first)

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        return self.options.start(torch.ones(self.width, dtype=self.dtype))

    def adapt_images(self, features: Tensor) -> Tensor:
        return features if self.stack is None else self.options.change(features, self.stack)


@dataclass(frozen=True)
class Scale(FitsEveryModel):
    """What clients train in these tests."""

    change: Callable[[Tensor, Any], Tensor] = lambda features, stack: features * stack["scale"].unsqueeze(1)
    start: Callable[[Tensor], Any] = lambda ones: {"scale": ones}
    first: tuple[tuple[str, int], ...] = ()

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedScale(self, clip)


def model_with(options: Adapter, path: str, precision: str = "fp64") -> AdaptedClip:
    clip, templates = load_clip(path, precision=precision), options.templates(("a photo of a {}.",))
    clip = with_classes(replace(clip, reads_patches=options.comparison.reads_patches), [NAMES], templates)
    return AdaptedClip(clip, options.attach(clip), class_names=NAMES, templates=templates)


def fault(options: Adapter, path: str) -> str:
    with pytest.raises(UserError) as caught:
        check_adapter(options, model_with(options, path))
    return str(caught.value)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_right_one_passes(tiny_model: str, precision: str) -> None:
    check_adapter(Scale(), model_with(Scale(), tiny_model, precision))


def test_clients_that_mix_are_refused(tiny_model: str) -> None:
    mixed = Scale(change=lambda features, stack: features * stack["scale"].mean(dim=0))
    assert "adapter: Scale mixes clients: two that compute together get other logits than" in fault(mixed, tiny_model)


def test_clients_that_mix_are_refused_in_single_precision(tiny_model: str) -> None:
    mixed = Scale(change=lambda features, stack: features * stack["scale"].mean(dim=0))
    with pytest.raises(UserError, match="mixes clients"):
        check_adapter(mixed, model_with(mixed, tiny_model, "fp32"))


def test_axes_that_are_mistaken_do_not_fit(tiny_model: str) -> None:
    mistaken = Scale(change=lambda features, stack: features * stack["scale"])
    message = fault(mistaken, tiny_model)
    assert message.startswith("adapter: Scale fails with tensors of 2 clients and 3 images: RuntimeError: The size of")


def test_what_changes_nothing_is_refused(tiny_model: str) -> None:
    idle = Scale(change=lambda features, stack: features)
    assert "adapter: Scale changes no logit: nothing of it would be trained; does `trained_from`" in fault(
        idle, tiny_model
    )
    half = Scale(start=lambda ones: {"scale": ones, "shift": ones})
    assert "adapter: Scale: 'shift' changes no logit: it would not be trained" in fault(half, tiny_model)


def test_what_it_starts_from_is_checked(tiny_model: str) -> None:
    short = Scale(start=lambda ones: {"scale": ones.half()})
    assert "adapter: Scale returned 'scale' as torch.float16 in `initial_state`, expected" in fault(short, tiny_model)
    none = Scale(start=lambda ones: {})
    assert "adapter: Scale returned no tensors by name as `initial_state`" in fault(none, tiny_model)


@pytest.mark.parametrize("name", sorted(components(Adapter)))
def test_those_that_are_here_pass(name: str, tiny_model: str) -> None:
    options = components(Adapter)[name]()
    check_adapter(options, model_with(options, tiny_model))


def test_a_run_begins_with_it(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTRY[Adapter], "mine", Mixed)
    config = parse_config({**raw_config, "adapter": "mine"})
    with pytest.raises(UserError, match="adapter: mine mixes clients"):
        build_experiment(config)


@dataclass(frozen=True)
class Mixed(FitsEveryModel):
    """One whose clients mix."""

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return Scale(change=lambda features, stack: features * stack["scale"].mean(dim=0)).attach(clip)

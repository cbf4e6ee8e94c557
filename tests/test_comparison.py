"""Adapters that compare images and classes in their own way: trained, evaluated and predicted with, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, TOLERANCE, load_clip, random_pixels
from helpers import adapt as adapt_with
from torch import Tensor

from flora.client.objectives import CrossEntropy, MultiPositive, Objective
from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.prompts import AttachedContext, PromptContext
from flora.clip.comparison import Comparison, CosinesByImage
from flora.clip.frozen import FrozenClip
from flora.clip.prediction import FixedFusion, Prediction
from flora.clip.towers.towers import AdaptedClip
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.engine.batch import Batch
from flora.engine.gradients import FlatStack, Loss, gradient_function
from flora.evaluation.accuracy import evaluate
from flora.features.features import StoredFeatures

TEMPLATES = PromptContext().templates(())
WIDTH, DIM = 32, 16


@dataclass(frozen=True)
class ShiftedContext(PromptContext):
    """A context that moves with the image: context + image feature times a matrix."""

    @property
    def comparison(self) -> Comparison:
        return CosinesByImage()

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedShifted(self, clip)


class AttachedShifted(AttachedContext):
    comparison = CosinesByImage()

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        shift = torch.empty(DIM, WIDTH).normal_(0, 0.1, generator=rng.torch()).to(self.dtype)
        return {**super().initial_state(rng), "shift": shift}

    def for_images(self, images: Tensor) -> StateLike:
        assert self.stack is not None
        shifts = torch.bmm(images, self.stack["shift"]).unsqueeze(2)
        return {"context": (self.stack["context"].unsqueeze(1) + shifts).flatten(0, 1)}


@dataclass(frozen=True)
class SquaredPatches(Comparison):
    """The mean over patches and prompts of the squared cosines."""

    reads_patches: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = True

    def similarities(self, images: Tensor, classes: Tensor) -> Tensor:
        return torch.einsum("kbmd,kctd->kbcmt", images, classes).square().mean(dim=(3, 4))


@dataclass(frozen=True)
class TwoContexts(PromptContext):
    @property
    def comparison(self) -> Comparison:
        return SquaredPatches()

    def templates(self, given: Any) -> tuple[str, ...]:
        return super().templates(given) * 2

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedTwo(self, clip)


class AttachedTwo(AttachedContext):
    comparison = SquaredPatches()

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        context = super().initial_state(rng)["context"]
        return {"context": torch.cat([context, context])}


OPTIONS = {"by image": ShiftedContext(), "patches and prompts": TwoContexts()}


def adapt(path: str, kind: str) -> AdaptedClip:
    return adapt_with(path, OPTIONS[kind], templates=OPTIONS[kind].templates(()))


def random_stack(model: AdaptedClip, number: int) -> State:
    generator = torch.Generator().manual_seed(3)
    return {
        name: tensor + 0.1 * torch.randn((number, *tensor.shape), generator=generator, dtype=tensor.dtype)
        for name, tensor in model.initial_adapter(Rng(0)).items()
    }


def plain_logits(path: str, kind: str, adapter: StateLike, pixels: Tensor) -> Tensor:
    """The logits `(B, C)` of one client, an image at a time, with ordinary contexts alone."""
    plain, visual = adapt_with(path, PromptContext(), templates=TEMPLATES), load_clip(path).visual
    visual.output_tokens = True

    def texts(context: Tensor) -> Tensor:
        with plain.adapter.bind({"context": context.unsqueeze(0)}):
            return plain.class_features(1)[0]

    rows = []
    for each in pixels:
        image = plain.image_features(plain.vision.stem(each.unsqueeze(0)), 1)[0, 0]
        if kind == "by image":
            rows.append(texts(adapter["context"] + image @ adapter["shift"]) @ image)
            continue
        _, tokens = visual(each.unsqueeze(0))
        patches = F.normalize(tokens[0] @ visual.proj, dim=-1)  # behind the last norm already
        prompts = torch.stack([texts(half) for half in adapter["context"].chunk(2)])
        rows.append((prompts @ patches.T).square().mean(dim=(0, 2)))
    return plain.logit_scale() * torch.stack(rows)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_step_equals_one_client_and_image_at_a_time(tiny_model: str, kind: str, number: int) -> None:
    model = adapt(tiny_model, kind)
    stack, pixels = random_stack(model, number), random_pixels(3 * number)
    labels = torch.arange(3 * number).view(number, 3) % 2
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[-1, 2] = False
    batch = Batch({"stem": model.vision.stem(pixels), "labels": labels, "example_mask": mask})
    flat = FlatStack(stack, model.device)
    compute = gradient_function(model, Loss((("local.objective", CrossEntropy()),)), flat, None, batch_size=3)
    losses, gradients = compute(flat.matrix, batch)
    for client in range(number):
        leaves = {name: tensor[client].clone().requires_grad_() for name, tensor in stack.items()}
        real = mask[client]
        logits = plain_logits(tiny_model, kind, leaves, pixels.unflatten(0, (number, 3))[client][real])
        loss = F.cross_entropy(logits, labels[client][real])
        rows = torch.autograd.grad(loss, list(leaves.values()))
        torch.testing.assert_close(losses[client], loss.detach(), atol=TOLERANCE, rtol=0)
        expected = torch.cat([row.flatten() for row in rows])
        torch.testing.assert_close(gradients[client], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", OPTIONS)
def test_clients_that_start_from_one_adapter_agree(tiny_model: str, kind: str) -> None:
    """Whether or not their classes are encoded once, which is for class features that no image changes."""
    model = adapt(tiny_model, kind)
    stack = {name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in random_stack(model, 1).items()}
    labels = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]])
    stem, mask = model.vision.stem(random_pixels(8)), torch.ones_like(labels, dtype=torch.bool)
    batch = Batch({"stem": stem, "labels": labels, "example_mask": mask})
    flat = FlatStack(stack, model.device)
    compute = gradient_function(model, Loss((("local.objective", CrossEntropy()),)), flat, None, batch_size=2)
    (shared, first), (again, second) = (compute(flat.matrix, batch) for _ in range(2))
    torch.testing.assert_close(shared, again, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_classes_of_a_batch_are_enough_for_an_objective_of_these(tiny_model: str, kind: str) -> None:
    model = adapt(tiny_model, kind)
    flat, labels = FlatStack(random_stack(model, 2), model.device), torch.tensor([[0, 2], [2, 2]])
    stem, mask = model.vision.stem(random_pixels(4)), torch.ones_like(labels, dtype=torch.bool)
    objective: Objective = MultiPositive()
    compute = gradient_function(model, Loss((("local.objective", objective),)), flat, None, batch_size=2)
    whole = compute(flat.matrix, Batch({"stem": stem, "labels": labels, "example_mask": mask}))
    selected = model.select_classes(labels)
    assert selected is not None
    part = Batch({"stem": stem, "labels": selected[1], "example_mask": mask}, classes=selected[0])
    for one, other in zip(whole, compute(flat.matrix, part), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", OPTIONS)
def test_evaluation_compares_so_and_the_frozen_model_by_cosines(tiny_model: str, kind: str) -> None:
    model, pixels = adapt(tiny_model, kind), random_pixels(6)
    stack, labels = random_stack(model, 2), torch.arange(6) % 3
    features = StoredFeatures(model.vision.stem(pixels), torch.arange(6), labels, np.arange(6))
    expected = [
        plain_logits(tiny_model, kind, {name: each[row] for name, each in stack.items()}, pixels).detach()
        for row in range(2)
    ]
    found = evaluate(model, stack, features, batch_size=4)
    for one, logits in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.losses, F.cross_entropy(logits, labels, reduction="none"), atol=TOLERANCE)
        assert one.class_features.shape == (len(CLASSES), DIM)
    plain = adapt_with(tiny_model, PromptContext(), templates=TEMPLATES)
    stem = plain.vision.stem(pixels)
    frozen = plain.logits(stem, plain.class_features(1))[0]
    zero_shot = evaluate(model, None, features, batch_size=4)[0]
    np.testing.assert_allclose(zero_shot.losses, F.cross_entropy(frozen, labels, reduction="none"), atol=TOLERANCE)
    mixed = evaluate(model, stack, features, batch_size=4, prediction=Prediction(FixedFusion(weight=0.3)))
    logits = 0.7 * expected[0] + 0.3 * frozen.detach()
    np.testing.assert_allclose(mixed[0].losses, F.cross_entropy(logits, labels, reduction="none"), atol=TOLERANCE)

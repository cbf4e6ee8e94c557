"""Prompts whose features are a distribution, against a loss written from the paper on plain OpenCLIP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    LABELS,
    PIXELS,
    TOLERANCE,
    adapt,
    assert_equal_to_a_plain_loop,
    load_plain,
    plain_texts,
    random_adapters,
    random_pixels,
)
from torch import Tensor

from flora.clip.adapters.prompt_distribution import MeanPrompts, ProDa, UpperBound
from flora.clip.frozen import FrozenClip
from flora.clip.loss_terms import StepView
from flora.core.tree import State

METHOD = ProDa(words=None, num_tokens=3, orthogonality=0.3)


def prompts_of(plain: FrozenClip, context: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features of four prompts of each class `(C, 4, d)`, and of the four contexts without a name `(4, d)`."""
    features = []
    for own, num_before in zip(context, (3, 3, 1, 0), strict=True):

        def put(x: Tensor, ends: Tensor, own: Tensor = own, num_before: int = num_before) -> None:
            for row, end in enumerate(ends.tolist()):
                x[row, 1 : 1 + num_before] = own[:num_before]
                x[row, end - 1 - (3 - num_before) : end - 1] = own[num_before:]

        before, behind = " x" * num_before, " x" * (3 - num_before)
        texts = [f"{before} {name}{behind}." for name in CLASSES]
        features.append(plain_texts(plain, texts, put))

    def put_all(x: Tensor, ends: Tensor) -> None:
        x[:, 1:4] = context

    return torch.stack(features, dim=1), plain_texts(plain, ["x x x."] * 4, put_all)


def plain_loss(plain: FrozenClip, context: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The upper bound, image by image and class by class, and the cosines of prompts without names."""
    named, nameless = prompts_of(plain, context)
    scale, mean, losses = plain.model.logit_scale.exp(), named.mean(dim=1), []  # type: ignore[operator]
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = []
        for other in range(len(named)):
            differences = named[other] - named[label]
            variance = (differences - differences.mean(dim=0)).square().mean(dim=0)  # diagonal, over the prompts
            logits.append(scale * image @ mean[other] + scale**2 / 2 * (image**2 @ variance))
        losses.append(F.cross_entropy(torch.stack(logits), torch.tensor(label)))
    cosines = [(nameless[i] @ nameless[j]).abs() for i in range(4) for j in range(4) if i != j]
    return torch.stack(losses).mean() + 0.3 * torch.stack(cosines).mean()


def test_rounds_equal_a_plain_loop(tiny_model: str) -> None:
    model, plain = adapt(tiny_model, METHOD, templates=METHOD.templates(())), load_plain(tiny_model)
    plain.model.requires_grad_(False)
    images = model.image_features(model.vision.stem(PIXELS), 1)[0].detach()

    def loss(state: State, examples: np.ndarray) -> Tensor:
        return plain_loss(plain, state["context"], images[examples], LABELS[examples])

    _, last = assert_equal_to_a_plain_loop(model, loss)
    assert {name: tensor.shape for name, tensor in last.items()} == {"context": (4, 3, 32)}


@torch.no_grad()
def test_images_are_compared_with_the_mean_of_prompts(tiny_model: str) -> None:
    """As it is: it is not normalised once more."""
    model, plain = adapt(tiny_model, METHOD, templates=METHOD.templates(())), load_plain(tiny_model)
    stack, stem = random_adapters(model, 2), model.vision.stem(random_pixels(6))
    images = model.image_features(stem, 2)
    with model.adapter.bind(stack):
        found = model.logits(stem, model.class_features(2))
    for client in range(2):
        mean = prompts_of(plain, stack["context"][client])[0].mean(dim=1)
        expected = model.logit_scale() * images[client] @ mean.T
        torch.testing.assert_close(found[client], expected, atol=TOLERANCE, rtol=0)
        assert mean.norm(dim=-1).max() < 1 - 1e-6


def test_where_all_prompts_are_alike_the_bound_is_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    images, prompts = (
        F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
        for shape in ((2, 5, 8), (2, 3, 4, 8))
    )
    batch = {"labels": torch.tensor([[0, 1, 2, 0, 1]] * 2), "example_mask": torch.ones(2, 5, dtype=torch.bool)}

    def excess(prompts: Tensor) -> Tensor:
        scale = torch.tensor(10.0, dtype=torch.float64)
        return UpperBound(4).loss(StepView(images, prompts, scale, batch, comparison=MeanPrompts(4)))

    assert (excess(prompts) > 0.1).all()
    assert excess(prompts[:, :, :1].expand(-1, -1, 4, -1)).abs().max() < TOLERANCE


@pytest.mark.parametrize(("number", "positions"), [(2, (2, 0, 0)), (6, (4, 1, 1)), (8, (4, 2, 2))])
def test_where_the_name_stands(number: int, positions: tuple[int, int, int]) -> None:
    templates = ProDa(num_prompts=number).templates(())
    shown = ("a photo of a {}.", "a photo {} of a.", "{} a photo of a.")
    assert tuple(templates[:number].count(each) for each in shown) == positions
    assert templates[number:] == ("a photo of a.",) * number

"""Objectives against hand-worked numbers and plain PyTorch; clients and padding never mix in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.client.objectives import Contrastive, CrossEntropy, MultiPositive, Objective
from flora.clip.loss_terms import StepView

ALL = [CrossEntropy(), CrossEntropy(label_smoothing=0.1), Contrastive(), MultiPositive()]


def inputs(labels: list[list[int]], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit image features, class features (4 classes) and the labels."""
    generator = torch.Generator().manual_seed(seed)
    num_clients, size = len(labels), len(labels[0])
    images = F.normalize(torch.randn(num_clients, size, 5, generator=generator), dim=-1)
    classes = F.normalize(torch.randn(num_clients, 4, 5, generator=generator), dim=-1)
    return images, classes, torch.tensor(labels)


def loss_of(
    objective: Objective, images: Tensor, classes: Tensor, labels: Tensor, mask: Tensor, scale: Tensor
) -> Tensor:
    return objective.loss(StepView(images, classes, scale, {"labels": labels, "example_mask": mask}))


def test_cross_entropy_by_hand() -> None:
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    loss = loss_of(
        CrossEntropy(), images, classes, torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor(2.0)
    )
    # logits (2, 0) and (0, 2), both of class 0: log(1 + e^-2) and log(1 + e^2)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2)


def test_contrastive_is_clips_loss_in_which_a_same_class_image_is_a_negative() -> None:
    images, classes, labels = inputs([[0, 2, 2, 1]])
    loss = loss_of(Contrastive(), images, classes, labels, torch.ones(1, 4, dtype=torch.bool), torch.tensor(10.0))
    logits = 10 * images[0] @ classes[0][labels[0]].T
    target = torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss[0], expected)


def test_multi_positive_counts_each_text_once_by_hand() -> None:
    # Two images of class 0 and one of class 2, on the axes; class 1 is not in the batch, and counts nowhere.
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    classes = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    labels, mask = torch.tensor([[0, 0, 2]]), torch.ones(1, 3, dtype=torch.bool)
    loss = loss_of(MultiPositive(), images, classes, labels, mask, torch.tensor(2.0, dtype=torch.float64))
    e = math.exp(2)
    # Logits of the images to the texts of 0 and 2: (2, 0), (0, 2), (0, 2).
    of_images = [-math.log(e / (e + 1)), -math.log(1 / (1 + e)), -math.log(e / (1 + e))]
    # Logits of text 0 to the images: (2, 0, 0), the first two its own; of text 2: (0, 2, 2), the last its own.
    of_texts = [-(math.log(e / (e + 2)) + math.log(1 / (e + 2))) / 2, -math.log(e / (1 + 2 * e))]
    assert loss.item() == pytest.approx((sum(of_images) / 3 + sum(of_texts) / 2) / 2, rel=1e-12)


def test_multi_positive_is_contrastive_only_where_no_class_comes_twice() -> None:
    images, classes, labels = (each.double() if each.is_floating_point() else each for each in inputs([[0, 2, 2, 1]]))
    mask, scale = torch.ones(1, 4, dtype=torch.bool), torch.tensor(10.0, dtype=torch.float64)
    for own, is_same in ((labels, False), (torch.tensor([[3, 2, 0, 1]]), True)):
        left, right = (loss_of(each, images, classes, own, mask, scale) for each in (MultiPositive(), Contrastive()))
        assert (abs(left - right).item() < 1e-9) == is_same
        assert is_same or abs(left - right).item() > 1e-2


@pytest.mark.parametrize("objective", ALL)
def test_padding_changes_neither_loss_nor_gradient(objective: Objective) -> None:
    images, classes, labels = inputs([[0, 1, 1, 3, 2]])
    images.requires_grad_()
    short = loss_of(
        objective, images[:, :3], classes, labels[:, :3], torch.ones(1, 3, dtype=torch.bool), torch.tensor(20.0)
    )
    mask = torch.tensor([[True, True, True, False, False]])
    padded = loss_of(objective, images, classes, labels, mask, torch.tensor(20.0))
    torch.testing.assert_close(padded, short)
    expected, found = (torch.autograd.grad(loss.sum(), images)[0] for loss in (short, padded))
    torch.testing.assert_close(found, expected)
    assert found[:, 3:].abs().max() == 0


@pytest.mark.parametrize("objective", ALL)
def test_clients_do_not_mix(objective: Objective) -> None:
    images, classes, labels = inputs([[0, 1, 1], [3, 2, 0], [2, 2, 2]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    together = loss_of(objective, images, classes, labels, mask, torch.tensor(5.0))
    for client in range(3):
        own = slice(client, client + 1)
        alone = loss_of(objective, images[own], classes[own], labels[own], mask[own], torch.tensor(5.0))
        torch.testing.assert_close(together[own], alone)

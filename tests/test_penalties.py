"""Penalties for forgetting: closed forms, and rounds against a plain loop."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import adapt, assert_states_close, federation, mean, start

from flora.client.local_training import LocalTraining
from flora.client.objectives import Contrastive, CrossEntropy, Objective
from flora.client.optimizers import Sgd
from flora.client.penalties import Anchor, Distillation, NoPenalty, Penalty, ReciprocalConsistency
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.beside import LinearHead
from flora.clip.adapters.lora import Lora
from flora.clip.loss_terms import StepView
from flora.core import tree
from flora.federated.round import run_round

BATCH = {"labels": torch.zeros(1, 3, dtype=torch.int64), "example_mask": torch.tensor([[True, True, False]])}
SCALE = torch.tensor(2.0)


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows), dim=-1)


def test_anchor_by_hand() -> None:
    images, frozen = unit([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]), unit([1.0, 0.0], [0.0, 1.0])
    classes = torch.stack([frozen, unit([0.0, 1.0], [0.0, -1.0])])  # as they were; at 90 and 180 degrees
    found = Anchor(weight=3.0).loss(StepView(images.expand(2, -1, -1), classes, SCALE, BATCH, images, frozen))
    assert found.tolist() == pytest.approx([0.0, 3.0 * (1 + 2) / 2])


def test_distillation_by_hand() -> None:
    images, classes = unit([1.0, 0.0], [0.0, 1.0], [5.0, 1.0]), unit([1.0, 0.0], [0.0, 1.0])
    seen = StepView(images.unsqueeze(0), classes.unsqueeze(0), SCALE, BATCH, images.unsqueeze(0), classes)
    same = Distillation().loss(seen)
    assert same.tolist() == pytest.approx([0.0])
    # The adapted model has swapped the two classes; at temperature 4 the logits are 1/2 and 0.
    swapped = classes.flip(0).unsqueeze(0)
    p = math.exp(0.5) / (math.exp(0.5) + 1)
    divergence = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    found = Distillation(weight=0.5, temperature=4.0).loss(dataclasses.replace(seen, classes=swapped))
    assert found.tolist() == pytest.approx([0.5 * 16 * divergence], rel=1e-5)


def symmetric(p: list[float], q: list[float]) -> float:
    return sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2


def softmax(*logits: float) -> list[float]:
    total = sum(math.exp(each) for each in logits)
    return [math.exp(each) / total for each in logits]


def test_reciprocal_consistency_by_hand() -> None:
    # Two real images and padding; the adapted model has turned the second class by 180 degrees.
    images, classes = unit([1.0, 0.0], [0.0, 1.0], [5.0, 1.0]), unit([1.0, 0.0], [0.0, 1.0])
    turned = unit([1.0, 0.0], [0.0, -1.0]).unsqueeze(0)
    seen = StepView(images.unsqueeze(0), classes.unsqueeze(0), SCALE, BATCH, images.unsqueeze(0), classes)
    assert ReciprocalConsistency().loss(seen).tolist() == pytest.approx([0.0])
    found = ReciprocalConsistency(weight=0.5, temperature=4.0).loss(dataclasses.replace(seen, classes=turned))
    # At temperature 4 a logit is half a cosine. The first image sees the same two classes as before.
    of_images = symmetric(softmax(0, -0.5), softmax(0, 0.5)) / 2
    of_classes = symmetric(softmax(0, -0.5), softmax(0, 0.5)) / 2
    assert found.tolist() == pytest.approx([0.5 * 16 * (of_images + of_classes) / 2], rel=1e-5)


def test_reciprocal_consistency_ignores_what_padding_holds() -> None:
    images, classes = unit([1.0, 0.0], [0.3, 1.0], [5.0, 1.0]), unit([1.0, 0.2], [0.0, 1.0])
    frozen = unit([1.0, 0.0], [0.0, 1.0])
    seen = StepView(images.unsqueeze(0), classes.unsqueeze(0), SCALE, BATCH, images.unsqueeze(0), frozen)
    other = torch.cat([images[:2], unit([-3.0, 1.0])]).unsqueeze(0)
    padded = dataclasses.replace(seen, images=other, frozen_images=other)
    assert ReciprocalConsistency().loss(seen).tolist() == ReciprocalConsistency().loss(padded).tolist()


PENALTIES = [
    Anchor(weight=2.0),
    Distillation(weight=0.7, temperature=3.0),
    ReciprocalConsistency(weight=0.7, temperature=3.0),
]
ADAPTERS = [Lora(rank=2), Lora(rank=2, towers=("text", "vision")), LinearHead()]


def local(penalty: Penalty, objective: Objective) -> LocalTraining:
    return LocalTraining(
        learning_rate=0.02, batch_size=100, epochs=2, optimizer=Sgd(), penalty=penalty, objective=objective
    )


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("objective", [CrossEntropy(), Contrastive()])
def test_a_round_equals_a_plain_loop(tiny_model: str, penalty: Penalty, adapter: Adapter, objective: Objective) -> None:
    model = adapt(tiny_model, adapter)
    parts, state = federation(model, local(penalty, objective), per_block=3), start(model)
    after, _ = run_round(parts, state)
    frozen_classes = model.class_features(1)[0].detach()
    ends = []
    for client in parts.clients:
        stem = parts.engine.features.take(torch.from_numpy(client.train), torch.device("cpu"))
        labels = parts.engine.features.labels[client.train].unsqueeze(0)
        frozen_images = model.image_features(stem, 1).detach()
        mask = torch.ones_like(labels, dtype=torch.bool)
        vector = tree.flatten(state.adapter)
        for _ in range(2):
            leaf = vector.clone().requires_grad_()
            own = {name: each.unsqueeze(0) for name, each in tree.unflatten(leaf, state.adapter).items()}
            with model.adapter.bind(own):
                images, classes, scale = model.image_features(stem, 1), model.class_features(1), model.logit_scale()
                loss = objective.loss(StepView(images, classes, scale, {"labels": labels, "example_mask": mask}))
                if isinstance(penalty, Anchor):
                    loss = loss + penalty.weight * (1 - F.cosine_similarity(classes[0], frozen_classes)).mean()
                elif isinstance(penalty, Distillation):
                    student = (scale * images[0] @ classes[0].T / penalty.temperature).log_softmax(dim=-1)
                    teacher = (scale * frozen_images[0] @ frozen_classes.T / penalty.temperature).softmax(dim=-1)
                    divergence = F.kl_div(student, teacher, reduction="batchmean")
                    loss = loss + penalty.weight * penalty.temperature**2 * divergence
                elif isinstance(penalty, ReciprocalConsistency):
                    student = scale * images[0] @ classes[0].T / penalty.temperature
                    teacher = scale * frozen_images[0] @ frozen_classes.T / penalty.temperature
                    for one, other in ((student, teacher), (student.T, teacher.T)):
                        p, q = one.softmax(dim=-1), other.softmax(dim=-1)
                        both = F.kl_div(q.log(), p, reduction="batchmean") + F.kl_div(p.log(), q, reduction="batchmean")
                        loss = loss + penalty.weight * penalty.temperature**2 * both / 4
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            vector = vector - 0.02 * gradient
        ends.append(vector)
    assert_states_close(after.adapter, tree.unflatten(mean(parts, ends), state.adapter))


def test_a_heavy_anchor_holds_the_classes_in_place(tiny_model: str) -> None:
    moved = []
    for penalty in (NoPenalty(), Anchor(weight=100.0)):
        model = adapt(tiny_model, Lora(rank=2))
        parts, state = federation(model, LocalTraining(learning_rate=0.01, steps=10, penalty=penalty)), start(model)
        for _ in range(3):
            state, _ = run_round(parts, state)
        before = model.frozen_class_features()
        with model.adapter.bind(tree.expand(state.adapter, 1)), torch.no_grad():
            moved.append(float((1 - (model.class_features(1)[0] * before).sum(dim=-1)).mean()))
    assert moved[1] < moved[0] / 5

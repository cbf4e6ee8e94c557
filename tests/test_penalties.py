"""Penalties for forgetting: closed forms, and rounds against a plain loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import adapt, assert_states_close, federation, mean, start

from flora.client.local_training import LocalTraining
from flora.client.objectives import Contrastive, CrossEntropy, Objective
from flora.client.optimizers import Sgd
from flora.client.penalties import Anchor, Distillation, NoPenalty, Penalty, ProGrad, ReciprocalConsistency
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.heads import LinearHead
from flora.clip.adapters.lora import Lora
from flora.clip.adapters.prompts import PromptContext
from flora.clip.loss_terms import StepView
from flora.clip.towers.speed import SpeedOptions
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.tree import State
from flora.engine.gradients import SharedTexts
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


def test_what_goes_against_the_guide_is_taken_out_by_hand() -> None:
    """Five clients: against it, along it, across it, a guide of zero, and one that is nothing but rounding."""
    loss = torch.tensor([[1.0, -2.0], [1.0, 2.0], [3.0, 0.0], [1.0, -2.0], [1.0, -2.0]], dtype=torch.float64)
    guide = torch.tensor([[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [0.0, 0.0], [0.0, 1e-9]], dtype=torch.float64)
    found = ProGrad().guided(loss, guide)
    assert found.tolist() == [[1.0, 0.0], *loss[1:].tolist()]
    assert ProGrad(strength=0.25).guided(loss, guide)[0].tolist() == [1.0, -1.5]


GUIDED = [Lora(rank=2), Lora(rank=2, towers=("text", "vision")), LinearHead(), PromptContext(words="an image of one")]


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize("adapter", GUIDED)
def test_a_round_of_prograd_equals_a_plain_loop(tiny_model: str, adapter: Adapter, per_block: int) -> None:
    penalty = ProGrad(strength=0.8, temperature=2.0)
    model = adapt(tiny_model, adapter, templates=adapter.templates(("a photo of a {}.",)))
    parts, state = federation(model, local(penalty, CrossEntropy()), per_block=per_block), start(model)
    state = dataclasses.replace(state, adapter=moved(state.adapter))
    after, _ = run_round(parts, state)
    frozen_classes, ends, conflicts = model.frozen_class_features(), [], 0
    for client in parts.clients:
        stem = parts.engine.features.take(torch.from_numpy(client.train), torch.device("cpu"))
        labels, frozen_images = parts.engine.features.labels[client.train], model.image_features(stem, 1)[0].detach()
        vector = tree.flatten(state.adapter)
        for _ in range(2):
            leaf = vector.clone().requires_grad_()
            own = {name: each.unsqueeze(0) for name, each in tree.unflatten(leaf, state.adapter).items()}
            with model.adapter.bind(own):
                scale = model.logit_scale()
                logits = scale * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
            teacher = (scale * frozen_images @ frozen_classes.T / 2).softmax(dim=-1)
            general = 4 * F.kl_div((logits / 2).log_softmax(dim=-1), teacher, reduction="batchmean")
            (g,) = torch.autograd.grad(F.cross_entropy(logits, labels), leaf, retain_graph=True)
            (h,) = torch.autograd.grad(general, leaf)
            if torch.dot(g, h) < 0:
                conflicts += 1
                g = g - 0.8 * torch.dot(g, h) / torch.dot(h, h) * h
            vector = vector - 0.02 * g
        ends.append(vector)
    assert_states_close(after.adapter, tree.unflatten(mean(parts, ends), state.adapter))
    assert conflicts  # or it would be a test of the cross-entropy alone


def moved(adapter: State) -> State:
    """An adapter that is no longer the frozen model, from which the divergence has a gradient."""
    generator = torch.Generator().manual_seed(1)
    noise = {n: 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in adapter.items()}
    return {name: tensor + noise[name] for name, tensor in adapter.items()}


def test_from_the_frozen_model_prograd_takes_nothing_out(tiny_model: str) -> None:
    """The divergence has no gradient there but rounding, which must not point anywhere."""
    ends = []
    for penalty in (NoPenalty(), ProGrad()):
        model = adapt(tiny_model, Lora(rank=2))
        parts = federation(model, dataclasses.replace(local(penalty, CrossEntropy()), epochs=1))
        ends.append(run_round(parts, start(model))[0].adapter)
    assert_states_close(*ends)


def test_prograd_is_the_same_where_clients_share_their_first_texts(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, shared = [], []
    rows = SharedTexts.rows
    monkeypatch.setattr(SharedTexts, "rows", lambda *given, **kept: shared.append(kept) or rows(*given, **kept))
    for speed in (SpeedOptions(share_first_step=True), SpeedOptions(share_first_step=False)):
        model = adapt(tiny_model, Lora(rank=2), speed=speed)
        state = dataclasses.replace(start(model), adapter=moved(start(model).adapter))
        parts = federation(model, local(ProGrad(), CrossEntropy()), per_block=5)
        ends.append(run_round(parts, state)[0].adapter)
    assert_states_close(*ends)
    assert [kept.get("keep_graph", False) for kept in shared] == [True, False]


def test_the_sum_of_both_losses_has_the_gradient_of_a_cross_entropy_with_the_frozen_probabilities() -> None:
    """What FLiP runs as ProGrad."""
    images, frozen = unit([1.0, 0.2], [0.1, 1.0], [5.0, 1.0]), unit([1.0, 0.0], [0.0, 1.0])
    classes = unit([1.0, 0.4], [0.3, 1.0]).unsqueeze(0).requires_grad_()
    seen = StepView(images.unsqueeze(0), classes, SCALE, BATCH, images.unsqueeze(0), frozen)
    (found,) = torch.autograd.grad(Distillation(weight=1.0, temperature=1.0).loss(seen).sum(), classes)
    teacher = (SCALE * images[:2] @ frozen.T).softmax(dim=-1)
    loss = F.cross_entropy(SCALE * images[:2] @ classes[0].T, teacher)
    torch.testing.assert_close(found, torch.autograd.grad(loss, classes)[0])


def test_the_papers_weight_of_kgcoop_is_sixteen() -> None:
    """Its squared distances times 8 are our 1 - cos times 16."""
    images, frozen = unit([1.0, 0.0]), unit([1.0, 0.0], [0.0, 1.0])
    classes = unit([1.0, 0.4], [0.3, -1.0])
    seen = StepView(images.unsqueeze(0), classes.unsqueeze(0), SCALE, BATCH, images.unsqueeze(0), frozen)
    paper = 8 * (classes - frozen).square().sum(dim=-1).mean()
    assert Anchor(weight=16.0).loss(seen).tolist() == pytest.approx([float(paper)])


def test_prograd_is_refused_with_privacy_of_examples(raw_config: dict[str, Any]) -> None:
    raw = raw_config | {"local": {"penalty": "prograd", "privacy": {}}}
    with pytest.raises(OptionError, match=r"local\.penalty: expected none, anchor or distillation .* prograd couples"):
        check_experiment(parse_config(raw))


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

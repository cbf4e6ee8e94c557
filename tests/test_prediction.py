"""How classes are told: fused with the frozen model or not, with the patches' help or not, and on which classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, LABELS, PIXELS, TOLERANCE, adapt, load_clip, random_adapters, write_model
from hypothesis import given
from hypothesis import strategies as st

from flora.clip.adapters.base import Adapter
from flora.clip.adapters.features import ClipAdapter
from flora.clip.adapters.lora import Lora
from flora.clip.prediction import EntropyFusion, FixedFusion, NoFusion, PatchAttention, Prediction
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.evaluation.accuracy import evaluate, own_accuracies, unheld_accuracies
from flora.experiment.build import build_experiment
from flora.features.features import StoredFeatures
from flora.simulate import simulate

CPU = torch.device("cpu")
ADAPTERS = [Lora(rank=2), Lora(rank=2, towers=("text", "vision")), ClipAdapter()]


def features_of(model: AdaptedClip) -> StoredFeatures:
    return StoredFeatures(model.vision.stem(PIXELS), torch.arange(len(LABELS)), LABELS, np.arange(len(LABELS)))


def with_patches(path: str, adapter: Adapter) -> AdaptedClip:
    clip = dataclasses.replace(load_clip(path), reads_patches=True)
    return AdaptedClip(clip, adapter.attach(clip), class_names=CLASSES, templates=("a photo of a {}.",))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fixed_weight_of_0_or_1_is_one_of_the_models(tiny_model: str, adapter: Adapter) -> None:
    model = adapt(tiny_model, adapter)
    features, adapters = features_of(model), random_adapters(model, 2)
    plain = evaluate(model, adapters, features, batch_size=5)
    frozen = evaluate(model, None, features, batch_size=5)[0]
    for weight, expected in ((0.0, plain), (1.0, [frozen, frozen])):
        found = evaluate(model, adapters, features, batch_size=5, prediction=Prediction(FixedFusion(weight=weight)))
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one.losses - other.losses).max() < TOLERANCE
            assert np.array_equal(one.predicted, other.predicted)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("fusion", [FixedFusion(weight=0.3), EntropyFusion(temperature=0.5)])
def test_fused_losses_are_those_of_a_plain_loop(tiny_model: str, adapter: Adapter, fusion: Any) -> None:
    model = adapt(tiny_model, adapter)
    features, adapters = features_of(model), random_adapters(model, 2)
    found = evaluate(model, adapters, features, batch_size=7, prediction=Prediction(fusion))
    scale = model.logit_scale()
    with torch.no_grad():
        before = scale * model.image_features(features.stem, 1)[0] @ model.class_features(1)[0].T
        for client in range(2):
            with model.adapter.bind({name: each[client : client + 1] for name, each in adapters.items()}):
                after = scale * model.image_features(features.stem, 1)[0] @ model.class_features(1)[0].T
            for row in range(len(LABELS)):
                if isinstance(fusion, EntropyFusion):
                    p, q = after[row].softmax(0), before[row].softmax(0)
                    gap = float((q * q.log()).sum() - (p * p.log()).sum())  # H(adapted) - H(frozen)
                    weight = 1 / (1 + math.exp(-gap / fusion.temperature))
                else:
                    weight = fusion.weight
                fused = (1 - weight) * after[row] + weight * before[row]
                loss = float(F.cross_entropy(fused, LABELS[row]))
                assert found[client].losses[row] == pytest.approx(loss, abs=TOLERANCE)


def test_whoever_is_surer_weighs_more() -> None:
    sure, unsure = torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[0.1, 0.0]]])
    fusion = EntropyFusion(temperature=0.1)
    assert float(fusion.frozen_weight(unsure, sure)) > 0.99
    assert float(fusion.frozen_weight(sure, unsure)) < 0.01
    assert float(fusion.frozen_weight(sure, sure)) == pytest.approx(0.5)


def test_patches_by_hand() -> None:
    """Cosines 1, 0, -1 and 0.6: a class that leaves out half of them adds the two highest, of four."""
    patches = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]]])
    classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = PatchAttention(alpha=2.0, dropped=0.5).cosines(patches, classes)
    assert found.flatten().tolist() == pytest.approx([2 * 1.6 / 4, 2 * 1.8 / 4])
    every = PatchAttention(alpha=1.0, dropped=0.0).cosines(patches, classes)
    assert every.flatten().tolist() == pytest.approx([0.6 / 4, 1.8 / 4])


@given(percent=st.integers(0, 99), number=st.integers(1, 100))
def test_a_class_leaves_out_whole_patches_rounded_down(percent: int, number: int) -> None:
    """Of 100 patches 29 % are 29, though 0.29 * 100 is a little less."""
    patches, classes = torch.ones(1, 1, number, 1), torch.ones(1, 1, 1)
    kept = float(PatchAttention(alpha=1.0, dropped=percent / 100).cosines(patches, classes)) * number
    assert 1 <= round(kept) == number - percent * number // 100


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alpha_0_is_exactly_the_plain_logits(tiny_model: str, adapter: Adapter) -> None:
    model = with_patches(tiny_model, adapter)
    features, adapters = features_of(model), random_adapters(model, 2)
    plain = evaluate(model, adapters, features, batch_size=6)
    nothing = Prediction(patches=PatchAttention(alpha=0.0))
    found = evaluate(model, adapters, features, batch_size=6, prediction=nothing)
    assert all(np.array_equal(one.losses, other.losses) for one, other in zip(plain, found, strict=True))
    without = adapt(tiny_model, adapter)
    usual = evaluate(without, adapters, features_of(without), batch_size=6)
    assert all(np.abs(one.losses - other.losses).max() < TOLERANCE for one, other in zip(plain, usual, strict=True))


def test_patches_change_the_answers_as_a_plain_loop_says(tiny_model: str) -> None:
    model = with_patches(tiny_model, Lora(rank=2, towers=("text", "vision")))
    features, adapters = features_of(model), random_adapters(model, 1)
    how = PatchAttention(alpha=0.7, dropped=0.5)
    (found,) = evaluate(model, adapters, features, batch_size=6, prediction=Prediction(patches=how))
    with model.adapter.bind(adapters), torch.no_grad():
        tokens = F.normalize(model.vision.suffix(features.stem), dim=-1)
        classes = model.class_features(1)[0]
    for row in range(len(LABELS)):
        cosines = tokens[row, 0] @ classes.T
        for place in range(len(CLASSES)):
            similar = sorted((tokens[row, 1:] @ classes[place]).tolist(), reverse=True)
            cosines[place] += 0.7 * sum(similar[: len(similar) - len(similar) // 2]) / len(similar)
        loss = float(F.cross_entropy(model.logit_scale() * cosines, LABELS[row]))
        assert found.losses[row] == pytest.approx(loss, abs=TOLERANCE)


def test_own_examples_are_told_in_the_same_way(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    features, adapters, how = (
        features_of(model),
        random_adapters(model, 2, scale=3.0),
        Prediction(FixedFusion(weight=1.0)),
    )
    examples = [np.arange(0, 15), np.arange(15, 33)]
    plain = own_accuracies(model, adapters, features, examples, batch_size=9)
    found = own_accuracies(model, adapters, features, examples, batch_size=9, prediction=how)
    whole = evaluate(model, adapters, features, batch_size=9, prediction=how)
    assert found.tolist() == pytest.approx(
        [each.correct[own].mean() for each, own in zip(whole, examples, strict=True)]
    )
    assert found.tolist() != plain.tolist()


def test_classes_that_a_client_never_held_by_hand() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    correct = np.array([[True, False, True, True, True, False]])
    holds = np.array([[True, False, False], [True, True, False], [True, True, True]])
    found = unheld_accuracies(correct, labels, holds)
    assert found[:2].tolist() == pytest.approx([3 / 4, 2 / 3]) and np.isnan(found[2])
    own = np.array([correct[0], ~correct[0], correct[0]])
    assert unheld_accuracies(own, labels, holds)[1] == pytest.approx(1 / 3)


SIX = {"name": "patterns", "num_classes": 6, "num_train": 120, "num_test": 60}
RUN: dict[str, Any] = {"rounds": 2, "partition": {"name": "pathological", "classes_per_client": 1}}


def test_images_without_a_label_are_held_too(raw_config: dict[str, Any]) -> None:
    """With one class at each client, whatever its labels."""
    config = {**raw_config, **RUN, "clients": {"number": 3, "labelled_fraction": 0.1}}
    experiment = build_experiment(parse_config(config))
    assert experiment.held_classes.sum(axis=1).tolist() == [1, 1, 1]
    mixed = build_experiment(parse_config({**config, "partition": "iid"}))
    labels = mixed.federation.engine.features.labels.numpy()
    for row, client in zip(mixed.held_classes, mixed.federation.clients, strict=True):
        assert set(np.flatnonzero(row)) == set(labels[[*client.train, *client.unlabelled]])


def test_a_run_reports_classes_that_nobody_here_held(raw_config: dict[str, Any]) -> None:
    config = {**raw_config, **RUN, "personal": {"name": "fine_tuning"}, "evaluation": {"num_local_only": 3}}
    result = simulate(parse_config(config))
    for name in ("unheld_accuracy", "local_only_unheld_accuracy", "personal_unheld_accuracy"):
        assert 0 <= getattr(result.summary, name) <= 1
    everywhere = simulate(parse_config({**raw_config, "partition": "iid", "name": "iid"}))
    assert everywhere.summary.unheld_accuracy is None


def test_fusion_changes_answers_and_no_adapter(raw_config: dict[str, Any]) -> None:
    backbone = {**raw_config.get("backbone", {}), "precision": "fp64"}
    base = {**raw_config, **RUN, "backbone": backbone, "split": "base_to_new", "data": SIX}
    runs = [
        simulate(parse_config({**base, "name": f"run-{place}", "evaluation": evaluation}))
        for place, evaluation in enumerate(
            [{}, {"fusion": {"name": "fixed", "weight": 1}}, {"fusion": "entropy", "patches": {"alpha": 0.4}}]
        )
    ]
    for other in runs[1:]:
        for name, tensor in runs[0].adapter.items():
            assert torch.allclose(tensor, other.adapter[name], rtol=0, atol=TOLERANCE)
    assert runs[1].summary.last_accuracy == runs[1].summary.zero_shot_accuracy
    assert runs[1].summary.new_accuracy == runs[1].summary.zero_shot_new_accuracy
    assert NoFusion().is_idle


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"fusion": {"name": "fixed", "weight": 1.5}}, "evaluation.fusion.weight: expected .* at most 1"),
        ({"patches": {"dropped": 1}}, "evaluation.patches.dropped: expected .* below 1"),
        ({"fusion": "entropie"}, "evaluation.fusion.name: 'entropie' is not known; did you mean 'entropy'"),
    ],
)
def test_wrong_options_are_one_line(raw_config: dict[str, Any], evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({**raw_config, "evaluation": evaluation})


def test_a_tower_that_averages_its_patches_has_none_to_attend_to(raw_config: dict[str, Any], tmp_path: Any) -> None:
    path = write_model(tmp_path / "avg.json", vision={"pool_type": "avg"})
    config = parse_config(
        {**raw_config, "backbone": {"model": path, "weights": "random"}, "evaluation": {"patches": {"alpha": 1}}}
    )
    with pytest.raises(UserError, match="features of patches need a vision tower that is read at its class token"):
        simulate(config)

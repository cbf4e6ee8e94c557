"""Images without labels: who has which, what they are labelled, what is learned from them, and what it says."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, TOLERANCE, adapt, assert_states_close, start
from PIL import Image

from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.client.self_training import Dpo, Likelihood, Preference, PseudoLabels, SelfTraining
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.dual_lora import DualLora
from flora.clip.adapters.lora import Lora
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.errors import UserError
from flora.core.progress import Tell
from flora.core.rng import Rng
from flora.core.states import ClientData
from flora.data.augmentation import Augmentation, Corrupt, CropFlip, NoAugmentation
from flora.data.batching import BatchSizes
from flora.data.datasets.base import ImageArrays, Split
from flora.data.views import views_of
from flora.engine.engine import Engine
from flora.engine.training import _Batches
from flora.experiment.clients import hide_labels
from flora.features.cache import CacheOptions
from flora.features.features import Features, StoredFeatures
from flora.features.live import LiveFeatures
from flora.features.loading import load_features
from flora.features.views import ViewFeatures
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.federated.synchronous import Synchronous
from flora.runs.loop import resume
from flora.simulate import simulate

CPU = torch.device("cpu")
NUM = 24
PIXELS = np.random.default_rng(0).integers(0, 255, (NUM, 20, 20, 3), dtype=np.uint8)
SPLIT = Split(ImageArrays(PIXELS, "noise"), np.arange(NUM), np.arange(NUM) % len(CLASSES))
# Three clients with 4, 3 and 2 labelled images, and 7, 0 and 8 without a label.
CLIENTS = [
    ClientData(np.arange(0, 4), np.empty(0, np.int64), unlabelled=np.arange(4, 11)),
    ClientData(np.arange(11, 14), np.empty(0, np.int64)),
    ClientData(np.arange(14, 16), np.empty(0, np.int64), unlabelled=np.arange(16, 24)),
]
WEAK, STRONG = CropFlip(min_area=0.9), Corrupt(first=CropFlip())


def stored(model: AdaptedClip, split: Split) -> StoredFeatures:
    quiet = Tell(lambda title, total: lambda done: None, lambda line: None)
    (features,), problems = load_features(
        [split], model, cache=CacheOptions(folder=None), skip_unreadable=False, tell=quiet
    )
    assert not problems
    return features


def kept_views(model: AdaptedClip, name: str, augmentation: Augmentation, number: int) -> ViewFeatures:
    split = views_of(SPLIT, augmentation, number, model.clip.architecture.image_size, Rng(5).child(name))
    return ViewFeatures(stored(model, SPLIT), stored(model, split), number)


def live_views(model: AdaptedClip, augmentation: Augmentation) -> LiveFeatures:
    return LiveFeatures(SPLIT, model, augmentation, torch.from_numpy(SPLIT.labels), np.arange(NUM))


def federation(
    model: AdaptedClip, own: SelfTraining | None, *, per_block: int = 3, views: int | None = 2, **changes: Any
) -> Federation:
    features = stored(model, SPLIT)
    made: dict[str, Features] = {
        name: live_views(model, each) if views is None else kept_views(model, name, each, views)
        for name, each in {"weak": WEAK, "strong": STRONG}.items()
    }
    options = {"learning_rate": 0.05, "batch_size": 2, "epochs": 2, "optimizer": Sgd(), **changes}
    return Federation(
        engine=Engine(model, dataclasses.replace(features, views=made), per_block),
        clients=CLIENTS,
        participation=Participation(Uniform(), np.array([4, 3, 2])),
        local=LocalTraining(self_training=own, **options),
        schedule=Synchronous(),
        num_rounds=2,
        rng=Rng(7),
    )


def test_labels_are_hidden_from_as_many_as_asked() -> None:
    whole = ClientData(np.arange(10, 30), np.arange(3))
    own = hide_labels(whole, 0.25, Rng(0))
    assert len(own.train) == 5 and len(own.unlabelled) == 15 and np.array_equal(own.held_out, whole.held_out)
    assert sorted([*own.train, *own.unlabelled]) == list(whole.train)
    assert list(own.train) != list(range(10, 15)) and list(own.train) != list(hide_labels(whole, 0.25, Rng(1)).train)
    assert len(hide_labels(whole, 1e-9, Rng(0)).train) == 1
    assert len(hide_labels(ClientData(np.arange(1), np.arange(0)), 0.1, Rng(0)).unlabelled) == 0


def test_a_label_needs_its_probability() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]]).log()
    labels = SelfTraining(threshold=0.7).label(np.array([3, 5, 9]), np.array([0, 0, 1]), logits.double(), Rng(0))
    assert labels.labels.tolist() == [0, 1, 0]
    assert labels.is_sure.tolist() == [True, False, False]
    sure = SelfTraining(threshold=0.55).label(np.array([3, 5, 9]), np.array([0, 0, 1]), logits.double(), Rng(0))
    assert sure.is_sure.tolist() == [True, True, False]
    assert sure.report == {"num_unlabelled": 3, "num_sure": 2, "num_right": 1}


def test_random_labels_are_as_sure_and_nobodys() -> None:
    logits = torch.zeros(500, 4)
    logits[:, 2] = 9.0
    own = SelfTraining(threshold=0.5, labels="random").label(np.arange(500), np.full(500, 2), logits, Rng(0))
    assert own.is_sure.all()
    assert np.bincount(own.labels).min() > 80


def test_each_pass_over_images_without_labels_sees_all_of_them() -> None:
    labels = PseudoLabels(np.array([5, 8, 9]), np.array([0, 1, 2]), np.array([True, False, True]), np.zeros(3, int))
    drawn = labels.draw(BatchSizes(2, 2, 4), Rng(0))
    seen = drawn["unlabelled"][drawn["unlabelled_mask"]]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [5, 8, 9]
    pairs = zip(drawn["unlabelled"].flat, drawn["pseudo_labels"].flat, strict=True)
    assert {int(place): int(label) for place, label in pairs} == {5: 0, 8: 1, 9: 2}
    assert not drawn["pseudo_mask"][drawn["unlabelled"] == 8].any()


def test_a_damaged_image_is_damaged_as_asked() -> None:
    image = Image.fromarray(np.full((60, 60, 3), 200, np.uint8))
    dropped = np.asarray(Corrupt(blur=0, colour=0, dropped=0.25, grid=6).apply(image, (16, 16), Rng(0)))
    assert (dropped == 128).all(axis=-1).mean() == pytest.approx(0.25)
    assert ((dropped == 128) | (dropped == 200)).all()
    same = Corrupt(blur=0, colour=0, dropped=0).apply(image, (16, 16), Rng(0))
    assert np.array_equal(np.asarray(same), np.asarray(image))
    noise = Image.fromarray(PIXELS[0])
    blurred = np.asarray(Corrupt(blur=0.2, colour=0, dropped=0).apply(noise, (16, 16), Rng(1)), dtype=float)
    assert blurred.std() < PIXELS[0].std()


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_kept_views_are_those_that_would_be_computed(tiny_model: str, name: str) -> None:
    """Each of V views of an image has the features that the image would have, changed as that view's stream says."""
    model = adapt(tiny_model, Lora(rank=2))
    augmentation = {"weak": WEAK, "strong": STRONG}[name]
    features = kept_views(model, name, augmentation, 3)
    size = model.clip.architecture.image_size
    for image in (0, 7):
        for view in range(3):
            changed = augmentation.apply(Image.fromarray(PIXELS[image]), size, Rng(5).child(name).child(image, view))
            expected = model.vision.stem(model.clip.preprocess(changed).unsqueeze(0))[0]
            found = features.stored_views.take(torch.tensor([image * 3 + view]), CPU)[0]
            assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_which_view_is_seen_is_the_clients_own_draw(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    features = kept_views(model, "weak", WEAK, 4)
    indices = torch.arange(6)
    together = features.take(indices, CPU, [Rng(1), Rng(2)])
    alone = [features.take(indices[:3], CPU, [Rng(1)]), features.take(indices[3:], CPU, [Rng(2)])]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(features.take(indices, CPU), features.images.take(indices, CPU))
    # A longer row begins with the same draws: who is padded sees what it would see alone.
    assert torch.equal(features.take(torch.arange(5), CPU, [Rng(1)])[:3], alone[0])


PREFERENCES = [Likelihood(), Dpo(beta=0.5, likelihood=0.3)]
ADAPTERS = [Lora(rank=2), Lora(rank=2, towers=("text", "vision")), DualLora(rank=2)]


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("views", [None, 2])
def test_the_number_of_clients_in_a_step_changes_nothing(
    tiny_model: str, preference: Preference, adapter: Adapter, views: int | None
) -> None:
    own, after = SelfTraining(threshold=0.34, batch_size=3, preference=preference), []
    for per_block in (1, 2, 3):
        model = adapt(tiny_model, adapter)
        state, result = run_round(federation(model, own, per_block=per_block, views=views), start(model))
        after.append((state.adapter, result.client_pseudo_labels))
    assert after[0][1] == after[1][1] == after[2][1]
    assert_states_close(after[0][0], after[1][0])
    assert_states_close(after[0][0], after[2][0])


@pytest.mark.parametrize("preference", PREFERENCES)
def test_a_round_equals_a_plain_loop(tiny_model: str, preference: Preference) -> None:
    """One client, one step of all its images: the loss written out, with the gradient of plain autograd."""
    own = SelfTraining(weight=0.7, threshold=0.334, preference=preference)
    model = adapt(tiny_model, Lora(rank=2, towers=("text", "vision")))
    parts, state = federation(model, own, batch_size=50, epochs=1), start(model)
    _, result = run_round(parts, state)
    assert result.client_pseudo_labels is not None
    task = parts.task(2, state.adapter, parts.setup(1, state.adapter), parts.rng.child("round", 1))
    (found,) = parts.engine.train([task])
    client, features = CLIENTS[2], parts.engine.features
    places = torch.from_numpy(client.unlabelled)
    drawn = PseudoLabels(client.unlabelled, np.zeros(8, int), np.ones(8, bool), np.zeros(8, int)).draw(
        BatchSizes(8, 8, 1), task.rng
    )["unlabelled"][0]
    scale = model.logit_scale()
    with model.adapter.bind(tree.expand(state.adapter, 1)), torch.no_grad():
        weak = features.views["weak"].take(places, CPU, [task.rng.child("weak", 0)])
        chances = (scale * model.image_features(weak, 1)[0] @ model.class_features(1)[0].T).softmax(dim=-1)
    sure, label = chances.max(dim=-1)
    by_place = dict(zip(places.tolist(), zip(sure.tolist(), label.tolist(), strict=True), strict=True))
    strong = features.views["strong"].take(torch.from_numpy(drawn), CPU, [task.rng.child("unlabelled views", 0)])
    clean = features.take(torch.from_numpy(drawn), CPU)
    with torch.no_grad():
        before = model.class_features(1)[0]
        s0 = [scale * model.image_features(each, 1)[0] @ before.T for each in (clean, strong)]
    leaf = tree.flatten(state.adapter).clone().requires_grad_()
    with model.adapter.bind({name: each.unsqueeze(0) for name, each in tree.unflatten(leaf, state.adapter).items()}):
        classes = model.class_features(1)[0]
        labelled = features.take(torch.from_numpy(client.train), CPU)
        logits = scale * model.image_features(labelled, 1)[0] @ classes.T
        loss = F.cross_entropy(logits, features.labels[client.train])
        s = [scale * model.image_features(each, 1)[0] @ classes.T for each in (clean, strong)]
    for row, place in enumerate(drawn.tolist()):
        chance, y = by_place[place]
        if chance < 0.334:
            continue
        if isinstance(preference, Dpo):
            gain = [s[which][row, y] - s0[which][row, y] for which in (0, 1)]
            term = -F.logsigmoid(preference.beta * (gain[0] - gain[1]))
            term = term - preference.likelihood * s[0][row].log_softmax(dim=-1)[y]
        else:
            term = -s[1][row].log_softmax(dim=-1)[y]
        loss = loss + 0.7 * term / len(drawn)
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = tree.unflatten(tree.flatten(state.adapter) - 0.05 * gradient, state.adapter)
    assert_states_close(found.adapter, expected)
    assert found.loss == pytest.approx(float(loss.detach()), abs=TOLERANCE)


def test_weight_0_is_supervised_training_bit_for_bit(tiny_model: str) -> None:
    after = []
    for own in (None, SelfTraining(weight=0.0)):
        model = adapt(tiny_model, Lora(rank=2))
        state, result = run_round(federation(model, own), start(model))
        assert result.pseudo_label_coverage is None
        after.append(state.adapter)
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_who_has_no_image_without_a_label_trains_as_ever(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    ends = []
    for own in (None, SelfTraining(threshold=0.0)):
        parts = federation(model, own)
        state = start(model)
        (result,) = parts.engine.train([parts.task(1, state.adapter, parts.setup(1, state.adapter), Rng(0))])
        ends.append(result.adapter)
    assert_states_close(ends[0], ends[1])


RUN: dict[str, Any] = {
    "data": {"name": "patterns", "num_train": 60},
    "rounds": 3,
    "clients": {"number": 3, "labelled_fraction": 0.3},
    "local": {"batch_size": 4, "self_training": {"threshold": 0.34, "batch_size": 4}},
}


def raw(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, **RUN, **changes}


@pytest.mark.parametrize("cache", [{}, {"views": 2}])
def test_a_run_reports_what_its_labels_were_worth(
    raw_config: dict[str, Any], cache: dict[str, Any], tmp_path: Path
) -> None:
    result = simulate(parse_config(raw(raw_config, cache={"folder": str(tmp_path / "cache"), **cache})))
    record = result.records[-1]
    counts = record.client_pseudo_labels
    assert set(counts) == {"0", "1", "2"}
    number, sure, right = (sum(each) for each in zip(*counts.values(), strict=True))
    assert record.pseudo_label_coverage == sure / number
    assert record.pseudo_label_precision == (right / sure if sure else None)
    header, *rows = (result.directory / "clients.csv").read_text().splitlines()
    assert {"num_unlabelled", "pseudo_label_coverage", "pseudo_label_precision"} <= set(header.split(","))
    assert sum(int(row.split(",")[header.split(",").index("num_unlabelled")]) for row in rows) == number


def test_the_inventory_says_whose_images_have_no_label(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw(raw_config)))
    with (result.directory / "examples.csv").open() as file:
        rows = list(csv.DictReader(file))
    clients = json.loads((result.directory / "partition.json").read_text())["clients"]
    assert not any(row["split"] == "unused" for row in rows)
    for client in clients:
        mine = [row["split"] for row in rows if row["client"] == str(client["client"])]
        assert mine.count("unlabelled") == client["num_unlabelled"] > 0
        assert mine.count("train") == client["num_train"]


def test_each_step_sees_views_of_its_own(tiny_model: str) -> None:
    """The same image in two steps: two looks at it, not one."""
    model = adapt(tiny_model, Lora(rank=2))
    parts, state = federation(model, SelfTraining(threshold=0.0), batch_size=50, epochs=2), start(model)
    setup = parts.setup(1, state.adapter)
    block = parts.engine._laid_out([parts.task(2, state.adapter, setup, Rng(0))])
    batches = _Batches(model, parts.engine.features, block, None, in_batch=False)
    looks = [batches.of_step(step, 1).tensors["stem of strong"] for step in range(2)]
    places = [block.extra["unlabelled"][step, 0] for step in range(2)]
    order = [each.argsort() for each in places]
    assert torch.equal(places[0][order[0]], places[1][order[1]])
    assert not torch.equal(looks[0][order[0]], looks[1][order[1]])


def test_a_stopped_run_goes_on_as_if_it_had_not(raw_config: dict[str, Any], tmp_path: Path) -> None:
    whole = simulate(parse_config(raw(raw_config, output=str(tmp_path / "whole"), cache={"views": 2})))
    short = simulate(parse_config(raw(raw_config, output=str(tmp_path / "cut"), rounds=1, cache={"views": 2})))
    with pytest.raises(UserError, match=r"cache\.views"):
        resume(short.directory, ["rounds=3", "cache.views=3"])
    later = resume(short.directory, ["rounds=3"])
    assert all(torch.equal(whole.adapter[name], later.adapter[name]) for name in whole.adapter)
    assert [each.client_pseudo_labels for each in whole.records] == [
        each.client_pseudo_labels for each in later.records
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": {"labelled_fraction": 1.0}}, "local.self_training: there are no images without a label"),
        ({"local": {"self_training": {"threshold": 1.1}}}, "local.self_training.threshold: expected .* at most 1"),
        ({"clients": {"labelled_fraction": 0}}, "clients.labelled_fraction: expected .* above 0"),
        (
            {"local": {"self_training": {"batch_size": 500}}},
            "local.self_training.batch_size: expected at most 1., the most images without a label that a client has",
        ),
        ({"clients": {"number": 3, "labelled_fraction": 0.99}}, "no client has an image without a label, with 0.99"),
        ({"cache": {"views": 2, "enabled": False}}, "cache.views: expected none"),
        ({"cache": {"views": 2}, "local": {}}, "cache.views: expected none: no image is changed at random"),
        ({"local": {"self_training": {"preference": "dpa"}}}, "local.self_training.preference.name: .*dpo"),
    ],
)
def test_what_can_not_be_is_said_in_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def run() -> None:
        simulate(parse_config(raw(raw_config, output=str(tmp_path), **changes)))

    with pytest.raises(UserError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_augmented_training_images_can_be_kept_in_views(raw_config: dict[str, Any], tmp_path: Path) -> None:
    config = {
        **raw_config,
        "rounds": 1,
        "local": {"augmentation": "crop_flip"},
        "cache": {"views": 3, "folder": str(tmp_path / "cache")},
    }
    lines: list[str] = []
    first = simulate(parse_config(config), echo=lines.append)
    assert any("3 of each image are kept" in line for line in lines)
    lines.clear()
    again = simulate(parse_config({**config, "name": "again"}), echo=lines.append)
    assert sum("read from the cache" in line for line in lines) == 3  # of training images, of test images, of views
    assert all(torch.equal(first.adapter[name], again.adapter[name]) for name in first.adapter)


def test_an_augmentation_that_changes_nothing_is_no_view() -> None:
    assert not NoAugmentation().changes_images and Corrupt().changes_images

"""IFCA: the server keeps several models, and each client trains the one that fits its examples best."""

from __future__ import annotations

import csv
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    LABELS,
    LOCAL,
    SIZES,
    TOLERANCE,
    adapt,
    assert_states_close,
    federation,
    random_pixels,
    rounds,
    variant,
)

from flora.audit.subject import audited
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.heads import LinearHead
from flora.clip.adapters.lora import Lora
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.clusters import clusters_of, in_cluster
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.core.tree import State
from flora.data.batching import BatchSizes, client_batches
from flora.evaluation.collapse import effective_rank, over_adapters
from flora.export import merged_model
from flora.features.features import StoredFeatures
from flora.federated.clusters import nearest_clusters
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.runs.finished import read_run
from flora.server.aggregators import Median
from flora.server.optimizers import ServerSgd
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.clustered import Ifca
from flora.simulate import resume, simulate

SMALL = dataclasses.replace(LOCAL, learning_rate=0.3)


def loss_of(parts: Federation, adapter: State, batch: torch.Tensor) -> torch.Tensor:
    """One client's mean loss of some examples with an adapter."""
    model, features = parts.engine.model, parts.engine.features
    stem = features.take(batch, torch.device("cpu"))
    with model.adapter.bind({name: tensor.unsqueeze(0) for name, tensor in adapter.items()}):
        logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
    return F.cross_entropy(logits, features.labels[batch])


def plain_training(parts: Federation, start: State, client: int, rng: Rng) -> State:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=parts.local.learning_rate)
    sizes = BatchSizes(4, 4, -(-SIZES[client] // 4))
    for batch, real in zip(*client_batches(parts.clients[client].train, rng, sizes), strict=True):
        optimizer.zero_grad()
        loss_of(parts, leaves, batch[real]).backward()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def plain_choice(parts: Federation, models: list[State], client: int) -> int:
    every = torch.from_numpy(parts.clients[client].train)
    with torch.no_grad():
        return int(np.argmin([float(loss_of(parts, model, every)) for model in models]))


def of_two_kinds(parts: Federation) -> Federation:
    """The same clients, two of which, 1 and 3, call every class by the next one's name."""
    labels = LABELS.clone()
    for client in (1, 3):
        places = parts.clients[client].train
        labels[places] = (labels[places] + 1) % len(CLASSES)
    return variant(parts, features=parts.engine.features.with_labels(labels))


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize("adapter", [Lora(rank=2), LinearHead()], ids=["lora", "head"])
def test_ifca_as_in_a_plain_loop(tiny_model: str, adapter: Adapter, per_block: int) -> None:
    """Algorithm 1 with model averaging, one client at a time: the first round by chance, then by the lowest loss."""
    model = adapt(tiny_model, adapter)
    parts = of_two_kinds(federation(model, SMALL, strategy=Ifca(clusters=2), cohort=4, per_block=per_block))
    states, results = rounds(parts, 4)
    models = clusters_of(states[0].adapter)
    assert len(models) == 2 and all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    taken: list[int] = []
    for round in (1, 2, 3, 4):
        rng = parts.rng.child("round", round)
        cohort = parts.participation.sampler.sample(parts.participation.sizes, 4, rng.child("cohort")).tolist()
        if round == 1:
            choice = (rng.child("clusters").numpy().permutation(4) % 2).tolist()
        else:
            choice = [plain_choice(parts, models, client) for client in cohort]
        ends = [
            plain_training(parts, models[cluster], client, rng.child("client", client))
            for client, cluster in zip(cohort, choice, strict=True)
        ]
        for cluster in {*choice}:
            rows = [row for row, each in enumerate(choice) if each == cluster]
            models[cluster] = tree.weighted_mean([ends[row] for row in rows], [SIZES[cohort[row]] for row in rows])
        for ours, expected in zip(clusters_of(states[round].adapter), models, strict=True):
            assert_states_close(ours, expected)
        assert results[round - 1].cluster_sizes == {"0": choice.count(0), "1": choice.count(1)}
        assert results[round - 1].aggregation_error is None
        taken += choice[:] if round > 1 else []
    assert {*taken} == {0, 1}
    nearest = nearest_clusters(parts, states[-1].adapter, range(5))
    assert nearest.tolist() == [plain_choice(parts, models, client) for client in range(5)]


def test_all_models_go_down_and_one_comes_back(tiny_model: str) -> None:
    seen: list[ClientUpdate] = []

    def watch(round: int, update: ClientUpdate) -> ClientUpdate:
        seen.append(update)
        return update

    model = adapt(tiny_model, Lora(rank=2))
    plain, several = (federation(model, SMALL, strategy=strategy) for strategy in (FedAvg(), Ifca(clusters=3)))
    (_, result), (_, other) = (
        run_round(parts, parts.initial_state(model.initial_adapter(Rng(1))))
        for parts in (variant(several, hooks=Hooks(update=watch)), plain)
    )
    assert result.uplink_bytes == other.uplink_bytes
    assert 2.5 * other.downlink_bytes < result.downlink_bytes < 3.5 * other.downlink_bytes
    assert {update.cluster for update in seen} == {0, 1, 2}
    assert all(set(update.delta) == set(model.initial_adapter(Rng(1))) for update in seen)


def test_a_cluster_that_nobody_takes_stays_as_it_is(tiny_model: str) -> None:
    """So does what the server optimizer remembers of it; the aggregator sees each cluster's deltas by themselves."""
    model = adapt(tiny_model, Lora(rank=2))
    parts = federation(
        model, SMALL, strategy=Ifca(clusters=4), cohort=3, aggregator=Median(), optimizer=ServerSgd(momentum=0.5)
    )
    before = parts.initial_state(model.initial_adapter(Rng(1)))
    after, result = run_round(parts, before)
    assert result.cluster_sizes is not None and sorted(result.cluster_sizes.values()) == [0, 1, 1, 1]
    for cluster, (old, new) in enumerate(zip(*map(clusters_of, (before.adapter, after.adapter)), strict=True)):
        stays = result.cluster_sizes[str(cluster)] == 0
        assert stays == all(torch.equal(old[name], new[name]) for name in old)
        momenta = [after.optimizer[f"momentum.{name}"] for name in in_cluster(old, cluster)]
        assert stays == all(not tensor.any() for tensor in momenta)


def test_of_models_that_are_the_same_the_first_is_taken(tiny_model: str) -> None:
    parts = federation(adapt(tiny_model, Lora(rank=2)), SMALL, strategy=Ifca(clusters=3), per_block=5)
    state = parts.initial_state(parts.engine.model.initial_adapter(Rng(1)))
    assert nearest_clusters(parts, state.adapter, range(5)).tolist() == [0] * 5
    assert nearest_clusters(parts, state.adapter, []).tolist() == []


def test_clients_whose_labels_mean_other_things_keep_to_models_of_their_own(tiny_model: str) -> None:
    """From models of which each is better for some, as the paper's theorems assume them."""
    model = adapt(tiny_model, LinearHead())
    pixels = random_pixels(len(CLASSES), seed=5)[LABELS] + 0.1 * random_pixels(len(LABELS))
    parts = federation(model, dataclasses.replace(LOCAL, learning_rate=0.03, epochs=5))
    every = np.arange(len(LABELS))
    features = StoredFeatures(model.vision.stem(pixels), torch.from_numpy(every), LABELS, every)
    alike = variant(parts, features=features)
    *_, begun = rounds(alike, 5)[0]
    several = of_two_kinds(variant(alike, strategy=Ifca(clusters=2)))
    other = {name: tensor.roll(1, dims=0) for name, tensor in begun.adapter.items()}
    state = dataclasses.replace(several.initial_state(begun.adapter), round=1)
    state = dataclasses.replace(state, adapter={**state.adapter, **in_cluster(other, 1)})
    for _ in range(3):
        assert nearest_clusters(several, state.adapter, range(5)).tolist() == [0, 1, 0, 1, 0]
        state, result = run_round(several, state)
        assert result.cluster_sizes == {"0": 3, "1": 2}


def test_a_run_says_how_good_each_clients_model_is(raw_config: dict[str, Any]) -> None:
    """And goes on as it would have; the server's accuracy is the mean over its models, each on all test images."""
    raw = {**raw_config, "rounds": 4, "server": {"strategy": {"name": "ifca", "random_rounds": 2}},
           "clients": {"number": 4, "cohort": {"number": 3}, "holdout_fraction": 0.5}}  # fmt: skip
    whole = simulate(parse_config({**raw, "name": "whole"}))
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=4"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    with (rest.directory / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (whole.directory / "clients.csv").read_bytes() == (rest.directory / "clients.csv").read_bytes()
    assert np.mean([float(row["accuracy"]) for row in rows]) == pytest.approx(whole.summary.client_accuracy_mean)
    by_cluster = {row["cluster"]: float(row["test_accuracy"]) for row in rows}
    assert set(by_cluster) <= {"0", "1"}
    if len(by_cluster) == 2:
        assert whole.summary.last_accuracy == pytest.approx(sum(by_cluster.values()) / 2, abs=1e-6)
    last = json.loads((rest.directory / "rounds.jsonl").read_text().splitlines()[-1])
    assert sum(last["cluster_sizes"].values()) == 3
    with pytest.raises(UserError, match="its server keeps 2 models: name a client, for its own"):
        merged_model(rest.directory)
    with pytest.raises(UserError, match="its server keeps several models, and attacks read one"):
        audited(rest.directory, progress=lambda title, total: lambda done: None, log=print)
    initial = adapt(raw["backbone"]["model"], Lora(rank=2), precision="fp32")
    bound = read_run(rest.directory).adapter_of("2", initial.adapter)
    expected = clusters_of(whole.adapter)[int(rows[2]["cluster"])]
    assert bound.keys() == expected.keys() and all(torch.equal(bound[name], expected[name]) for name in bound)
    (rest.directory / "clients.csv").unlink()
    with pytest.raises(UserError, match=r"clients\.csv: missing or damaged"):
        read_run(rest.directory).adapter_of("2", initial.adapter)


def test_more_models_than_clients_of_a_cohort_can_be_saved(raw_config: dict[str, Any]) -> None:
    clients = {"number": 4, "cohort": {"name": "uniform", "number": 1}}
    raw = {**raw_config, "rounds": 2, "clients": clients, "server": {"strategy": {"name": "ifca", "clusters": 4}}}
    whole = simulate(parse_config(raw))
    part = simulate(parse_config({**raw, "name": "part", "rounds": 1}))
    gone_on = resume(part.directory, ["rounds=2"])
    assert all(torch.equal(gone_on.adapter[name], tensor) for name, tensor in whole.adapter.items())


def test_what_is_measured_of_class_features_is_the_mean_over_models() -> None:
    features = np.random.default_rng(0).normal(size=(2, 4, 6))
    one, other = (effective_rank(each) for each in features)
    assert one is not None and other is not None
    assert over_adapters(effective_rank, features) == pytest.approx((one + other) / 2, abs=TOLERANCE)
    assert over_adapters(effective_rank, features[0]) == one
    features[1, 0, 0] = np.nan
    assert over_adapters(effective_rank, features) is None


NO_OTHER = "server.strategy: ifca gives each client one of several models: expected an adapter that keeps nothing, and "
NO_PRIVACY = "server.strategy: ifca can't be used with privacy, local.privacy, server.secure_sum or canaries: "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"personal": "ditto"}, f"{NO_OTHER}personal none"),
        ({"adapter": "dual_lora"}, f"{NO_OTHER}personal none"),
        ({"local": {"optimizer_state": "kept"}},
         "server.strategy: ifca gives a client another model than before: expected no error feedback, "
         "local.optimizer_state fresh, local.correction none or fedprox"),
        ({"privacy": {"name": "central", "clip_norm": 0.1, "noise_multiplier": 0.5}},
         f"{NO_PRIVACY}a cluster's number tells of its client's examples"),
        ({"evaluation": {"held_classes": True}},
         "evaluation.held_classes: expected false, because with ifca the server has no single model"),
        ({"evaluation": {"predictions": 2}},
         "evaluation.predictions: expected 0, because with ifca the server has no single model"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_clusters_is_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, "server": {"strategy": "ifca"}, **changes}))
    assert str(caught.value) == message

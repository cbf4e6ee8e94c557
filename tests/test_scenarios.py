"""What single scenarios measure: clients that never train, and classes that only other clients hold."""

from __future__ import annotations

import csv
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE

from flora.clip.prediction import PLAIN, bound
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.evaluation.accuracy import evaluate, harmonic_mean
from flora.evaluation.held_classes import accuracies_by_holding
from flora.experiment.build import Experiment, build_experiment
from flora.experiment.clients import deal_out
from flora.federated.round import run_round
from flora.runs.loop import RunResult
from flora.runs.measure import measure_clients
from flora.simulate import simulate

UNSEEN = {"clients": {"number": 5, "held_out_fraction": 0.4, "holdout_fraction": 0.5}, "partition": "iid"}


def built(raw: dict[str, Any]) -> Experiment:
    return build_experiment(parse_config(raw))


def rows(result: RunResult) -> list[dict[str, str]]:
    with (result.directory / "clients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_clients_held_out_have_their_share_and_never_take_part(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw_config | UNSEEN))
    assert [record.cohort for record in result.records] == [(), (0, 1, 2), (0, 1, 2)]
    assert (result.summary.num_clients, result.summary.num_unseen) == (3, 2)
    partition = json.loads((result.directory / "partition.json").read_text())
    assert [each["client"] for each in partition["clients"]] == [0, 1, 2]
    assert [each["client"] for each in partition["unseen_clients"]] == [3, 4]
    with (result.directory / "examples.csv").open(newline="") as file:
        splits = {(row["client"], row["split"]) for row in csv.DictReader(file)}
    assert {split for client, split in splits if client == "0"} == {"train", "held_out"}
    assert {split for client, split in splits if client == "4"} == {"unseen_train", "unseen_held_out"}


def test_what_clients_that_never_train_are_given_is_in_records_summary_and_table(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw_config | UNSEEN))
    first, middle, last = (record.metrics for record in result.records)
    assert middle["unseen_accuracy"] is None and first["unseen_tuned_accuracy"] is None
    table = rows(result)
    assert [row["unseen"] for row in table] == ["", "", "", "yes", "yes"]
    assert [row["accuracy"] == "" for row in table] == [False] * 3 + [True] * 2
    for name in ("unseen_accuracy", "unseen_tuned_accuracy"):
        values = [float(row[name]) for row in table if row["unseen"]]
        assert last[name] == pytest.approx(np.mean(values), abs=1e-6)
        assert last[f"{name}_std"] == pytest.approx(np.std(values), abs=1e-6)
        assert result.summary.figures[name] == last[name]
    assert result.summary.figures["zero_shot_unseen_accuracy"] == first["unseen_accuracy"]
    assert "clients not seen" in (result.directory / "log.txt").read_text()


def test_a_client_that_never_trains_fine_tunes_the_servers_adapter_as_any_client_would(
    raw_config: dict[str, Any],
) -> None:
    """The same pass by hand: its task from the server's adapter, and its images one by one."""
    raw = raw_config | UNSEEN | {"backbone": {**raw_config["backbone"], "precision": "fp64"}}
    experiment = built(raw | {"local": {"learning_rate": 0.3, "batch_size": 4}})
    federation, state = experiment.federation, experiment.initial_state()
    for _ in range(2):
        state, _ = run_round(federation, state)
    scenarios = measure_clients(experiment, state).scenarios
    assert scenarios is not None and scenarios.unseen is not None
    model, features = federation.engine.model, federation.engine.features
    local = dataclasses.replace(federation.local, epochs=1)
    setup = federation.setup(state.round, federation.roles.ever_trained(state.adapter), local)
    for place, client in enumerate(experiment.unseen):
        rng = federation.rng.child("unseen").child("personal", state.round)
        task = dataclasses.replace(
            federation.task(0, state.adapter, setup, rng), examples=client.train, rng=rng.child("client", 3 + place)
        )
        (trained,) = federation.engine.train([task])
        assert max((trained.adapter[name] - state.adapter[name]).abs().max() for name in trained.adapter) > TOLERANCE
        for adapter, found in (
            (state.adapter, scenarios.unseen.server[place]),
            ({**state.adapter, **trained.adapter}, scenarios.unseen.tuned[place]),
        ):
            stack = tree.expand(adapter, 1)
            with torch.no_grad():
                with bound(model, stack):
                    classes = model.class_features(1)
                stem = features.take(torch.from_numpy(client.held_out), model.device)
                predicted = PLAIN.logits(model, stack, stem, classes)[0].argmax(dim=-1)
            right = predicted == features.labels[client.held_out]
            assert found == pytest.approx(right.double().mean().item())


def test_who_never_trains_follows_the_seed_and_nobody_elses_share_changes() -> None:
    labels = np.arange(60) % 3
    raw: dict[str, Any] = {"data": "patterns", "partition": "iid", "clients": {"number": 10}}

    def shares(fraction: float, seed: int) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        config = parse_config(raw | {"clients": {"number": 10, "held_out_fraction": fraction}, "seed": seed})
        found = deal_out(config, labels, None, Rng(seed))
        trains, away = ({tuple(each.train) for each in kind} for kind in (found.clients, found.unseen))
        return trains, away

    trains, away = shares(0.3, 1)
    everybody, nobody = shares(0.0, 1)
    assert (len(trains), len(away), nobody) == (7, 3, set())
    assert trains | away == everybody
    assert shares(0.3, 1) == (trains, away) and {len(shares(0.3, seed)[1] & away) for seed in (2, 3)} == {0}
    assert [len(shares(fraction, 1)[1]) for fraction in (0.01, 0.99)] == [1, 9]


def test_who_can_not_be_held_out_is_said(raw_config: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"clients\.held_out_fraction: expected 0 without holdout_fraction"):
        parse_config(raw_config | {"clients": {"held_out_fraction": 0.5, "holdout_fraction": 0.0}})
    with pytest.raises(OptionError, match=r"clients\.held_out_fraction: expected at least two clients, one to train"):
        check_experiment(parse_config(raw_config | {"clients": {"number": 1, "held_out_fraction": 0.5}}))
    with pytest.raises(OptionError, match=r"clients\.held_out_fraction: expected 0, because with clients\.centralized"):
        check_experiment(parse_config(raw_config | {"clients": {"held_out_fraction": 0.5, "centralized": True}}))
    with pytest.raises(OptionError, match=r"clients\.cohort\.number: expected at most the number of clients, 3, got 4"):
        check_experiment(
            parse_config(raw_config | {"clients": {"number": 4, "held_out_fraction": 0.2, "cohort": {"number": 4}}})
        )


HELD = {
    "data": {"name": "patterns", "num_classes": 5},
    "partition": {"name": "pathological", "classes_per_client": 2},
    "evaluation": {"held_classes": True},
}


def by_hand(experiment: Experiment, adapter: tree.State, holds: np.ndarray) -> list[float]:
    """One client's accuracies, image by image: on its classes among these, on the others among those."""
    model, test = experiment.federation.engine.model, experiment.test
    stack = model.adapter.models(tree.expand(adapter, 1))[-1]
    with torch.no_grad():
        with bound(model, stack):
            classes = model.class_features(1)
        logits = PLAIN.logits(model, stack, test.take(torch.arange(len(test)), model.device), classes)[0].numpy()
    found = []
    for part in (np.flatnonzero(holds), np.flatnonzero(~holds)):
        right = [
            part[row[part].argmax()] == label
            for row, label in zip(logits, test.labels.tolist(), strict=True)
            if label in part
        ]
        found.append(float(np.mean(right)))
    return found


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 2}, {"name": "fedpgp", "bottleneck": 2}])
def test_classes_that_a_client_holds_and_those_of_others_are_told_apart_by_themselves(
    raw_config: dict[str, Any], adapter: dict[str, Any]
) -> None:
    precise = {"backbone": {**raw_config["backbone"], "precision": "fp64"}, "adapter": adapter}
    experiment = built(raw_config | HELD | precise | {"local": {"learning_rate": 0.3, "batch_size": 4}})
    federation, state = experiment.federation, experiment.initial_state()
    for _ in range(2):
        state, _ = run_round(federation, state)
    scenarios = measure_clients(experiment, state).scenarios
    assert scenarios is not None and scenarios.by_holding is not None
    for client, holds in enumerate(experiment.held_classes):
        assert holds.sum() == 2
        expected = by_hand(experiment, federation.client_adapter(state, client), holds)
        assert scenarios.by_holding[client].tolist() == pytest.approx(expected)


def test_a_run_reports_both_and_their_harmonic_mean(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw_config | HELD))
    first, middle, last = (record.metrics for record in result.records)
    assert middle["held_class_accuracy"] is None and first["held_class_accuracy"] is not None
    table = rows(result)
    for name in ("held_class_accuracy", "other_class_accuracy"):
        assert last[name] == pytest.approx(np.mean([float(row[name]) for row in table]), abs=1e-6)
        assert result.summary.figures[f"zero_shot_{name}"] == first[name]
    both = last["held_class_accuracy"], last["other_class_accuracy"]
    assert last["held_other_harmonic_mean"] == harmonic_mean(*both)


def test_a_client_that_holds_every_class_has_no_others(raw_config: dict[str, Any]) -> None:
    experiment = built(raw_config)
    holds = np.array([[True, True, True], [False, True, False]])
    found = accuracies_by_holding(experiment.federation.engine.model, None, experiment.test, holds, batch_size=7)
    assert np.isnan(found[0, 1]) and found[1, 0] == 1.0
    plain = evaluate(experiment.federation.engine.model, None, experiment.test, batch_size=7)[0]
    assert found[0, 0] == pytest.approx(plain.accuracy)

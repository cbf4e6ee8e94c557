"""When a run measures what, that round 0 is the frozen model wherever it is measured, and what is said of clients."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import assert_states_close

from flora.config.parse import parse_config
from flora.core import tree
from flora.core.hooks import Hooks
from flora.evaluation.accuracy import evaluate
from flora.evaluation.classification import macro_f1
from flora.evaluation.local_only import train_centralized, train_local_only
from flora.experiment.build import Experiment, build_experiment
from flora.simulate import RunResult, resume, simulate


def client_rows(result: RunResult) -> list[dict[str, str]]:
    with (result.directory / "clients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def client_accuracies(raw: dict[str, Any]) -> list[str]:
    return [row["accuracy"] for row in client_rows(simulate(parse_config(raw)))]


def test_without_rounds_clients_meet_the_frozen_model(raw_config: dict[str, Any]) -> None:
    """CLIP-Adapter's random start changes the model at once, LoRA's doesn't: both must report the same model."""
    raw = {**raw_config, "rounds": 0, "data": {"name": "patterns", "num_train": 240, "num_classes": 8}}
    lora = client_accuracies({**raw, "name": "lora"})
    assert any(float(cell) not in (0.0, 1.0) for cell in lora)
    assert client_accuracies({**raw, "name": "clip_adapter", "adapter": {"name": "clip_adapter", "ratio": 1.0}}) == lora


@pytest.mark.parametrize("every", [1, 2, 5])
def test_clients_are_measured_when_they_are_due(raw_config: dict[str, Any], every: int) -> None:
    raw = {**raw_config, "rounds": 7, "evaluation": {"every": 3, "clients_every": every}}
    records = simulate(parse_config(raw)).records
    assert [record.round for record in records if record.accuracy is not None] == [0, 3, 6, 7]
    due = [round for round in range(1, 8) if round % every == 0 or round == 7]
    assert [record.round for record in records if record.client_accuracy_mean is not None] == due


# Who took part


def test_each_rounds_cohort_and_how_often_a_client_took_part(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 5, "clients": {"number": 7, "cohort": {"number": 3}}}
    whole = simulate(parse_config({**raw, "name": "whole"}))
    cohorts = [record.cohort or () for record in whole.records]
    assert [len(set(cohort)) for cohort in cohorts] == [0, 3, 3, 3, 3, 3]
    expected = [sum(client in cohort for cohort in cohorts) for client in range(7)]
    assert len(set(expected)) > 1
    assert [int(row["num_rounds"]) for row in client_rows(whole)] == expected
    # A run that stopped counts the rounds before that, too.
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=5"])
    assert (rest.directory / "clients.csv").read_bytes() == (whole.directory / "clients.csv").read_bytes()


def test_a_client_whose_update_is_left_out_took_part(raw_config: dict[str, Any]) -> None:
    hooks = Hooks(update=lambda round, update: replace(update, delta=tree.scale(update.delta, math.nan))
                  if update.client == 1 else update)  # fmt: skip
    result = simulate(parse_config(raw_config), hooks=hooks)
    assert [rejected.client for rejected in result.records[-1].rejected_clients] == [1]
    assert [record.cohort for record in result.records] == [(), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert [row["num_rounds"] for row in client_rows(result)] == ["2"] * 4


# What clients reach


def test_the_weighted_mean_is_that_of_all_held_out_examples(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "data": {"name": "patterns", "num_train": 240, "num_classes": 8}, "personal": "ditto"}
    result = simulate(parse_config(raw))
    rows = client_rows(result)
    sizes = np.array([int(row["num_held_out"]) for row in rows])
    assert len(set(sizes)) > 1
    for whose, column in (("client", "accuracy"), ("personal", "personal_accuracy")):
        accuracies = np.array([float(row[column]) for row in rows])
        expected = np.rint(accuracies * sizes).sum() / sizes.sum()
        assert getattr(result.summary, f"{whose}_accuracy_weighted_mean") == pytest.approx(expected, abs=1e-9)
        assert getattr(result.summary, f"{whose}_accuracy_mean") == pytest.approx(accuracies.mean(), abs=1e-5)


def test_both_adapters_on_both_sets(raw_config: dict[str, Any]) -> None:
    """What a client reaches alone, as evaluating it by itself on its own held-out and on all test images says."""
    raw = {**raw_config, "data": {"name": "patterns", "num_train": 240, "num_classes": 8}, "rounds": 3}
    raw |= {"clients": {"number": 5, "per_block": 2, "holdout_fraction": 0.4}, "evaluation": {"num_local_only": 3}}
    result = simulate(parse_config(raw))
    experiment = build_experiment(parse_config(raw))
    federation = experiment.federation
    adapters = train_local_only(federation, experiment.initial_adapter, np.array([0, 2, 4]), advance=lambda _: None)
    rows, held_out = client_rows(result), []
    for place, client in enumerate((0, 2, 4)):
        one = {name: tensor[place : place + 1] for name, tensor in adapters.items()}
        own = federation.engine.features.subset(federation.clients[client].held_out)
        found = [
            evaluate(federation.engine.model, one, each, batch_size=512)[0].accuracy for each in (own, experiment.test)
        ]
        cells = [rows[client][column] for column in ("local_only_held_out_accuracy", "local_only_accuracy")]
        assert cells == [f"{accuracy:.6f}" for accuracy in found]
        held_out.append(found[0])
    assert len({*held_out, *(float(row["accuracy"]) for row in rows)}) > 2
    assert [row["local_only_held_out_accuracy"] == "" for row in rows] == [False, True, False, True, False]
    assert {row["test_accuracy"] for row in rows} == {f"{result.summary.last_accuracy:.6f}"}
    summary = result.summary
    assert summary.held_out_num_clients == 3
    assert summary.held_out_local_only_accuracy == pytest.approx(np.mean(held_out), abs=1e-9)
    federated = np.mean([float(rows[client]["accuracy"]) for client in (0, 2, 4)])
    assert summary.held_out_federated_accuracy == pytest.approx(federated, abs=1e-6)
    line = f"federated {100 * federated:.1f} %, alone {100 * np.mean(held_out):.1f} %   (3 clients)"
    assert f"on clients' own data: {line}" in (result.directory / "log.txt").read_text()


def built(raw: dict[str, Any]) -> Experiment:
    return build_experiment(parse_config(raw))


def test_all_images_in_one_place_come_to_what_a_centralised_run_does(raw_config: dict[str, Any]) -> None:
    """In batches of all examples, whose order says nothing, both take the same steps."""
    raw = {**raw_config, "rounds": 3, "backbone": {**raw_config["backbone"], "precision": "fp64"}}
    raw |= {"local": {"learning_rate": 0.5, "batch_size": 10_000, "optimizer": "sgd"}}
    clients = {"number": 4, "holdout_fraction": 0.0}
    experiment = built({**raw, "clients": clients})
    found = train_centralized(experiment.federation, experiment.initial_adapter, advance=lambda _: None)
    run = simulate(parse_config({**raw, "clients": {**clients, "centralized": True}}))
    moved = max((run.adapter[name] - experiment.initial_adapter[name]).abs().max() for name in found)
    assert moved > 1e-3
    assert_states_close(tree.unstack(found)[0], run.adapter)


def test_what_all_images_in_one_place_reach_is_recorded(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "data": {"name": "patterns", "num_train": 240, "num_classes": 8}}
    raw |= {"clients": {"number": 4, "holdout_fraction": 0.4}}
    result = simulate(parse_config({**raw, "evaluation": {"num_local_only": 2, "centralized": True}}))
    experiment, summary = built(raw), result.summary
    adapter = train_centralized(experiment.federation, experiment.initial_adapter, advance=lambda _: None)
    model = experiment.federation.engine.model
    assert summary.centralized_accuracy == evaluate(model, adapter, experiment.test, batch_size=512)[0].accuracy
    correct = evaluate(model, adapter, experiment.held_out, batch_size=512)[0].correct
    parts = np.split(correct, np.cumsum(experiment.held_out_sizes)[:-1])
    cells = [row["centralized_held_out_accuracy"] for row in client_rows(result)]
    assert cells == [f"{part.mean():.6f}" for part in parts]
    assert len({*cells, *(row["accuracy"] for row in client_rows(result))}) > 2
    assert summary.held_out_centralized_accuracy == pytest.approx(np.mean([parts[0].mean(), parts[3].mean()]))
    assert (
        f"all in one place      {100 * summary.centralized_accuracy:.1f} %"
        in (result.directory / "log.txt").read_text()
    )
    other = simulate(parse_config({**raw, "name": "other"}))
    assert other.summary.centralized_accuracy is None
    assert "centralized_held_out_accuracy" not in client_rows(other)[0]
    assert tree.state_digest(other.adapter) == tree.state_digest(result.adapter)


def test_f1_of_each_client(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "data": {"name": "patterns", "num_train": 240, "num_classes": 8}}
    result = simulate(parse_config({**raw, "clients": {"number": 4, "holdout_fraction": 0.4}}))
    experiment = built({**raw, "clients": {"number": 4, "holdout_fraction": 0.4}})
    model, stack = experiment.federation.engine.model, tree.expand(result.adapter, 1)
    for client, row in zip(experiment.federation.clients, client_rows(result), strict=True):
        own = experiment.federation.engine.features.subset(client.held_out)
        predicted = evaluate(model, stack, own, batch_size=512)[0].predicted
        assert row["macro_f1"] == f"{macro_f1(own.labels.numpy(), predicted, 8):.6f}"
    assert len({row["macro_f1"] for row in client_rows(result)}) > 1


def test_without_held_out_examples_there_is_nothing_to_compare(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "clients": {"number": 4, "holdout_fraction": 0.0}, "evaluation": {"num_local_only": 4}}
    result = simulate(parse_config(raw))
    assert result.summary.held_out_num_clients == 0
    assert result.summary.client_accuracy_weighted_mean is None
    assert all(row["local_only_accuracy"] and not row["local_only_held_out_accuracy"] for row in client_rows(result))
    assert "together or alone" not in (result.directory / "log.txt").read_text()


def test_whose_adapter_a_personal_figure_is_of(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 1, "clients": {"number": 4, "cohort": {"number": 2}, "holdout_fraction": 0.5}}
    result = simulate(parse_config({**raw, "personal": "ditto", "evaluation": {"num_local_only": 4}}))
    rows = client_rows(result)
    for client, row in enumerate(rows):
        took_part = client in (result.records[-1].cohort or ())
        assert row["personal_adapter"] == ("own" if took_part else "server")
        assert bool(row["personal_test_accuracy"]) == took_part
        assert took_part or row["personal_accuracy"] == row["accuracy"]
    assert result.summary.held_out_personal_accuracy == result.summary.personal_accuracy_mean

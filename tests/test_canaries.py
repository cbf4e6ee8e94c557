"""Canaries are in a run or not as their coins say, nobody else is touched, and the run says which were in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE

from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientData, ClientUpdate
from flora.core.tree import State
from flora.experiment.build import Experiment, build_experiment
from flora.federated.round import run_round
from flora.privacy.canaries import Canaries, Directions, Evidence, Examples, PlantedCanaries, RealClients
from flora.simulate import resume, simulate

CLIENTS = [ClientData(np.arange(4 * index, 4 * index + 4), np.empty(0, np.int64)) for index in range(10)]


def delta_of(client: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(client)
    return {name: scale * torch.randn(3, 4, generator=generator).double() for name in ("a", "b")}


def built(raw: dict[str, Any], **changes: Any) -> Experiment:
    config = parse_config({**raw, **changes})
    return build_experiment(config)


def test_coins_are_fair_and_name_distinct_canaries() -> None:
    coins = [RealClients(6).flip(CLIENTS, Rng(seed)) for seed in range(300)]
    for each in coins:
        assert len(set(each.ids.tolist())) == 6 and (np.diff(each.ids) > 0).all()
    assert 0.45 < np.mean([each.was_in.mean() for each in coins]) < 0.55
    assert not np.corrcoef([each.was_in for each in coins], rowvar=False)[np.triu_indices(6, 1)].max() > 0.25


@pytest.mark.parametrize("canaries", [RealClients(4), Directions(4), Directions(4, norm=2.5)])
def test_a_canary_client_that_is_out_sends_nothing_and_others_send_what_they_had(canaries: Canaries) -> None:
    coins = replace(canaries.flip(CLIENTS, Rng(0)), was_in=np.array([True, False, True, False]))
    planted = PlantedCanaries(canaries, coins)
    for client in range(10):
        before, extra = delta_of(client), {"c": torch.ones(2).double()}
        after, extra_after = planted.sent(client, before, extra)
        if client not in coins.ids:
            assert after is before and extra_after is extra
            continue
        assert not extra_after["c"].any()
        is_in = bool(coins.was_in[coins.ids.tolist().index(client)])
        sent, norm = tree.flatten(after), tree.flatten(before).norm()
        if not is_in:
            assert not sent.any()
        elif isinstance(canaries, Directions):
            assert float(sent.norm()) == pytest.approx(float(norm) if canaries.norm is None else 2.5, abs=TOLERANCE)
            again = tree.flatten(planted.sent(client, delta_of(client, scale=7), {})[0])
            assert float(again @ sent / again.norm() / sent.norm()) == pytest.approx(1, abs=TOLERANCE)
        else:
            assert after is before


def test_directions_are_scored_by_what_became_of_the_adapter() -> None:
    canaries = Directions(8, norm=1.0)
    coins = canaries.flip(CLIENTS, Rng(0))
    everyone = PlantedCanaries(canaries, replace(coins, was_in=np.ones(8, bool)))
    sent = [everyone.sent(client, delta_of(client), {})[0] for client in coins.ids.tolist()]
    moved = {name: sum(each[name] for each, is_in in zip(sent, coins.was_in, strict=True) if is_in) for name in "ab"}
    scores = canaries.scores(coins, Evidence(moved, lambda examples: examples, CLIENTS))
    expected = [sum(float((moved[name] * each[name]).sum()) for name in "ab") for each in sent]
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)


def test_canary_examples_that_are_out_are_taken_away_and_their_labels_are_wrong() -> None:
    canaries = Examples(12)
    coins, labels = canaries.flip(CLIENTS, Rng(0)), np.arange(40) % 5
    clients = canaries.deal(CLIENTS, coins)
    left = np.concatenate([client.train for client in clients])
    assert sorted([*left, *coins.ids[~coins.was_in]]) == list(range(40)) and all(len(each.train) for each in clients)
    changed = canaries.labels(labels, 5, coins)
    assert np.array_equal(np.flatnonzero(changed != labels), coins.ids) and changed.max() < 5
    assert Examples(12, mislabelled=False).labels(labels, 5, coins) is labels
    everything = Examples(30).deal(CLIENTS, replace(Examples(30).flip(CLIENTS, Rng(0)), was_in=np.zeros(30, bool)))
    assert all(len(each.train) == 1 for each in everything)


def test_a_round_without_canaries_in_is_a_round_in_which_they_send_zeros(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "backbone": {**raw_config["backbone"], "precision": "fp64"}, "local": {"optimizer": "sgd"}}
    plain = built(raw)
    experiment = built(raw, canaries={"name": "clients", "number": 4})
    assert experiment.federation.canaries is not None
    was_in = experiment.federation.canaries.coins.was_in
    assert 0 < was_in.sum() < 4
    state, _ = run_round(experiment.federation, experiment.initial_state())
    sent: dict[int, ClientUpdate] = {}

    def note(round: int, update: ClientUpdate) -> ClientUpdate:
        sent[update.client] = update
        return update

    engine = plain.federation.engine
    engine.hooks = replace(engine.hooks, update=note)
    run_round(plain.federation, plain.initial_state())
    total = sum(each.num_examples for each in sent.values())
    for name, tensor in state.adapter.items():
        if name in sent[0].delta:
            mean = (
                sum(sent[client].delta[name] * sent[client].num_examples for client in np.flatnonzero(was_in)) / total
            )
            torch.testing.assert_close(tensor - plain.initial_adapter[name], mean, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["directions", "clients", "examples"])
def test_a_run_says_which_canaries_were_in_and_is_resumed_with_them(raw_config: dict[str, Any], name: str) -> None:
    config = parse_config({**raw_config, "canaries": {"name": name, "number": 4}})
    whole = simulate(config)
    recorded = json.loads((whole.directory / "partition.json").read_text())["canaries"]
    assert len(recorded["ids"]) == len(recorded["was_in"]) == 4
    assert recorded["unit"] == ("example" if name == "examples" else "client")
    part = simulate(replace(config, rounds=1, name="part"))
    gone_on = resume(part.directory, ["rounds=2"])
    for key, tensor in whole.adapter.items():
        torch.testing.assert_close(gone_on.adapter[key], tensor, rtol=0, atol=0)


def test_more_canaries_than_there_can_be_are_refused_in_a_line(raw_config: dict[str, Any]) -> None:
    config = parse_config({**raw_config, "canaries": {"name": "directions", "number": 5}})
    with pytest.raises(OptionError, match=r"canaries.number: expected at most 4"):
        check_experiment(config)
    with pytest.raises(OptionError, match=r"canaries.number: expected at most \d+, .* got 100"):
        built(raw_config, canaries="examples")
    with pytest.raises(OptionError, match="number: expected a number at least 2"):
        Examples(1)

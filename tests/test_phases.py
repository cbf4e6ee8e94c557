"""FedRep: clients train what stays with them, then what travels, each while the other is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, LOCAL, SIZES, TOLERANCE, adapt, assert_states_close, federation, rounds, variant

from flora.client.optimizers import Sgd
from flora.clip.adapters.lora import Lora
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientUpdate
from flora.core.tree import State
from flora.data.batching import BatchSizes, client_batches
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.server.strategies.averaging import FedPer, FedRep
from flora.simulate import resume, simulate

SMALL = dataclasses.replace(LOCAL, learning_rate=0.02, optimizer=Sgd(momentum=0.5))
REP = FedRep(stay=("text.1.*",), own_epochs=2)


def plain_phase(
    parts: Federation, start: State, client: int, rng: Rng, names: set[str], num_steps: int
) -> tuple[State, float]:
    """A client's steps with `names` alone, by autograd, and the sum of their losses: one client at a time."""
    model = parts.engine.model
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in start.items()}
    optimizer = torch.optim.SGD([leaves[name] for name in leaves if name in names], lr=0.02, momentum=0.5)
    examples = parts.clients[client].train
    total = 0.0
    for batch, real in zip(
        *client_batches(examples, rng.child("client", client), BatchSizes(4, 4, num_steps)), strict=True
    ):
        stem = parts.engine.features.take(batch[real], torch.device("cpu"))
        with model.adapter.bind({name: leaf.unsqueeze(0) for name, leaf in leaves.items()}):
            logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
        loss = F.cross_entropy(logits, LABELS[batch[real]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return {name: leaf.detach() for name, leaf in leaves.items()}, total


@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize("strategy", [REP, FedRep(stay=("*.lora_B",), own_steps=3)], ids=["epochs", "steps"])
def test_two_phases_as_in_a_plain_loop(tiny_model: str, strategy: FedRep, per_block: int) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    parts = federation(model, SMALL, strategy=strategy, cohort=3, per_block=per_block)
    states, results = rounds(parts, 3)
    server = states[0].adapter
    kept: dict[int, State] = {}
    stay = set(filter(strategy.stays, server))
    for round in (1, 2, 3):
        rng = parts.rng.child("round", round)
        cohort = parts.participation.sampler.sample(parts.participation.sizes, 3, rng.child("cohort")).tolist()
        ends, losses = {}, {}
        for client in cohort:
            passes = -(-SIZES[client] // 4)
            own_steps = 3 if strategy.own_steps else 2 * passes
            start = {**server, **kept.get(client, {})}
            middle, first = plain_phase(parts, start, client, rng.child("first"), stay, own_steps)
            ends[client], last = plain_phase(parts, middle, client, rng, set(server) - stay, passes)
            losses[client] = (first + last) / (own_steps + passes)
            assert all(torch.equal(middle[name], start[name]) for name in set(server) - stay)
        kept |= {client: {name: end[name] for name in stay} for client, end in ends.items()}
        weights = [SIZES[client] for client in cohort]
        mean = tree.weighted_mean(list(ends.values()), weights)
        server = {name: server[name] if name in stay else mean[name] for name in server}
        assert_states_close(states[round].adapter, server)
        assert set(states[round].clients) == set(kept)
        for client, expected in kept.items():
            assert_states_close(states[round].clients[client].own, expected)
        loss = sum(losses[client] * SIZES[client] for client in cohort) / sum(weights)
        assert results[round - 1].train_loss == pytest.approx(loss, abs=TOLERANCE)


def test_what_stays_is_never_sent_and_bytes_are_those_of_fedper(tiny_model: str) -> None:
    seen: set[str] = set()

    def watch(round: int, update: ClientUpdate) -> ClientUpdate:
        seen.update(update.delta)
        return update

    model = adapt(tiny_model, Lora(rank=2))
    parts = federation(model, SMALL, strategy=REP)
    state = parts.initial_state(model.initial_adapter(Rng(1)))
    _, result = run_round(variant(parts, hooks=Hooks(update=watch)), state)
    assert seen == {name for name in state.adapter if not name.startswith("text.1.")}
    _, other = run_round(federation(model, SMALL, strategy=FedPer(stay=REP.stay)), state)
    assert (result.uplink_bytes, result.downlink_bytes) == (other.uplink_bytes, other.downlink_bytes)
    assert result.num_steps == 3 * other.num_steps


def test_a_network_waits_for_both_phases(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    loads = []
    for strategy in (FedPer(stay=REP.stay), REP):
        parts = federation(model, SMALL, strategy=strategy)
        state = parts.initial_state(model.initial_adapter(Rng(1)))
        loads.append(parts.load(state, parts.broadcast(state)[0]).num_steps(0))
    assert loads == [4, 12]


def test_a_first_phase_that_diverges_is_said_so_and_left_out(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    local = dataclasses.replace(SMALL, learning_rate=1e300)
    parts = federation(model, local, strategy=REP)
    state, result = run_round(parts, parts.initial_state(model.initial_adapter(Rng(1))))
    assert {each.client for each in result.rejected_clients} == set(range(5)) and not state.clients
    assert all(each.step is not None and each.step < 8 for each in result.rejected_clients)


def test_a_run_goes_on_as_it_would_have(raw_config: dict[str, Any]) -> None:
    raw = {**raw_config, "rounds": 4, "clients": {"number": 4, "cohort": {"number": 2}, "holdout_fraction": 0.5},
           "server": {"strategy": {"name": "fedrep", "stay": ["*.lora_A"], "own_epochs": 2}}}  # fmt: skip
    whole = simulate(parse_config({**raw, "name": "whole"}))
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=4"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    assert (rest.directory / "clients.csv").read_bytes() == (whole.directory / "clients.csv").read_bytes()
    assert whole.summary.personal_accuracy_mean is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"optimizer_state": "kept"}},
         "local.optimizer_state: expected fresh, because clients train what stays with them and what they send one "
         "after the other"),
        ({"adapter": "dual_lora"},
         "server.strategy: fedrep says what stays and is trained first: expected an adapter that keeps nothing by "
         "itself, got dual_lora"),
        ({"local": {"privacy": {"noise_multiplier": 1.0}}},
         "local.privacy: expected none, because with fedrep what travels is trained beside tensors that were trained "
         "before"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_two_phases_is_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    raw = {**raw_config, **changes, "server": {"strategy": {"name": "fedrep", "stay": ["*.lora_A"]}}}
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config(raw))
    assert str(caught.value) == message
    with pytest.raises(OptionError, match="own_steps: give either"):
        FedRep(own_steps=3, own_epochs=2)

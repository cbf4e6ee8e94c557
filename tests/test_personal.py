"""What never leaves a client: it is where it was when the client comes back, and nobody else ever sees it."""

from __future__ import annotations

import csv
import dataclasses
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
    changed,
    federation,
    random_adapters,
    variant,
)

from flora.client.local_training import LocalTraining
from flora.client.optimizers import AdamW, Cosine, Sgd
from flora.client.personalization import Ditto, FineTuning, NoPersonalization, Personalization
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.dual_lora import DualLora
from flora.clip.adapters.lora import Lora
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientUpdate, ServerState
from flora.core.tree import State
from flora.data.batching import BatchSizes, client_batches
from flora.evaluation.accuracy import evaluate, own_accuracies
from flora.evaluation.local_only import clients_with_own_adapters, own_adapters
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.server.strategies.averaging import FedAvg, FedPer
from flora.server.strategies.base import Strategy
from flora.server.strategies.factors import FedSaLora, FfaLora, OneFactorStays, PLora, RoLora
from flora.simulate import resume, simulate

SMALL = dataclasses.replace(LOCAL, learning_rate=0.02)


def parts_of(
    model: AdaptedClip, strategy: Strategy | None = None, local: LocalTraining = SMALL,
    personal: Personalization | None = None, **options: Any,
) -> Federation:  # fmt: skip
    return federation(model, local, strategy=strategy or FedAvg(), personal=personal or NoPersonalization(), **options)


def rounds(parts: Federation, number: int) -> list[ServerState]:
    states = [parts.initial_state(parts.engine.model.initial_adapter(Rng(1)))]
    for _ in range(number):
        states.append(run_round(parts, states[-1])[0])
    return states


def own(state: ServerState, client: int) -> State:
    return state.clients[client].own


def plain_training(
    parts: Federation, start: State, client: int, rng: Rng, names: set[str], anchor: State | None = None, mu: float = 0
) -> State:
    """One client's epoch of SGD by autograd alone, one client at a time."""
    model, local = parts.engine.model, parts.local
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in start.items()}
    trained = [leaves[name] for name in leaves if name in names]
    optimizer = torch.optim.SGD(trained, lr=local.learning_rate)
    data = parts.clients[client]
    steps = -(-len(data.train) // 4)
    indices, masks = client_batches(data.train, rng.child("client", client), BatchSizes(4, 4, steps))
    for batch, real in zip(indices, masks, strict=True):
        stem = parts.engine.features.take(batch[real], torch.device("cpu"))
        with model.adapter.bind({name: leaf.unsqueeze(0) for name, leaf in leaves.items()}):
            logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
        loss = F.cross_entropy(logits, LABELS[batch[real]])
        if anchor is not None:
            loss = loss + mu / 2 * torch.stack([(leaves[n] - anchor[n]).square().sum() for n in names]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


# One factor stays


@pytest.mark.parametrize("strategy", [FedSaLora(), PLora(), FedPer(stay=("text.0.*",))])
def test_one_factor_stays_as_in_a_plain_loop(tiny_model: str, strategy: OneFactorStays) -> None:
    parts = parts_of(adapt(tiny_model, Lora(rank=2)), strategy, cohort=3)
    states = rounds(parts, 3)
    server, kept = states[0].adapter, {}
    names = set(server)
    for round in (1, 2, 3):
        rng = parts.rng.child("round", round)
        cohort = parts.participation.sampler.sample(parts.participation.sizes, 3, rng.child("cohort")).tolist()
        ends = {
            client: plain_training(parts, {**server, **kept.get(client, {})}, client, rng, names) for client in cohort
        }
        kept |= {client: {n: t for n, t in end.items() if strategy.stays(n)} for client, end in ends.items()}
        mean = tree.weighted_mean(list(ends.values()), [SIZES[client] for client in cohort])
        server = {name: server[name] if strategy.stays(name) else mean[name] for name in server}
        assert_states_close(states[round].adapter, server)
        assert set(states[round].clients) == set(kept)
        for client, expected in kept.items():
            assert_states_close(own(states[round], client), expected)
    assert 3 < len(kept) <= 5


@pytest.mark.parametrize(("strategy", "shared"), [(FedSaLora(), "lora_A"), (PLora(), "lora_B")])
def test_the_factor_that_stays_is_never_sent(tiny_model: str, strategy: Strategy, shared: str) -> None:
    parts = parts_of(adapt(tiny_model, Lora(rank=2)), strategy)
    seen: set[str] = set()

    def watch(round: int, update: ClientUpdate) -> ClientUpdate:
        seen.update(update.delta)
        return update

    watching = variant(parts, hooks=Hooks(update=watch))
    state = watching.initial_state(watching.engine.model.initial_adapter(Rng(1)))
    after, result = run_round(watching, state)
    assert {name.rpartition(".")[2] for name in seen} == {shared}
    assert changed(state.adapter, after.adapter) == {shared}
    assert result.aggregation_error is None
    _, plain = run_round(parts_of(parts.engine.model), state)
    assert result.uplink_bytes == result.downlink_bytes < 0.6 * plain.uplink_bytes


def test_what_matches_a_pattern_stays_as_a_factor_does(tiny_model: str) -> None:
    """`fedper` with the names of all B is `fedsa_lora`, and a run that names nothing there is refused."""
    model = adapt(tiny_model, Lora(rank=2))
    one, other = (rounds(parts_of(model, strategy), 2)[-1] for strategy in (FedPer(stay=("*.lora_B",)), FedSaLora()))
    assert_states_close(one.adapter, other.adapter, atol=0)
    for client in one.clients:
        assert_states_close(own(one, client), own(other, client), atol=0)
    with pytest.raises(OptionError, match=r"strategy\.stay: 'head\.\*' matches no tensor; there are text\.0"):
        FedPer().check_names(tuple(one.adapter))
    with pytest.raises(OptionError, match=r"strategy\.stay: all tensors would stay, and none travel"):
        FedPer(stay=("*",)).check_names(tuple(one.adapter))
    with pytest.raises(OptionError, match="stay: expected at least one pattern"):
        FedPer(stay=())


def test_a_pattern_that_matches_nothing_is_one_line(raw_config: dict[str, Any]) -> None:
    raw = raw_config | {"server": {"strategy": {"name": "fedper", "stay": ["head.*"]}}}
    with pytest.raises(OptionError, match=r"server\.strategy\.stay: 'head\.\*' matches no tensor; there are text"):
        simulate(parse_config(raw))


def test_a_client_that_is_left_out_keeps_what_it_had(tiny_model: str) -> None:
    parts = parts_of(adapt(tiny_model, Lora(rank=2)), FedSaLora())
    first = rounds(parts, 1)[1]

    def spoil(round: int, update: ClientUpdate) -> ClientUpdate:
        broken = {name: tensor * float("nan") for name, tensor in update.delta.items()}
        return dataclasses.replace(update, delta=broken) if update.client == 2 else update

    second, result = run_round(variant(parts, hooks=Hooks(update=spoil)), first)
    assert [rejection.client for rejection in result.rejected_clients] == [2]
    assert all(torch.equal(own(first, 2)[name], tensor) for name, tensor in own(second, 2).items())
    assert any(not torch.equal(own(first, 1)[name], tensor) for name, tensor in own(second, 1).items())


# Ditto


@pytest.mark.parametrize("strategy", [FedAvg(), FfaLora(), RoLora()])
def test_ditto_as_in_a_plain_loop_and_the_server_as_without(tiny_model: str, strategy: Strategy) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    parts = parts_of(model, strategy, personal=Ditto(weight=0.7), cohort=3)
    states, without = rounds(parts, 3), rounds(parts_of(model, strategy, cohort=3), 3)
    kept: dict[int, State] = {}
    for round in (1, 2, 3):
        server = states[round - 1].adapter
        assert all(torch.equal(server[name], without[round - 1].adapter[name]) for name in server)  # bit for bit
        rng = parts.rng.child("round", round)
        names = {name for name in server if strategy.trains(name, round)}
        for client in parts.participation.sampler.sample(parts.participation.sizes, 3, rng.child("cohort")).tolist():
            start = {**server, **kept.get(client, {})}
            kept[client] = plain_training(parts, start, client, rng.child("personal"), names, server, 0.7)
        assert set(states[round].clients) == set(kept)
        for client, expected in kept.items():
            mine = own(states[round], client)
            assert set(mine) == {name for name in server if strategy.trains(name, 1) or strategy.trains(name, 2)}
            assert_states_close(mine, {name: expected[name] for name in mine})


def test_a_heavy_weight_holds_ditto_at_the_server(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    local = dataclasses.replace(LOCAL, learning_rate=1e-3)
    far, near = (rounds(parts_of(model, local=local, personal=Ditto(weight=w)), 1)[1] for w in (0.0, 500.0))
    start = model.initial_adapter(Rng(1))
    moved = [tree.norm(tree.subtract(own(state, 0), start)) for state in (far, near)]
    assert moved[1] < 0.7 * moved[0]


# Dual adapters


def test_dual_adapters_have_two_models(tiny_model: str) -> None:
    model = adapt(tiny_model, DualLora(rank=2, local_rank=5))
    stack = random_adapters(model, 3)
    server, local = model.adapter.models(stack)
    plain = adapt(tiny_model, Lora(rank=5, alpha=8 * 5))  # the scaling is that of rank 2 and alpha 16
    merged = {
        f"{layer}.{factor}": stack[f"{layer}.local_{factor[-1]}"]
        * (stack[f"{layer}.local_gate"].unsqueeze(1) if factor == "lora_B" else 1)
        for layer in ("text.0.q", "text.0.v", "text.1.q", "text.1.v")
        for factor in ("lora_A", "lora_B")
    }
    with torch.no_grad():
        with model.adapter.bind(local):
            ours = model.class_features(3)
        with plain.adapter.bind(merged):
            torch.testing.assert_close(ours, plain.class_features(3), atol=TOLERANCE, rtol=0)
        with model.adapter.bind(server):
            assert (model.class_features(3) - ours).abs().max() > 1e-3


def gates(state: State) -> list[str]:
    return [name for name in state if name.endswith(".local_gate")]


def dual_loss(model: AdaptedClip, leaves: State, stem: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Both models' cross-entropies and what they learn from each other, written out."""
    logits = []
    for view in model.adapter.models({name: leaf.unsqueeze(0) for name, leaf in leaves.items()}):
        with model.adapter.bind(view):
            logits.append(model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T)
    loss = F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)
    for me, other in (logits, logits[::-1]):
        teacher = (other.detach() / 2).softmax(dim=-1)
        kl = (teacher * (teacher.log() - (me / 2).log_softmax(dim=-1))).sum(dim=-1).mean()
        loss = loss + 0.3 * 4 * kl
    return loss


@pytest.mark.parametrize("per_block", [1, 2, 5])
def test_dual_adapters_as_in_a_plain_loop(tiny_model: str, per_block: int) -> None:
    options = DualLora(rank=2, local_rank=4, threshold=2.0, distillation=0.3, temperature=2.0)
    model = adapt(tiny_model, options)
    local = LocalTraining(learning_rate=0.02, batch_size=100, epochs=3, optimizer=Sgd(momentum=0.9))
    parts = parts_of(model, local=local, per_block=per_block)
    states = rounds(parts, 2)
    server, kept = states[0].adapter, {}
    for round in (1, 2):
        ends = []
        for client, data in enumerate(parts.clients):
            leaves = {n: t.clone().requires_grad_() for n, t in {**server, **kept.get(client, {})}.items()}
            optimizer = torch.optim.SGD(leaves.values(), lr=0.02, momentum=0.9)
            stem = parts.engine.features.take(torch.from_numpy(data.train), torch.device("cpu"))
            for _ in range(3):
                optimizer.zero_grad()
                dual_loss(model, leaves, stem, parts.engine.features.labels[data.train]).backward()
                optimizer.step()
                for name in gates(server):
                    gate = leaves[name].data
                    leaves[name].data = gate.sign() * (gate.abs() - 0.02 * 2.0).clamp(min=0)
            ends.append({name: leaf.detach() for name, leaf in leaves.items()})
            kept[client] = {name: tensor for name, tensor in ends[-1].items() if model.adapter.stays(name)}
        mean = tree.weighted_mean(ends, SIZES)
        server = {name: server[name] if model.adapter.stays(name) else mean[name] for name in server}
        assert_states_close(states[round].adapter, server)
        for client, expected in kept.items():
            assert_states_close(own(states[round], client), expected)


def test_a_higher_threshold_leaves_fewer_ranks(tiny_model: str) -> None:
    counts = []
    for threshold in (0.0, 2.4, 1000.0):
        model = adapt(tiny_model, DualLora(rank=2, local_rank=4, threshold=threshold))
        state = rounds(parts_of(model, local=dataclasses.replace(LOCAL, learning_rate=0.05)), 2)[-1]
        counts.append(sum(int(own(state, 0)[name].count_nonzero()) for name in gates(state.adapter)))
    assert counts[0] == 16 and counts[0] > counts[1] > counts[2] == 0


def test_dual_adapters_send_the_small_one_alone(tiny_model: str) -> None:
    both, small = (
        run_round(parts, parts.initial_state(parts.engine.model.initial_adapter(Rng(1))))[1]
        for parts in (
            parts_of(adapt(tiny_model, options)) for options in (DualLora(rank=2, local_rank=7), Lora(rank=2))
        )
    )
    assert both.uplink_bytes == small.uplink_bytes and both.downlink_bytes == small.downlink_bytes


# What clients end with


def test_own_accuracies_equal_one_by_one(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(rank=2))
    features = federation(model, LOCAL).engine.features
    stack = random_adapters(model, 3, scale=3.0)
    examples = [np.arange(0, 13), np.array([], dtype=np.int64), np.arange(20, 25)]
    for batch_size in (1, 7, 500):
        found = own_accuracies(model, stack, features, examples, batch_size=batch_size)
        assert np.isnan(found[1])
        for place in (0, 2):
            alone = {name: tensor[place : place + 1] for name, tensor in stack.items()}
            correct = evaluate(model, alone, features, batch_size=100)[0].correct[examples[place]]
            assert found[place] == pytest.approx(correct.mean())
    assert found[0] != found[2]


@pytest.mark.parametrize("per_block", [1, 2, 5])
def test_own_adapters(tiny_model: str, per_block: int) -> None:
    parts = parts_of(adapt(tiny_model, Lora(rank=2)), FedSaLora(), cohort=2, per_block=per_block)
    state = rounds(parts, 1)[1]
    with_own = clients_with_own_adapters(parts, state)
    assert with_own is not None and with_own.tolist() == sorted(state.clients) and len(with_own) == 2
    assert clients_with_own_adapters(parts_of(parts.engine.model), state) is None
    found = {}
    for clients, stack in own_adapters(parts, state, np.arange(5)):
        found |= dict(zip(clients, tree.unstack(stack), strict=True))
    assert list(found) == list(range(5))
    for client in range(5):
        expected = {**state.adapter, **(own(state, client) if client in state.clients else {})}
        assert all(torch.equal(found[client][name], expected[name]) for name in expected)


@pytest.mark.parametrize("strategy", [FedAvg(), FedSaLora()])
def test_fine_tuning_as_in_a_plain_loop(tiny_model: str, strategy: Strategy) -> None:
    local = dataclasses.replace(SMALL, schedule=Cosine())  # which has come to its end by then
    parts = parts_of(adapt(tiny_model, Lora(rank=2)), strategy, local, FineTuning(epochs=1), per_block=2)
    state = rounds(parts, 3)[-1]
    found = {}
    for clients, stack in own_adapters(parts, state, np.arange(5)):
        found |= dict(zip(clients, tree.unstack(stack), strict=True))
    for client in range(5):
        start = parts.client_adapter(state, client)
        expected = plain_training(parts, start, client, parts.rng.child("personal", 3), set(start))
        assert_states_close(found[client], expected)
        assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1e-3


# Whole runs

WHOLE: dict[str, dict[str, Any]] = {
    "fedsa_lora": {"server": {"strategy": "fedsa_lora"}},
    "fedper": {"server": {"strategy": {"name": "fedper", "stay": ["*.lora_A"]}}},
    "plora, kept optimiser": {"server": {"strategy": "plora"}, "local": {"optimizer_state": "kept"}},
    "ditto": {"personal": {"name": "ditto", "weight": 0.5}},
    "dual_lora": {"adapter": {"name": "dual_lora", "rank": 2, "local_rank": 4, "layers": None}},
    "fine_tuning": {"personal": "fine_tuning"},
    "ditto and scaffold": {"personal": "ditto", "local": {"correction": "scaffold", "optimizer": "sgd"}},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_run_reports_both_and_goes_on(raw_config: dict[str, Any], kind: str) -> None:
    raw = {**raw_config, "rounds": 4, "clients": {"number": 4, "cohort": {"name": "uniform", "number": 2},
                                                 "holdout_fraction": 0.5}}  # fmt: skip
    changes = dict(WHOLE[kind])
    raw["local"] = {**raw["local"], **changes.pop("local", {})}
    raw |= changes
    whole = simulate(parse_config({**raw, "name": "whole"}))
    summary = whole.summary
    assert summary.personal_accuracy_mean is not None and summary.client_accuracy_mean is not None
    assert summary.personal_accuracy_worst_decile is not None and summary.personal_accuracy_std is not None
    with (whole.directory / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert np.mean([float(row["personal_accuracy"]) for row in rows]) == pytest.approx(summary.personal_accuracy_mean)
    assert "personal adapters" in (whole.directory / "log.txt").read_text()
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=4"])
    assert all(torch.equal(whole.adapter[name], rest.adapter[name]) for name in whole.adapter)
    assert rest.summary.personal_accuracy_mean == summary.personal_accuracy_mean
    assert (rest.directory / "clients.csv").read_bytes() == (whole.directory / "clients.csv").read_bytes()


def test_without_own_adapters_nothing_is_said_of_them(raw_config: dict[str, Any]) -> None:
    result = simulate(parse_config(raw_config))
    assert result.summary.personal_accuracy_mean is None
    assert "personal" not in (result.directory / "clients.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"strategy": "fedsa_lora"}, "personal": "ditto"},
         "personal: ditto can't be used, because some of the adapter's tensors stay with their clients anyway"),
        ({"adapter": "dual_lora", "personal": "ditto"},
         "personal: ditto can't be used, because some of the adapter's tensors stay with their clients anyway"),
        ({"server": {"strategy": "fedex_lora"}, "personal": "ditto"},
         "personal: ditto can't be used, because the strategy restarts or corrects the adapter by a residual"),
        ({"server": {"strategy": "plora"}, "local": {"correction": "feddyn"}},
         "local.correction: expected none or fedprox, because some tensors stay with their clients"),
        ({"adapter": {"name": "dual_lora", "local_rank": 33}},
         "adapter.local_rank: expected at most the width of the text tower of TINY, 32, got 33"),
        ({"server": {"strategy": "plora"}, "adapter": "norm"},
         "server.strategy: plora treats A and B differently: expected adapter lora, got norm"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, **changes}))
    assert str(caught.value).replace(raw_config["backbone"]["model"], "TINY") == message


def test_adamw_and_dropout_go_with_everything(tiny_model: str) -> None:
    local = LocalTraining(learning_rate=0.01, batch_size=4, optimizer=AdamW(), optimizer_state="kept", clip_norm=0.5)
    kinds: list[tuple[Adapter, Strategy, Personalization]] = [
        (Lora(rank=2, dropout=0.3), FedSaLora(), NoPersonalization()),
        (DualLora(rank=2, local_rank=3, dropout=0.3), FedAvg(), FineTuning()),
        (Lora(rank=2, dropout=0.3), FedAvg(), Ditto()),
    ]
    for adapter, strategy, personal in kinds:
        found = [
            rounds(parts_of(adapt(tiny_model, adapter), strategy, local, personal, per_block=number), 2)[-1]
            for number in (1, 5)
        ]
        assert_states_close(found[0].adapter, found[1].adapter)
        for client in range(len(SIZES)):
            assert_states_close(own_or_nothing(found[0], client), own_or_nothing(found[1], client))
    assert len(CLASSES) == 3


def own_or_nothing(state: ServerState, client: int) -> State:
    return state.clients[client].own if client in state.clients else {}


@pytest.mark.parametrize("changes", [
    {"server": {"strategy": "rolora"}, "personal": "ditto"},
    {"personal": "ditto", "local": {"optimizer_state": "kept"}, "server": {"screening": {"max_norm_ratio": 1}}},
    {"personal": {"name": "ditto", "weight": 1e30},
     "local": {"optimizer_state": "kept", "optimizer": {"name": "sgd", "momentum": 0.9}}},
])  # fmt: skip
def test_whoever_lacks_a_part_of_what_clients_keep_goes_on_without(
    raw_config: dict[str, Any], changes: dict[str, Any]
) -> None:
    raw = {**raw_config, "rounds": 4, **changes, "local": {**raw_config["local"], **changes.get("local", {})}}
    whole = simulate(parse_config({**raw, "name": "whole"}))
    parts = simulate(parse_config({**raw, "name": "parts", "rounds": 2}))
    rest = resume(parts.directory, ["rounds=4"])
    assert "warning" not in (rest.directory / "log.txt").read_text()
    assert (rest.directory / "clients.csv").read_bytes() == (whole.directory / "clients.csv").read_bytes()
    diverges = "weight" in str(changes)
    assert ("own adapter diverged, and stays as it was" in (whole.directory / "log.txt").read_text()) == diverges


def test_steps_of_own_adapters_are_counted(raw_config: dict[str, Any]) -> None:
    plain, ditto = (
        simulate(parse_config({**raw_config, "name": name, "personal": name})).records[-1] for name in ("none", "ditto")
    )
    assert ditto.num_steps == 2 * plain.num_steps


def test_running_out_of_memory_is_learned_once(tiny_model: str) -> None:
    lines: list[str] = []
    parts = parts_of(adapt(tiny_model, Lora(rank=2)), personal=Ditto(), per_block=5)

    def before(round: int, clients: tuple[int, ...]) -> None:
        if len(clients) > 2:
            raise torch.OutOfMemoryError("simulated")

    parts = variant(parts, hooks=Hooks(before_block=before), log=lines.append)
    rounds(parts, 2)
    assert len(lines) == 2 and parts.engine.clients_per_block == 2  # 5 to 3, then 3 to 2

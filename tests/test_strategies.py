"""What clients train and send, how deltas become one, how the server steps: by hand, and against plain loops."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LOCAL,
    TOLERANCE,
    adapt,
    assert_states_close,
    changed,
    federation,
    fp64,
    low_rank_clients,
    start,
    train,
    variant,
)
from helpers import rounds as several_rounds
from hypothesis import given
from hypothesis import strategies as st

from flora.audit.updates import sent_updates
from flora.client.local_training import LocalTraining
from flora.client.optimizers import Adam, Sgd
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.lora import Lora
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.low_rank import aggregation_error, layers, product_of, residual_of
from flora.core.registry import OptionError, components
from flora.core.rng import Rng
from flora.core.states import ClientData, ClientUpdate, ServerState
from flora.core.tree import State
from flora.engine.engine import Engine
from flora.federated.aggregation import step
from flora.federated.federation import Federation
from flora.federated.round import RoundResult, run_round
from flora.federated.synchronous import Synchronous
from flora.server.aggregators import Aggregator, BoundedMean, Mean, Median, MultiKrum, TrimmedMean
from flora.server.optimizers import (
    Adaptive,
    GaussianAverage,
    ServerAdagrad,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.base import Strategy
from flora.server.strategies.factors import FfaLora, RoLora
from flora.server.strategies.products import FlexLora, HetLora, LoraFair

AGGREGATORS = [Mean(), Median(), TrimmedMean(), MultiKrum(), BoundedMean(max_norm=1e6)]
ROBUST = [Median(), TrimmedMean(fraction=0.25), MultiKrum(fraction=0.25), BoundedMean(max_norm=3.0)]


def deltas(*rows: list[float]) -> list[State]:
    """Deltas of two tensors, the first number in one and the others in the other."""
    return [
        {"a": torch.tensor(row[:1], dtype=torch.float64), "b": torch.tensor(row[1:], dtype=torch.float64)}
        for row in rows
    ]


def flat(state: State) -> list[float]:
    return torch.cat([tensor.flatten() for tensor in state.values()]).tolist()


# Aggregators


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        (Mean(), [2.5, 2.5, 22.0]),
        (Median(), [2.5, 2.5, 4.5]),
        (TrimmedMean(fraction=0.25), [2.5, 2.5, 4.5]),
        (TrimmedMean(fraction=0.0), [2.5, 2.5, 22.0]),
        (TrimmedMean(fraction=0.24), [2.5, 2.5, 22.0]),  # 0.96 clients are none
    ],
)
def test_aggregators_by_hand(aggregator: Aggregator, expected: list[float]) -> None:
    cohort = deltas([1.0, 4.0, 4.0], [2.0, 3.0, 0.0], [3.0, 2.0, 79.0], [4.0, 1.0, 5.0])
    assert flat(aggregator.combine(cohort, [1.0] * 4)) == pytest.approx(expected)


def test_median_of_an_odd_number() -> None:
    assert flat(Median().combine(deltas([1.0, 9.0], [5.0, 2.0], [3.0, 4.0]), [1.0] * 3)) == [3.0, 4.0]


def test_multi_krum_by_hand() -> None:
    # With f = 1 of 5 a score is the sum over the two nearest: 0, 1, 2 are close, 10 less so, 100 not at all.
    cohort = deltas([0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [10.0, 0.0], [100.0, 0.0])
    assert flat(MultiKrum(fraction=0.2).combine(cohort, [1.0] * 5)) == pytest.approx([13 / 4, 0.0])
    assert flat(MultiKrum(fraction=0.4).combine(cohort, [1.0, 1.0, 2.0, 1.0, 1.0])) == pytest.approx([5 / 4, 0.0])


def test_bounded_mean_by_hand() -> None:
    cohort = deltas([3.0, 4.0], [0.6, 0.8], [0.0, 0.0])  # of norm 5, 1 and 0
    assert flat(BoundedMean(max_norm=2.5).combine(cohort, [2.0, 1.0, 1.0])) == pytest.approx(
        [(2 * 1.5 + 0.6) / 4, (2 * 2.0 + 0.8) / 4]
    )


rows = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), min_size=1, max_size=7)


@given(rows=rows, order=st.randoms(use_true_random=False), aggregator=st.sampled_from(AGGREGATORS))
def test_the_order_of_clients_is_irrelevant(rows: list[list[float]], order: Any, aggregator: Aggregator) -> None:
    places = list(range(len(rows)))
    order.shuffle(places)
    weights = [1.0 + place for place in range(len(rows))]
    straight = aggregator.combine(deltas(*rows), weights)
    shuffled = aggregator.combine(deltas(*(rows[place] for place in places)), [weights[place] for place in places])
    if not isinstance(aggregator, MultiKrum):  # among equal scores it keeps the first ones
        assert flat(shuffled) == pytest.approx(flat(straight), abs=TOLERANCE)


@given(order=st.permutations(range(6)), fraction=st.sampled_from([0.0, 0.2, 0.4]))
def test_multi_krum_keeps_the_same_clients_in_any_order(order: list[int], fraction: float) -> None:
    """Six clients whose scores all differ: whom it keeps is a matter of the deltas alone."""
    rows = [[0.0, 0.1], [0.3, 0.0], [0.0, 0.7], [1.5, 0.2], [4.0, 1.0], [11.0, 5.0]]
    weights = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    aggregator = MultiKrum(fraction=fraction)
    straight = aggregator.combine(deltas(*rows), weights)
    shuffled = aggregator.combine(deltas(*(rows[place] for place in order)), [weights[place] for place in order])
    assert flat(shuffled) == pytest.approx(flat(straight), abs=TOLERANCE)
    assert (flat(straight) == pytest.approx(flat(Mean().combine(deltas(*rows), weights)))) == (fraction == 0.0)


@given(row=rows.map(lambda found: found[0]), number=st.integers(1, 6), aggregator=st.sampled_from(AGGREGATORS))
def test_equal_clients_are_left_as_they_are(row: list[float], number: int, aggregator: Aggregator) -> None:
    assert flat(aggregator.combine(deltas(*[row] * number), [2.0] * number)) == pytest.approx(row, abs=TOLERANCE)


@given(honest=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2), min_size=4, max_size=8),
       poison=st.floats(-1e6, 1e6, width=32), aggregator=st.sampled_from(ROBUST))  # fmt: skip
def test_a_poisoned_client_moves_robust_aggregators_within_a_bound(
    honest: list[list[float]], poison: float, aggregator: Aggregator
) -> None:
    combined = flat(aggregator.combine(deltas(*honest, [poison, -poison]), [1.0] * (len(honest) + 1)))
    assert max(map(abs, combined)) <= 3.0
    if not isinstance(aggregator, BoundedMean):
        assert max(map(abs, combined)) <= 1.0 + 1e-6 or abs(poison) < 10


def test_the_mean_has_no_such_bound() -> None:
    assert flat(Mean().combine(deltas([0.0, 0.0], [1e6, 0.0]), [1.0, 1.0])) == [5e5, 0.0]


# Server optimisers


def steps(optimizer: ServerOptimizer, numbers: list[float]) -> list[float]:
    adapter = {"a": torch.zeros(1, dtype=torch.float64)}
    state = optimizer.init(adapter)
    found = []
    for number in numbers:
        adapter, state = optimizer.step(adapter, {"a": torch.tensor([number], dtype=torch.float64)}, state)
        found.append(float(adapter["a"]))
    return found


def test_fedavgm_by_hand() -> None:
    assert steps(ServerSgd(learning_rate=0.5), [2.0, 4.0]) == [1.0, 3.0]
    assert steps(ServerSgd(momentum=0.5), [2.0, 4.0, 0.0]) == [2.0, 7.0, 9.5]


@pytest.mark.parametrize("optimizer", [ServerAdagrad(), ServerAdam(), ServerYogi(), ServerAdam(beta1=0.0, beta2=0.0)])
def test_adaptive_optimisers_equal_algorithm_2(optimizer: Adaptive) -> None:
    numbers = [0.5, -2.0, 0.0, 1e-3]
    x, m, v, expected = 0.0, 0.0, optimizer.tau**2, []
    for d in numbers:
        m = optimizer.beta1 * m + (1 - optimizer.beta1) * d
        if isinstance(optimizer, ServerAdagrad):
            v = v + d * d
        elif isinstance(optimizer, ServerAdam):
            v = optimizer.beta2 * v + (1 - optimizer.beta2) * d * d
        elif isinstance(optimizer, ServerYogi):
            sign = (v > d * d) - (v < d * d)
            v = v - (1 - optimizer.beta2) * d * d * sign
        x = x + optimizer.learning_rate * m / (v**0.5 + optimizer.tau)
        expected.append(x)
    assert steps(optimizer, numbers) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("optimizer", [ServerSgd(momentum=0.9), ServerAdam()])
def test_tensors_without_a_delta_are_left_alone(optimizer: ServerOptimizer) -> None:
    adapter = {"a": torch.ones(2), "b": torch.ones(2)}
    state = optimizer.init(adapter)
    after, next_state = optimizer.step(adapter, {"b": torch.ones(2)}, state)
    assert list(after) == ["a", "b"] and next_state.keys() == state.keys()
    assert after["a"] is adapter["a"]
    assert all(next_state[name] is state[name] for name in state if name.endswith(".a"))
    assert not torch.equal(after["b"], adapter["b"])


@pytest.mark.parametrize(("mean", "std"), [(2.0, 0.7), (-3.0, 2.0), (300.0, 1.0)])
def test_a_gaussian_average_is_one_of_the_rounds_without_it(tiny_model: str, mean: float, std: float) -> None:
    """After each round; clients go on as if there were none."""
    model = adapt(tiny_model)
    plain = several_rounds(federation(model, LOCAL, per_block=5, optimizer=ServerSgd(momentum=0.5)), 4)[0]
    parts = federation(model, LOCAL, per_block=5, optimizer=GaussianAverage(momentum=0.5, mean=mean, std=std))
    states = several_rounds(parts, 4)[0]
    for round in range(1, 5):
        logs = [-((each - mean) ** 2) / (2 * std**2) for each in range(1, round + 1)]
        weights = torch.tensor(logs, dtype=torch.float64).softmax(dim=0).tolist()
        expected = tree.weighted_mean([state.adapter for state in plain[1 : round + 1]], weights)
        assert_states_close(states[round].adapter, expected)
        assert_states_close(parts.continued(states[round]).adapter, plain[round].adapter, atol=0)


def test_an_audit_repeats_the_rounds_of_an_average(tiny_model: str) -> None:
    sent: list[ClientUpdate] = []

    def note(round: int, update: ClientUpdate) -> ClientUpdate:
        sent.append(update)
        return update

    optimizer, hooks = GaussianAverage(mean=1.0), Hooks(update=note)
    parts = federation(adapt(tiny_model), LOCAL, per_block=5, optimizer=optimizer, hooks=hooks)
    states, _ = several_rounds(parts, 2)
    again = [update for _, update in sent_updates(parts, states[1])]
    for update, expected in zip(again, sent[len(again) :], strict=True):
        assert_states_close(update.delta, expected.delta)


# The error of averaging the factors


def test_aggregation_error_by_hand() -> None:
    left = {"x.lora_A": torch.tensor([[1.0, 0.0]]), "x.lora_B": torch.tensor([[1.0], [0.0]])}
    right = {"x.lora_A": torch.tensor([[0.0, 1.0]]), "x.lora_B": torch.tensor([[0.0], [1.0]])}
    mean = tree.weighted_mean([left, right], [1, 1])
    # The mean product is I / 2, of norm sqrt(1/2); the product of means has 1/4 everywhere: they differ by 1/4 each.
    assert aggregation_error([left, right], [1, 1], mean) == pytest.approx(0.5 / 0.5**0.5)
    assert aggregation_error([left, left], [1, 3], left) == pytest.approx(0, abs=1e-12)
    zero = tree.scale(left, 0.0)
    assert aggregation_error([zero, zero], [1, 1], zero) is None
    assert aggregation_error([{"head": torch.ones(2)}], [1], {"head": torch.ones(2)}) is None


@given(seed=st.integers(0, 999), number=st.integers(1, 5), rank=st.integers(1, 4))
def test_aggregation_error_equals_dense_products(seed: int, number: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.lora_A": (rank, 6), "x.lora_B": (5, rank), "y.lora_A": (rank, 3), "y.lora_B": (9, rank)}
    clients = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(number + 1)
    ]
    server, clients = clients[0], clients[1:]
    weights = [1.0 + place for place in range(number)]
    wrong = mean = 0.0
    for layer in ("x", "y"):
        dense = sum(
            weight / sum(weights) * client[f"{layer}.lora_B"] @ client[f"{layer}.lora_A"]
            for weight, client in zip(weights, clients, strict=True)
        )
        own = server[f"{layer}.lora_B"] @ server[f"{layer}.lora_A"]
        wrong += float((dense - own).square().sum())
        mean += float(torch.as_tensor(dense).square().sum())
    assert aggregation_error(clients, weights, server) == pytest.approx((wrong / mean) ** 0.5, rel=1e-9)


LEFT = {"x.lora_A": torch.eye(2, dtype=torch.float64), "x.lora_B": torch.eye(2, dtype=torch.float64)}


def errors(changes: list[State], **options: Any) -> list[float | None]:
    """The error of three rounds that begin with `LEFT`, in each of which clients of equal weight change the same."""
    clients = [ClientData(np.arange(1), np.arange(0)) for _ in changes]
    parts = Federation(
        engine=Engine(None, None, 1),  # type: ignore[arg-type]
        clients=clients,
        participation=Participation(Uniform(), np.ones(len(changes))),
        local=LOCAL,
        schedule=Synchronous(),
        num_rounds=3,
        rng=Rng(0),
    )
    parts = variant(parts, **options)
    state = ServerState(0, LEFT, parts.server.optimizer.init(LEFT))
    found = []
    for round in range(1, 4):
        begin = {client: parts.received(state.adapter, client) for client in range(len(changes))}
        updates = [ClientUpdate(client, 1, fp64(delta), 0.0, 1) for client, delta in enumerate(changes)]
        after = step(parts, state, updates, begin)
        state = ServerState(round, after.adapter, after.optimizer, after.correction)
        found.append(after.aggregation_error)
    return found


SERVER_OPTIMIZERS = [ServerSgd(), ServerSgd(learning_rate=0.1, momentum=0.9), ServerAdam(), ServerYogi()]


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("aggregator", [Mean(), Median()])
def test_what_the_server_does_afterwards_is_no_error_of_averaging(
    optimizer: ServerOptimizer, aggregator: Aggregator
) -> None:
    b_alone = [{"x.lora_B": torch.tensor([[float(client), 0.0], [0.0, 3.0]])} for client in range(3)]
    found = errors(b_alone, strategy=FfaLora(), optimizer=optimizer, aggregator=aggregator)
    assert found == pytest.approx([0.0] * 3, abs=TOLERANCE)


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_the_error_of_a_round_by_hand(optimizer: ServerOptimizer) -> None:
    one = {"x.lora_A": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "x.lora_B": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    found = errors([one, tree.scale(one, 0.0)], strategy=FedAvg(), optimizer=optimizer)
    # From I and I one client comes to diag(2, 1) twice, the other stays. The mean product is diag(2.5, 1), of norm
    # sqrt(7.25), the product of the means diag(2.25, 1), whatever the server makes of them.
    assert found[0] == pytest.approx(0.25 / 7.25**0.5, rel=TOLERANCE)


def test_ranks_that_nobody_in_the_cohort_holds_are_no_error() -> None:
    same = {"x.lora_A": torch.tensor([[1.0, 0.5], [0.0, 0.0]]), "x.lora_B": torch.tensor([[0.5, 0.0], [1.0, 0.0]])}
    assert errors([same] * 2, strategy=HetLora(), ranks=np.array([1, 1])) == pytest.approx([0.0] * 3, abs=TOLERANCE)
    other = {"x.lora_A": torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), "x.lora_B": torch.tensor([[-1.0, 0.0], [0.0, 0.0]])}
    # From the first rank of I and I: one client comes to [2, 0.5] and [1.5, 1], the other to zeros. The mean product is
    # half of the first one's, the product of the means a quarter: it lacks half of what there is.
    found = errors([same, other], strategy=HetLora(), ranks=np.array([1, 1]))
    assert found[0] == pytest.approx(0.5, rel=TOLERANCE)


def product(state: State) -> torch.Tensor:
    return state["x.lora_B"].double() @ state["x.lora_A"].double()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_flexlora_keeps_the_nearest_product(number: int) -> None:
    clients, weights = low_rank_clients(number), [1.0 + place for place in range(number)]
    dense = torch.as_tensor(
        sum(weight / sum(weights) * product(client) for weight, client in zip(weights, clients, strict=True))
    )
    u, values, v = torch.linalg.svd(dense)
    nearest = u[:, :2] @ values[:2].diag() @ v[:2]
    settled = FlexLora().finalize(tree.weighted_mean(clients, weights), clients, weights)
    torch.testing.assert_close(product(settled), nearest, atol=TOLERANCE, rtol=0)
    gram = settled["x.lora_A"] @ settled["x.lora_A"].T
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64), atol=TOLERANCE, rtol=0)
    expected = float(values[2:].square().sum() / values.square().sum()) ** 0.5
    assert aggregation_error(clients, weights, settled) == pytest.approx(expected, abs=TOLERANCE)


def test_flexlora_leaves_an_untrained_start_alone() -> None:
    clients = [{**client, "x.lora_B": torch.zeros(5, 2)} for client in low_rank_clients(1)] * 3
    settled = FlexLora().finalize(clients[0], clients, [1.0] * 3)
    assert torch.equal(settled["x.lora_A"], clients[0]["x.lora_A"])
    assert not settled["x.lora_B"].any()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_lora_fair_is_the_ridge_regression(number: int) -> None:
    clients, weights, penalty = low_rank_clients(number), [1.0 + place for place in range(number)], 0.3
    averaged = tree.weighted_mean(clients, weights)
    dense = torch.as_tensor(
        sum(weight / sum(weights) * product(client) for weight, client in zip(weights, clients, strict=True))
    )
    A, B = averaged["x.lora_A"].double(), averaged["x.lora_B"].double()
    stacked = torch.cat([A.T, penalty**0.5 * torch.eye(2, dtype=torch.float64)])
    target = torch.cat([(dense - B @ A).T, torch.zeros(2, 5, dtype=torch.float64)])
    expected = B + torch.linalg.lstsq(stacked, target).solution.T
    settled = LoraFair(penalty=penalty).finalize(averaged, clients, weights)
    torch.testing.assert_close(settled["x.lora_B"].double(), expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(settled["x.lora_A"], averaged["x.lora_A"])
    better, before = (aggregation_error(clients, weights, each) for each in (settled, averaged))
    assert better is not None and before is not None and better <= before + 1e-12


# Strategies, trained for real


def rounds(
    model: str, strategy: Strategy, number: int, local: LocalTraining = LOCAL, **options: Any
) -> tuple[list[ServerState], list[RoundResult]]:
    adapted = adapt(model, Lora(rank=2))
    parts = federation(adapted, local, strategy=strategy, **options)
    states, results = [start(adapted)], []
    for _ in range(number):
        state, result = run_round(parts, states[-1])
        states.append(state)
        results.append(result)
    return states, results


def test_ffa_lora_trains_and_sends_b_alone(tiny_model: str) -> None:
    states, results = rounds(tiny_model, FfaLora(), 2)
    _, plain = rounds(tiny_model, FedAvg(), 2)
    for (before, after), result, other in zip(pairwise(states), results, plain, strict=True):
        assert changed(before.adapter, after.adapter) == {"lora_B"}
        assert result.aggregation_error == pytest.approx(0, abs=TOLERANCE)
        assert result.uplink_bytes == result.downlink_bytes < 0.6 * other.uplink_bytes
    assert plain[1].aggregation_error is not None and plain[1].aggregation_error > 1e-3


def test_rolora_alternates(tiny_model: str) -> None:
    states, results = rounds(tiny_model, RoLora(), 3)
    found = [changed(before.adapter, after.adapter) for before, after in pairwise(states)]
    assert found == [{"lora_B"}, {"lora_A"}, {"lora_B"}]
    assert all(result.aggregation_error == pytest.approx(0, abs=TOLERANCE) for result in results)


@pytest.mark.parametrize("strategy", [FfaLora(), RoLora()])
@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.9, weight_decay=0.1), Adam(weight_decay=0.1)])
def test_frozen_factors_equal_a_plain_loop(tiny_model: str, strategy: Strategy, optimizer: Any) -> None:
    local = LocalTraining(learning_rate=0.05, batch_size=100, epochs=3, optimizer=optimizer, clip_norm=0.5)
    states, _ = rounds(tiny_model, strategy, 2, local)
    model = adapt(tiny_model, Lora(rank=2))
    parts = federation(model, local)
    adapter = start(model).adapter
    for round in (1, 2):
        ends = []
        for client in parts.clients:
            leaves = {
                name: tensor.clone().requires_grad_(strategy.trains(name, round)) for name, tensor in adapter.items()
            }
            trained = [tensor for tensor in leaves.values() if tensor.requires_grad]
            if isinstance(optimizer, Adam):
                torch_optimizer: Any = torch.optim.Adam(trained, lr=0.05, weight_decay=0.1)
            else:
                torch_optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1)
            stem = parts.engine.features.take(torch.from_numpy(client.train), torch.device("cpu"))
            labels = parts.engine.features.labels[client.train]
            for _ in range(3):
                with model.adapter.bind({name: leaf.unsqueeze(0) for name, leaf in leaves.items()}):
                    classes = model.class_features(1)[0]
                    logits = model.logit_scale() * model.image_features(stem, 1)[0] @ classes.T
                torch_optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits, labels).backward()
                torch.nn.utils.clip_grad_norm_(trained, 0.5)
                torch_optimizer.step()
            ends.append({name: leaf.detach() for name, leaf in leaves.items()})
        adapter = tree.weighted_mean(ends, [len(client.train) for client in parts.clients])
        assert_states_close(states[round].adapter, adapter)


@pytest.mark.parametrize("strategy", [FfaLora(), RoLora()])
def test_clients_per_block_change_nothing_where_factors_are_frozen(tiny_model: str, strategy: Strategy) -> None:
    local = dataclasses.replace(LOCAL, learning_rate=0.01)
    one, two, five = (rounds(tiny_model, strategy, 2, local, per_block=number)[0][-1].adapter for number in (1, 2, 5))
    assert_states_close(one, two)
    assert_states_close(one, five)


@pytest.mark.parametrize("strategy", [FlexLora(), LoraFair()])
def test_settling_brings_the_server_nearer_to_the_mean_product(tiny_model: str, strategy: Strategy) -> None:
    states, results = rounds(tiny_model, strategy, 2)
    _, plain = rounds(tiny_model, FedAvg(), 2)
    assert changed(states[0].adapter, states[1].adapter) == {"lora_A", "lora_B"}
    first, other = results[0].aggregation_error, plain[0].aggregation_error  # of the same clients
    assert first is not None and other is not None and first < other
    local = dataclasses.replace(LOCAL, learning_rate=0.01)
    one, five = (rounds(tiny_model, strategy, 2, local, per_block=number)[0][-1].adapter for number in (1, 5))
    for layer in layers(one):  # a pair of singular vectors may change its sign, their product doesn't
        left, right = (each[f"{layer}.lora_B"] @ each[f"{layer}.lora_A"] for each in (one, five))
        torch.testing.assert_close(left, right, atol=TOLERANCE, rtol=0)


def test_one_client_is_left_as_it_is(tiny_model: str) -> None:
    for aggregator in AGGREGATORS:
        adapted = adapt(tiny_model, Lora(rank=2))
        parts = federation(adapted, LOCAL, cohort=1, aggregator=aggregator)
        _, result = run_round(parts, start(adapted))
        assert result.num_clients == 1
        assert result.aggregation_error == pytest.approx(0, abs=TOLERANCE)


# The configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"strategy": "ffa_lora"}, "adapter": "full"},
         "server.strategy: ffa_lora treats A and B differently: expected adapter lora, got full"),
        ({"server": {"strategy": "rolora"}, "local": {"optimizer_state": "kept"}},
         "local.optimizer_state: expected fresh, because the strategy trains other tensors from round to round"),
        ({"server": {"strategy": "flexlora"}, "local": {"optimizer_state": "kept"}},
         "local.optimizer_state: expected fresh, because the strategy gives A and B another basis each round"),
        ({"server": {"strategy": "flexlora"}, "personal": "ditto"},
         "personal: ditto can't be used, because the strategy gives A and B another basis each round, and a distance "
         "from them means nothing"),
        ({"server": {"strategy": "flexlora", "optimizer": "adam"}},
         "server.strategy: flexlora replaces the plain mean: expected aggregator mean, optimizer sgd with its "
         "defaults, and no correction that the server remembers"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, **changes}))
    assert str(caught.value) == message


def test_options_are_checked(raw_config: dict[str, Any]) -> None:
    config = parse_config(
        {**raw_config, "server": {"strategy": "rolora", "aggregator": {"name": "trimmed_mean", "fraction": 0.1},
                                  "optimizer": {"name": "yogi", "learning_rate": 0.01}}}
    )  # fmt: skip
    assert config.server.aggregator == TrimmedMean(fraction=0.1)
    assert config.server.optimizer == ServerYogi(learning_rate=0.01)
    with pytest.raises(OptionError, match=r"fraction: expected a number at least 0 and below 0\.5, got 0\.5"):
        TrimmedMean(fraction=0.5)


def test_full_fine_tuning_has_no_low_rank_error_and_makes_no_clients_adapter(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ends: object, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is made")

    monkeypatch.setattr(tree.Moved, "__getitem__", refuse)
    monkeypatch.setattr(tree, "moves_of", refuse)
    with pytest.raises(AssertionError, match=r"lora_. is made"):
        rounds(tiny_model, FedAvg(), 1)
    adapted = adapt(tiny_model, FullFineTuning())
    _, result = run_round(federation(adapted, LOCAL), start(adapted))
    assert result.aggregation_error is None


# Every strategy

ALL = {name: cls() for name, cls in components(Strategy).items()}
PRODUCTS = {name: each for name, each in ALL.items() if not each.has_personal and each.num_clusters == 1}


def multiplied(state: State, layer: str) -> torch.Tensor:
    """B A and the residual of a layer, multiplied out."""
    pairs = [product_of(state, layer), *residual_of(state, layer)]
    return torch.stack([left @ right for left, right in pairs]).sum(dim=0)


def after_round(model: str, strategy: Strategy, sizes: list[np.ndarray], cohort: int | None = None) -> tuple[Any, ...]:
    """Federation, state before and after a round, and its result, of clients with these examples, all in one batch."""
    adapted = adapt(model, Lora(rank=2))
    local = dataclasses.replace(LOCAL, batch_size=100)
    parts = federation(adapted, local, cohort=cohort, strategy=strategy)
    none = np.array([], dtype=np.int64)
    clients = [ClientData(examples, none) for examples in sizes]
    parts = variant(parts, clients=clients, sizes=np.array([len(examples) for examples in sizes]))
    state = parts.initial_state(adapted.initial_adapter(Rng(1)))
    state, _ = run_round(parts, state)  # so that neither factor begins at zero
    return parts, state, *run_round(parts, state)


@pytest.mark.parametrize("name", PRODUCTS)
def test_one_client_ends_at_the_server(tiny_model: str, name: str) -> None:
    strategy, examples = PRODUCTS[name], np.arange(9)
    parts, before, after, result = after_round(tiny_model, strategy, [examples])
    rng = parts.rng.child("round", 2)
    client = {**before.adapter, **train(parts, {0: before.adapter}, round=2, rng=rng)[0].adapter}
    for layer in layers(before.adapter):
        there, here = multiplied(after.adapter, layer), multiplied(client, layer)
        # LoRA-FAIR's penalty on its own term is all that could keep it away.
        torch.testing.assert_close(there, here, atol=TOLERANCE, rtol=0)
        assert (here - multiplied(before.adapter, layer)).abs().max() > 1e-5
    assert result.aggregation_error == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("name", PRODUCTS)
def test_equal_clients_have_no_error(tiny_model: str, name: str) -> None:
    _, before, after, result = after_round(tiny_model, PRODUCTS[name], [np.arange(9)] * 4)
    _, _, alone, _ = after_round(tiny_model, PRODUCTS[name], [np.arange(9)])
    assert result.num_clients == 4
    assert result.aggregation_error == pytest.approx(0, abs=TOLERANCE)
    for layer in layers(before.adapter):
        torch.testing.assert_close(
            multiplied(after.adapter, layer), multiplied(alone.adapter, layer), atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_clients_decides_nothing(name: str) -> None:
    strategy = ALL[name]
    clients, weights = low_rank_clients(4), [1.0, 2.0, 3.0, 4.0]
    found = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        some, own = [clients[place] for place in order], [weights[place] for place in order]
        server = strategy.initial({"x.lora_A": clients[0]["x.lora_A"], "x.lora_B": torch.zeros(5, 2)})
        settled = strategy.finalize({**server, **tree.weighted_mean(some, own)}, some, own)
        found.append(multiplied(settled, "x"))
    torch.testing.assert_close(found[0], found[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("aggregator", ROBUST)
def test_a_poisoned_client_in_a_round(tiny_model: str, aggregator: Aggregator) -> None:
    """One of five sends noise of a thousand times its update; what the server does is still within the honest range."""
    adapted = adapt(tiny_model, Lora(rank=2))
    honest: list[ClientUpdate] = []

    def poison(round: int, update: ClientUpdate) -> ClientUpdate:
        if update.client:
            honest.append(update)
            return update
        generator = torch.Generator().manual_seed(0)
        noise = fp64({key: torch.randn(tensor.shape, generator=generator) for key, tensor in update.delta.items()})
        factor = 1000 * tree.norm(update.delta) / tree.norm(noise)
        return dataclasses.replace(update, delta=tree.scale(noise, factor))

    bounded = isinstance(aggregator, BoundedMean)
    aggregator = BoundedMean(max_norm=0.1) if bounded else aggregator
    parts = federation(adapted, LOCAL, aggregator=aggregator, hooks=Hooks(update=poison))
    before = start(adapted)
    after, _ = run_round(parts, before)
    moved = tree.subtract(after.adapter, before.adapter)
    if bounded:
        assert tree.norm(moved) <= 0.1 + 1e-6
    else:
        for key, tensor in moved.items():
            numbers = torch.stack([update.delta[key] for update in honest])
            assert (tensor <= numbers.max(dim=0).values + 1e-5).all()
            assert (tensor >= numbers.min(dim=0).values - 1e-5).all()
    plain, _ = run_round(variant(parts, aggregator=Mean()), before)
    assert tree.norm(tree.subtract(plain.adapter, before.adapter)) > 20 * tree.norm(moved)

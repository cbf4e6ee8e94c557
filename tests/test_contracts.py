"""Components of a user's own that return what they must not: one line names the setting, the component, the fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from flora.client.objectives import Objective
from flora.client.optimizers import Schedule
from flora.client.penalties import Penalty
from flora.communication.compressors import Compressor
from flora.communication.sampling import Sampler
from flora.config.parse import parse_config
from flora.core import registry
from flora.core.errors import DivergedError, UserError
from flora.core.registry import Component, register
from flora.data.datasets.base import ImageData, Split
from flora.data.partition import Partitioner
from flora.data.splits import Splitter
from flora.server.aggregators import Aggregator
from flora.server.optimizers import ServerOptimizer
from flora.server.strategies.base import Strategy
from flora.simulate import simulate

FIRST = "text.0.q.lora_A"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = {kind: dict(known) for kind, known in registry._REGISTRY.items()}
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def own(kind: type[Component], method: str, returned: Callable[..., Any]) -> None:
    """Register `mine`, whose method returns what `returned` makes of its arguments."""
    cls = type("Mine", (kind,), {method: lambda self, *args, **options: returned(*args, **options)})
    register("mine")(dataclass(frozen=True)(cls))


def fault(raw: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        simulate(parse_config({**raw, **changes}))
    return str(caught.value)


def mean(deltas: Sequence[Any], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in deltas[0].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda delta: delta | {FIRST: torch.zeros(2, 1)}, f"'{FIRST}' as float32 (2, 1), expected float32 (2, 32)"),
        (lambda delta: delta | {FIRST: delta[FIRST].long()}, f"'{FIRST}' as int64 (2, 32), expected float32 (2, 32)"),
        (lambda delta: delta | {FIRST: 0.0}, f"'{FIRST}' as a float, expected float32 (2, 32)"),
        (lambda delta: delta | {"more": torch.zeros(1)}, "a tensor 'more' that nobody knows"),
        (lambda delta: {name: delta[name] for name in delta if name != FIRST}, f"no tensor '{FIRST}'"),
        (lambda delta: None, "a NoneType, expected tensors by name"),
    ],
)  # fmt: skip
def test_aggregators_and_server_optimizers(raw_config: dict[str, Any], change: Any, message: str) -> None:
    own(Aggregator, "combine", lambda deltas, weights: change(mean(deltas, weights)))
    assert fault(raw_config, server={"aggregator": "mine"}) == f"server.aggregator: mine returned {message}"
    own(ServerOptimizer, "step", lambda adapter, delta, state: (change(dict(adapter)), state))
    assert fault(raw_config, name="b", server={"optimizer": "mine"}) == f"server.optimizer: mine returned {message}"
    own(Strategy, "finalize", lambda averaged, clients, weights: change(dict(averaged)))
    assert fault(raw_config, name="c", server={"strategy": "mine"}) == f"server.strategy: mine returned {message}"


def test_a_server_optimizer_that_remembers_what_it_did_not_begin_with(raw_config: dict[str, Any]) -> None:
    own(ServerOptimizer, "step", lambda adapter, delta, state: (adapter, {**state, "count": torch.ones(1)}))
    message = "server.optimizer: mine returned a tensor 'count' that nobody knows"
    assert fault(raw_config, server={"optimizer": "mine"}) == message


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0] * 3, "3 weights for 4 clients"), ([0.0] * 4, "weights that are all 0"),
     ([1.0, -2.0, 1.0, 1.0], "a weight of -2"), ([float("nan")] * 4, "a weight of nan")],
)  # fmt: skip
def test_weights(raw_config: dict[str, Any], weights: list[float], message: str) -> None:
    own(Strategy, "weights", lambda updates: weights)
    assert fault(raw_config, server={"strategy": "mine"}) == f"server.strategy: mine returned {message}"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0], [1], [2]], "3 parts for 4 clients"),
        ([[0], [1], [2], [3, -1]], "-1 among the examples of client 3, expected 0 to 59"),
        ([[0], [60], [2], [3]], "60 among the examples of client 1, expected 0 to 59"),
        ([[0], [1], [5, 2, 5], [3]], "5 twice among the examples of client 2"),
        ([[0.0], [1], [2], [3]], "examples of client 0 as float64 (1,), expected whole numbers in one row"),
        ([[[0]], [1], [2], [3]], "examples of client 0 as int64 (1, 1), expected whole numbers in one row"),
    ],
)
def test_partitioners(raw_config: dict[str, Any], parts: list[Any], message: str) -> None:
    own(Partitioner, "split", lambda labels, num_clients, rng, *, groups: [np.array(part) for part in parts])
    assert fault(raw_config, partition="mine") == f"partition: mine returned {message}"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0], "1 clients, expected 2"),
        ([1, 1], "1 twice among the clients"),
        ([0, 4], "4 among the clients, expected 0 to 3"),
        ([-1, 0], "-1 among the clients, expected 0 to 3"),
    ],
)
def test_samplers(raw_config: dict[str, Any], ids: list[int], message: str) -> None:
    own(Sampler, "sample", lambda sizes, number, rng: np.array(ids))
    clients = {"number": 4, "cohort": {"name": "mine", "number": 2}}
    assert fault(raw_config, clients=clients) == f"clients.cohort: mine returned {message}"


def test_splitters(raw_config: dict[str, Any]) -> None:
    def shifted(data: ImageData, rng: Any) -> ImageData:
        train = data.train
        return ImageData(Split(train.source, train.source_indices + 1, train.labels), data.test, data.class_names)

    own(Splitter, "split", shifted)
    message = "split: mine returned 60 among the source_indices of the training images, expected 0 to 59"
    assert fault(raw_config, split="mine") == message
    own(Splitter, "split", lambda data, rng: (data.train, data.test))
    assert fault(raw_config, split="mine", name="b") == "split: mine returned a tuple, expected ImageData"


def test_compressors(raw_config: dict[str, Any]) -> None:
    def decode(self: Any, payload: bytes, like: Any) -> Any:
        return {name: torch.zeros(1) for name in like}

    cls = type("Mine", (Compressor,), {"encode": lambda self, state, rng: b"", "decode": decode})
    register("mine")(dataclass(frozen=True)(cls))
    expected = f"mine returned '{FIRST}' as float32 (1,), expected float32 (2, 32)"
    for way in ("upload", "broadcast"):
        assert fault(raw_config, communication={way: "mine"}, name=way) == f"communication.{way}: {expected}"
    cls = type("Mine", (Compressor,), {"encode": lambda self, state, rng: "text", "decode": decode})
    register("mine")(dataclass(frozen=True)(cls))
    message = "communication.upload: mine returned a str to send, expected bytes"
    assert fault(raw_config, communication={"upload": "mine"}, name="text") == message


def test_what_a_step_minimises(raw_config: dict[str, Any]) -> None:
    own(Objective, "loss", lambda view: view.images.sum())
    message = "local.objective: mine returned float32 (), expected shape (4,)"
    assert fault(raw_config, local={**raw_config["local"], "objective": "mine"}, name="a") == message
    own(Penalty, "loss", lambda view: view.images.sum())
    message = "local.penalty: mine returned float32 (), expected shape (4,)"
    assert fault(raw_config, local={**raw_config["local"], "penalty": "mine"}, name="b") == message
    own(Schedule, "after_warmup", lambda num_done, number: float("nan"))
    message = "local.schedule: mine returned a factor of nan in round 1"
    assert fault(raw_config, local={**raw_config["local"], "schedule": "mine"}, name="c") == message


# Numbers that are not finite


def test_a_server_optimizer_is_named_and_no_client_is_blamed(raw_config: dict[str, Any]) -> None:
    with pytest.raises(DivergedError) as caught:
        simulate(parse_config({**raw_config, "server": {"optimizer": {"name": "sgd", "learning_rate": 1e300}}}))
    assert str(caught.value) == (
        "round 1: the step of server.optimizer sgd at learning rate 1e+300 is not finite; lower "
        "server.optimizer.learning_rate"
    )


def test_a_server_that_steps_too_far_is_named_beside_the_clients(raw_config: dict[str, Any]) -> None:
    """The step is finite, but the next round's losses are not."""
    raw = {**raw_config, "rounds": 6, "server": {"optimizer": {"name": "sgd", "learning_rate": 1e38}}}
    assert fault(raw, evaluation={"every": 10}).startswith(
        "round 2: client 0 diverged at step 0 (not finite), at the adapter that the server sent: lower "
        "server.optimizer.learning_rate, or local.learning_rate (0.01)"
    )
    line = "look at backbone.weights, adapter.alpha, local.learning_rate and server.optimizer.learning_rate"
    assert fault(raw, name="measured").endswith(line)


def test_a_aggregator_and_a_strategy_are_named(raw_config: dict[str, Any]) -> None:
    own(Aggregator, "combine", lambda deltas, weights: {n: tensor * float("nan") for n, tensor in deltas[0].items()})
    message = "round 1: what server.aggregator mine made of finite updates is not finite"
    assert fault(raw_config, server={"aggregator": "mine"}) == message
    own(Strategy, "finalize", lambda averaged, *others: {n: tensor / 0 for n, tensor in averaged.items()})
    message = "round 1: what server.strategy mine made of a finite adapter is not finite"
    assert fault(raw_config, server={"strategy": "mine"}, name="b") == message

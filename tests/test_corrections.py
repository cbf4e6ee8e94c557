"""FedProx, SCAFFOLD and FedDyn with a client axis, against loops over one client at a time in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, adapt, assert_states_close, comparable, federation, mean, start, variant

from flora.client.corrections import Correction, FedDyn, FedProx, NoCorrection, Scaffold
from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.clip.adapters.lora import Lora
from flora.communication.options import payload_bytes
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core import tree
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.registry import register
from flora.core.rng import Rng
from flora.core.states import ClientData, ClientUpdate, ServerState
from flora.core.tree import State
from flora.engine.engine import Engine
from flora.evaluation.local_only import train_local_only
from flora.federated.aggregation import step
from flora.federated.federation import Federation, ServerParts
from flora.federated.round import run_round
from flora.federated.synchronous import Synchronous
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.base import Strategy
from flora.simulate import resume, simulate

RATE, EPOCHS, ROUNDS = 0.02, 3, 3


def local(correction: Correction, **options: Any) -> LocalTraining:
    return LocalTraining(
        learning_rate=RATE, batch_size=100, epochs=EPOCHS, optimizer=Sgd(), correction=correction, **options
    )


def prepared(model: str, correction: Correction, **options: Any) -> tuple[Federation, ServerState]:
    adapted = adapt(model, Lora(rank=2))
    parts = federation(adapted, local(correction), **options)
    first = start(adapted)
    return parts, parts.initial_state(first.adapter)


def trained(
    model: str, correction: Correction, rounds: int = ROUNDS, *, weighting: str = "examples", **options: Any
) -> ServerState:
    parts, state = prepared(model, correction, **options)
    parts = variant(parts, strategy=FedAvg(weighting=weighting))
    for _ in range(rounds):
        state, _ = run_round(parts, state)
    return state


def gradient(parts: Federation, client: int, vector: torch.Tensor, like: State) -> torch.Tensor:
    """The gradient of one client's mean cross-entropy over all its examples, flat."""
    leaf = vector.clone().requires_grad_()
    adapter = tree.unflatten(leaf, like)
    examples, model = parts.clients[client].train, parts.engine.model
    stem = parts.engine.features.take(torch.from_numpy(examples), torch.device("cpu"))
    with model.adapter.bind({name: tensor.unsqueeze(0) for name, tensor in adapter.items()}):
        logits = model.logit_scale() * model.image_features(stem, 1)[0] @ model.class_features(1)[0].T
    torch.nn.functional.cross_entropy(logits, parts.engine.features.labels[examples]).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_fedprox_equals_a_plain_loop(tiny_model: str) -> None:
    parts, state = prepared(tiny_model, FedProx(mu=0.7))
    x = tree.flatten(state.adapter)
    for _ in range(ROUNDS):
        ends = []
        for client in range(5):
            w = x.clone()
            for _ in range(EPOCHS):
                w = w - RATE * (gradient(parts, client, w, state.adapter) + 0.7 * (w - x))
            ends.append(w)
        x = mean(parts, ends)
    assert_states_close(trained(tiny_model, FedProx(mu=0.7)).adapter, tree.unflatten(x, state.adapter))


def shares(parts: Federation, weighting: str) -> torch.Tensor:
    """Each client's share of all clients' weight."""
    sizes = torch.tensor([float(len(client.train)) for client in parts.clients], dtype=torch.float64)
    return sizes / sizes.sum() if weighting == "examples" else torch.full_like(sizes, 1 / len(sizes))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_scaffold_equals_a_plain_loop(tiny_model: str, weighting: str) -> None:
    parts, state = prepared(tiny_model, Scaffold())
    share = shares(parts, weighting)[:, None]
    x = tree.flatten(state.adapter)
    c, own = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(5)]
    for _ in range(ROUNDS):
        ends, changes = [], []
        for client in range(5):
            w = x.clone()
            for _ in range(EPOCHS):
                w = w - RATE * (gradient(parts, client, w, state.adapter) - own[client] + c)
            after = own[client] - c + (x - w) / (EPOCHS * RATE)
            ends.append(w)
            changes.append(after - own[client])
            own[client] = after
        x, c = (torch.stack(ends) * share).sum(dim=0), c + (torch.stack(changes) * share).sum(dim=0)
    found = trained(tiny_model, Scaffold(), weighting=weighting)
    assert_states_close(found.adapter, tree.unflatten(x, state.adapter))
    torch.testing.assert_close(found.correction["control"], c, atol=TOLERANCE, rtol=0)
    for client in range(5):
        torch.testing.assert_close(found.clients[client].correction["control"], own[client], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_feddyn_equals_a_plain_loop(tiny_model: str, weighting: str) -> None:
    alpha = 0.5
    parts, state = prepared(tiny_model, FedDyn(alpha=alpha))
    share = shares(parts, weighting)[:, None]
    x = tree.flatten(state.adapter)
    h, own = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(5)]
    for _ in range(ROUNDS):
        ends = []
        for client in range(5):
            w = x.clone()
            for _ in range(EPOCHS):
                w = w - RATE * (gradient(parts, client, w, state.adapter) - own[client] + alpha * (w - x))
            own[client] = own[client] - alpha * (w - x)
            ends.append(w)
        h = h - alpha * ((torch.stack(ends) - x) * share).sum(dim=0)
        x = (torch.stack(ends) * share).sum(dim=0) - h / alpha
    found = trained(tiny_model, FedDyn(alpha=alpha), weighting=weighting)
    assert_states_close(found.adapter, tree.unflatten(x, state.adapter))
    torch.testing.assert_close(found.correction["gradient"], h, atol=TOLERANCE, rtol=0)


# Three clients of 1, 2 and 9 examples, whose losses are |x - 0|^2 / 2, |x - 1|^2 / 2 and |x - 8|^2 / 2.
EXAMPLES, OPTIMA = (1, 2, 9), (0.0, 1.0, 8.0)


def quadratic_end(correction: Correction, weighting: str, cohorts: list[list[int]]) -> float:
    """Where the server comes to on the quadratic clients, which take 5 steps at rate 0.1 in each round."""
    clients = [ClientData(np.arange(number), np.arange(0)) for number in EXAMPLES]
    parts = Federation(
        engine=Engine(None, None, 1),  # type: ignore[arg-type]
        clients=clients,
        participation=Participation(Uniform(), np.array(EXAMPLES)),
        local=local(correction),
        schedule=Synchronous(),
        num_rounds=len(cohorts),
        rng=Rng(0),
        server=ServerParts(FedAvg(weighting=weighting)),
    )
    state = ServerState(0, {"x": torch.zeros(1)}, correction=correction.memory(torch.zeros(1)))
    kept = {client: correction.memory(torch.zeros(1)) for client in range(3)}
    for cohort in cohorts:
        server, start = state.correction, state.adapter["x"]
        updates = []
        for client in cohort:
            x = start.clone()
            for _ in range(5):
                rows = [x.unsqueeze(0), start.unsqueeze(0)]
                own, common = (tree.expand(memory, 1) for memory in (kept[client], server))
                x = x - 0.1 * correction.correct(rows[0] - OPTIMA[client], *rows, own, common)[0]
            moved, steps = (x - start).unsqueeze(0), torch.tensor([[5]])
            after = {name: row[0] for name, row in correction.remember(moved, own, common, steps, 0.1).items()}
            sent, kept[client] = correction.sent(kept[client], after), after
            updates.append(ClientUpdate(client, EXAMPLES[client], {"x": x - start}, 0.0, 5, extra=sent))
        moved_to = step(parts, state, updates, {})
        state = ServerState(state.round + 1, moved_to.adapter, moved_to.optimizer, moved_to.correction)
    return float(state.adapter["x"])


ALL = [[0, 1, 2]] * 300
SOME = [[0, 1], [1, 2], [0, 2], [2], [0], [1]] * 200


@pytest.mark.parametrize(("weighting", "optimum"), [("examples", 74 / 12), ("uniform", 3.0)])
@pytest.mark.parametrize("cohorts", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("correction", [Scaffold(), FedDyn(alpha=0.5)], ids=["scaffold", "feddyn"])
def test_the_fixed_point_is_the_optimum_of_the_weighting(
    correction: Correction, cohorts: list[list[int]], weighting: str, optimum: float
) -> None:
    assert quadratic_end(correction, weighting, cohorts) == pytest.approx(optimum, abs=1e-3)


CORRECTIONS = [FedProx(mu=0.5), Scaffold(), FedDyn(alpha=0.5)]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_clients_per_block_change_nothing(tiny_model: str, correction: Correction) -> None:
    one, two, five = (trained(tiny_model, correction, rounds=2, per_block=number) for number in (1, 2, 5))
    for other in (two, five):
        assert_states_close(one.adapter, other.adapter)
        assert one.clients.keys() == other.clients.keys()


@pytest.mark.parametrize("correction", [FedProx(mu=0.0), Scaffold()])
def test_what_corrects_nothing_is_fedavg(tiny_model: str, correction: Correction) -> None:
    """FedProx without a weight always; SCAFFOLD in its first round, when all controls are zero."""
    assert_states_close(
        trained(tiny_model, correction, rounds=1).adapter, trained(tiny_model, NoCorrection(), rounds=1).adapter
    )


def test_only_clients_that_took_part_remember(tiny_model: str) -> None:
    state = trained(tiny_model, Scaffold(), rounds=1, cohort=2)
    assert len(state.clients) == 2
    assert {name for carried in state.clients.values() for name in carried.correction} == {"control"}


def test_both_controls_travel(tiny_model: str) -> None:
    parts, state = prepared(tiny_model, Scaffold())
    _, result = run_round(parts, state)
    control = {"correction.control": tree.flatten(state.adapter)}
    both = payload_bytes({**state.adapter, **control})
    assert result.uplink_bytes == result.downlink_bytes == 5 * both
    parts, state = prepared(tiny_model, FedDyn())
    _, result = run_round(parts, state)
    assert result.uplink_bytes == result.downlink_bytes == 5 * payload_bytes(state.adapter)


def test_who_trains_alone_is_not_corrected(tiny_model: str) -> None:
    found = []
    for correction in (NoCorrection(), Scaffold(), FedDyn(alpha=5.0)):
        parts, state = prepared(tiny_model, correction)
        found.append(train_local_only(parts, state.adapter, np.array([0, 2]), advance=lambda number: None))
    for other in found[1:]:
        assert_states_close(found[0], other)


@pytest.mark.parametrize("correction", ["scaffold", "feddyn"])
def test_a_corrected_run_that_stopped_goes_on(raw_config: dict[str, Any], tmp_path: Path, correction: str) -> None:
    raw = {**raw_config, "local": {"learning_rate": 0.01, "optimizer": "sgd", "correction": correction}, "rounds": 4}
    raw["clients"] = {"number": 4, "cohort": {"number": 2}}
    simulate(parse_config({**raw, "name": "whole"}))

    def stop(round: int, clients: tuple[int, ...]) -> None:
        if round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(parse_config({**raw, "name": "parts"}), hooks=Hooks(before_block=stop))
    resume(tmp_path / "runs" / "parts")
    whole, parts = (comparable(tmp_path / "runs" / name) for name in ("whole", "parts"))
    assert whole["adapter.safetensors"] == parts["adapter.safetensors"]
    assert whole["rounds.jsonl"] == parts["rounds.jsonl"]
    assert whole["checkpoints/round-0004/clients.safetensors"] == parts["checkpoints/round-0004/clients.safetensors"]
    assert whole["checkpoints/round-0004/server.safetensors"] == parts["checkpoints/round-0004/server.safetensors"]


@register("by_loss")
@dataclass(frozen=True)
class ByLoss(Strategy):
    """Weighs clients by what is known after their training alone."""

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        return [update.loss for update in updates]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"correction": "scaffold"}},
         "local.optimizer: scaffold reads gradients off a client's way: expected sgd without momentum"),
        ({"local": {"correction": "scaffold", "optimizer": {"name": "sgd", "momentum": 0.9}}},
         "local.optimizer: scaffold reads gradients off a client's way: expected sgd without momentum"),
        ({"local": {"correction": "feddyn"}, "server": {"strategy": "rolora"}},
         "local.correction: expected none or fedprox, because the strategy trains other tensors from round to round"),
        ({"local": {"correction": "feddyn"}, "server": {"screening": {"policy": "clip", "max_norm_ratio": 2}}},
         "server.screening.policy: expected skip or abort, because feddyn remembers what clip takes away"),
        ({"local": {"correction": "scaffold", "optimizer": "sgd"},
          "server": {"screening": {"policy": "clip", "max_norm_ratio": 2}}},
         "server.screening.policy: expected skip or abort, because scaffold remembers what clip takes away"),
        ({"local": {"correction": "feddyn"}, "server": {"aggregator": "median"}},
         "server.aggregator: expected mean, because feddyn remembers the mean over all clients, those that median "
         "leaves out or scales down included"),
        ({"local": {"correction": "feddyn"}, "server": {"strategy": "by_loss"}},
         "local.correction: expected none or fedprox, because feddyn needs the weights of all clients, and by_loss has "
         "`weights` of its own: give it a `weight` instead"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    raw_config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(parse_config({**raw_config, **changes}))
    assert str(caught.value) == message

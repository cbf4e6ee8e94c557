"""Canaries: clients or examples of which fair coins decide whether they are in a run, so that it can be audited.

What the coins say is in nobody's hands, so how often an attack guesses it right bounds what the run gives away
(arXiv:2305.08846; see `flora.privacy.one_run`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flora.core import tree
from flora.core.registry import Component, OptionError, option, register
from flora.core.rng import Rng
from flora.core.states import ClientData
from flora.core.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class Coins:
    """The canaries' ids `(m,)`, sorted, whether each is in `(m,)`, and the stream that all about them is drawn from."""

    ids: np.ndarray
    was_in: np.ndarray
    rng: Rng


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an attacker has when a run is over.

    `moved` is by how much each tensor of the server's adapter is another than at first, `gains` is by how much each of
    some training examples `(N,)` has gained in logit-scaled confidence against the first adapter, `clients` are what
    the clients hold.
    """

    moved: StateLike
    gains: Callable[[np.ndarray], np.ndarray]
    clients: Sequence[ClientData]


@dataclass(frozen=True)
class Canaries(Component):
    """What is put into a run, or left out of it, by fair coins, so that `flora audit` can bound its epsilon."""

    number: int = option("how many canaries there are: each is in or out by a fair coin", 100, at_least=2)

    unit = "client"
    """Whose privacy they audit: a "client"'s, or an "example"'s."""

    def flip(self, clients: Sequence[ClientData], rng: Rng) -> Coins:
        """Choose the canaries, and flip a coin for each. Raises `OptionError` if there are too few to choose from."""
        candidates = self.candidates(clients, rng)
        if self.number > len(candidates):
            raise OptionError(
                "canaries.number", f"expected at most {len(candidates)}, what can be a canary, got {self.number}"
            )
        ids = np.sort(rng.child("ids").numpy().choice(candidates, self.number, replace=False))
        return Coins(ids, rng.child("coins").numpy().integers(2, size=self.number) == 1, rng)

    def candidates(self, clients: Sequence[ClientData], rng: Rng) -> np.ndarray:
        """Return the sorted ids `(N,)` of the clients, or of the examples, that can be a canary."""
        return np.arange(len(clients))

    def deal(self, clients: Sequence[ClientData], coins: Coins) -> list[ClientData]:
        """Return what clients hold when canaries that are out are taken away."""
        return list(clients)

    def labels(self, labels: np.ndarray, num_classes: int, coins: Coins) -> np.ndarray:
        """Return the labels that training examples are trained with."""
        return labels

    def sent(self, client: int, delta: StateLike, coins: Coins) -> StateLike | None:
        """Return what a client sends in place of its delta; None if it sends what it has."""
        return None

    @abstractmethod
    def scores(self, coins: Coins, evidence: Evidence) -> np.ndarray:
        """Return how sure an attacker is that each canary was in, `(m,)`: the larger, the surer."""


@dataclass(frozen=True)
class ClientCanaries(Canaries):
    """Canaries that are clients. One that is out sends zeros, as if it were not there; nobody else is touched."""

    def sent(self, client: int, delta: StateLike, coins: Coins) -> StateLike | None:
        place = int(np.searchsorted(coins.ids, client))
        if place == len(coins.ids) or coins.ids[place] != client:
            return None
        return self.sent_if_in(client, delta, coins.rng) if coins.was_in[place] else zeros(delta)

    @abstractmethod
    def sent_if_in(self, client: int, delta: StateLike, rng: Rng) -> StateLike:
        """Return what a canary that is in sends in place of its delta."""


@register("directions")
@dataclass(frozen=True)
class Directions(ClientCanaries):
    """Clients that send a direction drawn at random, the same in each round: what a mechanism can hide least.

    The attack is the inner product of the direction with what became of the adapter: directions drawn in many
    dimensions hardly disturb each other. Source: arXiv:2302.03098, algorithm 2 (the canaries, not its estimate).
    """

    norm: float | None = option(
        "length of what a canary sends, over all its tensors, such as privacy's clip_norm; none: the length of the "
        "update that it stands in for",
        None,
        above=0,
    )

    def sent_if_in(self, client: int, delta: StateLike, rng: Rng) -> StateLike:
        direction = _direction(delta, client, rng)
        norm = float(tree.flatten(delta).norm()) if self.norm is None else self.norm
        return tree.scale(direction, norm / float(tree.flatten(direction).norm()))

    def scores(self, coins: Coins, evidence: Evidence) -> np.ndarray:
        moved = tree.flatten(evidence.moved).double()
        directions = (tree.flatten(_direction(evidence.moved, client, coins.rng)) for client in coins.ids.tolist())
        return np.array([float(moved @ each.double() / each.norm()) for each in directions])


@register("clients")
@dataclass(frozen=True)
class RealClients(ClientCanaries):
    """Clients with data as all others have.

    The attack is how much better the adapter knows a client's training examples than at first: what someone can do who
    has these and the adapter.
    """

    def sent_if_in(self, client: int, delta: StateLike, rng: Rng) -> StateLike:
        return delta

    def scores(self, coins: Coins, evidence: Evidence) -> np.ndarray:
        return client_scores(coins.ids, evidence)


@register("examples")
@dataclass(frozen=True)
class Examples(Canaries):
    """Training examples of clients; those that are out are taken from them.

    The attack is how much surer of its label the adapter is of an example than at first. A wrong label is learned from
    this one example alone, so it shows best whether that was in.
    """

    mislabelled: bool = option("whether canaries have a wrong label, drawn at random", True)

    unit = "example"

    def candidates(self, clients: Sequence[ClientData], rng: Rng) -> np.ndarray:
        # All but one of each client, which would have nothing to train on if it lost its last one. That one is drawn:
        # examples are in the order of their classes, and the first would make canaries unlike the others.
        generator = rng.child("spared").numpy()
        return np.sort(np.concatenate([generator.permutation(client.train)[1:] for client in clients]))

    def deal(self, clients: Sequence[ClientData], coins: Coins) -> list[ClientData]:
        out = coins.ids[~coins.was_in]
        return [replace(client, train=client.train[~np.isin(client.train, out)]) for client in clients]

    def labels(self, labels: np.ndarray, num_classes: int, coins: Coins) -> np.ndarray:
        if not self.mislabelled:
            return labels
        changed = labels.copy()
        shift = coins.rng.child("labels").numpy().integers(1, num_classes, size=len(coins.ids))
        changed[coins.ids] = (labels[coins.ids] + shift) % num_classes
        return changed

    def scores(self, coins: Coins, evidence: Evidence) -> np.ndarray:
        return evidence.gains(coins.ids)


@dataclass(frozen=True, eq=False)
class PlantedCanaries:
    """The canaries of an experiment and what their coins say."""

    canaries: Canaries
    coins: Coins

    def sent(self, client: int, delta: StateLike, extra: State) -> tuple[StateLike, State]:
        """Return what a client sends in place of its delta, and of what a correction sends beside it."""
        instead = self.canaries.sent(client, delta, self.coins)
        return (delta, extra) if instead is None else (instead, zeros(extra))

    def labels(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Return the labels that training examples are trained with."""
        return self.canaries.labels(labels, num_classes, self.coins)

    def to_dict(self) -> dict[str, Any]:
        """Which canaries there are and which of them are in, as JSON types."""
        coins = self.coins
        return {"unit": self.canaries.unit, "ids": coins.ids.tolist(), "was_in": coins.was_in.tolist()}


def planted(
    canaries: Canaries | None, clients: Sequence[ClientData], rng: Rng
) -> tuple[PlantedCanaries | None, list[ClientData]]:
    """Flip the coins of `canaries`, and return them with what clients hold then; None if there are no canaries."""
    if canaries is None:
        return None, list(clients)
    coins = canaries.flip(clients, rng)
    return PlantedCanaries(canaries, coins), canaries.deal(clients, coins)


def zeros(state: StateLike) -> State:
    """A state of the same names and shapes, all zeros."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def client_scores(clients: np.ndarray, evidence: Evidence) -> np.ndarray:
    """Return the mean gain of each client's training examples, `(len(clients),)`."""
    examples = [evidence.clients[client].train for client in clients.tolist()]
    gains = evidence.gains(np.concatenate(examples))
    return np.array([part.mean() for part in np.split(gains, np.cumsum([len(each) for each in examples])[:-1])])


def _direction(like: StateLike, client: int, rng: Rng) -> State:
    """A canary client's direction: numbers drawn from a normal distribution, of the shapes of `like`."""
    return {
        name: torch.randn(tensor.shape, generator=rng.child("direction", client, name).torch(), dtype=torch.float64).to(
            tensor.dtype
        )
        for name, tensor in like.items()
    }

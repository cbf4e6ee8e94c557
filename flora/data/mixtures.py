"""Partitioners whose clients have given sizes, or mixtures of classes of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flora.core.errors import UserError
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.data.partition import (
    MAX_DRAWS,
    Partitioner,
    classes_of,
    collect,
    covering_holders,
    deal,
    groups_of,
    log_dirichlet,
    require_examples,
    require_number,
)


@register("given_sizes")
@dataclass(frozen=True)
class GivenSizes(Partitioner):
    """Every client gets a random sample of the examples, of the size that is given for it.

    Examples that are left over belong to nobody.
    """

    sizes: tuple[int, ...] = option("each client's number of examples, in the order of clients", (), at_least=1)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        sizes = _checked_sizes(self.sizes, num_clients, len(labels))
        owner = np.full(len(labels), -1, np.int64)
        owner[rng.child("examples").numpy().permutation(len(labels))[: sizes.sum()]] = np.repeat(
            np.arange(num_clients), sizes
        )
        return collect(owner, num_clients)


@register("inner_dirichlet")
@dataclass(frozen=True)
class InnerDirichlet(Partitioner):
    """Label skew with fixed sizes: each client fills its places from its own mixture of classes.

    A client's mixture is drawn from Dirichlet(concentration) over the classes. All places draw a class at once; where
    more do than a class has examples left, those that come first in a random order get them and the others draw anew
    among the classes that are left. Without `sizes` all examples are dealt, and clients' sizes differ by at most one.

    Source: Acar et al., arXiv:2111.04263, appendix (there one place after the other draws), also known as the inner
    Dirichlet partition.
    """

    concentration: float = option("small: few classes at each client; large: all clients alike", 0.5, above=0)
    sizes: tuple[int, ...] | None = option(
        "each client's number of examples, in the order of clients; none: equal", None, at_least=1
    )

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        sizes = np.full(num_clients, len(labels) // num_clients)
        sizes[rng.child("order").numpy().permutation(num_clients)[: len(labels) % num_clients]] += 1
        if self.sizes is not None:
            sizes = _checked_sizes(self.sizes, num_clients, len(labels))
        classes = classes_of(labels)
        chosen = self._classes_of_places(sizes, np.array([len(members) for members in classes.values()]), rng)
        clients = np.repeat(np.arange(num_clients), sizes)
        owner = np.full(len(labels), -1, np.int64)
        for (label, members), places in zip(classes.items(), collect(chosen, len(classes)), strict=True):
            shuffled = rng.child("class", label).numpy().permutation(members)
            owner[shuffled[: len(places)]] = clients[places]
        return collect(owner, num_clients)

    def _classes_of_places(self, sizes: np.ndarray, left: np.ndarray, rng: Rng) -> np.ndarray:
        """The class `(sum of sizes,)` that each place gets, one client's places after the other's.

        `left` `(C,)` are the numbers of examples of the classes.
        """
        num_clients, left = len(sizes), left.copy()
        mixtures = log_dirichlet(self.concentration, (num_clients, len(left)), rng)
        clients = np.repeat(np.arange(num_clients), sizes)
        chosen = np.empty(len(clients), np.int64)
        waiting, generator = rng.child("places").numpy().permutation(len(clients)), rng.child("draws").numpy()
        while len(waiting):
            drawn = _draw(np.where(left > 0, mixtures, -np.inf), clients[waiting], generator)
            # The place of each among those that draw the same class: the first ones get what is left of it.
            order = np.argsort(drawn, kind="stable")
            starts = np.searchsorted(drawn[order], np.arange(len(left)))
            ranks = np.empty(len(waiting), np.int64)
            ranks[order] = np.arange(len(waiting)) - starts[drawn[order]]
            served = ranks < left[drawn]
            chosen[waiting[served]] = drawn[served]
            left -= np.bincount(drawn[served], minlength=len(left))
            waiting = waiting[~served]
        return chosen


@register("extended_dirichlet")
@dataclass(frozen=True)
class ExtendedDirichlet(Partitioner):
    """Label skew in two steps: each client is given some classes, each class is dealt among those that have it.

    The shares of a class are drawn from Dirichlet(concentration). Complete: every example is dealt exactly once. A draw
    that leaves a client without an example is repeated; after `MAX_DRAWS`, such a client gets one example of its
    classes from whoever has the most of it.

    Source: Li and Lyu, arXiv:2311.03154 (ExDir). Differs from the paper: classes are dealt like cards, so that their
    numbers of holders differ by at most one, and no client is empty.
    """

    classes_per_client: int = option("classes of which a client can have examples", 2, at_least=1)
    concentration: float = option("small: each class mostly at one of its clients; large: shared alike", 1.0, above=0)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        classes = classes_of(labels)
        holders = covering_holders(len(classes), self.classes_per_client, num_clients, rng)
        owner = np.empty(len(labels), np.int64)
        for draw in range(MAX_DRAWS):
            for (label, members), clients in zip(classes.items(), holders, strict=True):
                class_rng, dealt = rng.child("draw", draw, "class", label), np.empty(len(labels), np.int64)
                deal(dealt, members, log_dirichlet(self.concentration, len(clients), class_rng), class_rng)
                owner[members] = clients[dealt[members]]
            if len(np.unique(owner)) == num_clients:
                break
        self._fill_the_empty(owner, list(classes.values()), holders, num_clients)
        return collect(owner, num_clients)

    def _fill_the_empty(
        self, owner: np.ndarray, members: list[np.ndarray], holders: list[np.ndarray], num_clients: int
    ) -> None:
        """Give each client without an example one of its classes. Raises `UserError` where nobody has one to spare."""
        sizes = np.bincount(owner, minlength=num_clients)
        for client in np.flatnonzero(sizes == 0).tolist():
            best = None
            for place, clients in enumerate(holders):
                if client in clients:
                    counts = np.bincount(owner[members[place]], minlength=num_clients)
                    counts[sizes < 2] = 0
                    giver = int(counts.argmax())
                    if counts[giver] and (best is None or counts[giver] > best[0]):
                        best = counts[giver], giver, place
            if best is None:
                raise UserError(
                    f"partition.classes_per_client: the classes of client {client} have too few examples for their "
                    f"holders: expected fewer clients than {num_clients}, or more classes for each"
                )
            _, giver, place = best
            owner[members[place][owner[members[place]] == giver][0]] = client
            sizes[giver] -= 1
            sizes[client] += 1


@register("within_groups")
@dataclass(frozen=True)
class WithinGroups(Partitioner):
    """Each group that the data name (domain, site) is dealt out among clients of its own, by another partitioner.

    Clients are called after their group: "sketch 1", "sketch 2". `clients.number` is null, or as many as there are.
    """

    names_clients = True
    of: Partitioner = option("how each group's examples are dealt out to its clients")
    clients_per_group: int = option("clients of each group", 2, at_least=1)

    def check(self) -> None:
        if self.of.names_clients:
            raise OptionError("of", "expected a partitioner that takes no clients from the data, such as dirichlet")

    def client_names(self, groups: np.ndarray | None, number: int | None = None) -> tuple[str, ...]:
        names = np.unique(groups_of(self, groups)).tolist()
        numbers = range(1, self.clients_per_group + 1)
        return require_number(tuple(f"{name} {place}" for name in names for place in numbers), number)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        groups = groups_of(self, groups)
        self.client_names(groups, num_clients)
        parts = []
        for name in np.unique(groups).tolist():
            members = np.flatnonzero(groups == name)
            try:
                dealt = self.of.split(labels[members], self.clients_per_group, rng.child("group", name))
            except UserError as error:
                raise UserError(f"partition.of: group {name!r}: {error}") from None
            parts += [members[part] for part in dealt]
        return parts


def _checked_sizes(sizes: tuple[int, ...], num_clients: int, num_examples: int) -> np.ndarray:
    """The sizes `(num_clients,)`. Raises `UserError` unless there is one for each client and examples for all."""
    if len(sizes) != num_clients:
        raise UserError(f"partition.sizes: expected {num_clients} numbers, one for each client, got {len(sizes)}")
    if sum(sizes) > num_examples:
        raise UserError(
            f"partition.sizes: expected at most {num_examples:,} together (the training examples), got {sum(sizes):,}"
        )
    return np.array(sizes)


def _draw(log_weights: np.ndarray, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One column for each of `rows`, drawn in proportion to exp(log_weights) `(K, C)` of that row."""
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    ends = np.cumsum(weights, axis=1)
    # All rows end to end: row k covers the numbers from k to k + 1.
    ends = ends / ends[:, -1:] + np.arange(len(ends))[:, None]
    places = np.searchsorted(ends.ravel(), rows + generator.random(len(rows)), side="right")
    columns = np.minimum(places - rows * ends.shape[1], ends.shape[1] - 1)
    # Rounding at a row's edge can land on a column without weight: the next one that has some stands in.
    wrong = np.flatnonzero(weights[rows, columns] == 0)
    columns[wrong] = weights[rows[wrong]].argmax(axis=1)
    return columns

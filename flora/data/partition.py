"""How the training examples are dealt out to the clients."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from flora.core.counts import counted, part_of
from flora.core.errors import UserError
from flora.core.registry import Component, name_of, option, register
from flora.core.rng import Rng

MAX_DRAWS = 10


@dataclass(frozen=True)
class Partitioner(Component):
    """How the training examples are dealt out to the clients."""

    names_clients: ClassVar[bool] = False
    """Whether the data name the clients: `client_names`, in that order."""

    def client_names(self, groups: np.ndarray | None, number: int | None = None) -> tuple[str, ...]:
        """The names of the clients that have one of these examples; none where the data don't name them.

        Raises `UserError` if they should and don't, or are not `number` where that is given.
        """
        return ()

    @abstractmethod
    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return `num_clients` sorted int64 arrays of indices into `labels` `(N,)`.

        `groups` `(N,)` names the client, or the domain, of each example where the data do so.
        Raises `UserError`, saying what would be possible, where the request can't be met.
        """


def groups_of(partitioner: Partitioner, groups: np.ndarray | None) -> np.ndarray:
    """`groups` `(N,)`, which a partitioner needs. Raises `UserError` if the data have none."""
    if groups is None:
        raise UserError(
            f"partition: the data name no clients, which {name_of(partitioner)} needs; choose another partitioner"
        )
    return groups


def require_number(names: tuple[str, ...], number: int | None) -> tuple[str, ...]:
    """Return `names`, those of the clients. Raises `UserError` if `number` is given and not theirs."""
    if number not in (None, len(names)):
        raise UserError(
            f"clients.number: the data name {len(names)} clients, got {number}; null takes them as they are"
        )
    return names


# A partitioner whose clients share no example fills in `owner` (N,): the client of each example, -1 for one left out.


def collect(owner: np.ndarray, num_owners: int) -> list[np.ndarray]:
    """The sorted indices that each of the owners 0 .. num_owners - 1 has in `owner` `(N,)`."""
    order = np.argsort(owner, kind="stable").astype(np.int64, copy=False)
    cuts = np.searchsorted(owner[order], np.arange(num_owners + 1))
    return [order[start:stop] for start, stop in pairwise(cuts.tolist())]


def classes_of(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The sorted indices of each class's examples by its label, for the classes that occur in `labels` `(N,)`."""
    names, index = np.unique(labels, return_inverse=True)
    return dict(zip(names.tolist(), collect(index, len(names)), strict=True))


def require_examples(labels: np.ndarray, num_clients: int, minimum: int = 1) -> None:
    """Raise `UserError` unless there are enough examples for each client to have one, and to have `minimum`."""
    if not 1 <= num_clients <= len(labels):
        raise UserError(f"clients.number: expected 1 to {len(labels)} (the training examples), got {num_clients}")
    if num_clients * minimum > len(labels):
        raise UserError(
            f"partition.minimum_examples: {counted(num_clients, 'client')} share {len(labels)} training examples: "
            f"expected at most {len(labels) // num_clients}, got {minimum}"
        )


def log_dirichlet(concentration: float, shape: int | tuple[int, int], rng: Rng) -> np.ndarray:
    """Logarithms of Gamma(concentration) draws, which normalised (over the last axis) are a draw from the Dirichlet.

    Gamma(c) is Gamma(c + 1) U^(1/c), whose logarithm is finite where a small c makes the number itself zero.
    """
    concentration = min(max(concentration, 1e-100), 1e100)
    gamma = rng.child("gamma").numpy().standard_gamma(concentration + 1, shape)
    return np.log(gamma) - rng.child("boost").numpy().standard_exponential(shape) / concentration


def deal(owner: np.ndarray, examples: np.ndarray, log_weights: np.ndarray, rng: Rng) -> None:
    """Deal all of `examples`, shuffled, in proportion to exp(log_weights) `(K,)`; each share is off by less than one.

    The clients come in a random order, so that rounding favours none of them; equal weights give sizes that differ
    by at most one.
    """
    order = np.argsort(rng.child("order").numpy().random(len(log_weights)), kind="stable")
    total = np.cumsum(np.exp(log_weights - log_weights.max())[order])
    cuts = np.rint(total / total[-1] * len(examples)).astype(np.int64)
    owner[rng.child("examples").numpy().permutation(examples)] = np.repeat(order, np.diff(cuts, prepend=0))


def raise_to_minimum(owner: np.ndarray, num_clients: int, minimum: int, rng: Rng) -> None:
    """Move random examples from the largest clients to those with fewer than `minimum`, and no more than needed."""
    sizes = np.bincount(owner, minlength=num_clients)
    missing = np.maximum(minimum - sizes, 0)
    if not missing.any():
        return
    generator = rng.child("minimum").numpy()
    stacked = generator.permutation(len(owner))
    stacked = stacked[np.argsort(owner[stacked], kind="stable")]
    # Pile up each client's examples: the highest ones are the surplus of the largest clients.
    height = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = stacked[np.argsort(-height, kind="stable")[: missing.sum()]]
    owner[generator.permutation(moved)] = np.repeat(np.arange(num_clients), missing)


def holders_of(num_classes: int, classes_per_client: int, num_clients: int, rng: Rng) -> list[np.ndarray]:
    """The sorted clients that hold each class, when every client holds `classes_per_client` distinct ones at random.

    The classes are dealt like cards, a shuffled deck of all of them after another: their numbers of holders differ by
    at most one, and one more client changes nobody else's classes. Raises `UserError` if there are fewer classes.
    """
    if classes_per_client > num_classes:
        raise UserError(
            f"partition.classes_per_client: expected at most {num_classes} (the classes), got {classes_per_client}"
        )
    generator = rng.child("classes").numpy()
    decks: list[np.ndarray] = []
    for num_dealt in range(0, num_clients * classes_per_client, num_classes):
        deck = generator.permutation(num_classes)
        num_held = num_dealt % classes_per_client
        if num_held:  # The last deck ran out within a client's hand: complete that with other classes.
            new = np.flatnonzero(~np.isin(deck, decks[-1][-num_held:]))[: classes_per_client - num_held]
            deck = np.concatenate([deck[new], np.delete(deck, new)])
        decks.append(deck)
    cards = np.concatenate(decks)[: num_clients * classes_per_client]
    return [places // classes_per_client for places in collect(cards, num_classes)]


def covering_holders(num_classes: int, classes_per_client: int, num_clients: int, rng: Rng) -> list[np.ndarray]:
    """The holders of each class as `holders_of` has them. Raises `UserError` if a class would have none."""
    holders = holders_of(num_classes, classes_per_client, num_clients, rng)
    least_clients = -(-num_classes // classes_per_client)
    if num_clients < least_clients:
        raise UserError(
            f"partition.classes_per_client: {counted(num_clients, 'client')} with {classes_per_client} of the "
            f"{num_classes} classes each can't cover all of them: expected at least {-(-num_classes // num_clients)} "
            f"classes, or {least_clients} clients"
        )
    return holders


@register("iid")
@dataclass(frozen=True)
class Iid(Partitioner):
    """Every client gets a random sample of the examples.

    Complete: every example is dealt exactly once. Sizes differ by at most one.
    """

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        owner = np.empty(len(labels), np.int64)
        deal(owner, np.arange(len(labels)), np.zeros(num_clients), rng)
        return collect(owner, num_clients)


@register("dirichlet")
@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Label skew: each class is dealt in proportions drawn from Dirichlet(concentration) over the clients.

    Complete: every example is dealt exactly once, and every client has at least `minimum_examples`. A draw that leaves
    a client short is repeated; after `MAX_DRAWS`, random examples move from the largest clients to those still short.
    With a `cap`, the classes are dealt in the order of their labels: of each, the clients that have `cap` times N / K
    examples or more get nothing, and the others share it in proportion. A client may pass the cap with one class.

    Source: Yurochkin et al., arXiv:1905.12022, the experiments. Differs from the paper: the minimum and the cap, which,
    at 1, is the rule of NIID-Bench (arXiv:2102.02079), FedML and the released code of FLoRA (arXiv:2404.15182).
    """

    concentration: float = option("small: each class at few clients; large: all clients alike", 0.1, above=0)
    minimum_examples: int = option("examples that every client has at least", 1, at_least=0)
    cap: float | None = option(
        "a client that holds this many times the mean number of examples gets nothing of the classes to come; "
        "none: no cap",
        None,
        at_least=1,
    )

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients, self.minimum_examples)
        classes = classes_of(labels)
        owner = np.empty(len(labels), np.int64)
        full = math.inf if self.cap is None else math.ceil(part_of(self.cap, len(labels)))
        for draw in range(MAX_DRAWS):
            sizes = np.zeros(num_clients, np.int64)
            for label, members in classes.items():
                class_rng = rng.child("draw", draw, "class", label)
                log_weights = log_dirichlet(self.concentration, num_clients, class_rng)
                # Never all clients: while examples are left, the smallest client has fewer than the mean.
                log_weights[sizes * num_clients >= full] = -np.inf
                deal(owner, members, log_weights, class_rng)
                sizes += np.bincount(owner[members], minlength=num_clients)
            if sizes.min() >= self.minimum_examples:
                break
        raise_to_minimum(owner, num_clients, self.minimum_examples, rng)
        return collect(owner, num_clients)


@register("pathological")
@dataclass(frozen=True)
class Pathological(Partitioner):
    """Every client has examples of a few classes only, chosen at random.

    Complete: every example is dealt exactly once. The numbers of clients that hold a class differ by at most one, and
    they share its examples equally. A client has fewer classes than `classes_per_client` only where a class has fewer
    examples than holders; a request that would leave a client with no example is an error.
    """

    classes_per_client: int = option("classes of which a client has examples", 2, at_least=1)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        classes = classes_of(labels)
        holders = covering_holders(len(classes), self.classes_per_client, num_clients, rng)
        shuffled = [rng.child("class", label).numpy().permutation(members) for label, members in classes.items()]
        owner = np.empty(len(labels), np.int64)
        self._share(owner, shuffled, holders, num_clients)
        num_empty = num_clients - len(np.unique(owner))
        if num_empty:
            rarest = min(len(members) for members in shuffled)
            least_clients = -(-len(classes) // self.classes_per_client)
            possible = max(least_clients, rarest * len(classes) // self.classes_per_client)
            raise UserError(
                f"clients.number: {num_empty} of {num_clients} clients would get no example: "
                f"{possible} clients are possible, or try more partition.classes_per_client"
            )
        return collect(owner, num_clients)

    def _share(
        self, owner: np.ndarray, shuffled: list[np.ndarray], holders: list[np.ndarray], num_clients: int
    ) -> None:
        """Give each class's examples to its holders in equal shares, the rarest class last.

        Odd examples go to the holders with the fewest so far, among these to those with the fewest classes to come.
        """
        sizes = np.zeros(num_clients, np.int64)
        classes_to_come = np.full(num_clients, self.classes_per_client)
        for members, clients in sorted(zip(shuffled, holders, strict=True), key=lambda pair: -len(pair[0])):
            share, num_odd = divmod(len(members), len(clients))
            shares = np.full(len(clients), share)
            shares[np.lexsort((classes_to_come[clients], sizes[clients]))[:num_odd]] += 1
            owner[members] = np.repeat(clients, shares)
            sizes[clients] += shares
            classes_to_come[clients] -= 1


@register("shards")
@dataclass(frozen=True)
class Shards(Partitioner):
    """The examples, sorted by label, are cut into equal shards; every client gets some of these at random.

    Complete: every example is dealt exactly once. Shard sizes differ by at most one. A shard that is no larger than
    the smallest class has at most two classes.

    Source: McMahan et al., arXiv:1602.05629, section 3.
    """

    shards_per_client: int = option("shards that every client gets", 2, at_least=1)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        num_shards = num_clients * self.shards_per_client
        if num_shards > len(labels):
            raise UserError(
                f"partition.shards_per_client: {num_clients} clients share {len(labels)} training examples: "
                f"expected at most {len(labels) // num_clients}, got {self.shards_per_client}"
            )
        by_label = np.concatenate(
            [rng.child("class", label).numpy().permutation(members) for label, members in classes_of(labels).items()]
        )
        client_of_shard = rng.child("shards").numpy().permutation(num_shards) // self.shards_per_client
        owner = np.empty(len(labels), np.int64)
        owner[by_label] = client_of_shard[np.arange(len(labels)) * num_shards // len(labels)]
        return collect(owner, num_clients)


@register("quantity")
@dataclass(frozen=True)
class Quantity(Partitioner):
    """Quantity skew: client sizes in proportion to log-normal draws, each client a random sample of the examples.

    Complete: every example is dealt exactly once, and every client has at least `minimum_examples`: random examples
    move from the largest clients to those that are short.
    """

    sigma: float = option("standard deviation of the logarithm of a client's size; 0: equal sizes", 1.0, at_least=0)
    minimum_examples: int = option("examples that every client has at least", 1, at_least=0)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients, self.minimum_examples)
        owner = np.empty(len(labels), np.int64)
        log_sizes = min(self.sigma, 1e100) * rng.child("sizes").numpy().standard_normal(num_clients)
        deal(owner, np.arange(len(labels)), log_sizes, rng)
        raise_to_minimum(owner, num_clients, self.minimum_examples, rng)
        return collect(owner, num_clients)


@register("long_tailed")
@dataclass(frozen=True)
class LongTailed(Partitioner):
    """Long-tailed clients: of C classes in some order, the one at place i has imbalance^(-i / (C - 1)) of the first's.

    With `order: shared` the classes' order, drawn once, is everybody's: of each class as many examples are left as the
    profile allows, at least one, the others belong to nobody, and those that are left are dealt evenly, each class by
    itself. With `order: own` each client has an order of its own and every example is dealt: each class in proportion
    to the clients' profiles. A client's counts then follow its profile, as far as classes are equally common.

    Source: the exponential profile of Cui et al., arXiv:1901.05555; federated in CReFF, arXiv:2204.13399.
    """

    imbalance: float = option("how many times as many examples the most common class has as the rarest", 50, at_least=1)
    order: str = option("whether the same classes are rare everywhere", "shared", choices=("shared", "own"))

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        classes = classes_of(labels)
        owner = np.full(len(labels), -1, np.int64)
        steps = -math.log(self.imbalance) * np.arange(len(classes)) / max(len(classes) - 1, 1)
        if self.order == "shared":
            profile = steps[rng.child("order").numpy().permutation(len(classes))]
            # As many of the most common class as leave every class enough for its place in the profile.
            most = min(len(members) / math.exp(step) for members, step in zip(classes.values(), profile, strict=True))
            for (label, members), step in zip(classes.items(), profile, strict=True):
                class_rng = rng.child("class", label)
                count = max(1, round(most * math.exp(step)))
                kept = class_rng.child("kept").numpy().permutation(members)[:count]
                deal(owner, kept, np.zeros(num_clients), class_rng)
        else:
            profiles = np.stack(
                [steps[rng.child("order", client).numpy().permutation(len(classes))] for client in range(num_clients)]
            )
            for place, (label, members) in enumerate(classes.items()):
                deal(owner, members, profiles[:, place], rng.child("class", label))
        return collect(owner, num_clients)


@register("natural")
@dataclass(frozen=True)
class Natural(Partitioner):
    """The clients that the data themselves name, in the sorted order of their names.

    Complete: every example belongs to the client that its group names. Nothing is drawn. `clients.number` is null, or
    as many as have a training image.
    """

    names_clients = True

    def client_names(self, groups: np.ndarray | None, number: int | None = None) -> tuple[str, ...]:
        return require_number(tuple(np.unique(groups_of(self, groups)).tolist()), number)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        names = self.client_names(groups, num_clients)
        return collect(np.searchsorted(names, groups_of(self, groups)), num_clients)

"""The clients: what the data call them, and which examples, ranks, lines and machines each has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flora.communication.network import COLUMNS, Profiles
from flora.config.rules import check_clients
from flora.config.schema import ExperimentConfig
from flora.core.contracts import checked_column, checked_parts, refuse
from flora.core.counts import part_of
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientData
from flora.data.datasets.base import ImageData

# Clients that a line of the log names.
MAX_NAMED = 10


@dataclass(frozen=True, eq=False)
class Roster:
    """What the data call the clients, if they do, and what lines and machines they have, if that matters."""

    names: tuple[str, ...] | None
    profiles: Profiles | None


@dataclass(frozen=True, eq=False)
class Shares:
    """The training examples of the clients that train, and of those that never do (`clients.held_out_fraction`)."""

    clients: Sequence[ClientData] = ()
    unseen: Sequence[ClientData] = ()


def _never_train(config: ExperimentConfig, number: int, rng: Rng) -> np.ndarray:
    """Which of `number` clients never train, `(number,)` bool: drawn at random, whatever examples they have."""
    chosen = rng.child("unseen").numpy().choice(number, config.clients.num_unseen(number), replace=False)
    return np.isin(np.arange(number), chosen)


def roster_of(config: ExperimentConfig, groups: np.ndarray | None, rng: Rng) -> Roster:
    """The clients that train, where training examples of these `groups` `(N,)` are dealt out.

    Raises `UserError` if the data name as many clients as something in the configuration can't go with.
    """
    names = None
    if config.partition.names_clients and not config.clients.centralized:
        names = config.partition.client_names(groups, config.clients.number)
        if config.clients.held_out_fraction:
            away = _never_train(config, len(names), rng)
            names = tuple(name for name, is_away in zip(names, away, strict=True) if not is_away)
    number = config.clients.number_training if names is None else len(names)
    assert number is not None
    if names is not None:
        check_clients(config, number, names)
    profiles = None
    if config.network is not None:
        profiles = config.network.profiles(number, rng.child("network"), names=names)
        for column in COLUMNS:
            checked_column("network", config.network, getattr(profiles, column), number, what=column)
    return Roster(names, profiles)


def without_training_images(
    data: ImageData, trained: np.ndarray | None, log: Callable[[str], object]
) -> tuple[str, ...]:
    """The groups (clients, domains) that the data name and that are not among those `trained` on; logs them."""
    groups = [split.groups for split in (data.train, data.test) if split.groups is not None]
    names = np.unique(groups[0] if trained is None else trained)
    left_out = np.setdiff1d(np.concatenate(groups), names).tolist()
    if left_out:
        shown = ", ".join(left_out[:MAX_NAMED]) + (", ..." if len(left_out) > MAX_NAMED else "")
        log(
            f"{len(left_out)} of the {len(left_out) + len(names)} clients that the data name have no training image "
            f"and take no part: {shown}"
        )
    return tuple(left_out)


def ranks_of(config: ExperimentConfig, num_clients: int, rng: Rng) -> np.ndarray | None:
    """The clients' ranks `(num_clients,)`; None if they all have the adapter's."""
    ranks = config.clients.ranks
    if ranks is None:
        return None
    if isinstance(ranks, tuple):
        return np.array(ranks)
    drawn = checked_column("clients.ranks", ranks, ranks.draw(num_clients, rng), num_clients, what="ranks")
    if drawn.min() < 1 or drawn.max() > ranks.highest or (drawn % 1).any():
        refuse("clients.ranks", ranks, f"ranks that are not whole numbers from 1 to {ranks.highest}")
    return drawn


def hold_out(examples: np.ndarray, fraction: float, rng: Rng) -> ClientData:
    """Split a client's examples `(n,)`: it tests on round(n fraction), at least one if n > 1 and fraction > 0."""
    count = 0
    if fraction > 0 and len(examples) > 1:
        count = min(max(round(part_of(fraction, len(examples))), 1), len(examples) - 1)
    if not count:
        return ClientData(train=np.sort(examples), held_out=np.empty(0, np.int64))
    order = rng.numpy().permutation(examples)
    return ClientData(train=np.sort(order[count:]), held_out=np.sort(order[:count]))


def hide_labels(client: ClientData, fraction: float, rng: Rng) -> ClientData:
    """Leave a client the labels of round(n * fraction) of its training examples, at least one, chosen at random."""
    number = len(client.train)
    count = max(round(part_of(fraction, number)), 1)
    if count >= number:
        return client
    order = rng.numpy().permutation(client.train)
    return replace(client, train=np.sort(order[:count]), unlabelled=np.sort(order[count:]))


def _check_unlabelled(config: ExperimentConfig, clients: Sequence[ClientData]) -> None:
    """Raise `OptionError` if there are fewer images without a label than self-training asks for."""
    self_training = config.local.self_training
    if self_training is None:
        return
    most = max(len(client.unlabelled) for client in clients)
    if not most:
        fraction = config.clients.labelled_fraction
        raise OptionError("clients.labelled_fraction", f"no client has an image without a label, with {fraction:g}")
    batch_size = self_training.batch_size
    if batch_size is not None and batch_size > most:
        raise OptionError(
            "local.self_training.batch_size",
            f"expected at most {most}, the most images without a label that a client has, got {batch_size}",
        )


def deal_out(config: ExperimentConfig, labels: np.ndarray, groups: np.ndarray | None, rng: Rng) -> Shares:
    """Each client's share of the training examples, of `labels` and `groups` `(N,)`.

    Raises `UserError` if a client would have nothing to train on.

    Clients that never train are dealt theirs as if they did, and are then left out.
    """
    names = config.partition.client_names(groups, config.clients.number)
    number = config.clients.number or len(names)
    parts = config.partition.split(labels, number, rng.child("partition"), groups=groups)
    parts = checked_parts("partition", config.partition, parts, number, len(labels))
    if config.clients.centralized:
        parts, names = [np.unique(np.concatenate(parts))], ()
    fraction = config.clients.holdout_fraction
    clients = [hold_out(part, fraction, rng.child("holdout", index)) for index, part in enumerate(parts)]
    if names:
        clients = [replace(client, name=name) for client, name in zip(clients, names, strict=True)]
    empty = [index for index, client in enumerate(clients) if not len(client.train)]
    if empty:
        raise UserError(
            f"partition: {len(empty)} of {len(clients)} clients would get no training example, the first is client "
            f"{empty[0]}; set partition.minimum_examples to 1 or lower clients.number"
        )
    labelled = config.clients.labelled_fraction
    if labelled < 1:
        clients = [hide_labels(each, labelled, rng.child("labelled", index)) for index, each in enumerate(clients)]
    shares = Shares(clients)
    if config.clients.held_out_fraction:
        away = _never_train(config, number, rng)
        shares = Shares(
            [client for client, is_away in zip(clients, away, strict=True) if not is_away],
            [client for client, is_away in zip(clients, away, strict=True) if is_away],
        )
    _check_unlabelled(config, shares.clients)
    return shares

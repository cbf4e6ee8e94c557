"""Check what combines with what in a configuration, before weights or images are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from flora.clip.adapters.lora import Lora
from flora.communication.network import StragglerPolicy
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.registry import OptionError, name_of
from flora.core.rng import Rng
from flora.federated.buffered import Buffered
from flora.server.aggregators import Mean
from flora.server.optimizers import ServerSgd
from flora.server.strategies.base import Strategy


def check_experiment(config: ExperimentConfig) -> None:
    """What can be checked without the model's weights or an image. Raises `UserError` naming the setting.

    Where the data name the clients, `check_clients` is for later.
    """
    for check in _CHECKS:
        check(config)


def mistakes(config: ExperimentConfig) -> Iterator[UserError]:
    """Whatever `check_experiment` finds wrong, and what can be known of the weights before they are fetched or read."""
    seen = set()
    for check in (*_CHECKS, _check_weights):
        try:
            check(config)
        except UserError as error:
            if str(error) not in seen:
                yield error
            seen.add(str(error))


def _check_weights(config: ExperimentConfig) -> None:
    config.backbone.check_weights()


def _check_model(config: ExperimentConfig) -> None:
    architecture = config.backbone.architecture()
    with below("adapter"):
        config.adapter.check_fits(architecture)


def _check_parts(config: ExperimentConfig) -> None:
    with below("server"):
        config.server.strategy.check_fits(config.adapter)
    with below("local"):
        config.local.correction.check_fits(config.local.optimizer)


def _check_data(config: ExperimentConfig) -> None:
    if config.split.sets_classes_aside and config.adapter.knows_classes:
        raise OptionError(
            "split", f"base_to_new needs an adapter without weights for each class, got {name_of(config.adapter)}"
        )
    if config.cache.enabled and config.local.augmentation.changes_images:
        raise OptionError(
            "cache.enabled",
            "expected false or null where local.augmentation changes images: their features can't be kept",
        )
    number = config.clients.number_training
    if number is not None and (config.clients.centralized or not config.partition.names_clients):
        check_clients(config, number)


def check_clients(config: ExperimentConfig, number: int, names: Sequence[str] | None = None) -> None:
    """Raise `UserError` naming the setting if something doesn't go with as many clients, of these names."""
    with below("clients.cohort"):
        config.clients.cohort.cohort_size(number)
    counts = {
        "evaluation.num_local_only": config.evaluation.num_local_only,
        "server.schedule.buffer": _buffer(config),
    }
    for option, count in counts.items():
        if count > number:
            raise OptionError(option, f"expected at most {number}, the clients there are, got {count}")
    ranks = config.clients.ranks
    if isinstance(ranks, tuple) and len(ranks) != number:
        raise OptionError("clients.ranks", f"expected {number} numbers, one for each client, got {len(ranks)}")
    if _buffer(config) and config.network is not None:
        _check_buffer_fills(config, number, names)


def _check_buffer_fills(config: ExperimentConfig, number: int, names: Sequence[str] | None) -> None:
    """Raise `OptionError` if fewer clients than the server waits for can ever deliver."""
    assert config.network is not None
    profiles = config.network.profiles(number, Rng(config.seed).child("network"), names=names)
    delivering, size = len(config.network.can_ever_deliver(profiles)), _buffer(config)
    if size > delivering:
        raise OptionError(
            "server.schedule.buffer",
            f"expected at most {delivering}, the clients that can ever deliver (the others have a network.dropout of 1 "
            f"or an availability of 0), got {size}",
        )


def _buffer(config: ExperimentConfig) -> int:
    """How many updates the server waits for; 0 where it waits for its cohort."""
    schedule = config.server.schedule
    return schedule.buffer if isinstance(schedule, Buffered) else 0


def _check_combination(config: ExperimentConfig) -> None:
    """Raise `OptionError` if the strategy doesn't go with what else clients and the server do."""
    strategy, local, server = config.server.strategy, config.local, config.server
    plain = (server.aggregator, server.optimizer) == (Mean(), ServerSgd())
    remembers = bool(local.correction.memory(torch.empty(1)))
    if strategy.replaces_mean and (not plain or remembers):
        raise OptionError(
            "server.strategy",
            f"{name_of(strategy)} replaces the plain mean: expected aggregator mean, optimizer sgd with "
            "its defaults, and no correction that the server remembers",
        )
    reasons = (
        (strategy.alternates, "trains other tensors from round to round"),
        (strategy.restarts, "starts anew each round"),
        (strategy.changes_basis, "gives A and B another basis each round"),
    )
    reason = next((reason for applies, reason in reasons if applies), None)
    if reason is not None and local.optimizer_state == "kept":
        raise OptionError("local.optimizer_state", f"expected fresh, because the strategy {reason}")
    if config.communication.error_feedback and (strategy.alternates or strategy.replaces_mean):
        raise OptionError(
            "communication.error_feedback",
            "expected false, because what is lost of one round's factors is no part of the next one's",
        )
    if local.correction.reads_deltas and not config.communication.upload.is_identity:
        raise OptionError(
            "communication.upload", f"expected none, because {name_of(local.correction)} reads the deltas themselves"
        )
    if strategy.keeps_residual and not config.communication.broadcast.is_identity:
        raise OptionError("communication.broadcast", "expected none, because the strategy sends a residual")
    has_personal = strategy.has_personal or config.adapter.has_personal
    if remembers and (strategy.alternates or has_personal or config.clients.ranks is not None):
        reason = "the strategy trains other tensors from round to round"
        if not strategy.alternates:
            reason = "some tensors stay with their clients" if has_personal else "clients have ranks of their own"
        raise OptionError("local.correction", f"expected none or fedprox, because {reason}")
    if remembers:
        _check_memory(config)
    trains_own = config.personal.in_round(local) is not None
    if trains_own and (has_personal or strategy.keeps_residual or strategy.changes_basis):
        reason = "the strategy restarts or corrects the adapter by a residual"
        if strategy.changes_basis:
            reason = "the strategy gives A and B another basis each round, and a distance from them means nothing"
        if has_personal:
            reason = "some of the adapter's tensors stay with their clients anyway"
        raise OptionError("personal", f"{name_of(config.personal)} can't be used, because {reason}")


def _check_memory(config: ExperimentConfig) -> None:
    """Raise `OptionError` if the server does what a correction that it remembers doesn't go with."""
    name, server = name_of(config.local.correction), config.server
    if server.screening.policy == "clip":
        raise OptionError(
            "server.screening.policy", f"expected skip or abort, because {name} remembers what clip takes away"
        )
    if server.aggregator != Mean():
        raise OptionError(
            "server.aggregator",
            f"expected mean, because {name} remembers the mean over all clients, those that "
            f"{name_of(server.aggregator)} leaves out or scales down included",
        )
    if type(server.strategy).weights is not Strategy.weights:
        raise OptionError(
            "local.correction",
            f"expected none or fedprox, because {name} needs the weights of all clients, and "
            f"{name_of(server.strategy)} has `weights` of its own: give it a `weight` instead",
        )


def _check_network(config: ExperimentConfig) -> None:
    """Raise `OptionError` if what needs a network has none, or the server waits for a buffer and can't."""
    if config.network is None and config.server.stragglers != StragglerPolicy():
        raise OptionError("server.stragglers", "expected a network: without one all clients deliver at once")
    if not config.server.schedule.waits_for_buffer:
        return
    strategy = config.server.strategy
    if config.network is None:
        raise OptionError("network", "missing: a buffered schedule needs to know who is how fast")
    if config.server.stragglers != StragglerPolicy():
        raise OptionError("server.stragglers", "expected the defaults: a buffered schedule waits for its buffer alone")
    local, feedback = config.local, config.communication.error_feedback
    if local.correction.memory(torch.empty(1)) or local.optimizer_state == "kept" or feedback:
        raise OptionError(
            "server.schedule",
            "buffered can't be used where clients remember what belongs to their last update: expected no error "
            "feedback, local.optimizer_state fresh, local.correction none or fedprox",
        )
    if config.adapter.has_personal or strategy.has_personal or config.personal.in_round(config.local) is not None:
        raise OptionError("server.schedule", "buffered can't be used with adapters of the clients' own")
    reasons = (
        (strategy.alternates, "trains other tensors from round to round than an update of an earlier round has"),
        (strategy.restarts or strategy.changes_basis, "gives A and B another basis each round"),
        (strategy.replaces_mean, "needs the products B A of clients that began from the same adapter"),
        (config.clients.ranks is not None, "is used with clients' own ranks, and needs what each of them began with"),
    )
    for applies, reason in reasons:
        if applies:
            raise OptionError("server.schedule", f"expected synchronous, because {name_of(strategy)} {reason}")


def _check_ranks(config: ExperimentConfig) -> None:
    """Raise `OptionError` if clients have ranks and the adapter or the strategy can't have them."""
    ranks, strategy = config.clients.ranks, config.server.strategy
    if ranks is None:
        return
    if not isinstance(config.adapter, Lora):
        raise OptionError("clients.ranks", f"expected adapter lora, got {name_of(config.adapter)}")
    if not strategy.takes_ranks:
        raise OptionError(
            "clients.ranks",
            f"{name_of(strategy)} has no rule for factors of different sizes: expected server.strategy "
            "hetlora, flexlora or flora_stacking",
        )
    if (config.server.aggregator, config.server.optimizer) != (Mean(), ServerSgd()):
        raise OptionError("clients.ranks", "expected server.aggregator mean and server.optimizer sgd with its defaults")
    if not config.communication.is_exact:
        raise OptionError("clients.ranks", "expected communication.broadcast and communication.upload to lose nothing")
    highest = max(ranks) if isinstance(ranks, tuple) else ranks.highest
    if highest > config.adapter.rank:
        raise OptionError("clients.ranks", f"expected at most adapter.rank, {config.adapter.rank}, got {highest}")


@contextmanager
def below(section: str) -> Iterator[None]:
    """Give the options named in an `OptionError` their full dotted names."""
    try:
        yield
    except OptionError as error:
        raise error.below(section) from None


_CHECKS = (_check_model, _check_parts, _check_combination, _check_ranks, _check_network, _check_data)

"""Check a configuration before weights or images are loaded: what fits what, and what combines with what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flora.clip.adapters.lora import Lora
from flora.config.combinations.table import check_combinations
from flora.config.descriptions import read_descriptions
from flora.config.presets import NO_SCENARIO, component_name, read_scenario
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.registry import OptionError, name_of
from flora.core.rng import Rng
from flora.federated.buffered import Buffered
from flora.privacy.accounting import require_accounting


def check_experiment(config: ExperimentConfig) -> None:
    """Check all that needs neither the model's weights nor an image. Raises `UserError` naming the setting.

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


def departures(config: ExperimentConfig) -> Iterator[str]:
    """Warnings of parts that the file or the command line has in place of those that make the scenario what it is."""
    if config.scenario == NO_SCENARIO:
        return
    values = read_scenario(config.scenario).values
    for key, part in (("split", config.split), ("partition", config.partition)):
        theirs, ours = component_name(values.get(key)), name_of(part)
        if theirs not in (None, ours):
            yield (
                f"warning: {key}: {ours} in place of {theirs}, which the scenario {config.scenario} has: what a file "
                f"or the command line says wins; {key}={theirs} is the scenario's"
            )


def _check_weights(config: ExperimentConfig) -> None:
    config.backbone.check_weights()


def _check_model(config: ExperimentConfig) -> None:
    architecture = config.backbone.architecture()
    with in_section("adapter"):
        config.adapter.check_fits(architecture)
    with in_section("backbone.tokens"):
        config.backbone.tokens.check_fits(architecture.vision.num_layers)


def _check_descriptions(config: ExperimentConfig) -> None:
    if config.prompts.descriptions is not None:
        read_descriptions(config.prompts.descriptions)
    if config.server.text_rounds is not None:
        read_descriptions(config.server.text_rounds.descriptions, "server.text_rounds.descriptions")


def _check_parts(config: ExperimentConfig) -> None:
    with in_section("server"):
        config.server.strategy.check_fits(config.adapter)
    with in_section("local"):
        config.local.correction.check_fits(config.local.optimizer)


def _check_accounting(config: ExperimentConfig) -> None:
    if config.privacy is not None or config.local.privacy is not None:
        require_accounting()


def _check_number_of_clients(config: ExperimentConfig) -> None:
    number = config.clients.number_training
    if number is not None and (config.clients.centralized or not config.partition.names_clients):
        check_clients(config, number)


def check_clients(config: ExperimentConfig, number: int, names: Sequence[str] | None = None) -> None:
    """Raise `UserError` naming the setting if something doesn't go with as many clients, of these names."""
    with in_section("clients.cohort"):
        config.clients.cohort.cohort_size(number)
    counts = {
        "evaluation.num_local_only": config.evaluation.num_local_only,
        "server.schedule.buffer": _buffer(config),
        "canaries.number": 0 if config.canaries is None or config.canaries.unit != "client" else config.canaries.number,
    }
    for option, count in counts.items():
        if count > number:
            raise OptionError(option, f"expected at most {number}, the clients there are, got {count}")
    if config.server.secure_sum is not None and config.clients.cohort.size_in(1, number) < 2:
        raise OptionError("clients.cohort", "expected at least 2 clients in a round: a secure sum of one is no secret")
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
    """Return how many updates the server waits for; 0 where it waits for its cohort."""
    schedule = config.server.schedule
    return schedule.buffer if isinstance(schedule, Buffered) else 0


def _check_ranks(config: ExperimentConfig) -> None:
    """Raise `OptionError` if a client has a higher rank than the adapter."""
    ranks = config.clients.ranks
    if ranks is None or not isinstance(config.adapter, Lora):
        return
    highest = max(ranks) if isinstance(ranks, tuple) else ranks.highest
    if highest > config.adapter.rank:
        raise OptionError("clients.ranks", f"expected at most adapter.rank, {config.adapter.rank}, got {highest}")


@contextmanager
def in_section(section: str) -> Iterator[None]:
    """A context in which options that an `OptionError` names get their full dotted names: `section`, then their own."""
    try:
        yield
    except OptionError as error:
        raise error.in_section(section) from None


_CHECKS = (
    _check_model,
    _check_parts,
    check_combinations,
    _check_accounting,
    _check_ranks,
    _check_number_of_clients,
    _check_descriptions,
)

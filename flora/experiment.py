"""Build everything that a run needs from its configuration. No other code reads the whole configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip.frozen import parameter_count
from flora.clip.towers.text import with_classes
from flora.clip.towers.towers import AdaptedClip
from flora.communication.network import COLUMNS, Profiles
from flora.communication.participation import Participation
from flora.config.rules import below, check_clients, check_experiment
from flora.config.schema import ExperimentConfig
from flora.core.contracts import checked_column, checked_parts, refuse
from flora.core.counts import part_of
from flora.core.devices import choose_device
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.progress import Progress
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.states import ClientData, ServerState
from flora.core.tree import State, state_digest
from flora.data.datasets.base import ImageData, checked_images
from flora.data.partition import group_names
from flora.data.value_range import with_one_range
from flora.engine.capacity import choose_clients_per_block
from flora.engine.engine import Engine
from flora.features.features import (
    Features,
    StoredFeatures,
    images_digest,
    live_features,
    load_features,
    move_if_they_fit,
)
from flora.federated.federation import Federation, ServerParts

# Clients that a line of the log names.
MAX_NAMED = 10


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything a run needs. `held_out` are the clients' held-out examples, one client after the other.

    `digests` tell other weights and other data from these, wherever they are; `value_range` is what images of more than
    8 bits were scaled from, if there are any. `new` is the same model and adapter with
    the prompts of classes that were set aside, and their test images, if there are any. `left_out` are the clients that
    the data name and that have no training image. `test_domains` `(N,)` is the group (client, folder, camera) that each
    test image belongs to, empty where that is not known; None where the data have no groups. `data` are the images as
    they were split, unreadable ones included; None once they are written down, because the paths of a million images
    take memory.
    """

    config: ExperimentConfig
    federation: Federation
    test: Features
    held_out: Features
    held_out_sizes: np.ndarray
    class_names: tuple[str, ...]
    initial_adapter: State
    backbone_parameters: int
    unreadable: tuple[str, ...]
    digests: dict[str, str]
    value_range: tuple[float, float] | None
    new: tuple[AdaptedClip, Features] | None
    left_out: tuple[str, ...] = ()
    test_domains: np.ndarray | None = None
    data: ImageData | None = None

    def initial_state(self) -> ServerState:
        """The server before the first round."""
        return self.federation.initial_state(self.initial_adapter)


def build_experiment(
    config: ExperimentConfig,
    *,
    progress: Progress,
    log: Callable[[str], object],
    hooks: Hooks | None = None,
    clients_per_block: int | None = None,
) -> Experiment:
    """Load the model and the data, run the frozen stems over all images, deal the examples out.

    `clients_per_block` is used where the configuration leaves the choice open. `log` is given what a user should know.
    Raises `UserError` naming the setting or the file.
    """
    check_experiment(config)
    rng, tell = Rng(config.seed), _Tell(progress, log)
    images = _images(config, rng, tell)
    data = images.data
    models, backbone_parameters, digests = _models(config, images, rng, tell)
    model = models[0]
    (train, test, *new), unreadable = _features(config, data, model, tell)
    digests |= {"data_sha256": _data_digest(data), "images_sha256": images_digest([train, test, *new])}
    clients_per_block = _clients_per_block(config, model, clients_per_block)
    log(f"clients in one step: up to {clients_per_block}")
    if all(isinstance(each, StoredFeatures) for each in (train, test, *new)):
        model.release_stems()
    train, test, *new = move_if_they_fit([train, test, *new], model.device)
    labels, test_labels = train.labels.numpy(), test.labels.cpu().numpy()
    _check_classes(labels, test_labels, images.class_names)
    _warn_of_untested_classes(test_labels, images.class_names, log)
    groups = None if data.train.groups is None else data.train.groups[train.split_indices]
    roster = _roster(config, groups, rng) if unreadable else images.roster
    if roster.profiles is not None:
        digests["network_sha256"] = roster.profiles.digest()
    clients = deal_out(config, labels, groups, rng)
    log(
        f"{len(labels):,} training and {len(test):,} test images, {len(images.class_names)} classes, "
        f"{len(clients)} clients"
    )
    if new:
        log(f"{len(new[0]):,} more test images, of {len(images.new_class_names)} new classes")
    engine = Engine(model, train, clients_per_block, hooks or Hooks(), log)
    return Experiment(
        config=config,
        federation=_federation(config, engine, clients, roster, rng),
        test=test,
        held_out=train.subset(np.concatenate([client.held_out for client in clients])),
        held_out_sizes=np.array([len(client.held_out) for client in clients]),
        class_names=images.class_names,
        initial_adapter=model.initial_adapter(rng.child("adapter")),
        backbone_parameters=backbone_parameters,
        unreadable=tuple(unreadable),
        digests=digests,
        value_range=images.value_range,
        new=(models[1], new[0]) if new else None,
        left_out=() if roster.names is None else _without_training_images(images.whole, roster.names, log),
        test_domains=None if data.test.groups is None else data.test.groups[test.split_indices],
        data=data,
    )


@dataclass(frozen=True)
class _Tell:
    """Who is told how far it is, and what a user should know."""

    progress: Progress
    log: Callable[[str], object]


@dataclass(frozen=True, eq=False)
class _Images:
    """The images before they were split and after it, how their classes are called, and whom the data name."""

    whole: ImageData
    data: ImageData
    class_names: tuple[str, ...]
    new_class_names: tuple[str, ...]
    roster: _Roster
    value_range: tuple[float, float] | None


def _images(config: ExperimentConfig, rng: Rng, tell: _Tell) -> _Images:
    """Find the images, split them, and check all that can be checked of them before the model is loaded."""
    whole = checked_images("data", config.data, config.data.load_with_progress(rng.child("data"), tell.progress))
    data = checked_images("split", config.split, config.split.split(whole, rng.child("split")))
    for line in whole.remarks:
        tell.log(f"warning: {line}")
    roster = _roster(config, data.train.groups, rng)
    class_names, new_names = _class_names(config, data)
    _check_labels(config, data, class_names, rng)
    data, value_range = with_one_range(data, config.data.value_range, whole=whole, progress=tell.progress, log=tell.log)
    limits = None if value_range is None else value_range.limits
    return _Images(whole, data, class_names, new_names, roster, limits)


def _models(
    config: ExperimentConfig, images: _Images, rng: Rng, tell: _Tell
) -> tuple[list[AdaptedClip], int, dict[str, str]]:
    """The model with the prompts of its classes, and with those of new ones if there are any; its size and digest."""
    clip = config.backbone.load(choose_device(config.device), rng.child("backbone"))
    number = parameter_count(clip.model)
    digests = {"backbone_sha256": state_digest(clip.model.state_dict())}
    precision = config.backbone.precision
    tell.log(f"{clip.architecture.name}: {number:,} frozen parameters on {clip.device}, {precision}")
    given = config.prompts.templates or config.data.templates
    clip = with_classes(clip, (images.class_names, images.new_class_names), given)
    adapter = config.adapter.attach(clip)
    templates = config.adapter.templates(given)
    models = [
        AdaptedClip(clip, adapter, class_names=names, templates=templates, speed=config.speed)
        for names in (images.class_names, images.new_class_names)
        if names
    ]
    for line in dict.fromkeys(line for model in models for line in model.text.cut_prompts):
        tell.log(f"warning: prompts: {line}")
    _check_clients_per_block(config, models[0])
    if not models[0].text.is_cut_at_end:
        tell.log("the text tower is not causal or not read at the end-of-text token: prompts stay padded")
    return models, number, digests


def _federation(
    config: ExperimentConfig, engine: Engine, clients: Sequence[ClientData], roster: _Roster, rng: Rng
) -> Federation:
    """The federation of these clients, as the configuration says."""
    server = config.server
    sizes = np.array([len(client.train) for client in clients])
    return Federation(
        engine=engine,
        clients=clients,
        participation=Participation(config.clients.cohort, sizes, config.network, roster.profiles, server.stragglers),
        local=config.local,
        schedule=server.schedule,
        num_rounds=config.rounds,
        rng=rng.child("federation"),
        server=ServerParts(server.strategy, server.aggregator, server.optimizer, server.screening),
        personal=config.personal,
        communication=config.communication,
        ranks=_ranks(config, len(clients), rng.child("ranks")),
    )


@dataclass(frozen=True, eq=False)
class _Roster:
    """What the data call the clients, if they do, and what lines and machines they have, if that matters."""

    names: tuple[str, ...] | None
    profiles: Profiles | None


def _roster(config: ExperimentConfig, groups: np.ndarray | None, rng: Rng) -> _Roster:
    """The clients among whom training examples of these `groups` are dealt out.

    Raises `UserError` if the data name as many clients as something in the configuration can't go with.
    """
    names = None
    if config.partition.names_clients and not config.clients.centralized:
        names = group_names(groups, config.clients.number)
    number = config.clients.number_training if names is None else len(names)
    assert number is not None
    if names is not None:
        check_clients(config, number, names)
    profiles = None
    if config.network is not None:
        profiles = config.network.profiles(number, rng.child("network"), names=names)
        for column in COLUMNS:
            checked_column("network", config.network, getattr(profiles, column), number, what=column)
    return _Roster(names, profiles)


def _without_training_images(data: ImageData, names: Sequence[str], log: Callable[[str], object]) -> tuple[str, ...]:
    """The clients that the data name and that are not among `names`, those with something to train on; logs them."""
    groups = [split.groups for split in (data.train, data.test) if split.groups is not None]
    left_out = np.setdiff1d(np.concatenate(groups), names).tolist()
    if left_out:
        shown = ", ".join(left_out[:MAX_NAMED]) + (", ..." if len(left_out) > MAX_NAMED else "")
        log(
            f"{len(left_out)} of the {len(left_out) + len(names)} clients that the data name have no training image "
            f"and take no part: {shown}"
        )
    return tuple(left_out)


def _ranks(config: ExperimentConfig, num_clients: int, rng: Rng) -> np.ndarray | None:
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


def _features(
    config: ExperimentConfig, data: ImageData, model: AdaptedClip, tell: _Tell
) -> tuple[list[Features], list[str]]:
    """The features of the splits, and a line for each image that can't be read.

    They are computed once, apart from those of images that are augmented: the training split's.
    """
    augmentation, skip = config.local.augmentation, config.data.unreadable == "skip"
    splits = {"training": data.train, "test": data.test} | ({"new": data.new} if data.new is not None else {})
    is_live = dict.fromkeys(splits, config.cache.enabled is False)
    is_live["training"] |= augmentation.changes_images
    features: dict[str, Features] = {}
    problems: list[str] = []
    for name in (name for name in splits if is_live[name]):
        tell.log(f"features of the {name} images: computed at each use")
        features[name], found = live_features(
            splits[name], model, augmentation, skip_unreadable=skip, progress=tell.progress
        )
        problems += found
    stored = [name for name in splits if not is_live[name]]
    if stored:
        loaded, found = load_features(
            [splits[name] for name in stored],
            model,
            cache=config.cache,
            skip_unreadable=skip,
            progress=tell.progress,
            log=tell.log,
        )
        features.update(zip(stored, loaded, strict=True))
        problems += found
    if problems:
        number = sum(len(split) for split in splits.values())
        tell.log(f"left out: {len(problems):,} of {number:,} images can't be read")
    return [features[name] for name in splits], problems


def hold_out(examples: np.ndarray, fraction: float, rng: Rng) -> ClientData:
    """Split a client's examples: it tests on round(n * fraction) of them (at least one if n > 1 and fraction > 0)."""
    count = 0
    if fraction > 0 and len(examples) > 1:
        count = min(max(round(part_of(fraction, len(examples))), 1), len(examples) - 1)
    order = rng.numpy().permutation(examples)
    return ClientData(train=np.sort(order[count:]), held_out=np.sort(order[:count]))


def deal_out(config: ExperimentConfig, labels: np.ndarray, groups: np.ndarray | None, rng: Rng) -> list[ClientData]:
    """Each client's share of the training examples. Raises `UserError` if one would have nothing to train on."""
    names = group_names(groups, config.clients.number) if config.partition.names_clients else ()
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
    return clients


def _data_digest(data: ImageData) -> str:
    splits = [data.train, data.test] + ([data.new] if data.new is not None else [])
    parts = [each for split in splits for each in (split.source.contents(split.source_indices), split.labels)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.tobytes())
    return digest.hexdigest()


def _check_labels(config: ExperimentConfig, data: ImageData, class_names: Sequence[str], rng: Rng) -> None:
    """Raise `UserError` for what labels alone show to be wrong: before any image is read, not hours later."""
    _check_classes(data.train.labels, data.test.labels, class_names)
    clients = deal_out(config, data.train.labels, data.train.groups, rng)
    _ranks(config, len(clients), rng.child("ranks"))


def _check_classes(train: np.ndarray, test: np.ndarray, class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise UserError(f"data: {class_names[0]!r} is the only class: there is nothing to tell it from")
    empty = np.flatnonzero(np.bincount(train, minlength=len(class_names)) == 0)
    if len(empty):
        raise UserError(
            f"data: class {class_names[empty[0]]!r} has no training image: the data have none that can be read, or "
            "`split` leaves none"
        )
    if not len(test):
        raise UserError("data: there are no test images")


def _warn_of_untested_classes(test: np.ndarray, class_names: Sequence[str], log: Callable[[str], object]) -> None:
    counts = np.bincount(test, minlength=len(class_names)).tolist()
    untested = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if untested:
        names = ", ".join(untested[:10]) + " ..." * (len(untested) > 10)
        log(f"warning: data: {len(untested)} of {len(class_names)} classes have no test image: {names}")


def _class_names(config: ExperimentConfig, data: ImageData) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the classes are called in prompts: those that are trained on, and those that are set aside."""
    with below("prompts"):
        names = config.prompts.rename((*data.class_names, *data.new_class_names))
    return names[: len(data.class_names)], names[len(data.class_names) :]


def _check_clients_per_block(config: ExperimentConfig, model: AdaptedClip) -> None:
    limit, asked = model.adapter.max_clients_per_block, config.clients.per_block
    if limit is not None and asked is not None and asked > limit:
        raise OptionError("clients.per_block", f"expected at most {limit} with this adapter, got {asked}")


def _clients_per_block(config: ExperimentConfig, model: AdaptedClip, recorded: int | None) -> int:
    """As many as are asked for, or as `recorded` of the run so far, or as fit."""
    limit, asked = model.adapter.max_clients_per_block, config.clients.per_block
    if asked or recorded:
        return asked or recorded or 1
    chosen = choose_clients_per_block(model, batch_size=config.local.batch_size)
    return min(chosen, limit or chosen)

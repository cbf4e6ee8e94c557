"""Build everything that a run needs from its configuration. No other code reads the whole configuration."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip.frozen import FrozenClip, parameter_count
from flora.clip.towers.text import with_classes
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.config.rules import below, check_experiment
from flora.config.schema import ExperimentConfig
from flora.core.devices import choose_device
from flora.core.hooks import Hooks
from flora.core.processes import ALONE, Message, Processes
from flora.core.progress import SILENT, Tell
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.shared import Shared
from flora.core.states import ClientData, ServerState
from flora.core.tree import State, state_digest
from flora.data.datasets.base import ImageData
from flora.engine.capacity import MAX_CLIENTS_PER_BLOCK, choose_clients_per_block
from flora.engine.engine import Engine
from flora.experiment.clients import Roster, deal_out, ranks_of, roster_of, without_training_images
from flora.experiment.images import (
    Images,
    check_classes,
    data_digest,
    features_key,
    features_of_splits,
    find_images,
    warn_of_untested_classes,
)
from flora.experiment.other_data import OtherData, load_other_data
from flora.experiment.server_training import find_server_data, server_digests, server_training
from flora.experiment.start import starting_adapter
from flora.features.features import Features, images_digest
from flora.features.views import move_if_they_fit
from flora.federated.federation import Federation, ServerParts
from flora.federated.summing import check_sums
from flora.privacy.canaries import planted
from flora.privacy.rounds import PrivateRounds


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything a run needs. `held_out` are the clients' held-out examples, one client after the other.

    `digests` tell other weights and other data from these, wherever they are; `value_range` is what images of more than
    8 bits were scaled from, if there are any. `new` is the same model and adapter with
    the prompts of classes that were set aside, and their test images, if there are any. `left_out` are the clients that
    the data name and that have no training image. `test_domains` `(N,)` is the group (client, folder, camera) that each
    test image belongs to, empty where that is not known; None where the data have no groups. `data` are the images as
    they were split, unreadable ones included; None once they are written down, because the paths of a million images
    take memory. `by_template` is the same model and adapter with the prompts of each of `evaluation.templates`.
    `other_data` are those of `evaluation.also`, by name. `unseen` are the clients that never train; their ids follow
    those of the federation's.
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
    by_template: Mapping[str, AdaptedClip] = field(default_factory=dict)
    other_data: Mapping[str, OtherData] = field(default_factory=dict)
    unseen: Sequence[ClientData] = ()

    @cached_property
    def unseen_held_out(self) -> Features:
        """The held-out examples of the clients that never train, one client after the other."""
        return self.federation.engine.features.subset(np.concatenate([client.held_out for client in self.unseen]))

    @cached_property
    def held_classes(self) -> np.ndarray:
        """Which classes each client has training examples of, with a label or without: `(num_clients, C)` bool."""
        clients, labels = self.federation.clients, self.federation.engine.features.labels.numpy()
        examples = [np.concatenate([client.train, client.unlabelled]) for client in clients]
        owners = np.repeat(np.arange(len(clients)), [len(each) for each in examples])
        holds = np.zeros((len(clients), len(self.class_names)), dtype=bool)
        holds[owners, labels[np.concatenate(examples)]] = True
        return holds

    @property
    def has_start(self) -> bool:
        """Whether the adapter begins from a file."""
        return "start_sha256" in self.digests

    @property
    def last_round(self) -> int:
        """The last round that there will be: fewer than asked for where a budget of privacy ends before."""
        private = self.federation.privacy
        return self.config.rounds if private is None else private.last_round

    @property
    def publishes(self) -> bool:
        """Whether records say, with differential privacy, what that does not cover."""
        return self.config.privacy is None or self.config.privacy.publish

    def initial_state(self) -> ServerState:
        """The server before the first round."""
        return self.federation.initial_state(self.initial_adapter)


def build_experiment(
    config: ExperimentConfig,
    tell: Tell = SILENT,
    *,
    hooks: Hooks | None = None,
    clients_per_block: int | None = None,
    processes: Processes = ALONE,
    shared: Shared | None = None,
) -> Experiment:
    """Load the model and the data, run the frozen stems over all images, deal the examples out.

    `tell` hears how far that is, and what a user should know. `clients_per_block` is used where the configuration
    leaves the choice open. All `processes` of a run do this together. `shared` keeps models, images and features for
    other experiments of this process that have the same; the frozen stems then stay in memory, too. Raises `UserError`
    naming the setting or the file.
    """
    check_experiment(config)
    if config.server.secure_sum is not None:
        config.server.secure_sum.require()
    rng, known, log = Rng(config.seed), shared or Shared(), tell.log
    with processes.one_first(if_needed=getattr(config.data, "download", False)):
        images = find_images(config, rng, tell, known)
        server_data = find_server_data(config, images.data, rng.child("server"), tell)
    data, prepared = images.data, _prepared(config, images, rng, tell, processes, known)
    model, (train, test, *new) = prepared.models[0], prepared.features
    chosen = _clients_per_block(config, model, clients_per_block, len(images.shares.clients), processes.size)
    clients_per_block = processes.first(lambda: Message(chosen)).fields
    training = server_training(config, server_data, prepared.models, clients_per_block, tell, processes)
    digests = prepared.digests | server_digests(training, server_data)
    log(f"clients in one step: up to {clients_per_block}")
    if shared is None and not any(each.runs_stem for each in (train, test, *new)):
        model.release_stems()
    train, test, *new = known.of(("moved", id(train)), lambda: move_if_they_fit([train, test, *new], model.device))
    labels, test_labels = train.labels.numpy(), test.labels.cpu().numpy()
    check_classes(labels, test_labels, images.class_names)
    warn_of_untested_classes(test_labels, images.class_names, log)
    groups = None if data.train.groups is None else data.train.groups[train.split_indices]
    roster, shares = images.roster, images.shares
    if prepared.unreadable:
        roster, shares = roster_of(config, groups, rng), deal_out(config, labels, groups, rng)
    clients, unseen = shares.clients, shares.unseen
    if roster.profiles is not None:
        digests["network_sha256"] = roster.profiles.digest()
    log(
        f"{len(labels):,} training and {len(test):,} test images, {len(images.class_names)} classes, "
        f"{len(clients)} clients" + f", {len(unseen)} more that never train" * bool(unseen)
    )
    if new:
        log(f"{len(new[0]):,} more test images, of {len(images.new_class_names)} new classes")
    canaries, clients = planted(config.canaries, clients, rng.child("canaries"))
    if canaries is not None:
        train = train.with_labels(torch.from_numpy(canaries.labels(labels, len(images.class_names))))
        log(f"{canaries.canaries.number} canaries, each in or out by a fair coin: this run is to be audited")
    engine = Engine(model, train, clients_per_block, hooks or Hooks(), log, processes, config.cache.memory_bytes)
    federation = replace(_federation(config, engine, clients, roster, rng), server_training=training, canaries=canaries)
    return Experiment(
        config=config,
        federation=federation,
        test=test,
        held_out=train.subset(np.concatenate([client.held_out for client in clients])),
        held_out_sizes=np.array([len(client.held_out) for client in clients]),
        class_names=images.class_names,
        initial_adapter=_initial_adapter(federation, prepared.start, rng, log),
        backbone_parameters=prepared.backbone_parameters,
        unreadable=tuple(prepared.unreadable),
        digests=digests,
        value_range=images.value_range,
        new=(prepared.models[1], new[0]) if new else None,
        left_out=() if roster.names is None else without_training_images(images.whole, groups, log),
        test_domains=None if data.test.groups is None else data.test.groups[test.split_indices],
        data=data,
        by_template=prepared.by_template,
        other_data=prepared.other_data,
        unseen=unseen,
    )


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What takes time to load or to compute: models, the adapter that a run starts from, the features of its images.

    `by_template`, `digests` and `other_data` are as in `Experiment`; `unreadable` has a line for each image that can't
    be read.
    """

    models: list[AdaptedClip]
    backbone_parameters: int
    by_template: Mapping[str, AdaptedClip]
    start: State
    features: list[Features]
    unreadable: list[str]
    digests: dict[str, str]
    other_data: Mapping[str, OtherData]


def _prepared(
    config: ExperimentConfig, images: Images, rng: Rng, tell: Tell, processes: Processes, known: Shared
) -> _Prepared:
    """Load the models and compute the features, but for what is `known` from other experiments."""
    device = choose_device(config.device, processes)
    models, backbone_parameters, models_digests = known.of(
        _models_key(config, device, images), lambda: _models(config, device, images, rng, tell)
    )
    model = models[0]
    by_template = known.of(
        ("by template", id(model), config.evaluation.templates), lambda: _models_by_template(config, model, tell)
    )
    start = starting_adapter(config, model)
    start_digest = {"start_sha256": state_digest(start)} if start else {}
    features, unreadable, images_digests = known.of(
        features_key(config, images.data, model), lambda: _features(config, images.data, model, tell, processes)
    )
    other_data = known.of(
        ("other data", id(model), id(images.other), repr(config.cache)),
        lambda: load_other_data(config, images.other, model, tell, processes),
    )
    digests = models_digests | start_digest | images_digests
    if other_data:
        digests["other_images_sha256"] = images_digest([each.features for each in other_data.values()])
    return _Prepared(models, backbone_parameters, by_template, start, features, unreadable, digests, other_data)


def _initial_adapter(federation: Federation, start: State, rng: Rng, log: Callable[[str], object]) -> State:
    """The adapter that the server starts from, `start` in it, after what it trains before round 1."""
    adapter = {**federation.engine.model.initial_adapter(rng.child("adapter")), **start}
    with below("server"):
        federation.server.strategy.check_names(tuple(adapter))
    check_sums(federation, adapter)
    synthetic = federation.server_training.synthetic
    if synthetic is None:
        return adapter
    after = synthetic.train(adapter, federation.roles.trained(adapter, round=1), rng.child("warm-up"))
    number = len(synthetic.engine.features)
    log(f"before round 1 the server trained on {number:,} images of its own: mean loss {after.loss:.3f}")
    return after.adapter


def _features(
    config: ExperimentConfig, data: ImageData, model: AdaptedClip, tell: Tell, processes: Processes
) -> tuple[list[Features], list[str], dict[str, str]]:
    """The features of the splits, lines about images that can't be read, and the digests of images and labels."""
    features, unreadable = features_of_splits(config, data, model, tell, processes)
    return features, unreadable, {"data_sha256": data_digest(data), "images_sha256": images_digest(features)}


def _models_key(config: ExperimentConfig, device: torch.device, images: Images) -> Hashable:
    """All that the models depend on: the seed too where their weights are random."""
    seed = config.seed if config.backbone.weights == "random" else None
    parts = config.backbone, config.adapter, config.prompts, config.data.templates, config.speed, images.descriptions
    own = config.personal if config.personal.has_personal else None
    names = images.class_names, images.new_class_names
    return "models", seed, repr(parts), own, names, str(device), config.evaluation.patches is not None


def _models(
    config: ExperimentConfig, device: torch.device, images: Images, rng: Rng, tell: Tell
) -> tuple[list[AdaptedClip], int, dict[str, str]]:
    """The model with the prompts of its classes, and with those of new ones if there are any; its size and digest."""
    clip = config.backbone.load(device, rng.child("backbone"))
    number = parameter_count(clip.model)
    digests = {"backbone_sha256": state_digest(clip.model.state_dict())}
    precision = config.backbone.precision
    tell.log(f"{clip.architecture.name}: {number:,} frozen parameters on {clip.device}, {precision}")
    models = adapted_models(config, clip, (images.class_names, images.new_class_names), images.descriptions)
    _warn_of_cut_prompts(models, tell)
    _check_clients_per_block(config, models[0])
    if not models[0].text.is_cut_at_end:
        tell.log("the text tower is not causal or not read at the end-of-text token: prompts stay padded")
    return models, number, digests | images.descriptions_digest


def adapted_models(
    config: ExperimentConfig,
    clip: FrozenClip,
    groups: Sequence[Sequence[str]],
    descriptions: Mapping[str, Sequence[str]],
) -> list[AdaptedClip]:
    """The model with the configuration's adapter and the prompts of each of `groups` of class names that isn't empty.

    All share the adapter. `descriptions` are more sentences for some classes, by their names.
    """
    given = config.prompts.templates or config.data.templates
    reads_patches = config.evaluation.patches is not None or config.adapter.comparison.reads_patches
    clip = replace(clip, reads_patches=reads_patches)
    clip = with_classes(clip, groups, given)
    adapter = config.attach(clip)
    templates = config.adapter.templates(given)
    return [
        AdaptedClip(
            clip,
            adapter,
            class_names=names,
            templates=templates,
            speed=config.speed,
            descriptions={name: descriptions[name] for name in names if name in descriptions},
        )
        for names in groups
        if names
    ]


def _models_by_template(config: ExperimentConfig, model: AdaptedClip, tell: Tell) -> dict[str, AdaptedClip]:
    """The same model with the prompts of each of `evaluation.templates` alone; they share all but the prompts."""
    by_template = {
        template: AdaptedClip(
            model.clip, model.adapter, class_names=model.class_names, templates=(template,), speed=config.speed
        )
        for template in config.evaluation.templates
    }
    _warn_of_cut_prompts(list(by_template.values()), tell)
    return by_template


def _warn_of_cut_prompts(models: Sequence[AdaptedClip], tell: Tell) -> None:
    for line in dict.fromkeys(line for model in models for line in model.text.cut_prompts):
        tell.log(f"warning: prompts: {line}")


def _federation(
    config: ExperimentConfig, engine: Engine, clients: Sequence[ClientData], roster: Roster, rng: Rng
) -> Federation:
    """The federation of these clients, as the configuration says."""
    server = config.server
    sizes = np.array([len(client.train) for client in clients])
    federation = Federation(
        engine=engine,
        clients=clients,
        participation=Participation(config.clients.cohort, sizes, config.network, roster.profiles, server.stragglers),
        local=config.local,
        schedule=server.schedule,
        num_rounds=config.rounds,
        rng=rng.child("federation"),
        server=ServerParts(server.strategy, server.aggregator, server.optimizer, server.screening, server.secure_sum),
        personal=config.personal,
        communication=config.communication,
        ranks=ranks_of(config, len(clients), rng.child("ranks")),
        privacy=_private_rounds(config, len(clients), engine.log),
    )
    return federation


def _private_rounds(config: ExperimentConfig, num_clients: int, log: Callable[[str], object]) -> PrivateRounds | None:
    """The mechanism of differential privacy with its noise multiplier, if there is one; what it promises is logged."""
    if config.privacy is None:
        return None
    attendance = config.clients.cohort.attendance(num_clients)
    made = PrivateRounds.of(config.privacy, attendance, config.rounds)
    for line in made.lines():
        log(line)
    return made


def _check_clients_per_block(config: ExperimentConfig, model: AdaptedClip) -> None:
    limit, asked = model.adapter.max_clients_per_block, config.clients.per_block
    if limit is not None and asked is not None and asked > limit:
        raise OptionError("clients.per_block", f"expected at most {limit} with this adapter, got {asked}")


def _clients_per_block(
    config: ExperimentConfig, model: AdaptedClip, recorded: int | None, num_clients: int, num_processes: int
) -> int:
    """As many as are asked for, or as `recorded` of the run so far, or as fit: with a block for each process."""
    limit, asked = model.adapter.max_clients_per_block, config.clients.per_block
    if asked or recorded:
        return asked or recorded or 1
    # Where each example has a gradient of its own, they go through the model in parts of a block.
    chosen = MAX_CLIENTS_PER_BLOCK
    if config.local.privacy is None:
        chosen = choose_clients_per_block(model, batch_size=config.local.images_per_step)
    if num_processes > 1:
        chosen = min(chosen, -(-config.clients.cohort.size_in(1, num_clients) // num_processes))
    return min(chosen, limit or chosen)

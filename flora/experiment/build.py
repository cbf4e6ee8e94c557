"""Build everything that a run needs from its configuration. No other code reads the whole configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.config.rules import check_experiment, in_section
from flora.config.schema import ExperimentConfig
from flora.core.counts import counted
from flora.core.hooks import Hooks
from flora.core.processes import ALONE, Message, Processes
from flora.core.progress import SILENT, Tell
from flora.core.rng import Rng
from flora.core.shared import Shared
from flora.core.states import ClientData, ServerState
from flora.core.tree import State
from flora.data.datasets.base import ImageData
from flora.engine.capacity import MAX_CLIENTS_PER_BLOCK, choose_clients_per_block
from flora.engine.engine import Engine
from flora.experiment.clients import deal_out, ranks_of, roster_of, without_training_images
from flora.experiment.images import Images, SplitFeatures, check_classes, find_images, warn_of_untested_classes
from flora.experiment.other_data import OtherData
from flora.experiment.prepared import BuildContext, Prepared, moved, prepare
from flora.experiment.server_training import find_server_data, server_digests, server_training
from flora.features.features import Features
from flora.federated.federation import Federation, ServerParts
from flora.federated.server_training import ServerTraining
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
    new: OtherData | None
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
    context = BuildContext(config, Rng(config.seed), tell, processes, shared or Shared())
    with processes.one_first(if_needed=getattr(config.data, "download", False)):
        images = find_images(config, context.rng, tell, context.shared)
        server_data = find_server_data(config, images.data, context.rng.child("server"), tell)
    prepared = prepare(context, images)
    clients_per_block = _clients_per_block(context, prepared.model, clients_per_block, len(images.shares.clients))
    training = server_training(config, server_data, prepared.models, clients_per_block, tell, processes)
    tell.log(f"clients in one step: up to {clients_per_block}")
    if shared is None and not prepared.features.runs_stem:
        prepared.model.release_stems()
    prepared = moved(context, prepared)
    images = _as_read(context, images, prepared.features)
    federation = _federation(context, images, prepared, training, clients_per_block, hooks or Hooks())
    return _experiment(context, images, prepared, federation, server_digests(training, server_data))


def _as_read(context: BuildContext, images: Images, features: SplitFeatures) -> Images:
    """The images whose `features` could be computed, dealt out among the clients.

    Raises `UserError` if a class or a client is left without any, and logs how many there are.
    """
    config, rng, log = context.config, context.rng, context.tell.log
    labels, test_labels = features.train.labels.numpy(), features.test.labels.cpu().numpy()
    check_classes(labels, test_labels, images.class_names)
    warn_of_untested_classes(test_labels, images.class_names, log)
    if features.unreadable:
        groups = images.data.train.subset(features.train.split_indices).groups
        images = replace(images, roster=roster_of(config, groups, rng), shares=deal_out(config, labels, groups, rng))
    clients, unseen = images.shares.clients, images.shares.unseen
    log(
        f"{len(labels):,} training and {len(test_labels):,} test images, {len(images.class_names)} classes, "
        f"{counted(len(clients), 'client')}" + f", {len(unseen)} more that never train" * bool(unseen)
    )
    if features.new is not None:
        log(f"{len(features.new):,} more test images, of {len(images.new_class_names)} new classes")
    return images


def _federation(
    context: BuildContext,
    images: Images,
    prepared: Prepared,
    training: ServerTraining,
    clients_per_block: int,
    hooks: Hooks,
) -> Federation:
    """The federation of the clients of `images`, as the configuration says, and of the canaries that it asks for."""
    config, rng, log, server = context.config, context.rng, context.tell.log, context.config.server
    canaries, clients = planted(config.canaries, images.shares.clients, rng.child("canaries"))
    train = prepared.features.train
    if canaries is not None:
        train = train.with_labels(torch.from_numpy(canaries.labels(train.labels.numpy(), len(images.class_names))))
        log(f"{canaries.canaries.number} canaries, each in or out by a fair coin: this run is to be audited")
    sizes = np.array([len(client.train) for client in clients])
    profiles = images.roster.profiles
    return Federation(
        engine=Engine(
            prepared.model, train, clients_per_block, hooks, log, context.processes, config.cache.memory_bytes
        ),
        clients=clients,
        participation=Participation(config.clients.cohort, sizes, config.network, profiles, server.stragglers),
        local=config.local,
        schedule=server.schedule,
        num_rounds=config.rounds,
        rng=rng.child("federation"),
        server=ServerParts(server.strategy, server.aggregator, server.optimizer, server.screening, server.secure_sum),
        personal=config.personal,
        communication=config.communication,
        ranks=ranks_of(config, len(clients), rng.child("ranks")),
        server_training=training,
        privacy=_private_rounds(config, len(clients), log),
        canaries=canaries,
    )


def _experiment(
    context: BuildContext, images: Images, prepared: Prepared, federation: Federation, server_digests: dict[str, str]
) -> Experiment:
    """The experiment of a federation, with the adapter that its server starts from and all that its images are of."""
    features, roster, log = prepared.features, images.roster, context.tell.log
    profiles = {} if roster.profiles is None else {"network_sha256": roster.profiles.digest()}
    held_out = [client.held_out for client in federation.clients]
    groups = images.data.train.subset(features.train.split_indices).groups
    return Experiment(
        config=context.config,
        federation=federation,
        test=features.test,
        held_out=federation.engine.features.subset(np.concatenate(held_out)),
        held_out_sizes=np.array([len(examples) for examples in held_out]),
        class_names=images.class_names,
        initial_adapter=_initial_adapter(federation, prepared.start, context.rng, log),
        backbone_parameters=prepared.backbone_parameters,
        unreadable=tuple(features.unreadable),
        digests=prepared.digests | server_digests | profiles,
        value_range=images.value_range,
        new=None if features.new is None else OtherData(prepared.models[1], features.new),
        left_out=() if roster.names is None else without_training_images(images.whole, groups, log),
        test_domains=images.data.test.subset(features.test.split_indices).groups,
        data=images.data,
        by_template=prepared.by_template,
        other_data=prepared.other_data,
        unseen=images.shares.unseen,
    )


def _initial_adapter(federation: Federation, start: State, rng: Rng, log: Callable[[str], object]) -> State:
    """The adapter that the server starts from, `start` in it, after what it trains before round 1."""
    adapter = {**federation.engine.model.initial_adapter(rng.child("adapter")), **start}
    with in_section("server"):
        federation.server.strategy.check_names(tuple(adapter))
    check_sums(federation, adapter)
    synthetic = federation.server_training.synthetic
    if synthetic is None:
        return adapter
    after = synthetic.train(adapter, federation.roles.trained(adapter, round=1), rng.child("warm-up"))
    number = len(synthetic.engine.features)
    log(f"before round 1 the server trained on {number:,} images of its own: mean loss {after.loss:.3f}")
    return after.adapter


def _private_rounds(config: ExperimentConfig, num_clients: int, log: Callable[[str], object]) -> PrivateRounds | None:
    """The mechanism of differential privacy with its noise multiplier, if there is one; what it promises is logged."""
    if config.privacy is None:
        return None
    attendance = config.clients.cohort.attendance(num_clients)
    made = PrivateRounds.of(config.privacy, attendance, config.rounds)
    for line in made.lines():
        log(line)
    return made


def _clients_per_block(context: BuildContext, model: AdaptedClip, recorded: int | None, num_clients: int) -> int:
    """As many as are asked for, or as `recorded` of the run so far, or as fit: with a block for each process.

    Free memory differs between processes, so the first one chooses for all.
    """
    config, processes = context.config, context.processes
    limit, asked = model.adapter.max_clients_per_block, config.clients.per_block
    chosen = asked or recorded
    if not chosen:
        # Where each example has a gradient of its own, they go through the model in parts of a block.
        chosen = MAX_CLIENTS_PER_BLOCK
        if config.local.privacy is None:
            chosen = choose_clients_per_block(model, batch_size=config.local.images_per_step)
        if processes.size > 1:
            chosen = min(chosen, -(-config.clients.cohort.size_in(1, num_clients) // processes.size))
        chosen = min(chosen, limit or chosen)
    number: int = processes.first(lambda: Message(chosen)).fields
    return number

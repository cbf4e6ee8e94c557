"""The parts of a federation, and the plan of one of its rounds."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flora.client.local_training import LocalTraining
from flora.client.personalization import NoPersonalization, Personalization
from flora.communication.link import Broadcast, Link
from flora.communication.network import ClientLoad, CohortOutcome
from flora.communication.options import CommunicationOptions
from flora.communication.participation import Participation
from flora.core import tree
from flora.core.contracts import called
from flora.core.errors import UserError
from flora.core.low_rank import rank_padded
from flora.core.registry import Component
from flora.core.rng import Rng
from flora.core.states import FRESH, ClientData, ClientState, ClientUpdate, InFlight, ServerState
from flora.core.tree import State, StateLike
from flora.engine.engine import Engine
from flora.engine.tasks import ClientTask, TrainingSetup
from flora.federated.roles import TensorRoles
from flora.federated.server_training import ServerTraining
from flora.privacy.canaries import PlantedCanaries
from flora.privacy.fixed_point import Ring
from flora.privacy.rounds import PrivateRounds
from flora.privacy.secure_sums import SecureSum
from flora.privacy.traffic import PHASES
from flora.server.aggregators import Aggregator, Mean
from flora.server.optimizers import ServerOptimizer, ServerSgd
from flora.server.screening import Screening
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.base import Strategy


@dataclass(frozen=True)
class ServerParts:
    """What the server does with updates: see the sections of `server` in a configuration."""

    strategy: Strategy = field(default_factory=FedAvg)
    aggregator: Aggregator = field(default_factory=Mean)
    optimizer: ServerOptimizer = field(default_factory=ServerSgd)
    screening: Screening = field(default_factory=Screening)
    secure_sum: SecureSum | None = None


class Awaited(NamedTuple):
    """When a client arrives on the network's clock; its id; whether it has dropped out by then. Sorted by time."""

    arrival_seconds: float
    client: int
    is_gone: bool


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """The plan of a round: the tasks of those who deliver, who was asked, what was broadcast.

    `view` is the server's state as clients see it: its adapter is what they read of the broadcast. `first_tasks` are
    the same clients' tasks for what stays with them, where they train that before what they send, and `personal_tasks`
    those for adapters that each trains for itself. `downlink_bytes` go to all who were
    asked, `late_uplink_bytes` come from those who are too late. `awaited` are the clients that
    were asked and have not arrived by the round's end: none where the server waits for its cohort. `clusters` says
    which of the server's models each client trains, where there are several.
    """

    round: int
    rng: Rng
    view: ServerState
    tasks: tuple[ClientTask, ...]
    personal_tasks: tuple[ClientTask, ...]
    outcome: CohortOutcome
    downlink_bytes: int
    late_uplink_bytes: int = 0
    awaited: Sequence[Awaited] = ()
    first_tasks: tuple[ClientTask, ...] = ()
    clusters: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Received:
    """The updates that came back in a round, and what clients carry on from it.

    `updates` are in the order of ids, so that sums don't depend on how clients were grouped. `clients` is what each
    client carries from now on, `before` what it carries if its update is left out. `staleness` is by how many rounds
    each update is late.
    """

    updates: Sequence[ClientUpdate]
    clients: Mapping[int, ClientState]
    before: Mapping[int, ClientState]
    staleness: Sequence[int] = ()


@dataclass(frozen=True)
class RoundSchedule(Component):
    """When the server steps: for whose updates it waits."""

    waits_for_buffer = False
    """Whether the server waits for a number of updates, whoever sends them, instead of for its cohort."""

    @abstractmethod
    def plan(self, federation: Federation, state: ServerState) -> RoundPlan:
        """Plan the round after `state`: who trains what."""

    @abstractmethod
    def receive(self, plan: RoundPlan, trained: Mapping[int, tuple[ClientUpdate, ClientState]]) -> Received:
        """Return the updates that have arrived when clients have `trained`, and what all clients carry on."""


@dataclass(frozen=True, eq=False)
class Federation:
    """The parts of a federation: who trains what, how it travels, and what the server makes of it. None of it changes.

    `ranks` `(num_clients,)` are the clients' own, None if all have the adapter's. `server_training` is what the server
    trains by itself. `privacy` is what bounds and noises updates, None where nothing does; `canaries` are
    what an audit looks for, if there are any.
    """

    engine: Engine
    clients: Sequence[ClientData]
    participation: Participation
    local: LocalTraining
    schedule: RoundSchedule
    num_rounds: int
    rng: Rng
    server: ServerParts = field(default_factory=ServerParts)
    personal: Personalization = field(default_factory=NoPersonalization)
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)
    ranks: np.ndarray | None = None
    server_training: ServerTraining = field(default_factory=ServerTraining)
    privacy: PrivateRounds | None = None
    canaries: PlantedCanaries | None = None

    @cached_property
    def roles(self) -> TensorRoles:
        """Which tensors are trained, sent and kept."""
        keeps_all = self.personal.in_round(self.local) is not None
        return TensorRoles(self.engine.model.adapter, self.server.strategy, keeps_all)

    @cached_property
    def link(self) -> Link:
        """How what travels is packed."""
        return Link(self.communication, self.ranks)

    @cached_property
    def most_unlabelled(self) -> int:
        """The most images without a label that a client has."""
        return max(len(client.unlabelled) for client in self.clients)

    def with_clients(self, clients: Sequence[ClientData]) -> Federation:
        """Return the same federation of other clients, whatever else is known of those that it has."""
        sizes = np.array([len(client.train) for client in clients])
        participation = dataclasses.replace(self.participation, sizes=sizes)
        return dataclasses.replace(self, clients=clients, participation=participation)

    def num_sent(self, num_numbers: int) -> int:
        """Return how many numbers go into a secure sum for an update of `num_numbers`."""
        return num_numbers if self.privacy is None else self.privacy.mechanism.num_sent(num_numbers)

    def initial_state(self, adapter: State) -> ServerState:
        """The server before the first round, from the adapter that clients start with.

        Raises `UserError` if the strategy trains other tensors in round 2 than in round 1, and does not say so.
        """
        trained = tree.select(adapter, self.roles.trained(adapter, round=1))
        strategy = self.server.strategy
        if not strategy.alternates and tuple(trained) != self.roles.trained(adapter, round=2):
            raise UserError(
                f"server.strategy: {called(strategy)} trains other tensors in round 2 than in round 1: its class has "
                "to say `alternates = True`"
            )
        whole = strategy.initial(adapter)
        return ServerState(
            0,
            whole,
            optimizer=self.server.optimizer.init(whole),
            correction=self.local.correction.memory(tree.vector_like(trained)),
            privacy={} if self.privacy is None else self.privacy.initial_state(),
        )

    def continued(self, state: ServerState) -> ServerState:
        """Return the state that the next round works on: its adapter is what clients go on from."""
        adapter = self.server.optimizer.continued(state.adapter, state.optimizer)
        return dataclasses.replace(state, adapter=adapter)

    def client_state(self, adapter: StateLike) -> ClientState:
        """Return what one client may carry between its rounds: names and shapes."""
        roles = self.roles
        sent = tree.select(adapter, roles.sent(adapter, round=1))
        update = ClientUpdate(client=0, num_examples=0, delta=sent, loss=0.0, num_steps=0)
        return dataclasses.replace(
            self.local.client_state(tree.select(adapter, roles.trained(adapter, round=1))),
            own=tree.select(adapter, roles.own(adapter)),
            feedback=sent if self.communication.error_feedback else {},
            in_flight=InFlight(0, 0.0, update) if self.schedule.waits_for_buffer else None,
            privacy={} if self.local.privacy is None else self.local.privacy.counted(0),
        )

    def received(self, adapter: State, client: int) -> State:
        """Return what of the server's adapter a client can use: the first of its ranks, if it has fewer of them."""
        return adapter if self.ranks is None else rank_padded(adapter, int(self.ranks[client]))

    def client_adapter(self, state: ServerState, client: int) -> State:
        """A client's own adapter: the server's, with what the client keeps of it for itself."""
        own = state.clients[client].own if client in state.clients else {}
        adapter = self.received(state.adapter, client)
        return {**adapter, **own} if own else adapter

    def broadcast(self, state: ServerState) -> tuple[Broadcast, ServerState]:
        """Return what the server sends for the round after `state`, and the state as clients see it."""
        sent = tree.select(state.adapter, self.roles.broadcast(state.adapter))
        extra = state.correction if self.local.correction.is_broadcast else {}
        rng = self.rng.child("round", state.round + 1, "broadcast")
        broadcast = self.link.broadcast(sent, extra, rng)
        return broadcast, dataclasses.replace(state, adapter={**state.adapter, **broadcast.read})

    def load(self, state: ServerState, broadcast: Broadcast) -> ClientLoad:
        """Return what a client that is asked after `state` computes, gets and sends."""
        round, adapter = state.round + 1, state.adapter
        sent = tree.select(adapter, self.roles.sent(adapter, round))
        fresh = self.local.correction.memory(tree.vector_like(tree.select(adapter, self.roles.trained(adapter, round))))
        extra = self.local.correction.sent(fresh, fresh) if fresh else {}
        secure_sum, in_sum = self.server.secure_sum, {}
        if secure_sum is not None:
            payload = Ring(secure_sum.bits, self.num_sent(tree.count(sent)) + 1).payload_bytes
            traffic = secure_sum.client_traffic(self.participation.most_asked(round), payload)
            in_sum = {
                "num_trips": len(PHASES),
                "sum_downlink_bytes": sum(traffic.downlink_bytes.values()),
                "sum_uplink_bytes": sum(traffic.uplink_bytes.values()),
            }
        others = self.server.strategy.before_the_others(self.local), self.personal.in_round(self.local)
        locals = [self.local, *(each for each in others if each is not None)]
        return ClientLoad(
            num_steps=lambda client: sum(each.num_steps(len(self.clients[client].train)) for each in locals),
            downlink_bytes=lambda client: self.link.downlink_bytes(broadcast, client),
            uplink_bytes=lambda client: 0 if in_sum else self.link.uplink_bytes(sent, extra, client, round),
            **in_sum,
        )

    def setup(self, round: int, trained: Iterable[str], local: LocalTraining | None = None) -> TrainingSetup:
        """Return what a round's tasks have in common; `local` says how clients train, in place of the federation's.

        Raises `UserError` if no tensor is trained.
        """
        local, trained = local or self.local, tuple(trained)
        if not trained:
            raise UserError(
                f"server.strategy: {called(self.server.strategy)} trains no tensor of this adapter in round {round}"
            )
        largest = int(self.participation.sizes.max())
        self_training, unlabelled_width = local.active_self_training, 0
        if self_training is not None:
            unlabelled_width = self_training.width(local.batch_size, self.most_unlabelled)
        return TrainingSetup(
            round=round,
            local=local,
            learning_rate=local.rate(round, self.num_rounds),
            trained=trained,
            width=min(local.batch_size, largest),
            unlabelled_width=unlabelled_width,
        )

    def task(
        self, client: int, adapter: StateLike, setup: TrainingSetup, rng: Rng, state: ClientState = FRESH
    ) -> ClientTask:
        """A client's task from an adapter; `state` is of its last rounds, random numbers are those of `rng`'s child."""
        data, own = self.clients[client], rng.child("client", client)
        return ClientTask(client, adapter, data.train, own, setup, state, unlabelled=data.unlabelled)

"""The model, the clients and their data, and everything else that a round needs, in one object."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flora.client.capacity import client_bytes
from flora.client.personalization import OWN, NoPersonalization, Personalization
from flora.client.training import CORRECTION, BlockResult, LocalTraining, train_block
from flora.clip.towers.towers import AdaptedClip
from flora.communication.compressors import Compressor
from flora.communication.network import CohortOutcome, Network, Profiles, StragglerPolicy, trip
from flora.communication.options import FEEDBACK, CommunicationOptions, payload_bytes
from flora.communication.sampling import Sampler
from flora.core import tree
from flora.core.contracts import checked_ids, checked_state, refuse
from flora.core.counts import part_of
from flora.core.errors import UserError
from flora.core.hooks import Hooks
from flora.core.low_rank import is_residual, rank_first, rank_padded, residuals_at_their_smallest
from flora.core.memory import available_memory_bytes, is_out_of_memory, release_cached_memory
from flora.core.records import ClientData, ServerState
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.data.batching import ClientBlock, batch_bytes, client_blocks
from flora.features.features import Features
from flora.federated import in_flight as pending
from flora.server.aggregators import Aggregator, Mean
from flora.server.optimizers import ServerOptimizer, ServerSgd
from flora.server.screening import Screening
from flora.server.strategies.base import Strategy

# Where the server's state has the seconds that have passed on the simulated clock.
CLOCK = "network.clock"


@dataclass(eq=False)
class Federation:
    """All that rounds need: the model, the clients with their data, and what is done with them.

    Nothing of it changes but `clients_per_block`, which is lowered when a block doesn't fit into memory, and what is
    remembered because it is the same again.
    """

    model: AdaptedClip
    features: Features
    clients: Sequence[ClientData]
    local: LocalTraining
    sampler: Sampler
    strategy: Strategy
    num_rounds: int
    clients_per_block: int
    rng: Rng
    aggregator: Aggregator = field(default_factory=Mean)
    server_optimizer: ServerOptimizer = field(default_factory=ServerSgd)
    personal: Personalization = field(default_factory=NoPersonalization)
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)
    ranks: np.ndarray | None = None
    network: Network | None = None
    profiles: Profiles | None = None
    stragglers: StragglerPolicy = field(default_factory=StragglerPolicy)
    screening: Screening = field(default_factory=Screening)
    hooks: Hooks = field(default_factory=Hooks)
    log: Callable[[str], object] = lambda line: None
    sizes: np.ndarray = field(init=False)
    _uplink_bytes: dict[tuple[int, int | None], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = np.array([len(client.train) for client in self.clients])

    def learning_rate(self, round: int, local: LocalTraining | None = None) -> float:
        """The learning rate of a round, counted from 1."""
        local = local or self.local
        factor = local.schedule.factor(round, self.num_rounds)
        if not 0 <= factor < math.inf:
            refuse("local.schedule", local.schedule, f"a factor of {factor} in round {round}")
        return local.learning_rate * factor

    def initial_state(self, adapter: State) -> ServerState:
        """The server before the first round, from the adapter that clients start with."""
        memory = self.local.correction.memory(tree.vector_like(self.trained(adapter, round=1)))
        strategy = {**self.server_optimizer.init(adapter), **tree.add_prefix(CORRECTION, memory)}
        if self.network is not None:
            strategy[CLOCK] = torch.zeros(1, dtype=torch.float64)
        return ServerState(0, self.strategy.initial(adapter), strategy)

    def client_state(self, adapter: StateLike) -> State:
        """What one client keeps between its rounds: names and shapes."""
        own = {name: adapter[name] for name in self.own_names(adapter)}
        state = self.local.client_state(self.trained(adapter, round=1)) | tree.add_prefix(OWN, own)
        if self.communication.error_feedback:
            state |= tree.add_prefix(FEEDBACK, self.sent(adapter, round=1))
        return state | (pending.like(self.sent(adapter, round=1)) if self.strategy.buffer_size else {})

    def stays(self, name: str) -> bool:
        """Whether clients train this tensor and keep it to themselves."""
        return self.model.adapter.stays(name) or self.strategy.stays(name)

    def trained(self, adapter: StateLike, round: int) -> StateLike:
        """The part of an adapter that clients train in a round."""
        names = (name for name in adapter if not is_residual(name))
        stays, trains = self.model.adapter.stays, self.strategy.trains
        return {name: adapter[name] for name in names if stays(name) or trains(name, round)}

    def sent(self, adapter: StateLike, round: int) -> StateLike:
        """The part of an adapter that clients train in a round and send."""
        return {name: tensor for name, tensor in self.trained(adapter, round).items() if not self.stays(name)}

    def trained_ever(self, adapter: StateLike) -> StateLike:
        """The part of an adapter that is trained in some round."""
        found = self.trained(adapter, round=1).keys() | self.trained(adapter, round=2).keys()
        return {name: tensor for name, tensor in adapter.items() if name in found}

    def own_names(self, adapter: StateLike) -> list[str]:
        """The tensors of which each client keeps its own."""
        keeps_all = self.personal.in_round(self.local) is not None
        return [name for name in self.trained_ever(adapter) if keeps_all or self.stays(name)]

    def received(self, adapter: State, client: int) -> State:
        """What of the server's adapter a client can use: the first of its ranks, if it has fewer of them."""
        return adapter if self.ranks is None else rank_padded(adapter, int(self.ranks[client]))

    def own_adapter(self, state: ServerState, client: int) -> State:
        """A client's own adapter: the server's, with what the client keeps of it for itself."""
        own = tree.strip_prefix(OWN, state.clients.get(client, {}))
        adapter = self.received(state.adapter, client)
        return {**adapter, **own} if own else adapter

    def cohort_size(self, round: int) -> int:
        """How many clients take part in a round, counted from 1."""
        size, most = self.sampler.size_in(round, len(self.clients)), len(self.clients)
        if not 1 <= size <= most:
            refuse("clients.cohort", self.sampler, f"a cohort of {size} in round {round}, expected 1 to {most}")
        return size

    def cohort(self, present: np.ndarray, number: int, rng: Rng) -> np.ndarray:
        """A cohort of `number` of the clients `present`, sorted."""
        chosen = self.sampler.sample(self.sizes[present], number, rng)
        return present[checked_ids("clients.cohort", self.sampler, chosen, len(present), number=number)]

    def available(self, clock: float, rng: Rng) -> np.ndarray:
        """The clients that can be asked at a time of the network's clock, sorted."""
        assert self.network is not None and self.profiles is not None
        found = self.network.available(self.profiles, clock, rng)
        return checked_ids("network", self.network, found, len(self.clients), what="clients that can be asked")

    def trip(self, state: ServerState, rng: Rng, *, downlink_bytes: Callable[[int], int]) -> CohortOutcome:
        """Who is asked in the round after `state`, and what becomes of them; `downlink_bytes` is what each gets."""
        round = state.round + 1
        if self.network is None or self.profiles is None:
            everybody = np.arange(len(self.clients))
            return CohortOutcome(self.cohort(everybody, self.cohort_size(round), rng.child("cohort")))
        own = rng.child("network")
        present = self.available(float(state.strategy[CLOCK]), own.child("available"))
        if not len(present):
            return CohortOutcome(present, seconds=self.network.wait_seconds)
        needed = min(self.cohort_size(round), len(present))
        number = min(math.ceil(part_of(self.stragglers.over_selection, needed)), len(present))
        asked = self.cohort(present, number, rng.child("cohort"))
        return trip(
            self.network,
            self.profiles,
            self.stragglers,
            asked=asked,
            num_needed=needed,
            num_steps=[self.num_steps(client) for client in asked],
            downlink_bytes=[downlink_bytes(client) for client in asked],
            uplink_bytes=[self.uplink_bytes(state.adapter, round, client) for client in asked],
            rng=own.child("dropout"),
        )

    def num_steps(self, client: int) -> int:
        """How many steps a client takes in a round, those for itself alone included."""
        locals = [self.local, self.personal.in_round(self.local)]
        return sum(each.num_steps(int(self.sizes[client])) for each in locals if each is not None)

    def uplink_bytes(self, adapter: StateLike, round: int, client: int) -> int:
        """How many bytes a client sends in a round, whatever the numbers are."""
        kind = round, None if self.ranks is None else int(self.ranks[client])
        if kind not in self._uplink_bytes:
            self._uplink_bytes = {kind: self._count_uplink_bytes(adapter, round, client)} | {
                other: known for other, known in self._uplink_bytes.items() if other[0] == round
            }
        return self._uplink_bytes[kind]

    def _count_uplink_bytes(self, adapter: StateLike, round: int, client: int) -> int:
        fresh = self.local.correction.memory(tree.vector_like(self.trained(adapter, round)))
        extra = tree.add_prefix(CORRECTION, self.local.correction.sent(fresh, fresh) if fresh else {})
        zeros = tree.scale(self.sent(adapter, round), 0.0)
        return self.upload(zeros, {}, extra, client, self.rng)[2]

    def broadcast(self, state: ServerState) -> tuple[State, StateLike | bytes]:
        """The adapter as clients have it for the round after `state`, and what of it travels."""
        sends = self.strategy.broadcasts
        sent = {name: own for name, own in state.adapter.items() if sends(name) and not self.stays(name)}
        compressor = self.communication.broadcast
        if compressor.is_identity:
            return state.adapter, sent
        rng = self.rng.child("round", state.round + 1, "broadcast")
        payload, read = _through("communication.broadcast", compressor, sent, rng)
        return {**state.adapter, **read}, payload

    def upload(
        self, delta: State, lost: StateLike, extra: StateLike, client: int, rng: Rng
    ) -> tuple[State, State, int]:
        """What the server reads of a client's delta, what is lost of it, and how many bytes travel.

        `lost` is what was lost before, and is sent with it; `extra` travels as it is.
        """
        compressor = self.communication.upload
        if compressor.is_identity or not tree.is_finite(delta):
            return delta, {}, self.payload_bytes({**delta, **extra}, client)
        meant = tree.add(delta, lost) if lost else delta
        payload, read = _through("communication.upload", compressor, meant, rng)
        num_bytes = len(payload) + (payload_bytes(extra) if extra else 0)
        return read, tree.subtract(meant, read) if self.communication.error_feedback else {}, num_bytes

    def payload_bytes(self, state: StateLike, client: int) -> int:
        """How many bytes the state takes on its way to or from a client."""
        state = residuals_at_their_smallest(state)
        return payload_bytes(state if self.ranks is None else rank_first(state, int(self.ranks[client])))

    def blocks(self, cohort: np.ndarray, rng: Rng, local: LocalTraining) -> list[ClientBlock]:
        """The cohort in blocks, with every batch laid out. Raises `UserError` if these don't fit into memory."""
        # One width for all blocks: a client's dropout masks must not depend on its neighbours.
        width = int(min(local.batch_size, self.sizes.max()))
        self._check_steps([local.num_steps(int(self.sizes[client])) for client in cohort], width)
        return list(
            client_blocks(
                cohort.tolist(),
                [self.clients[client].train for client in cohort],
                rng,
                batch_size=local.batch_size,
                width=width,
                epochs=local.epochs,
                steps=local.steps,
                clients_per_block=self.clients_per_block,
            )
        )

    def _check_steps(self, num_steps: Sequence[int], width: int) -> None:
        """Raise `UserError` if the batches of clients with so many steps don't fit into memory."""
        needed = batch_bytes(num_steps, width=width, clients_per_block=self.clients_per_block)
        free = available_memory_bytes(torch.device("cpu"))
        if needed > free:
            raise UserError(
                f"out of memory: a client takes up to {max(num_steps):,} steps in a round, and the batches of the "
                f"cohort need {needed / 1e9:.1f} GB where {free / 1e9:.1f} GB are free; lower local.epochs or "
                "local.steps (personal.epochs, after the last round)"
            )

    def train(
        self,
        cohort: np.ndarray,
        adapters: Mapping[int, StateLike],
        kept: Mapping[int, State],
        *,
        round: int,
        rng: Rng,
        server_memory: StateLike | None = None,
        anchors: Mapping[int, StateLike] | None = None,
        names: Collection[str] | None = None,
        local: LocalTraining | None = None,
    ) -> Iterator[tuple[ClientBlock, BlockResult]]:
        """Train the tensors `names`, or what is trained in a round, by blocks, each client from its own of `adapters`.

        `local` says how, in place of the federation's own. `kept` is what clients carry from round to round,
        `server_memory` what a correction remembers at the server, `anchors` what it measures distances from, in place
        of `adapters`. A block that doesn't fit into memory is cut in two, and so are those after it.

        Raises `UserError` if one client alone doesn't fit.
        """
        if not len(cohort):
            return
        local = local or self.local
        waiting = self.blocks(cohort, rng, local)
        first = next(iter(adapters.values()))
        names = list(self.trained(first, round)) if names is None else names
        residual = {name: tensor for name, tensor in first.items() if is_residual(name)}
        taken, total = 0, sum(sum(block.num_steps) for block in waiting)

        def advance(number: int) -> None:
            nonlocal taken
            taken += number
            self.hooks.after_step(taken, total)

        while waiting:
            block, taken_before = waiting.pop(0), taken
            try:
                self.hooks.before_block(round, block.clients)
                result = train_block(
                    self.model,
                    block,
                    adapters=_stacked([adapters[client] for client in block.clients]),
                    features=self.features,
                    local=local,
                    learning_rate=self.learning_rate(round, local),
                    rngs=[rng.child("client", client) for client in block.clients],
                    kept=[kept.get(client) for client in block.clients],
                    trained=names,
                    server_memory=server_memory,
                    beside=tree.expand(residual, 1),
                    anchor=_stacked([anchors[client] for client in block.clients]) if anchors else None,
                    advance=advance,
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                result = None
            if result is None:  # outside of the handler, which keeps the failed step's tensors alive
                waiting[:0], taken = self._smaller(block), taken_before
                continue
            yield block, result

    def _smaller(self, block: ClientBlock) -> list[ClientBlock]:
        """A block that did not fit, in parts; from now on blocks are no larger than half of it."""
        release_cached_memory(self.model.device)
        number = len(block.clients)
        if number == 1:
            need = client_bytes(self.model, batch_size=self.local.batch_size)
            free = available_memory_bytes(self.model.device)
            raise UserError(
                f"out of memory with one client in a step, which needs about {need / 1e9:.1f} GB where "
                f"{free / 1e9:.1f} GB are free; lower local.batch_size or the number of prompts"
            )
        size = min(self.clients_per_block, -(-number // 2))
        if size < self.clients_per_block:
            self.clients_per_block = size
            self.log(f"out of memory: from now on {size} clients in one step, with the same results up to rounding")
        return [block.part(start, min(start + size, number)) for start in range(0, number, size)]


def _through(setting: str, compressor: Compressor, state: State, rng: Rng) -> tuple[bytes, State]:
    """What travels of a state that is compressed, and what is read of it."""
    payload = compressor.encode(state, rng)
    if not isinstance(payload, bytes):
        refuse(setting, compressor, f"a {type(payload).__name__} to send, expected bytes")
    return payload, checked_state(setting, compressor, compressor.decode(payload, state), state)


def _stacked(adapters: Sequence[StateLike]) -> StateLike:
    """The adapters `(K, ...)` without their residuals, and without a copy where all clients start from one."""
    is_one = all(adapter is adapters[0] for adapter in adapters)
    parts = [
        {name: tensor for name, tensor in adapter.items() if not is_residual(name)}
        for adapter in (adapters[:1] if is_one else adapters)
    ]
    return tree.expand(parts[0], len(adapters)) if is_one else tree.stack(parts)

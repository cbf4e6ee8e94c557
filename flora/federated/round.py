"""One round: sample a cohort, train each client's adapter on its data, average, step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora import tree
from flora.clip.towers import AdaptedClip
from flora.data.batching import ClientBlock, client_blocks
from flora.errors import UserError
from flora.federated.aggregation import Strategy
from flora.federated.combiners import Combiner, Mean
from flora.federated.communication import payload_bytes
from flora.federated.features import Features
from flora.federated.local import CORRECTION, BlockResult, LocalTraining, train_block
from flora.federated.low_rank import (
    aggregation_error,
    is_residual,
    rank_first,
    rank_padded,
    residuals_at_their_smallest,
)
from flora.federated.memory import available_memory_bytes, client_bytes, is_out_of_memory, release_cached_memory
from flora.federated.personal import OWN, NoPersonalization, Personalization
from flora.federated.sampling import Sampler
from flora.federated.screening import Screening, refusal, screen
from flora.federated.server_optimizers import ServerOptimizer, ServerSgd
from flora.hooks import Hooks
from flora.records import ClientData, ClientUpdate, Rejection, ServerState
from flora.rng import Rng
from flora.tree import State, StateLike


@dataclass(eq=False)
class Federation:
    """All that rounds need: the model, the clients with their data, and what is done with them.

    Nothing of it changes but `clients_per_block`, which is lowered when a block doesn't fit into memory.
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
    combiner: Combiner = field(default_factory=Mean)
    server_optimizer: ServerOptimizer = field(default_factory=ServerSgd)
    personal: Personalization = field(default_factory=NoPersonalization)
    ranks: np.ndarray | None = None
    screening: Screening = field(default_factory=Screening)
    hooks: Hooks = field(default_factory=Hooks)
    log: Callable[[str], object] = lambda line: None
    sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = np.array([len(client.train) for client in self.clients])

    def learning_rate(self, round: int, local: LocalTraining | None = None) -> float:
        """The learning rate of a round, counted from 1."""
        local = local or self.local
        return local.learning_rate * local.schedule.factor(round, self.num_rounds)

    def initial_state(self, adapter: State) -> ServerState:
        """The server before the first round, from the adapter that clients start with."""
        memory = self.local.correction.memory(tree.count(self.trained(adapter, round=1)))
        strategy = {**self.server_optimizer.init(adapter), **tree.below(CORRECTION, memory)}
        return ServerState(0, self.strategy.initial(adapter), strategy)

    def client_state(self, adapter: StateLike) -> State:
        """What one client keeps between its rounds: names and shapes."""
        own = {name: adapter[name] for name in self.own_names(adapter)}
        return self.local.client_state(self.trained(adapter, round=1)) | tree.below(OWN, own)

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
        own = tree.named_below(OWN, state.clients.get(client, {}))
        adapter = self.received(state.adapter, client)
        return {**adapter, **own} if own else adapter

    def payload_bytes(self, state: StateLike, client: int) -> int:
        """How many bytes the state takes on its way to or from a client."""
        state = residuals_at_their_smallest(state)
        return payload_bytes(state if self.ranks is None else rank_first(state, int(self.ranks[client])))

    def blocks(self, cohort: np.ndarray, rng: Rng, local: LocalTraining) -> list[ClientBlock]:
        """The cohort in blocks, with every batch laid out."""
        return list(
            client_blocks(
                cohort.tolist(),
                [self.clients[client].train for client in cohort],
                rng,
                batch_size=local.batch_size,
                # One width for all blocks: a client's dropout masks must not depend on its neighbours.
                width=int(min(local.batch_size, self.sizes.max())),
                epochs=local.epochs,
                steps=local.steps,
                clients_per_block=self.clients_per_block,
            )
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
        local = local or self.local
        waiting = self.blocks(cohort, rng, local)
        first = next(iter(adapters.values()))
        names = list(self.trained(first, round)) if names is None else names
        residual = {name: tensor for name, tensor in first.items() if is_residual(name)}
        while waiting:
            block = waiting.pop(0)
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
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                result = None
            if result is None:  # outside of the handler, which keeps the failed step's tensors alive
                waiting[:0] = self._smaller(block)
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
            self.log(f"out of memory: from now on {size} clients in one step, with the same results up to 1e-5")
        return [block.part(start, min(start + size, number)) for start in range(0, number, size)]


def _stacked(adapters: Sequence[StateLike]) -> StateLike:
    """The adapters `(K, ...)` without their residuals, and without a copy where all clients start from one."""
    is_one = all(adapter is adapters[0] for adapter in adapters)
    parts = [
        {name: tensor for name, tensor in adapter.items() if not is_residual(name)}
        for adapter in (adapters[:1] if is_one else adapters)
    ]
    return tree.expand(parts[0], len(adapters)) if is_one else tree.stack(parts)


@dataclass(frozen=True)
class RoundResult:
    """What a round did, apart from the new state."""

    num_clients: int
    num_steps: int
    num_examples: int
    train_loss: float | None
    aggregation_error: float | None
    learning_rate: float
    uplink_bytes: int
    downlink_bytes: int
    train_seconds: float
    rejections: tuple[Rejection, ...]


def run_round(federation: Federation, state: ServerState) -> tuple[ServerState, RoundResult]:
    """The round after `state`. Nothing but `state` and the federation's seed decides what comes out.

    Updates that are not fit to be averaged are left out; without any, adapter and strategy stay as they are. Raises
    `UserError` for the first of them where `screening` says so.
    """
    started = time.perf_counter()
    round = state.round + 1
    rng = federation.rng.child("round", round)
    cohort = federation.sampler.sample(federation.sizes, rng.child("cohort"))
    updates: list[ClientUpdate] = []
    kept = dict(state.clients)
    begin = {client: _start(federation, state, client) for client in cohort.tolist()}
    memory = tree.named_below(CORRECTION, state.strategy)
    for block, result in federation.train(cohort, begin, state.clients, round=round, rng=rng, server_memory=memory):
        for place, client in enumerate(block.clients):
            update, own = _update(federation, begin[block.clients[place]], block, result, place)
            updates.append(update)
            if own:
                kept[client] = own
    # In the order of ids, so that sums don't depend on how the cohort was cut into blocks.
    updates = [federation.hooks.update(round, update) for update in sorted(updates, key=lambda update: update.client)]
    accepted, rejections = screen(updates, federation.sent(state.adapter, round), federation.screening)
    learning_rate = federation.learning_rate(round)
    if rejections and federation.screening.policy == "abort":
        raise refusal(round, rejections[0], learning_rate)
    for rejection in rejections:
        federation.log(f"round {round}: client {rejection.client} is left out: {rejection.reason}")
        kept.pop(rejection.client, None)
        if rejection.client in state.clients:
            kept[rejection.client] = state.clients[rejection.client]
    num_steps = sum(update.num_steps for update in updates)
    for client, own, own_steps in _train_own(federation, state, begin, round, rng.child("personal")):
        kept[client] = {**kept.get(client, {}), **own}
        num_steps += own_steps
    adapter, strategy, error = state.adapter, state.strategy, None
    if accepted:
        adapter, strategy, error = _next(federation, state, accepted, begin)
    if federation.strategy.restarts:
        adapter = {**adapter, **federation.model.adapter.initial_state(rng.child("adapter"))}
    sent = {
        name: tensor
        for name, tensor in state.adapter.items()
        if federation.strategy.broadcasts(name) and not federation.stays(name)
    }
    if federation.local.correction.is_broadcast:
        sent |= tree.below(CORRECTION, memory)
    weights = np.array([update.num_examples for update in accepted])
    losses = np.array([update.loss for update in accepted])
    return ServerState(round, adapter, strategy, kept), RoundResult(
        num_clients=len(updates),
        num_steps=num_steps,
        num_examples=sum(update.num_examples for update in updates),
        train_loss=float((losses * weights).sum() / weights.sum()) if accepted else None,
        aggregation_error=error,
        learning_rate=learning_rate,
        uplink_bytes=sum(
            federation.payload_bytes(update.delta | tree.below(CORRECTION, update.extra), update.client)
            for update in updates
        ),
        downlink_bytes=sum(federation.payload_bytes(sent, update.client) for update in updates),
        train_seconds=time.perf_counter() - started,
        rejections=tuple(rejections),
    )


def _start(federation: Federation, state: ServerState, client: int) -> State:
    """What a client trains from: the server's adapter, with what the strategy or the adapter leaves with clients."""
    if federation.personal.in_round(federation.local) is not None:  # what it keeps is another adapter
        return federation.received(state.adapter, client)
    return federation.own_adapter(state, client)


def _update(
    federation: Federation, begin: State, block: ClientBlock, result: BlockResult, place: int
) -> tuple[ClientUpdate, State]:
    """What one client of a block sends, which began with `begin`, and what it keeps."""
    client, num_steps = block.clients[place], block.num_steps[place]
    trained = {name: tensor[place] for name, tensor in result.adapters.items()}
    # Copies, so that no client keeps its whole block in memory.
    own = {name: tensor.clone() for name, tensor in trained.items() if federation.stays(name)}
    failed_step = int(result.failed_steps[place])
    if failed_step < 0 and not tree.is_finite(own):
        failed_step = num_steps - 1
    update = ClientUpdate(
        client=client,
        num_examples=int(federation.sizes[client]),
        delta={name: tensor - begin[name] for name, tensor in trained.items() if name not in own},
        loss=float(result.losses[place]),
        num_steps=num_steps,
        extra=result.sent[place],
        failed_step=failed_step if failed_step >= 0 else None,
    )
    return update, result.kept[place] | tree.below(OWN, own)


def _train_own(
    federation: Federation, state: ServerState, begin: Mapping[int, State], round: int, rng: Rng
) -> Iterator[tuple[int, State, int]]:
    """What clients keep of adapters that they train for themselves, drawn to what they `begin` from, and their steps.

    One that diverges stays as it was.
    """
    local = federation.personal.in_round(federation.local)
    if local is None:
        return
    names = federation.own_names(state.adapter)
    own = {client: federation.own_adapter(state, client) for client in begin}
    cohort = np.array(list(begin))
    for block, result in federation.train(cohort, own, {}, round=round, rng=rng, anchors=begin, local=local):
        for place, client in enumerate(block.clients):
            ended = {name: tensor[place] for name, tensor in result.adapters.items()}
            if result.failed_steps[place] >= 0 or not tree.is_finite(ended):
                federation.log(f"round {round}: client {client}'s own adapter diverged, and stays as it was")
                ended = {}
            after = {**own[client], **ended}
            # Copies, so that no client keeps its whole block in memory, nor another's tensors.
            yield client, tree.below(OWN, {name: after[name].clone() for name in names}), block.num_steps[place]


def _next(
    federation: Federation, state: ServerState, updates: Sequence[ClientUpdate], begin: Mapping[int, State]
) -> tuple[State, State, float | None]:
    """The next adapter and strategy state, and what averaging got wrong, from updates that may be averaged."""
    weights = federation.strategy.weights(updates)
    deltas, ends = _in_server_terms(federation, state.adapter, updates, begin)
    delta, strategy = federation.combiner.combine(deltas, weights), state.strategy
    memory = tree.named_below(CORRECTION, strategy)
    if memory:
        vector, memory = federation.local.correction.at_server(
            tree.flatten(delta),
            memory,
            [tree.flatten(update.delta) for update in updates],
            [update.extra for update in updates],
            len(federation.clients),
        )
        delta, strategy = tree.unflatten(vector, delta), {**strategy, **tree.below(CORRECTION, memory)}
    adapter, strategy = federation.server_optimizer.step(state.adapter, delta, strategy)
    adapter = federation.strategy.settle(adapter, ends, weights)
    if federation.strategy.has_personal:  # no product is the server's alone
        return adapter, strategy, None
    return adapter, strategy, aggregation_error(ends, weights, adapter, state.adapter)


def _in_server_terms(
    federation: Federation, adapter: State, updates: Sequence[ClientUpdate], begin: Mapping[int, State]
) -> tuple[list[State], list[State]]:
    """What clients changed of the server's adapter, and the adapters that they ended with.

    A client of a lower rank has zeros where it has no ranks. What is beyond the ranks of the whole cohort stays as it
    is: where A and B were both zero, nothing would ever change again.
    """
    if federation.ranks is None:
        deltas = [update.delta for update in updates]
        return deltas, [{**adapter, **{name: adapter[name] + own for name, own in delta.items()}} for delta in deltas]
    ends = [
        {**adapter, **{name: begin[update.client][name] + own for name, own in update.delta.items()}}
        for update in updates
    ]
    shared = rank_padded(adapter, int(federation.ranks[[update.client for update in updates]].max()))
    return [{name: end[name] - shared[name] for name in updates[0].delta} for end in ends], ends

"""One round: sample a cohort, train each client's adapter on its data, average, step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora import tree
from flora.clip.towers import AdaptedClip
from flora.data.batching import ClientBlock, client_blocks
from flora.errors import UserError
from flora.federated.aggregation import Strategy
from flora.federated.combiners import Combiner, Mean
from flora.federated.communication import payload_bytes
from flora.federated.corrections import NoCorrection
from flora.federated.features import Features
from flora.federated.local import CORRECTION, BlockResult, LocalTraining, train_block
from flora.federated.low_rank import aggregation_error
from flora.federated.memory import available_memory_bytes, client_bytes, is_out_of_memory, release_cached_memory
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
    screening: Screening = field(default_factory=Screening)
    hooks: Hooks = field(default_factory=Hooks)
    log: Callable[[str], object] = lambda line: None
    sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = np.array([len(client.train) for client in self.clients])

    def learning_rate(self, round: int) -> float:
        """The learning rate of a round, counted from 1."""
        return self.local.learning_rate * self.local.schedule.factor(round, self.num_rounds)

    def trained(self, adapter: StateLike, round: int) -> StateLike:
        """The part of an adapter that clients train, and send, in a round."""
        return {name: tensor for name, tensor in adapter.items() if self.strategy.trains(name, round)}

    def initial_strategy(self, adapter: State) -> State:
        """What the server remembers between rounds, at the start: its optimiser's state, a correction's memory."""
        size = tree.count(self.trained(adapter, round=1))
        memory = tree.below(CORRECTION, self.local.correction.memory(size))
        return {**self.server_optimizer.init(adapter), **memory}

    def client_state(self, adapter: StateLike) -> State:
        """What one client keeps between its rounds: names and shapes."""
        return self.local.client_state(self.trained(adapter, round=1))

    def blocks(self, cohort: np.ndarray, rng: Rng) -> list[ClientBlock]:
        """The cohort in blocks, with every batch laid out."""
        return list(
            client_blocks(
                cohort.tolist(),
                [self.clients[client].train for client in cohort],
                rng,
                batch_size=self.local.batch_size,
                # One width for all blocks: a client's dropout masks must not depend on its neighbours.
                width=int(min(self.local.batch_size, self.sizes.max())),
                epochs=self.local.epochs,
                steps=self.local.steps,
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
    ) -> Iterator[tuple[ClientBlock, BlockResult]]:
        """Train what is to be trained in a round, block by block, each client from its own of `adapters`.

        `kept` is what clients carry from round to round, `server_memory` what a correction remembers at the server. A
        block that doesn't fit into memory is cut in two, and so are those after it.

        Raises `UserError` if one client alone doesn't fit.
        """
        waiting = self.blocks(cohort, rng)
        names = list(self.trained(next(iter(adapters.values())), round))
        while waiting:
            block = waiting.pop(0)
            try:
                self.hooks.before_block(round, block.clients)
                result = train_block(
                    self.model,
                    block,
                    adapters=_stacked([adapters[client] for client in block.clients]),
                    features=self.features,
                    local=self.local,
                    learning_rate=self.learning_rate(round),
                    rngs=[rng.child("client", client) for client in block.clients],
                    kept=[kept.get(client) for client in block.clients],
                    trained=names,
                    server_memory=server_memory,
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
    """The adapters `(K, ...)`, without a copy where all clients start from one."""
    if all(adapter is adapters[0] for adapter in adapters):
        return tree.expand(adapters[0], len(adapters))
    return tree.stack(adapters)


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
    start = federation.trained(state.adapter, round)
    broadcast = dict.fromkeys(cohort.tolist(), state.adapter)
    memory = tree.named_below(CORRECTION, state.strategy)
    for block, result in federation.train(cohort, broadcast, state.clients, round=round, rng=rng, server_memory=memory):
        updates += _updates(federation, block, result, start)
        kept.update((client, own) for client, own in zip(block.clients, result.kept, strict=True) if own)
    # In the order of ids, so that sums don't depend on how the cohort was cut into blocks.
    updates = [federation.hooks.update(round, update) for update in sorted(updates, key=lambda update: update.client)]
    accepted, rejections = screen(updates, start, federation.screening)
    learning_rate = federation.learning_rate(round)
    if rejections and federation.screening.policy == "abort":
        raise refusal(round, rejections[0], learning_rate)
    for rejection in rejections:
        federation.log(f"round {round}: client {rejection.client} is left out: {rejection.reason}")
        kept.pop(rejection.client, None)
        if rejection.client in state.clients:
            kept[rejection.client] = state.clients[rejection.client]
    adapter, strategy, error = state.adapter, state.strategy, None
    if accepted:
        adapter, strategy, error = _next(federation, state, accepted, start)
    sent = {name: tensor for name, tensor in state.adapter.items() if federation.strategy.broadcasts(name)}
    if federation.local.correction.is_broadcast:
        sent |= tree.below(CORRECTION, memory)
    weights = np.array([update.num_examples for update in accepted])
    losses = np.array([update.loss for update in accepted])
    return ServerState(round, adapter, strategy, kept), RoundResult(
        num_clients=len(updates),
        num_steps=sum(update.num_steps for update in updates),
        num_examples=sum(update.num_examples for update in updates),
        train_loss=float((losses * weights).sum() / weights.sum()) if accepted else None,
        aggregation_error=error,
        learning_rate=learning_rate,
        uplink_bytes=sum(payload_bytes(update.delta | tree.below(CORRECTION, update.extra)) for update in updates),
        downlink_bytes=len(updates) * payload_bytes(sent),
        train_seconds=time.perf_counter() - started,
        rejections=tuple(rejections),
    )


def _next(
    federation: Federation, state: ServerState, updates: Sequence[ClientUpdate], start: StateLike
) -> tuple[State, State, float | None]:
    """The next adapter and strategy state, and what averaging got wrong, from updates that may be averaged."""
    weights = federation.strategy.weights(updates)
    delta, strategy = federation.combiner.combine([update.delta for update in updates], weights), state.strategy
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
    ends: list[State] = [{**state.adapter, **tree.add(start, update.delta)} for update in updates]
    adapter = federation.strategy.settle(adapter, ends, weights)
    return adapter, strategy, aggregation_error(ends, weights, adapter)


def _updates(federation: Federation, block: ClientBlock, result: BlockResult, start: StateLike) -> list[ClientUpdate]:
    trained = tree.unstack(result.adapters)
    return [
        ClientUpdate(
            client=client,
            num_examples=int(federation.sizes[client]),
            delta=tree.subtract(trained[place], start),
            loss=float(result.losses[place]),
            num_steps=block.num_steps[place],
            extra=result.sent[place],
            failed_step=int(result.failed_steps[place]) if result.failed_steps[place] >= 0 else None,
        )
        for place, client in enumerate(block.clients)
    ]


def train_alone(
    federation: Federation, adapter: State, clients: np.ndarray, *, advance: Callable[[int], object]
) -> State:
    """What each of `clients` reaches without the others: as many rounds from `adapter`, on its own data only.

    Returns their adapters `(len(clients), ...)`, in the order of `clients`. Nothing is averaged, nor corrected. A
    client whose round ends in numbers that are not finite stays where it was before. `advance` is told of each round
    done.
    """
    local = dataclasses.replace(federation.local, correction=NoCorrection())
    federation = dataclasses.replace(federation, local=local)
    alone: dict[int, State] = dict.fromkeys(clients.tolist(), adapter)
    kept: dict[int, State] = {}
    for round in range(1, federation.num_rounds + 1):
        rng = federation.rng.child("alone", round)
        for block, result in federation.train(clients, alone, kept, round=round, rng=rng):
            for place, (client, own) in enumerate(zip(block.clients, tree.unstack(result.adapters), strict=True)):
                if result.failed_steps[place] < 0 and tree.is_finite(own):
                    alone[client] = {**alone[client], **own}
                    if result.kept[place]:
                        kept[client] = result.kept[place]
        advance(1)
    return tree.stack([alone[client] for client in clients.tolist()])

"""One round: sample a cohort, train each client's adapter on its data, average, step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora import tree
from flora.clip.towers import AdaptedClip
from flora.data.batching import ClientBlock, client_blocks
from flora.errors import UserError
from flora.federated.aggregation import Strategy
from flora.federated.communication import payload_bytes
from flora.federated.features import Features
from flora.federated.local import BlockResult, LocalTraining, train_block
from flora.federated.memory import available_memory_bytes, client_bytes, is_out_of_memory, release_cached_memory
from flora.federated.sampling import Sampler
from flora.federated.screening import Screening, refusal, screen
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
    screening: Screening = field(default_factory=Screening)
    hooks: Hooks = field(default_factory=Hooks)
    log: Callable[[str], object] = lambda line: None
    sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = np.array([len(client.train) for client in self.clients])

    def learning_rate(self, round: int) -> float:
        """The learning rate of a round, counted from 1."""
        return self.local.learning_rate * self.local.schedule.factor(round, self.num_rounds)

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
        self, cohort: np.ndarray, adapters: Mapping[int, StateLike], kept: Mapping[int, State], *, round: int, rng: Rng
    ) -> Iterator[tuple[ClientBlock, BlockResult]]:
        """Train the cohort block by block, each client from its own of `adapters`.

        `kept` are optimiser states by client. A block that doesn't fit into memory is cut in two, and so are those
        after it. Raises `UserError` if one client alone doesn't fit.
        """
        waiting = self.blocks(cohort, rng)
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
                    optimizer_states=[kept.get(client) for client in block.clients],
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
    broadcast = dict.fromkeys(cohort.tolist(), state.adapter)
    for block, result in federation.train(cohort, broadcast, state.clients, round=round, rng=rng):
        updates += _updates(federation, block, result, state.adapter)
        kept.update((client, own) for client, own in zip(block.clients, result.optimizer_states, strict=True) if own)
    # In the order of ids, so that sums don't depend on how the cohort was cut into blocks.
    updates = [federation.hooks.update(round, update) for update in sorted(updates, key=lambda update: update.client)]
    accepted, rejections = screen(updates, state.adapter, federation.screening)
    learning_rate = federation.learning_rate(round)
    if rejections and federation.screening.policy == "abort":
        raise refusal(round, rejections[0], learning_rate)
    for rejection in rejections:
        federation.log(f"round {round}: client {rejection.client} is left out: {rejection.reason}")
        kept.pop(rejection.client, None)
        if rejection.client in state.clients:
            kept[rejection.client] = state.clients[rejection.client]
    adapter, strategy = state.adapter, state.strategy
    if accepted:
        adapter, strategy = federation.strategy.step(adapter, federation.strategy.combine(accepted), strategy)
    weights = np.array([update.num_examples for update in accepted])
    losses = np.array([update.loss for update in accepted])
    return ServerState(round, adapter, strategy, kept), RoundResult(
        num_clients=len(updates),
        num_steps=sum(update.num_steps for update in updates),
        num_examples=sum(update.num_examples for update in updates),
        train_loss=float((losses * weights).sum() / weights.sum()) if accepted else None,
        learning_rate=learning_rate,
        uplink_bytes=sum(payload_bytes(update.delta) for update in updates),
        downlink_bytes=len(updates) * payload_bytes(state.adapter),
        train_seconds=time.perf_counter() - started,
        rejections=tuple(rejections),
    )


def _updates(federation: Federation, block: ClientBlock, result: BlockResult, adapter: State) -> list[ClientUpdate]:
    trained = tree.unstack(result.adapters)
    return [
        ClientUpdate(
            client=client,
            num_examples=int(federation.sizes[client]),
            delta=tree.subtract(trained[place], adapter),
            loss=float(result.losses[place]),
            num_steps=block.num_steps[place],
            failed_step=int(result.failed_steps[place]) if result.failed_steps[place] >= 0 else None,
        )
        for place, client in enumerate(block.clients)
    ]


def train_alone(
    federation: Federation, adapter: State, clients: np.ndarray, *, advance: Callable[[int], object]
) -> State:
    """What each of `clients` reaches without the others: as many rounds from `adapter`, on its own data only.

    Returns their adapters `(len(clients), ...)`, in the order of `clients`. Nothing is averaged. A client whose round
    ends in numbers that are not finite stays where it was before. `advance` is told of each round done.
    """
    alone: dict[int, State] = dict.fromkeys(clients.tolist(), adapter)
    kept: dict[int, State] = {}
    for round in range(1, federation.num_rounds + 1):
        rng = federation.rng.child("alone", round)
        for block, result in federation.train(clients, alone, kept, round=round, rng=rng):
            for place, (client, own) in enumerate(zip(block.clients, tree.unstack(result.adapters), strict=True)):
                if result.failed_steps[place] < 0 and tree.is_finite(own):
                    alone[client] = own
                    if result.optimizer_states[place]:
                        kept[client] = result.optimizer_states[place]
        advance(1)
    return tree.stack([alone[client] for client in clients.tolist()])

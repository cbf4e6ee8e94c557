"""One round: sample a cohort, train each client's adapter on its data, average, step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from flora.federated.sampling import Sampler
from flora.records import ClientData, ClientUpdate, ServerState
from flora.rng import Rng
from flora.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class Federation:
    """All that rounds need: the model, the clients with their data, and what is done with them."""

    model: AdaptedClip
    features: Features
    clients: Sequence[ClientData]
    local: LocalTraining
    sampler: Sampler
    strategy: Strategy
    num_rounds: int
    clients_per_block: int
    rng: Rng
    sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.array([len(client.train) for client in self.clients]))

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
        self, block: ClientBlock, adapters: StateLike, *, round: int, rng: Rng, kept: dict[int, State]
    ) -> BlockResult:
        """Train one block from `adapters` `(K, ...)`; `kept`, the optimiser states by client, is read and renewed.

        Raises `UserError` if a client's adapter or loss is no longer finite.
        """
        result = train_block(
            self.model,
            block,
            adapters=adapters,
            features=self.features,
            local=self.local,
            learning_rate=self.learning_rate(round),
            rngs=[rng.child("client", client) for client in block.clients],
            optimizer_states=[kept.get(client) for client in block.clients],
        )
        for client, finite in zip(block.clients, result.finite.tolist(), strict=True):
            if not finite:
                raise UserError(
                    f"round {round}: client {client} diverged (adapter or loss no longer finite) at learning rate "
                    f"{self.learning_rate(round):g}; lower local.learning_rate or set local.clip_norm"
                )
        kept.update((client, own) for client, own in zip(block.clients, result.optimizer_states, strict=True) if own)
        return result


@dataclass(frozen=True)
class RoundResult:
    """What a round did, apart from the new state."""

    num_clients: int
    num_steps: int
    num_examples: int
    train_loss: float
    learning_rate: float
    uplink_bytes: int
    downlink_bytes: int
    train_seconds: float


def run_round(federation: Federation, state: ServerState) -> tuple[ServerState, RoundResult]:
    """The round after `state`. Nothing but `state` and the federation's seed decides what comes out."""
    started = time.perf_counter()
    round = state.round + 1
    rng = federation.rng.child("round", round)
    cohort = federation.sampler.sample(federation.sizes, rng.child("cohort"))
    updates: list[ClientUpdate] = []
    kept = dict(state.clients)
    for block in federation.blocks(cohort, rng):
        broadcast = tree.expand(state.adapter, len(block.clients))
        result = federation.train(block, broadcast, round=round, rng=rng, kept=kept)
        updates += _updates(federation, block, result, state.adapter)
    # In the order of ids, so that sums don't depend on how the cohort was cut into blocks.
    updates.sort(key=lambda update: update.client)
    delta = federation.strategy.combine(updates)
    adapter, strategy = federation.strategy.step(state.adapter, delta, state.strategy)
    weights = np.array([update.num_examples for update in updates])
    losses = np.array([update.loss for update in updates])
    return ServerState(round, adapter, strategy, kept), RoundResult(
        num_clients=len(updates),
        num_steps=sum(update.num_steps for update in updates),
        num_examples=int(weights.sum()),
        train_loss=float((losses * weights).sum() / weights.sum()),
        learning_rate=federation.learning_rate(round),
        uplink_bytes=sum(payload_bytes(update.delta) for update in updates),
        downlink_bytes=len(updates) * payload_bytes(state.adapter),
        train_seconds=time.perf_counter() - started,
    )


def _updates(federation: Federation, block: ClientBlock, result: BlockResult, adapter: State) -> list[ClientUpdate]:
    return [
        ClientUpdate(
            client=client,
            num_examples=int(federation.sizes[client]),
            delta=tree.subtract(trained, adapter),
            loss=float(result.losses[place]),
            num_steps=block.num_steps[place],
        )
        for place, (client, trained) in enumerate(zip(block.clients, tree.unstack(result.adapters), strict=True))
    ]


def train_alone(
    federation: Federation, adapter: State, clients: np.ndarray, *, advance: Callable[[int], object]
) -> State:
    """What each of `clients` reaches without the others: as many rounds from `adapter`, on its own data only.

    Returns their adapters `(len(clients), ...)`, in the order of `clients`. Nothing is averaged. `advance` is told
    of each round done.
    """
    alone: dict[int, State] = dict.fromkeys(clients.tolist(), adapter)
    kept: dict[int, State] = {}
    for round in range(1, federation.num_rounds + 1):
        rng = federation.rng.child("alone", round)
        for block in federation.blocks(clients, rng):
            stack = tree.stack([alone[client] for client in block.clients])
            result = federation.train(block, stack, round=round, rng=rng, kept=kept)
            alone.update(zip(block.clients, tree.unstack(result.adapters), strict=True))
        advance(1)
    return tree.stack([alone[client] for client in clients.tolist()])

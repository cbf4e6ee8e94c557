"""Reference runs: the audited run again, with half of the examples, to see what adapters without an example know of it.

All of them run at once, and their clients share steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from flora.core.hooks import Hooks
from flora.core.rng import Rng
from flora.core.states import ClientData
from flora.core.tree import State
from flora.engine.together import Member, Together
from flora.experiment.build import Experiment
from flora.federated.federation import Federation
from flora.federated.round import run_round


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference run: what its clients train on, and the server's adapters after some of its rounds."""

    clients: Sequence[ClientData]
    adapters: dict[int, State]

    @property
    def trained_on(self) -> np.ndarray:
        """The training examples that some client has, `(N,)`."""
        return np.concatenate([client.train for client in self.clients])


def train_references(
    experiment: Experiment,
    number: int,
    *,
    rounds: Collection[int],
    spared: np.ndarray,
    rng: Rng,
    advance: Callable[[int], object] = lambda rounds: None,
) -> list[Reference]:
    """Run an experiment `number` times, an even one, and return the references, with the adapters after `rounds`.

    They come in pairs: what a client has, training and held-out examples alike, is halved at random, and each of a pair
    has one half. So every example is in half of the references, whether it was in the audited run or not. The examples
    `spared` stay with whoever has them. Cohorts, batches and noise are drawn anew for each. `advance` is told of each
    round done. Raises what ended one of them.
    """
    references = [
        Reference(_half(experiment.federation.clients, spared, rng.child("halves", index // 2), index % 2), {})
        for index in range(number)
    ]

    def live(index: int, member: Member) -> None:
        reference = references[index]
        engine = member.join(experiment.federation.engine)
        federation = _with_clients(replace(experiment.federation, engine=engine), reference.clients)
        federation = replace(federation, rng=rng.child("reference", index))
        state = federation.initial_state(experiment.initial_adapter)
        for round in range(1, max(rounds) + 1):
            state, _ = run_round(federation, state)
            if round in rounds:
                reference.adapters[round] = state.adapter
            advance(1)

    for error in Together(Hooks()).run([partial(live, index) for index in range(number)]):
        if error is not None:
            raise error
    return references


def _with_clients(federation: Federation, clients: Sequence[ClientData]) -> Federation:
    sizes = np.array([len(client.train) for client in clients])
    return replace(federation, clients=clients, participation=replace(federation.participation, sizes=sizes))


def _half(clients: Sequence[ClientData], spared: np.ndarray, rng: Rng, which: int) -> list[ClientData]:
    """What clients train on when each has one half of what it had; one with a single example keeps that."""
    halved = []
    for index, client in enumerate(clients):
        pool = np.setdiff1d(np.concatenate([client.train, client.held_out]), spared)
        if len(pool) < 2:
            halved.append(client)
            continue
        half = rng.child("client", index).numpy().permutation(pool)[which::2]
        stays = np.intersect1d(client.train, spared)
        halved.append(replace(client, train=np.sort(np.concatenate([half, stays])), held_out=np.empty(0, np.int64)))
    return halved

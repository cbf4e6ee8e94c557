"""Reference runs: the audited run again, with half of the examples or of the clients, to see what is known without.

All of them run at once, and their clients share steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from flora.communication.network import COLUMNS, Profiles
from flora.core.hooks import Hooks
from flora.core.rng import Rng
from flora.core.states import ClientData, ServerState
from flora.core.tree import State
from flora.engine.together import Member, Together
from flora.experiment.build import Experiment
from flora.federated.federation import Federation
from flora.federated.round import RoundResult, run_round


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

    def note(index: int, state: ServerState, result: RoundResult) -> None:
        if state.round in rounds:
            references[index].adapters[state.round] = state.adapter
        advance(1)

    federations = [experiment.federation.with_clients(each.clients) for each in references]
    _run_together(federations, experiment.initial_adapter, max(rounds), note, rng)
    return references


@dataclass(frozen=True, eq=False)
class ClientReference:
    """A reference run with some of the clients: whose updates came in some round, and the server's last adapter."""

    took_part: np.ndarray
    adapter: State


def train_client_references(
    experiment: Experiment,
    number: int,
    clients: np.ndarray,
    *,
    rounds: int,
    rng: Rng,
    advance: Callable[[int], object] = lambda rounds: None,
) -> list[ClientReference]:
    """Run an experiment `number` times, an even one, for `rounds`, each with one half of `clients`, ids, and return it.

    They come in pairs that have one half each, drawn at random; cohorts are half as large, so that a client is in one
    as often as in the run. Cohorts, batches and noise are drawn anew. `advance` is told of each round done. Raises what
    ended one of them.
    """
    halves = [
        np.sort(rng.child("halves", index // 2).numpy().permutation(clients)[index % 2 :: 2]) for index in range(number)
    ]
    took_part: list[set[int]] = [set() for _ in halves]
    adapters: list[State] = [{} for _ in halves]

    def note(index: int, state: ServerState, result: RoundResult) -> None:
        took_part[index].update(halves[index][list(result.cohort or ())].tolist())
        adapters[index] = state.adapter
        advance(1)

    federations = [_of_some(experiment.federation, half) for half in halves]
    _run_together(federations, experiment.initial_adapter, rounds, note, rng)
    return [
        ClientReference(np.array(sorted(ids), dtype=int), adapter)
        for ids, adapter in zip(took_part, adapters, strict=True)
    ]


def _run_together(
    federations: Sequence[Federation],
    adapter: State,
    num_rounds: int,
    note: Callable[[int, ServerState, RoundResult], object],
    rng: Rng,
) -> None:
    """Run federations from one adapter, each with random numbers of its own; `note` is told of each round of each."""

    def live(index: int, member: Member) -> None:
        engine = member.join(federations[index].engine)
        federation = replace(federations[index], engine=engine, rng=rng.child("reference", index))
        state = federation.initial_state(adapter)
        for _ in range(num_rounds):
            state, result = run_round(federation, state)
            note(index, state, result)

    for error in Together(Hooks()).run([partial(live, index) for index in range(len(federations))]):
        if error is not None:
            raise error


def _of_some(federation: Federation, ids: np.ndarray) -> Federation:
    """The federation with some of its clients, numbered anew, and as much smaller cohorts; it says who took part."""
    participation, private = federation.participation, federation.privacy
    sampler, profiles = participation.sampler, participation.profiles
    if sampler.number is not None:
        share = len(ids) / len(federation.clients)
        sampler = replace(sampler, number=max(1, round(sampler.number * share)))
    if profiles is not None:
        profiles = Profiles(*(getattr(profiles, name)[ids] for name in COLUMNS))
    if private is not None:
        private = replace(private, mechanism=replace(private.mechanism, publish=True))
    return replace(
        federation.with_clients([federation.clients[index] for index in ids.tolist()]),
        participation=replace(participation, sampler=sampler, profiles=profiles, sizes=participation.sizes[ids]),
        ranks=None if federation.ranks is None else federation.ranks[ids],
        privacy=private,
        canaries=None,
    )


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

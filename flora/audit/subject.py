"""A finished run that is audited: built again as it was, with the adapters that it released."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from flora.clip.prediction import bound
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.errors import UserError
from flora.core.files import read_bytes
from flora.core.low_rank import is_residual
from flora.core.progress import Progress, Tell
from flora.core.records import RoundRecord
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.core.tree import State, StateLike
from flora.engine.losses import logits_in_batches
from flora.experiment.build import Experiment, build_experiment
from flora.features.features import Features
from flora.privacy.canaries import Evidence
from flora.runs.checkpoints import CheckpointFolder, DamagedError
from flora.runs.finished import FinishedRun, read_run
from flora.runs.inventory import partition_as_used
from flora.runs.resume import recorded_clients_per_block
from flora.runs.run_directory import read_json


@dataclass(frozen=True, eq=False)
class Subject:
    """A finished run, its experiment, and the server's states that are known of it, by the round that they follow.

    The first state and the last are always known, those between where there is a checkpoint. `records` has one of each
    round, but for lost ones.
    """

    run: FinishedRun
    experiment: Experiment
    states: Mapping[int, ServerState]
    records: Sequence[RoundRecord]

    @property
    def rng(self) -> Rng:
        """The seed tree of audits, which has no stream of the run's own."""
        return Rng(self.run.config.seed).child("audit")

    @property
    def last_round(self) -> int:
        """The round whose adapter the run ended with."""
        return max(self.states)

    @property
    def initial(self) -> State:
        """The server's adapter before the first round."""
        return self.states[0].adapter

    @cached_property
    def participants(self) -> np.ndarray:
        """The ids of the clients whose updates came in some round, sorted.

        Where the records don't say who that was (`privacy.publish: false`, lost lines), those who were drawn. Raises
        `UserError` if that depends on a network's clock.
        """
        recorded = {record.round: record.cohort for record in self.records}
        cohorts = [recorded.get(round) for round in range(1, self.last_round + 1)]
        if any(cohort is None for cohort in cohorts):
            federation = self.experiment.federation
            if federation.participation.network is not None:
                raise UserError(f"{self.run.path / 'rounds.jsonl'}: it doesn't say who took part")
            states = [replace(self.states[0], round=round) for round in range(self.last_round)]
            plans = [federation.schedule.plan(federation, state) for state in states]
            cohorts = [tuple(task.client for task in plan.tasks) for plan in plans]
        return np.array(sorted({client for cohort in cohorts for client in cohort or ()}), dtype=int)

    @cached_property
    def evidence(self) -> Evidence:
        """The evidence that the last adapter and the first one give an attacker."""
        return self.evidence_of(self.states[self.last_round].adapter)

    def evidence_of(self, last: StateLike) -> Evidence:
        """The evidence that an adapter with which training ended, and the first one, give an attacker."""
        first = self.initial
        return Evidence(
            moved={name: last[name] - first[name] for name in last if not is_residual(name)},
            gains=lambda examples: self.confidences(last, examples) - self.confidences(first, examples),
            clients=self.experiment.federation.clients,
        )

    def confidences(self, adapter: StateLike, examples: np.ndarray) -> np.ndarray:
        """Return how sure a server's adapter is of the labels of N training examples, `(N,)`: see `confidences`."""
        engine = self.experiment.federation.engine
        return confidences(
            engine.model, adapter, engine.features.subset(examples), batch_size=self.run.config.evaluation.batch_size
        )


@torch.no_grad()
def confidences(model: AdaptedClip, adapter: StateLike, features: Features, *, batch_size: int) -> np.ndarray:
    """Return the logit-scaled confidence log p / (1 - p) of each example's label, `(N,)`, in double precision.

    The loss falls as it rises, so ordering by one is ordering by the other. Source: arXiv:2112.03570, section IV-C, in
    its form without cancellation: the label's logit less the log of the sum of the others' exponentials. `adapter` has
    no client axis.
    """
    stack = {name: tensor.to(model.device) for name, tensor in tree.expand(model.adapter.models(adapter)[0], 1).items()}
    with bound(model, stack):
        classes = model.class_features(1)
    parts = []
    batches = logits_in_batches(model, stack, classes, features, batch_size=batch_size)
    for logits, labels in zip(batches, features.labels.split(batch_size), strict=True):
        targets = labels.to(model.device).unsqueeze(-1)
        others = logits[0].double().scatter(-1, targets, -torch.inf).logsumexp(dim=-1)
        parts.append((logits[0].double().gather(-1, targets).squeeze(-1) - others).cpu())
    return torch.cat(parts).numpy() if parts else np.empty(0)


def audited(path: Path, overrides: Sequence[str] = (), *, progress: Progress, log: Callable[[str], object]) -> Subject:
    """Build a finished run's experiment again, and read the adapters that it released.

    Raises `UserError` if the run has no rounds or is not finished, and if weights, data or clients are not the run's.
    """
    run = read_run(path, overrides)
    if not run.num_rounds:
        raise UserError(f"{path}: this run has no rounds: nothing was trained, and there is nothing to audit")
    if run.config.server.strategy.num_clusters > 1:
        raise UserError(f"{path}: its server keeps several models, and attacks read one")
    experiment = build_experiment(run.config, Tell(progress, log), clients_per_block=recorded_clients_per_block(path))
    _check_same(run, experiment)
    run.check_fits(experiment.initial_adapter)
    return Subject(run, experiment, _states(run, experiment, log), _records(run))


def _check_same(run: FinishedRun, experiment: Experiment) -> None:
    """Raise `UserError` unless weights, data and clients are those that the run was made with."""
    recorded = read_json(run.path / "environment.json")
    for name, digest in experiment.digests.items():
        if isinstance(recorded, dict) and recorded.get(name, digest) != digest:
            raise UserError(f"{run.path}: not what the run was made with (SHA-256): {name.removesuffix('_sha256')}")
    partition = json.loads(json.dumps(partition_as_used(experiment)))
    if read_json(run.path / "partition.json") != partition:
        raise UserError(f"{run.path / 'partition.json'}: missing, or the clients are not those of the run")


def _states(run: FinishedRun, experiment: Experiment, log: Callable[[str], object]) -> dict[int, ServerState]:
    """The server's states that are known, by round."""
    initial, folder = experiment.initial_state(), CheckpointFolder(run.path / "checkpoints")
    client_like = experiment.federation.client_state(initial.adapter)
    states = {0: initial, run.num_rounds: replace(initial, round=run.num_rounds, adapter=run.adapter)}
    for round in folder.rounds():
        if 0 < round <= run.num_rounds:
            try:
                states[round] = folder.load(round, like=initial, client_like=client_like).state
            except DamagedError as error:
                log(f"warning: {error}; left out")
    return dict(sorted(states.items()))


def _records(run: FinishedRun) -> tuple[RoundRecord, ...]:
    """The records of `rounds.jsonl`. Raises `UserError` if it is damaged, or has none of the last round."""
    file = run.path / "rounds.jsonl"
    try:
        records = tuple(RoundRecord.from_dict(json.loads(line)) for line in read_bytes(file).splitlines())
        if not records or records[-1].round != run.num_rounds:
            raise ValueError("the last round's is missing")
        return records
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{file}: missing or damaged") from None

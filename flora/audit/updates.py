"""Which classes a client holds, read off its update of one round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flora.audit.membership import as_json, canary_clients
from flora.audit.subject import Subject
from flora.clip.prediction import bound
from flora.clip.towers.towers import AdaptedClip
from flora.core import tree
from flora.core.states import ClientUpdate, ServerState
from flora.core.tree import StateLike
from flora.engine.losses import logits_in_batches
from flora.features.features import Features
from flora.federated.federation import Federation
from flora.federated.receiving import send_updates
from flora.privacy.attacks import success

# Public images that an update's effect is measured on.
MAX_IMAGES = 512


def sent_updates(federation: Federation, state: ServerState) -> list[tuple[StateLike, ClientUpdate]]:
    """Return what each client of the round after `state` trained from and what it sent, as the server read it.

    Nothing of a run has to be stored for this: training is repeated as it was.
    """
    plan = federation.schedule.plan(federation, federation.continued(state))
    starts = {task.client: task.adapter for task in plan.tasks}
    sent = send_updates(federation, plan, federation.engine.train(plan.tasks))
    return [(starts[client], update) for client, (update, _) in sorted(sent.items())]


@torch.no_grad()
def mean_log_probabilities(
    model: AdaptedClip, adapter: StateLike, features: Features, *, batch_size: int
) -> np.ndarray:
    """Return the mean over images of the log-probability of each class, `(C,)`; `adapter` has no client axis."""
    stack = {name: tensor.to(model.device) for name, tensor in tree.expand(model.adapter.models(adapter)[0], 1).items()}
    with bound(model, stack):
        classes = model.class_features(1)
    total = torch.zeros(classes.shape[1], dtype=torch.float64)
    for logits in logits_in_batches(model, stack, classes, features, batch_size=batch_size):
        total += logits[0].double().log_softmax(dim=-1).sum(dim=0).cpu()
    return np.asarray((total / len(features)).numpy())


def class_presence(subject: Subject, rounds: Sequence[int]) -> dict[str, Any]:
    """Guess the classes that each client of a round holds from its update alone; return what came out, as JSON types.

    A class's score is by how much an update raises its mean log-probability on public images (the test images, whatever
    they show), less what the round's updates do to it on average: training with cross-entropy lowers those classes most
    of which a client has no example.
    `rounds` count from 1; the state before each must be known. Canaries that are clients are left out.
    """
    return {"rounds": [_of_round(subject, round) for round in rounds]}


def _of_round(subject: Subject, round: int) -> dict[str, Any]:
    experiment, batch_size = subject.experiment, subject.run.config.evaluation.batch_size
    federation, state = experiment.federation, subject.states[round - 1]
    number = min(MAX_IMAGES, len(experiment.test))
    drawn = subject.rng.child("public").numpy().choice(len(experiment.test), number, replace=False)
    public, model = experiment.test.subset(np.sort(drawn)), federation.engine.model
    rows, clients = [], []
    for start, update in sent_updates(federation, state):
        if update.failed_step is not None or update.client in canary_clients(subject):
            continue
        after = {**start, **{name: start[name] + tensor for name, tensor in update.delta.items()}}
        before, then = (mean_log_probabilities(model, each, public, batch_size=batch_size) for each in (start, after))
        rows.append(then - before)
        clients.append(update.client)
    holds = experiment.held_classes[clients]
    effects = np.array(rows).reshape(holds.shape)
    scores = effects - effects.mean(axis=0) if len(effects) else effects
    found = success(scores[holds], scores[~holds], subject.rng.child("classes", round))
    return {"round": round, "num_clients": len(clients)} | as_json(found)

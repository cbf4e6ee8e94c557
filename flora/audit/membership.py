"""Membership inference: which examples, and which clients, an adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora.audit.references import Reference, train_client_references, train_references
from flora.audit.subject import Subject
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.tree import StateLike
from flora.privacy.attacks import Success, advantage, likelihood_ratios, offline_scores, success
from flora.privacy.canaries import client_scores


@dataclass(frozen=True, eq=False)
class Targets:
    """The examples that are attacked: whose each is, `(N,)`, and whether that client trained on it, `(N,)`.

    Who is no member is a held-out example of the same clients: it was drawn from what they have as members were.
    """

    examples: np.ndarray
    clients: np.ndarray
    is_member: np.ndarray


def targets_of(subject: Subject, most: int) -> Targets:
    """Return what is attacked: the examples of all who took part, or `most` of them drawn at random.

    Canaries are none of them: they have an attack of their own. Raises `UserError` where nothing was held out.
    """
    experiment = subject.experiment
    spared = canary_examples(subject)
    chosen = [client for client in subject.participants.tolist() if client not in canary_clients(subject)]
    parts = []
    for client in chosen:
        data = experiment.federation.clients[client]
        for examples, is_member in ((np.setdiff1d(data.train, spared), True), (data.held_out, False)):
            parts.append((examples, np.full(len(examples), client), np.full(len(examples), is_member)))
    if not any(len(examples) for examples, _, is_member in parts if not is_member.any()):
        raise UserError(
            f"{subject.run.path}: no client has held-out images (clients.holdout_fraction), so there is nothing to "
            "tell training images from; --only updates,canaries leaves this attack out"
        )
    every = Targets(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if len(every.examples) <= most:
        return every
    drawn = np.sort(subject.rng.child("targets").numpy().choice(len(every.examples), most, replace=False))
    return Targets(every.examples[drawn], every.clients[drawn], every.is_member[drawn])


def canary_examples(subject: Subject) -> np.ndarray:
    """The ids of the training examples that are canaries, `(N,)`."""
    planted = subject.experiment.federation.canaries
    is_example = planted is not None and planted.canaries.unit == "example"
    return planted.coins.ids if planted is not None and is_example else np.empty(0, np.int64)


def canary_clients(subject: Subject) -> set[int]:
    """The clients that are canaries."""
    planted = subject.experiment.federation.canaries
    return set(planted.coins.ids.tolist()) if planted is not None and planted.canaries.unit == "client" else set()


def example_membership(
    subject: Subject, rounds: Sequence[int], *, num_references: int, most: int, advance: Callable[[int], object]
) -> dict[str, Any]:
    """Attack the adapters after `rounds`, and return what came out, as JSON types, by attack.

    "loss" is the threshold on the loss (arXiv:1709.01604), "likelihood ratio" and "offline likelihood ratio" are those
    of arXiv:2112.03570, with `num_references` reference runs. The last adapter is attacked by client, too.
    """
    targets = targets_of(subject, most)
    references: list[Reference] = []
    if num_references:
        references = train_references(
            subject.experiment,
            num_references,
            rounds=rounds,
            spared=canary_examples(subject),
            rng=subject.rng.child("references"),
            advance=advance,
        )
    was_in = np.array([np.isin(targets.examples, each.trained_on) for each in references])
    attacks = []
    for round in rounds:
        scores = _scores(subject, subject.states[round].adapter, targets, references, was_in, round)
        attacks += [_result(subject, round, name, each, targets) for name, each in scores.items()]
    return {"num_references": num_references, "num_examples": len(targets.examples), "attacks": attacks}


def _scores(
    subject: Subject,
    adapter: StateLike,
    targets: Targets,
    references: Sequence[Reference],
    was_in: np.ndarray,
    round: int,
) -> dict[str, np.ndarray]:
    """The scores `(N,)` that each attack gives the targets."""
    observed = subject.confidences(adapter, targets.examples)
    scores = {"loss": observed}
    if references:
        seen = np.stack([subject.confidences(each.adapters[round], targets.examples) for each in references])
        scores |= _ratios(observed, seen, was_in)
    return scores


def _ratios(observed: np.ndarray, seen: np.ndarray, was_in: np.ndarray) -> dict[str, np.ndarray]:
    """The scores `(N,)` of the likelihood ratio attacks, for `observed` `(N,)` and what references say, `(R, N)`.

    `was_in` `(R, N)` says which reference had what. What was in all of them, or in none, can't be told: NaN.
    """
    told, scores = was_in.any(axis=0) & ~was_in.all(axis=0), {}
    for name, attack in (("likelihood ratio", likelihood_ratios), ("offline likelihood ratio", offline_scores)):
        scores[name] = np.full(len(observed), np.nan)
        scores[name][told] = attack(observed[told], seen[:, told], was_in[:, told])
    return scores


def _result(subject: Subject, round: int, attack: str, scores: np.ndarray, targets: Targets) -> dict[str, Any]:
    """How well one attack on one adapter does, as JSON types."""
    rng = subject.rng.child("bootstrap", attack, round)
    content: dict[str, Any] = {"attack": attack, "round": round} | _told(scores, targets.is_member, rng)
    if attack == "loss":
        losses = np.logaddexp(0, -scores)
        content["advantage"] = advantage(losses[targets.is_member], losses[~targets.is_member])
    if round == subject.last_round:
        content["by_client"] = {
            str(client): _told(scores[place], targets.is_member[place], rng.child("client", client))
            for client in np.unique(targets.clients).tolist()
            for place in [targets.clients == client]
        }
    return content


def _told(scores: np.ndarray, is_member: np.ndarray, rng: Rng) -> dict[str, Any]:
    """How well scores tell members from others, as JSON types; those without a score are left out."""
    known = ~np.isnan(scores)
    return as_json(success(scores[known & is_member], scores[known & ~is_member], rng))


def as_json(told: Success | None) -> dict[str, Any]:
    """A success as JSON types; without one its area is None."""
    return {"auc": None} if told is None else told.to_dict()


def client_membership(
    subject: Subject, *, num_references: int, advance: Callable[[int], object] = lambda rounds: None
) -> dict[str, Any]:
    """Attack which clients took part at all, with their training examples in hand, and return what came out.

    A client's score is by how much surer the last adapter is of the labels of its training examples than the first;
    with `num_references` also the likelihood ratio of arXiv:2112.03570, of that mean, against runs with half of the
    clients each. The area is None where all took part, or none did, and then there are no reference runs.
    """
    known = [client not in canary_clients(subject) for client in range(len(subject.experiment.federation.clients))]
    clients = np.flatnonzero(known)
    took_part = np.isin(clients, subject.participants)
    content: dict[str, Any] = {"num_in": int(took_part.sum()), "num_out": int((~took_part).sum())}
    scores = client_scores(clients, subject.evidence) if len(clients) else np.empty(0)
    content |= as_json(success(scores[took_part], scores[~took_part], subject.rng.child("clients")))
    if num_references and took_part.any() and not took_part.all():
        ratios = _client_ratios(subject, clients, num_references, advance)
        content["ratios"] = {
            name: _told(each, took_part, subject.rng.child("clients", name)) for name, each in ratios.items()
        }
    return content


def _client_ratios(
    subject: Subject, clients: np.ndarray, num_references: int, advance: Callable[[int], object]
) -> dict[str, np.ndarray]:
    """The scores of clients `(len(clients),)` by each likelihood ratio attack; NaN for those that can't be told."""
    references = train_client_references(
        subject.experiment,
        num_references,
        clients,
        rounds=subject.last_round,
        rng=subject.rng.child("client references"),
        advance=advance,
    )
    was_in = np.array([np.isin(clients, each.took_part) for each in references])
    gains = [client_scores(clients, subject.evidence_of(each.adapter)) for each in references]
    return _ratios(client_scores(clients, subject.evidence), np.stack(gains), was_in)

"""Partitioners that give each client a few examples of some classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flora.core.counts import counted
from flora.core.errors import UserError
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.data.partition import Partitioner, classes_of, collect, holders_of, require_examples


def _require_shots_of_each(classes: dict[int, np.ndarray], shots: int) -> None:
    """Raise `UserError`, with the largest possible shots, unless every class has `shots` examples."""
    most_shots = min((len(members) for members in classes.values()), default=0)
    if shots > most_shots:
        raise UserError(
            f"partition.shots: too few examples for {shots} shots of each class: expected at most {most_shots} shots"
        )


def _draw_subsets(size: int, rng: Rng, *, num_subsets: int, subset_size: int) -> np.ndarray:
    """Return `(num_subsets, subset_size)`: in each row distinct numbers below `size`, each set of them equally likely.

    One more row changes no other row. Source: Robert Floyd's algorithm (CACM 30(9), 1987), on all rows at once.
    """
    lasts = np.arange(size - subset_size, size)
    drawn = rng.numpy().integers(lasts + 1, size=(num_subsets, subset_size))
    for column, last in enumerate(lasts.tolist()):
        taken = (drawn[:, :column] == drawn[:, column, None]).any(axis=1)
        drawn[taken, column] = last
    return drawn


@register("few_shot")
@dataclass(frozen=True)
class FewShot(Partitioner):
    """Every client gets `shots` examples of each of its classes: of all classes (iid) or of some (pathological).

    No example goes to two clients; those left over go to none. In pathological mode the classes are chosen as
    `pathological` does, and some may stay without a client.
    """

    shots: int = option("examples of each of its classes that a client gets", 16, at_least=1)
    mode: str = option("iid: a client has all classes; pathological: some", "iid", choices=("iid", "pathological"))
    classes_per_client: int | None = option("classes of a client, with mode pathological", None, at_least=1)

    def check(self) -> None:
        if self.mode == "iid" and self.classes_per_client is not None:
            raise OptionError("classes_per_client", "with mode iid a client has all classes; leave this out")
        if self.mode == "pathological" and self.classes_per_client is None:
            raise OptionError("classes_per_client", "mode pathological needs it")

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        require_examples(labels, num_clients)
        classes = classes_of(labels)
        holders = holders_of(len(classes), self.classes_per_client or len(classes), num_clients, rng)
        self._require_shots(classes, holders, num_clients)
        owner = np.full(len(labels), -1, np.int64)
        for (label, members), clients in zip(classes.items(), holders, strict=True):
            shuffled = rng.child("class", label).numpy().permutation(members)
            owner[shuffled[: len(clients) * self.shots]] = np.repeat(clients, self.shots)
        return collect(owner, num_clients)

    def _require_shots(self, classes: dict[int, np.ndarray], holders: list[np.ndarray], num_clients: int) -> None:
        """Raise `UserError`, with the largest possible shots and clients, unless every class has enough examples."""
        sizes = [len(members) for members in classes.values()]
        most_shots = min(size // len(clients) for size, clients in zip(sizes, holders, strict=True) if len(clients))
        if self.shots <= most_shots:
            return
        per_client = self.classes_per_client or len(classes)
        most_clients = min(sizes) // self.shots * len(classes) // per_client
        possible = [counted(most_shots, "shot")] * (most_shots > 0)
        possible += [counted(most_clients, "client")] * (most_clients > 0)
        if not possible:
            possible = [f"{counted(min(sizes) * len(classes) // per_client, 'client')} with 1 shot"]
        raise UserError(
            f"partition.shots: too few examples for {counted(num_clients, 'client')} with "
            f"{counted(self.shots, 'shot')} of each of {per_client} classes: expected at most {' or '.join(possible)}"
        )


@register("few_shot_overlapping")
@dataclass(frozen=True)
class FewShotOverlapping(Partitioner):
    """Every client draws `shots` examples of each class on its own, so clients may share examples.

    No client has an example twice. There may be more clients than examples, and one more client changes nobody else's.

    Source: the few-shot iid setting in the released code of FLoRA (arXiv:2404.15182).
    """

    shots: int = option("examples of each class that a client gets", 16, at_least=1)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        if num_clients < 1:
            raise UserError(f"clients.number: expected at least 1, got {num_clients}")
        classes = classes_of(labels)
        _require_shots_of_each(classes, self.shots)
        drawn = []
        for label, members in classes.items():
            class_rng = rng.child("class", label)
            drawn.append(
                members[_draw_subsets(len(members), class_rng, num_subsets=num_clients, subset_size=self.shots)]
            )
        return list(np.sort(np.concatenate(drawn, axis=1), axis=1))


@register("few_shot_chunks")
@dataclass(frozen=True)
class FewShotChunks(Partitioner):
    """Every client gets `shots` examples of each of its classes, and no class belongs to two clients.

    All classes are dealt, at random, and the clients' numbers of classes differ by at most one. No example goes to two
    clients; those left over go to none.

    Source: the few-shot pathological setting in the released code of FLoRA (arXiv:2404.15182).
    """

    shots: int = option("examples of each of its classes that a client gets", 16, at_least=1)

    def split(
        self, labels: np.ndarray, num_clients: int, rng: Rng, *, groups: np.ndarray | None = None
    ) -> list[np.ndarray]:
        classes = classes_of(labels)
        if not 1 <= num_clients <= len(classes):
            raise UserError(f"clients.number: expected 1 to {len(classes)} (the classes), got {num_clients}")
        _require_shots_of_each(classes, self.shots)
        clients = rng.child("classes").numpy().permutation(len(classes)) * num_clients // len(classes)
        owner = np.full(len(labels), -1, np.int64)
        for (label, members), client in zip(classes.items(), clients.tolist(), strict=True):
            owner[rng.child("class", label).numpy().permutation(members)[: self.shots]] = client
        return collect(owner, num_clients)

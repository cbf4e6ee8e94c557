"""What the server trains by itself: before round 1, and after a round's mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.core import tree
from flora.core.errors import DivergedError
from flora.core.rng import Rng
from flora.core.tree import State, StateLike
from flora.engine.engine import Engine
from flora.engine.losses import logits_in_batches
from flora.engine.tasks import ClientTask, TrainingSetup

# The id of a task that is no client's.
SERVER = -1


@dataclass(frozen=True, eq=False)
class Trained:
    """The adapter after some steps, and their mean loss."""

    adapter: State
    loss: float


@dataclass(frozen=True, eq=False)
class ServerExamples:
    """Examples that the server has, as the `features` of an engine, and how it trains on them every so many rounds.

    `setting` is the section of the configuration that says so.
    """

    setting: str
    engine: Engine
    local: LocalTraining
    every: int = 1

    def train(self, adapter: StateLike, trained: Sequence[str], rng: Rng) -> Trained:
        """Train the adapter's tensors called `trained` on all examples.

        Raises `DivergedError` that names the setting if a number is not finite.
        """
        number = len(self.engine.features)
        setup = TrainingSetup(
            round=0,
            local=self.local,
            learning_rate=self.local.learning_rate,
            trained=tuple(trained),
            width=min(self.local.batch_size, number),
        )
        (result,) = self.engine.train([ClientTask(SERVER, adapter, np.arange(number), rng, setup)])
        if not result.is_finite:
            raise DivergedError(f"{self.setting}: what the server trained is not finite; lower its learning_rate")
        ended = {name: tensor.clone() for name, tensor in result.adapter.items()}
        return Trained({**adapter, **ended}, result.loss)

    def with_teacher(self, adapters: Sequence[StateLike]) -> ServerExamples:
        """Return the same examples, each with the mean of the logits that `adapters` give it."""
        teacher = _mean_logits(self.engine, adapters, self.local.batch_size)
        return dataclasses.replace(self, engine=self.engine.with_targets({"teacher_logits": teacher}))


@dataclass(frozen=True, eq=False)
class ServerTraining:
    """What the server trains on: before round 1, and after a round's mean, images that the cohort labels, and texts."""

    synthetic: ServerExamples | None = None
    public: ServerExamples | None = None
    texts: ServerExamples | None = None

    @property
    def all(self) -> list[ServerExamples]:
        """The examples that the server has, in the order in which it trains on them in a round."""
        return [each for each in (self.synthetic, self.public, self.texts) if each is not None]


@torch.no_grad()
def _mean_logits(engine: Engine, adapters: Sequence[StateLike], batch_size: int) -> Tensor:
    """The mean over adapters of their logits for each example of the engine, `(N, C)`, on the CPU."""
    model, features = engine.model, engine.features

    def summed(some: Sequence[StateLike]) -> Tensor:
        stack = {name: tensor.to(model.device) for name, tensor in tree.stack(some).items()}
        with model.adapter.bind(stack):
            classes = model.class_features(len(some))
        batches = logits_in_batches(model, stack, classes, features, batch_size=batch_size)
        return torch.cat([logits.sum(dim=0).cpu() for logits in batches])

    sums = engine.in_blocks(adapters, summed, setting="server.distillation.batch_size")
    return torch.stack(list(sums)).sum(dim=0) / len(adapters)

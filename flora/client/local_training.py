"""The options of local training: what every client does with its data in a round."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from flora.client.corrections import Correction, NoCorrection
from flora.client.objectives import CrossEntropy, Objective
from flora.client.optimizers import AdamW, Constant, Optimizer, Schedule
from flora.client.penalties import NoPenalty, Penalty
from flora.client.sampling import LocalSampling, Poisson, Shuffled
from flora.client.self_training import SelfTraining
from flora.core import tree
from flora.core.contracts import refuse
from flora.core.registry import OptionError, Options, option
from flora.core.states import ClientState
from flora.core.tree import StateLike
from flora.data.augmentation import Augmentation, NoAugmentation
from flora.data.batching import count_steps
from flora.privacy.examples import ExamplePrivacy

# In what clients that share a step may differ of their privacy.
_OTHER_NOISE: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-5, "accountant": "pld"}


@dataclass(frozen=True)
class LocalTraining(Options):
    """What every client does with its data in a round."""

    learning_rate: float = option("step size", 3e-3, above=0)
    epochs: int = option("passes over a client's examples in a round", 1, at_least=1, at_most=1_000_000)
    steps: int | None = option(
        "steps in a round, the same for every client, in place of `epochs`", None, at_least=1, at_most=10_000_000
    )
    batch_size: int = option("examples in a step", 32, at_least=1, at_most=1_000_000)
    sampling: LocalSampling = option("which of its examples a client sees when, and how much each counts", Shuffled())
    optimizer: Optimizer = option("how gradients become steps", AdamW())
    optimizer_state: str = option(
        "whether a client's optimiser starts fresh each round or is kept from its last one",
        "fresh",
        choices=("fresh", "kept"),
    )
    schedule: Schedule = option("the learning rate over rounds", Constant())
    clip_norm: float | None = option("largest norm of a client's gradient; none: no clipping", None, above=0)
    objective: Objective = option("what a step minimises", CrossEntropy())
    prompts: str = option(
        "which of a class's prompts (templates, descriptions) a step encodes: all, as an ensemble, or one at random; "
        "evaluation takes all",
        "ensemble",
        choices=("ensemble", "random"),
    )
    penalty: Penalty = option("what is added to the loss against forgetting the frozen model", NoPenalty())
    self_training: SelfTraining | None = option("how images without a label are learned from; none: not at all", None)
    correction: Correction = option("what is added to the gradient against drifting apart", NoCorrection())
    augmentation: Augmentation = option("how training images are changed at random", NoAugmentation())
    privacy: ExamplePrivacy | None = option(
        "differential privacy of single examples: bounded gradients and noise; none: without", None
    )

    def check(self) -> None:
        if self.steps is not None and self.epochs != 1:
            raise OptionError("steps", "give either `steps` or `epochs`, not both")

    @property
    def images_per_step(self) -> int:
        """How many images go through the model in a step of one client, at most."""
        number, self_training = self.batch_size, self.active_self_training
        if self_training is not None:
            number += (self_training.batch_size or self.batch_size) * len(self_training.preference.views)
        return number

    @property
    def active_self_training(self) -> SelfTraining | None:
        """How images without a label are learned from; None also where that weighs nothing."""
        return self.self_training if self.self_training is not None and self.self_training.weight else None

    @property
    def step_key(self) -> Hashable:
        """The key of these options: clients with the same one can share a step, whatever their rates and steps.

        Their corrections may differ, too, and the noise of private gradients: both come behind the model.
        """
        alike = replace(self, learning_rate=1.0, schedule=Constant(), epochs=1, steps=None, correction=NoCorrection())
        return alike if self.privacy is None else replace(alike, privacy=replace(self.privacy, **_OTHER_NOISE))

    @property
    def alone(self) -> LocalTraining:
        """The same without privacy, for what never leaves its client."""
        return replace(self, privacy=None)

    @property
    def drawing(self) -> LocalSampling:
        """How batches are drawn: by `sampling`, or as privacy wants it."""
        return Poisson() if self.privacy is not None and self.privacy.sampling == "poisson" else self.sampling

    def num_steps(self, num_examples: int) -> int:
        """Return how many steps a client of so many examples takes in a round."""
        return count_steps(num_examples, batch_size=self.batch_size, epochs=self.epochs, steps=self.steps)

    def client_state(self, trained: StateLike) -> ClientState:
        """Return what one client keeps between its rounds when it trains such tensors: names and shapes."""
        vector, state = tree.vector_like(trained), {}
        if self.optimizer_state == "kept":
            state = {name: tensor[0] for name, tensor in self.optimizer.init(vector.unsqueeze(0)).items()}
        return ClientState(optimizer=state, correction=self.correction.memory(vector))

    def rate(self, round: int, num_rounds: int) -> float:
        """The learning rate of a round, counted from 1. Raises `UserError` if the schedule's factor is no number."""
        factor = self.schedule.factor(round, num_rounds)
        if not 0 <= factor < math.inf:
            refuse("local.schedule", self.schedule, f"a factor of {factor} in round {round}")
        return self.learning_rate * factor

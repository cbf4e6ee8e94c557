"""What goes into the engine and what comes out: a task and a result for each client that trains."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flora.client.local_training import LocalTraining
from flora.core import tree
from flora.core.low_rank import is_residual
from flora.core.rng import Rng
from flora.core.states import FRESH, ClientState
from flora.core.tree import State, StateLike


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """What the tasks of one round of one run have in common.

    `trained` are the names of the tensors that are trained. `width` is how many examples a step's batch has room for:
    one number for all clients of a run, so that a client's dropout masks don't depend on its neighbours;
    `unlabelled_width` is the same for images without a label. `server_correction` is what the correction remembers at
    the server. `round` is for hooks and messages.
    """

    round: int
    local: LocalTraining
    learning_rate: float
    trained: tuple[str, ...]
    width: int
    unlabelled_width: int = 0
    server_correction: StateLike = field(default_factory=dict)

    @cached_property
    def step_key(self) -> Hashable:
        """The key of these tasks: tasks of other rounds or runs that have the same one can share a step with them."""
        rate = None if self.local.optimizer.rate_by_client else self.learning_rate
        return self.trained, self.width, self.unlabelled_width, self.local.step_key, rate


@dataclass(frozen=True, eq=False)
class ClientTask:
    """All that one client's local training needs.

    It trains from `adapter`, a state dict without a client axis, on the training examples `examples` `(N,)`; `rng` is
    what its batches, dropout and augmentation are drawn from; `state` is what it carries from its last round. `anchor`
    is what a correction measures distances from, in place of `adapter`. `unlabelled` are training examples of which it
    does not know the labels.
    """

    client: int
    adapter: StateLike
    examples: np.ndarray
    rng: Rng
    setup: TrainingSetup
    state: ClientState = FRESH
    anchor: StateLike | None = None
    unlabelled: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def step_key(self) -> Hashable:
        """The key of this task, the same for all tasks that can share a step: a residual has no client axis."""
        has_residual = any(map(is_residual, self.adapter))
        return self.setup.step_key, id(self.setup) if has_residual else None

    @property
    def num_steps(self) -> int:
        """How many local steps the client takes."""
        return self.setup.local.num_steps(len(self.examples))


@dataclass(frozen=True, eq=False)
class ClientResult:
    """All that comes of one client's local training, on the CPU.

    `adapter` are the trained tensors alone, without a client axis: views into the memory of all clients that shared its
    steps, so whoever keeps one copies it. `loss` is the mean over its steps. `failed_step` is the first step, counted
    from 0, at which loss or gradient was not finite. `state` is what the client carries on of its optimiser and of a
    correction; `sent_correction` is what the correction sends to the server. `report` are counts about its images
    without labels, for measuring.
    """

    client: int
    adapter: StateLike
    loss: float
    num_steps: int
    failed_step: int | None
    state: ClientState
    sent_correction: State
    report: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether no step failed and every number of the adapter is finite."""
        return self.failed_step is None and tree.is_finite(self.adapter)

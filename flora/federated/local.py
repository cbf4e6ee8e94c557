"""Local training: a block of K clients takes its steps together, each on its own data with its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.clip.towers import AdaptedClip
from flora.data.batching import ClientBlock
from flora.federated.features import Features
from flora.federated.objectives import CrossEntropy, Objective
from flora.federated.optimizers import AdamW, Constant, Optimizer, Schedule, clip_rows
from flora.registry import OptionError, Options, option
from flora.tree import State, StateLike


@dataclass(frozen=True)
class LocalTraining(Options):
    """What every client does with its data in a round."""

    learning_rate: float = option("step size", 1e-3, above=0)
    epochs: int = option("passes over a client's examples in a round", 1, at_least=1)
    steps: int | None = option("steps in a round, the same for every client, in place of `epochs`", None, at_least=1)
    batch_size: int = option("examples in a step", 32, at_least=1)
    optimizer: Optimizer = option("how gradients become steps", AdamW())
    optimizer_state: str = option(
        "whether a client's optimiser starts fresh each round or is kept from its last one",
        "fresh",
        choices=("fresh", "kept"),
    )
    schedule: Schedule = option("the learning rate over rounds", Constant())
    clip_norm: float | None = option("largest norm of a client's gradient; none: no clipping", None, above=0)
    objective: Objective = option("what a step minimises", CrossEntropy())

    def check(self) -> None:
        if self.steps is not None and self.epochs != 1:
            raise OptionError("steps", "give either `steps` or `epochs`, not both")


class FlatStack:
    """K adapters as one matrix `(K, P)`, so that an optimiser's step is a few operations however many layers there are.

    The matrix is a copy; `leaves` and `state` are views into it.
    """

    def __init__(self, stack: StateLike, device: torch.device) -> None:
        self._shapes = {name: tensor.shape[1:] for name, tensor in stack.items()}
        self.matrix = torch.cat([tensor.reshape(len(tensor), -1) for tensor in stack.values()], dim=1).to(device)

    def state(self, num_clients: int | None = None) -> State:
        """The first `num_clients` adapters (default: all), tensors `(K, ...)`."""
        rows = self.matrix[:num_clients]
        parts = rows.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def leaves(self, num_clients: int) -> State:
        """The same, each a leaf of the autograd graph that shares the matrix's memory."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.state(num_clients).items()}


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What K clients end with.

    `adapters` are `(K, ...)`, `losses` the means over steps `(K,)`, `finite` `(K,)` whether adapter and loss still are;
    `optimizer_states` has K state dicts where they are kept, else K empty ones.
    """

    adapters: State
    losses: Tensor
    finite: Tensor
    optimizer_states: list[State]


def train_block(
    model: AdaptedClip,
    block: ClientBlock,
    *,
    adapters: StateLike,
    features: Features,
    local: LocalTraining,
    learning_rate: float,
    dropout_generators: Sequence[torch.Generator],
    optimizer_states: Sequence[StateLike | None] = (),
) -> BlockResult:
    """Train K clients from `adapters` `(K, ...)`; the order of clients is the block's.

    A step minimises the sum over clients of each one's mean loss over its real examples, so no client's gradient
    depends on another. Clients that have taken all their steps are no longer touched. Results are on the CPU.
    `optimizer_states`, one a client, are what they kept; None is a fresh start.
    """
    flat = FlatStack(adapters, model.device)
    state = local.optimizer.init(flat.matrix)
    for row, kept in enumerate(optimizer_states):
        for name, tensor in (kept or {}).items():
            state[name][row] = tensor.to(model.device)
    indices = block.indices.to(features.device)
    mask = block.example_mask.to(model.device)
    totals = torch.zeros(len(block.clients), device=model.device)
    for num_active, steps in block.segments():
        leaves = flat.leaves(num_active)
        active_state = {name: tensor[:num_active] for name, tensor in state.items()}
        with model.adapter.bind(leaves, dropout_generators[:num_active]):
            for step in steps:
                stem, labels = features.take(indices[step, :num_active].flatten(), model.device)
                losses = local.objective.loss(
                    model.image_features(stem, num_active),
                    model.class_features(num_active),
                    labels.unflatten(0, (num_active, -1)),
                    mask[step, :num_active],
                    model.logit_scale(),
                )
                gradients = _row_gradients(losses, leaves)
                if local.clip_norm is not None:
                    gradients = clip_rows(gradients, local.clip_norm)
                with torch.no_grad():
                    local.optimizer.step(flat.matrix[:num_active], gradients, active_state, learning_rate)
                totals[:num_active] += losses.detach()
    keep = local.optimizer_state == "kept"
    return BlockResult(
        adapters={name: tensor.cpu() for name, tensor in flat.state().items()},
        losses=totals.cpu() / torch.tensor(block.num_steps),
        finite=(torch.isfinite(flat.matrix).all(dim=1) & torch.isfinite(totals)).cpu(),
        # Copies, so that no client keeps its whole block in memory.
        optimizer_states=[
            {name: tensor[row].cpu().clone() for name, tensor in state.items()} if keep else {}
            for row in range(len(block.clients))
        ],
    )


def _row_gradients(losses: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """The gradient of the summed losses with respect to all leaves, `(K, P)`; zero for those that the loss ignores."""
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(len(losses), -1) for gradient in gradients], dim=1)

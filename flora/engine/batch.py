"""What K clients see in one step, and the kind of function that computes a step's losses and gradients from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.core.tree import StateLike

# What the names of a batch's stem outputs begin with that are not those of its labelled images.
OTHER_STEM = "stem of "
# The name of what the frozen model makes of its labelled images, where that is known.
FROZEN_IMAGES = "frozen images"


@dataclass(frozen=True, eq=False)
class Batch:
    """What K clients see in one step, on the device: tensors by name, each client-major.

    `stem` `(K * B, ...)` are stem outputs, `labels` and `example_mask` are `(K, B)`; `OTHER_STEM` + NAME `(K * U, ...)`
    are stem outputs of other images, `FROZEN_IMAGES` `(K, B, embed_dim)` the frozen model's unit features. With
    `classes` `(K, C)`, on the CPU, only those are encoded, and labels are places among them; with `drawn` `(K, C)`, on
    the CPU, only the prompt in that place of each class.
    """

    tensors: Mapping[str, Tensor]
    classes: Tensor | None = None
    drawn: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all prompts of all classes are encoded."""
        return self.classes is None and self.drawn is None

    def of_clients(self, start: int, stop: int) -> Batch:
        """Return what the clients from `start` to `stop` see."""
        number = len(self.tensors["labels"])
        rows = {name: len(tensor) // number for name, tensor in self.tensors.items()}
        return Batch(
            {name: tensor[start * rows[name] : stop * rows[name]] for name, tensor in self.tensors.items()},
            None if self.classes is None else self.classes[start:stop],
            None if self.drawn is None else self.drawn[start:stop],
        )

    def as_clients(self) -> Batch:
        """Return what each example is by itself: K * B clients of one example, which is a real one to them."""
        size = self.tensors["labels"].shape[1]
        tensors = {
            name: tensor if name == "stem" else tensor.flatten(0, 1).unsqueeze(1)
            for name, tensor in self.tensors.items()
        }
        tensors["example_mask"] = torch.ones_like(tensors["example_mask"])
        repeated = (
            None if each is None else each.repeat_interleave(size, dim=0) for each in (self.classes, self.drawn)
        )
        return Batch(tensors, *repeated)


Compute = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""From adapters `(K, P)` and a batch to losses `(K,)` and the gradients of what is trained, `(K, num_trained)`."""

Step = Callable[[Tensor, Batch, StateLike], tuple[Tensor, Tensor]]
"""As `Compute`, with the residual that a block's clients share, which is empty where they have none."""

"""The frozen model's features of clients' examples, computed once for each client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.memory import available_memory_bytes
from flora.engine.blocks import Block
from flora.engine.tasks import ClientTask
from flora.features.features import Features
from flora.features.reading import stem_batch_size


@dataclass(frozen=True, eq=False)
class BlockImages:
    """The frozen model's unit features `(N, embed_dim)` of a block's examples, and which steps see, `(S, K, B)`."""

    features: Tensor
    rows: Tensor

    def of_step(self, step: int, num_active: int, width: int | None) -> Tensor:
        """Those of the first `width` examples, None being all, of the first clients at a step: `(k, B, embed_dim)`."""
        return self.features[self.rows[step, :num_active, :width]]


class FrozenImages:
    """The frozen model's features of each task's examples, computed when they are first asked for.

    Examples of one task go through the model by themselves, so that the last bits of their features depend on nothing
    else: not on who shares its steps, nor on what was computed before a run was stopped and gone on with. Up to
    `memory_bytes` of them are kept, None being half of the free memory; for more a task's are computed in each block.
    """

    def __init__(self, model: AdaptedClip, features: Features, memory_bytes: int | None = None) -> None:
        self._model, self._features = model, features
        self._known: dict[bytes, Tensor] = {}
        self._room_bytes = memory_bytes

    def of_block(self, block: Block) -> BlockImages | None:
        """Return those of a block; None where images change from look to look, or where computing them costs nothing.

        It costs nothing where the stem's output is the features already.
        """
        if not self._features.is_constant or self._model.vision.is_frozen:
            return None
        start, rows, device = 0, torch.empty_like(block.indices), self._model.device
        for column, task in enumerate(block.tasks):
            order = np.argsort(task.examples)
            places = np.searchsorted(task.examples, block.indices[:, column].numpy(), sorter=order)
            # Steps that a client does not take have any example.
            rows[:, column] = start + torch.from_numpy(order[places.clip(max=len(order) - 1)])
            start += len(order)
        features = torch.cat([self._of_task(task) for task in block.tasks])
        return BlockImages(features.to(device), rows.to(device))

    def _of_task(self, task: ClientTask) -> Tensor:
        """Those of a task's examples, `(N, embed_dim)`, on the CPU."""
        key = task.examples.tobytes()
        if key in self._known:
            return self._known[key]
        places = torch.from_numpy(task.examples).to(self._features.device)
        parts = [
            self._model.frozen_image_features(self._features.take(some, self._model.device)).cpu()
            for some in places.split(stem_batch_size(self._model))
        ]
        found = torch.cat(parts)
        if self._room_bytes is None:
            self._room_bytes = available_memory_bytes(torch.device("cpu")) // 2
        if found.nbytes <= self._room_bytes:
            self._known[key] = found
            self._room_bytes -= found.nbytes
        return found

"""Steps on CUDA as graphs that are recorded once and replayed, a bounded number of them for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flora.clip.towers.towers import AdaptedClip
from flora.core.memory import available_memory_bytes
from flora.core.tree import State, StateLike
from flora.engine.batch import Batch, Compute, Step

# Steps of one shape that run as they are before one is recorded: a recording costs about as much as ten of them.
STEPS_BEFORE_RECORDING = 3
# Recorded steps of a model, the share of the memory that is free at first that they may take, and shapes counted.
MAX_RECORDINGS, MAX_RECORDED_FRACTION, MAX_COUNTED = 32, 0.25, 256


def is_recorded(model: AdaptedClip, dropout: object) -> bool:
    """Whether steps are recorded: not with dropout, whose numbers a graph would not draw anew."""
    can_be = dropout is None and not model.adapter.is_large
    return model.device.type == "cuda" and model.speed.cuda_graphs and can_be


def padded_residual(residual: StateLike) -> State:
    """The residual with zeros added, which change nothing, up to the next power of two of its rank.

    Its rank changes from round to round, and steps are recorded for one shape: so there are few of them.
    """
    padded = {}
    for name, tensor in residual.items():
        axis = 1 if name.endswith("residual_A") else 2  # (1, R, d_in) and (1, d_out, R)
        rank = tensor.shape[axis]
        zeros = list(tensor.shape)
        zeros[axis] = (1 << (rank - 1).bit_length()) - rank if rank else 0
        padded[name] = torch.cat([tensor, tensor.new_zeros(zeros)], dim=axis)
    return padded


@dataclass(eq=False)
class Recording:
    """A recorded step: what it reads, what it writes, and how to run it.

    `residual` are copies of a block's tensors, `block` says of which. `num_bytes` is the memory that recording it took.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    residual: State
    outputs: tuple[Tensor, Tensor]
    num_bytes: int
    block: object = None

    def replay(self, inputs: Sequence[Tensor], residual: StateLike, block: object) -> tuple[Tensor, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        if self.block is not block:
            for name, tensor in residual.items():
                self.residual[name].copy_(tensor)
            self.block = block
        self.graph.replay()
        return self.outputs


@dataclass(eq=False)
class Recorder:
    """The recorded steps of one model, by shape, the one used last behind the others.

    What can't be recorded runs as it is. Beyond a number of recordings the one that was not used for longest is
    dropped; beyond `max_bytes` all are, because they share a pool, whose memory comes back with the last of them.
    """

    max_bytes: int
    recordings: dict[object, Recording] = field(default_factory=dict)
    counts: dict[object, int] = field(default_factory=dict)
    pool: object = None
    works: bool = True

    @staticmethod
    def of(model: AdaptedClip) -> Recorder:
        if model not in _RECORDERS:
            _RECORDERS[model] = Recorder(int(MAX_RECORDED_FRACTION * available_memory_bytes(model.device)))
        return _RECORDERS[model]

    def wrap(self, compute: Step, kind: object, residual: StateLike) -> Compute:
        """`compute` with a block's residual, replayed where a step of the same kind and shapes is recorded."""
        block, residual = object(), padded_residual(residual)

        def recorded(parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            if not batch.is_plain or not self.works:
                return compute(parameters, batch, residual)
            inputs = (parameters, *batch.tensors.values())
            names = tuple(batch.tensors), tuple(residual)
            key = (kind, names, *((each.shape, each.dtype) for each in (*inputs, *residual.values())))
            if key in self.recordings:
                self.recordings[key] = recording = self.recordings.pop(key)
                return recording.replay(inputs, residual, block)
            if self._is_frequent(key):
                self._record(key, compute, inputs, tuple(batch.tensors), residual)
            return compute(parameters, batch, residual)

        return recorded

    def _is_frequent(self, key: object) -> bool:
        """Count a step of this shape; return whether it is worth a recording."""
        self.counts[key] = self.counts.pop(key, 0) + 1
        while len(self.counts) > MAX_COUNTED:
            del self.counts[next(iter(self.counts))]
        return self.counts[key] > STEPS_BEFORE_RECORDING

    def _record(
        self, key: object, compute: Step, inputs: Sequence[Tensor], names: Sequence[str], residual: StateLike
    ) -> None:
        try:
            recording = self._capture(compute, inputs, names, residual)
        except RuntimeError:  # an operation that can't be recorded, or no memory for it
            self.works = False
            self._forget()
            return
        self.counts.pop(key, None)  # should it be dropped, it has to be frequent again
        self.works = recording.num_bytes <= self.max_bytes
        if recording.num_bytes + sum(each.num_bytes for each in self.recordings.values()) > self.max_bytes:
            self._forget()
            return
        self.recordings[key] = recording
        if len(self.recordings) > MAX_RECORDINGS:
            _wait()
            del self.recordings[next(iter(self.recordings))]

    def _capture(self, compute: Step, inputs: Sequence[Tensor], names: Sequence[str], residual: StateLike) -> Recording:
        """Record a step that reads copies of these tensors. Raises RuntimeError if that can't be."""
        before = torch.cuda.memory_reserved()
        own = tuple(each.clone() for each in inputs)
        own_residual = {name: tensor.clone() for name, tensor in residual.items()}
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):  # type: ignore[arg-type]
            outputs = compute(own[0], Batch(dict(zip(names, own[1:], strict=True))), own_residual)
        copied = sum(each.nbytes for each in (*own, *own_residual.values(), *outputs))
        num_bytes = max(copied, torch.cuda.memory_reserved() - before)
        return Recording(graph, own, own_residual, outputs, num_bytes)

    def _forget(self) -> None:
        """Drop all recordings, and the memory that they share."""
        _wait()
        self.recordings.clear()
        self.pool = None


def _wait() -> None:
    """Wait for the device: a graph that it still runs must not be dropped."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


_RECORDERS: WeakKeyDictionary[AdaptedClip, Recorder] = WeakKeyDictionary()

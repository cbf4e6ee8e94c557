"""Two low-rank adapters at each client: a small one that travels, a larger one that stays (arXiv:2503.07552)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flora.clip.adapters.lora import AttachedLora, Lora
from flora.clip.frozen import Architecture, FrozenClip
from flora.clip.loss_terms import StepView, divergence
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State, StateLike


@register("dual_lora")
@dataclass(frozen=True)
class DualLora(Lora):
    """Two low-rank adapters, each a model of its own: one travels, a larger one stays (FedDLP, arXiv:2503.07552).

    Both learn the same examples, and from each other's probabilities. The local one is W + scaling B diag(g) A; after
    each step its gates g are soft-thresholded by threshold times the learning rate, so that ranks of no use die out.
    Differs from the paper: the scaling of the local adapter is that of the other one, and its gates start at 1.
    """

    has_personal = True

    rank: int = option("inner width r of the factors that travel", 4, at_least=1)
    local_rank: int = option("inner width of the factors that stay", 16, at_least=1)
    threshold: float = option("what draws the local adapter's gates to zero, times the learning rate", 0.1, at_least=0)
    distillation: float = option("weight of what the two adapters learn from each other", 1.0, at_least=0)
    temperature: float = option("what logits are divided by in that: higher looks at all classes", 1.0, above=0)

    def check_fits(self, architecture: Architecture) -> None:
        super().check_fits(architecture)
        for tower in self.towers:
            width = architecture.tower(tower).width
            if self.local_rank > width:
                limit = f"at most the width of the {tower} tower of {architecture.name}, {width}"
                raise OptionError("local_rank", f"expected {limit}, got {self.local_rank}")

    def attach(self, clip: FrozenClip) -> AttachedDualLora:
        return AttachedDualLora(self, clip)


@dataclass(frozen=True)
class MutualDistillation:
    """What two models of one client learn from each other: weight * T^2 KL(other's probabilities || own ones)."""

    weight: float
    temperature: float
    in_batch: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = False

    def loss(self, view: StepView) -> Tensor:
        """Each client's divergence from its other model, which gets no gradient from it, `(K,)`."""
        ((images, classes),) = view.others
        other = (view.logit_scale * torch.bmm(images, classes.transpose(1, 2))).detach()
        return self.weight * view.mean(divergence(view.logits, other, self.temperature))


class AttachedDualLora(AttachedLora):
    """LoRA layers as in `AttachedLora`, and beside each its local rival.

    That is `T.i.t.local_A` `(local_rank, d_in)`, `T.i.t.local_B` `(d_out, local_rank)` and `T.i.t.local_gate`.
    """

    num_models = 2

    def __init__(self, options: DualLora, clip: FrozenClip) -> None:
        super().__init__(options, clip)
        self._local_rank = options.local_rank
        self._threshold = options.threshold
        self.loss_terms = (MutualDistillation(options.distillation, options.temperature),)
        self.after_step = self._shrink_gates

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        state = super().initial_state(rng)
        for name, layer in self.layers.items():
            state[f"{name}.local_A"] = self._start(rng.child("local", name), self._local_rank, layer)
            state[f"{name}.local_B"] = torch.zeros(layer.d_out, self._local_rank, dtype=self._dtype)
            state[f"{name}.local_gate"] = torch.ones(self._local_rank, dtype=self._dtype)
        return state

    def stays(self, name: str) -> bool:
        return name.rpartition(".")[2] in ("local_A", "local_B", "local_gate")

    def _shrink_gates(self, stack: StateLike, learning_rate: float | Tensor) -> None:
        """Draw the gates nearer to zero by threshold times the learning rate, and not beyond it."""
        for name in self.layers:
            gate = stack[f"{name}.local_gate"]
            by = torch.as_tensor(learning_rate * self._threshold, dtype=gate.dtype, device=gate.device)
            gate.copy_(gate.sign() * (gate.abs() - by).clamp(min=0))

    def models(self, stack: StateLike) -> list[StateLike]:
        local = {}
        for name in self.layers:
            local[f"{name}.lora_A"] = stack[f"{name}.local_A"]
            local[f"{name}.lora_B"] = stack[f"{name}.local_B"] * stack[f"{name}.local_gate"].unsqueeze(-2)
        return [stack, local]

"""Adapters that learn vectors in place of a prompt's words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.clip.adapters.base import Adapter, AttachedAdapter
from flora.clip.adapters.outside import AttachedOutside, FitsEveryModel
from flora.clip.frozen import Architecture, FrozenClip
from flora.core.errors import UserError
from flora.core.registry import OptionError, option, register
from flora.core.rng import Rng
from flora.core.tree import State


@register("prompt_context")
@dataclass(frozen=True)
class PromptContext(FitsEveryModel):
    """Learned vectors in place of the words around the class name (CoOp, arXiv:2109.01134; PromptFL, 2208.11625).

    The data set's own prompts are not used: prompts are the context, the class name and a full stop.
    """

    words: str | None = option("what the context starts from; none: random vectors", "a photo of a")
    num_tokens: int = option("vectors in the context, if there are no words", 16, at_least=1, at_most=64)
    position: str = option(
        "where the context stands: before the class name, half of it on either side, or behind it",
        "front",
        choices=("front", "middle", "end"),
    )
    class_specific: bool = option("each class has a context of its own", False)

    def check(self) -> None:
        if self.words is not None and (not self.words.strip() or "{" in self.words or "}" in self.words):
            raise OptionError("words", f"expected words without braces, or none, got {self.words!r}")

    def check_fits(self, architecture: Architecture) -> None:
        if self.position != "front" and not architecture.reads_text_end:
            raise OptionError("position", f"expected front: {architecture.name} is not read at a prompt's end")
        room = architecture.context_length - 3  # the first token, one of the class name, the last token
        if self.words is None and self.num_tokens > room:
            raise OptionError("num_tokens", f"expected at most {room} with {architecture.name}, got {self.num_tokens}")

    @property
    def knows_classes(self) -> bool:
        return self.class_specific

    @property
    def changes_images(self) -> bool:
        return False

    @property
    def halves(self) -> tuple[str, str]:
        """The words before the class name and those behind it; random vectors have an x each."""
        words = (self.words or " ".join(["x"] * self.num_tokens)).split()
        num_before = {"front": len(words), "middle": len(words) // 2, "end": 0}[self.position]
        return " ".join(words[:num_before]), " ".join(words[num_before:])

    @property
    def prompts_of_class(self) -> int:
        """How many prompts each class has, all of the same words."""
        return 1

    def templates(self, given: Sequence[str]) -> tuple[str, ...]:
        before, behind = self.halves
        return (f"{before} {{}} {behind}".strip() + ".",) * self.prompts_of_class

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        learned = "[learned context]"
        shown = {"front": f"{learned} {{}}.", "middle": f"{learned} {{}} {learned}.", "end": f"{{}} {learned}."}
        return (shown[self.position],) * self.prompts_of_class

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        return AttachedContext(self, clip)


@dataclass(frozen=True)
class WithContext(Adapter):
    """An adapter with the prompts of a context, whose vectors it makes or learns in its way."""

    @property
    @abstractmethod
    def context(self) -> PromptContext:
        """Where vectors stand in the prompts."""

    def check(self) -> None:
        self.context.check()

    def check_fits(self, architecture: Architecture) -> None:
        self.context.check_fits(architecture)

    def templates(self, given: Sequence[str]) -> tuple[str, ...]:
        return self.context.templates(given)

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        return self.context.shown_templates(given)


class AttachedContext(AttachedOutside):
    """Its state dict is `context`: `(n, text width)` for n vectors, `(C, n, text width)` where classes have their own.

    The first of them stand behind the prompt's first token, the others before its full stop. Where only the first
    `num_learned` of a context before the class name are learned, its other words stay.
    """

    def __init__(self, options: PromptContext, clip: FrozenClip, num_learned: int | None = None) -> None:
        super().__init__(clip)
        self.trained_from["text"] = 1
        self._is_class_specific, text = options.class_specific, clip.text
        tokens = [words_of(clip, half) for half in options.halves]
        tokens[0] = tokens[0][:num_learned]
        self._num_before, number = len(tokens[0]), len(tokens[0]) + len(tokens[1])
        # Copies, because the embeddings leave memory with the stem.
        self._positional = text.positional_embedding.detach().clone()
        ids = torch.tensor([*tokens[0], *tokens[1]], device=clip.device)
        self._words = None if options.words is None else text.token_embedding(ids).detach().cpu().clone()
        self._shape = number, clip.architecture.text.width
        self.learned_context = {"num_vectors": number, "starts_from": options.words}

    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        shape: tuple[int, ...] = self._shape
        if self._is_class_specific:
            assert class_features is not None
            shape = (len(class_features), *shape)
        if self._words is not None:
            return {"context": self._words.to(self.dtype).expand(shape).clone()}
        return {"context": torch.empty(shape).normal_(0, 0.02, generator=rng.torch()).to(self.dtype)}

    def learned_places(self, ends: Tensor, length: int, num_classes: int) -> Tensor:
        number = self._shape[0]
        places = context_places(ends, length, number, self._num_before)
        prompts, num_places = torch.arange(len(ends)), len(ends) // num_classes
        offsets = number * (prompts if self._is_class_specific else prompts % num_places)
        return torch.where(places >= 0, places + offsets.unsqueeze(1), places)

    def adapt_tokens(self, x: Tensor, positions: Tensor, learned: Tensor | None) -> Tensor:
        if self.stack is None:
            return x
        assert learned is not None
        return put_vectors(x, self.stack["context"].flatten(1, -2), learned, self._positional[positions])


def context_places(ends: Tensor, length: int, number: int, num_before: int) -> Tensor:
    """Which of a context's `number` vectors stands at each position of prompts: `(P, length)`, -1 where none does.

    `num_before` of them stand behind the prompts' first token, the others before the full stop. The prompts are read at
    `ends` `(P,)`. Raises `UserError` if one has no room.
    """
    num_behind = number - num_before
    if num_behind and int(ends.max()) == length - 1:
        raise UserError(
            f"adapter: a class's name leaves no room for the context behind it: the model reads {length} tokens of a "
            "prompt; expected a shorter context, shorter prompts.class_names, or all of it in front"
        )
    places = torch.full((len(ends), length), -1)
    places[:, 1 : 1 + num_before] = torch.arange(num_before)
    # A full stop and the last token follow.
    columns = ends.unsqueeze(1) - 1 - num_behind + torch.arange(num_behind)
    places.scatter_(1, columns, torch.arange(num_before, number).expand(len(ends), -1))
    return places


def put_vectors(x: Tensor, vectors: Tensor, learned: Tensor, positional: Tensor | float = 0.0) -> Tensor:
    """Put learned vectors `(K, V, width)` into prompts `x` `(K * G, M, width)`, each client's into its own.

    `learned` `(K * G, M)` says which stands where, -1 where none does; `positional` `(K * G, M, width)` is
    added to them.
    """
    number = len(vectors)
    clients = torch.arange(number, device=x.device).repeat_interleave(len(x) // number)
    chosen = vectors[clients.unsqueeze(1), learned.clamp(min=0)]
    return torch.where((learned >= 0).unsqueeze(-1), (chosen + positional).to(x.dtype), x)


def words_of(clip: FrozenClip, words: str) -> list[int]:
    """The tokens of some words, without those that every text begins and ends with."""
    if not words:
        return []
    tokens: list[int] = clip.tokenize([words])[0].tolist()
    number = len(tokens) - tokens[::-1].index(max(tokens)) - 2  # what stands between the first and the last
    return tokens[1 : 1 + number]

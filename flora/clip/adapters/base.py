"""The base classes of adapters: the options, and the adapter attached to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flora.clip.comparison import COSINES, Comparison
from flora.clip.frozen import Architecture, FrozenClip
from flora.clip.loss_terms import LossTerm
from flora.core.registry import Component, OptionError
from flora.core.rng import Rng
from flora.core.tree import State, StateLike

TOWERS = ("text", "vision")
HELD_CLASSES = "held_classes"
"""The name of what a local step binds an adapter with that `reads_held_classes`."""


class AttachedAdapter(ABC):
    """An adapter attached to a frozen model: where it starts from, and how the model computes while it is bound.

    A subclass gives `trained_from`, `initial_state`, `bind` and `merged_state_dict`; all else has a default. There are
    facts about the adapter, which don't change once it is attached; what it adds to local training; functions by
    which the towers compute, from the stem's output to the logits, that are called while adapters are bound; and
    models, where it stands for more than one. Tensors have a leading axis of K clients.
    """

    # Facts about the adapter.

    trained_from: dict[str, int]
    """For each tower the first of its stages that the adapter changes: 0 is the embedding, 1 + i block i,
    1 + num_layers the head, and 2 + num_layers says that it changes none. What is in front is computed once."""
    stack: StateLike | None = None
    """The tensors `(K, ...)` that are bound, of an adapter that works outside of the frozen layers."""
    max_clients_per_block: int | None = None
    """How many clients may train in one step; None: as many as memory and caches are good for."""
    has_dropout: bool = False
    """Whether training with it draws dropout, so that no two clients see the same features of texts."""
    is_large: bool = False
    """Whether it is about as large as the model."""
    mergeable: bool = True
    """Whether `merged_state_dict` can write it into the model's weights."""
    is_linear: bool = False
    """Whether it trains nothing but linear layers on features of images, each used once: see `AttachedOutside`."""
    comparison: Comparison = COSINES
    """How images and classes become logits while adapters are bound; another one than by cosines needs `stack`."""
    place_shares: tuple[float, ...] | None = None
    """How much each of a class's T prompts counts in the mean of their features; None: all alike."""
    frozen_templates: tuple[str, ...] | None = None
    """The templates of the frozen class features that losses compare with; None: those of the prompts."""
    reads_names: bool = False
    """Whether `adapt_tokens_by_names` is called, not `adapt_tokens`."""
    reads_held_classes: bool = False
    """Whether a local step binds it with `HELD_CLASSES` `(K, C)`, True for the classes of each client's examples."""
    learned_context: Mapping[str, Any] | None = None
    """For the model's card: what vectors are learned in place of a prompt's first words, as JSON types."""

    # What it adds to local training.

    loss_terms: tuple[LossTerm, ...] = ()
    """Terms that are added to each client's loss."""
    after_step: Callable[[StateLike, float | Tensor], None] | None = None
    """Changes the trained tensors `(K, ...)` in place after each local step, from them and the learning rate: a
    number, or `(K, 1)` where clients differ in it."""
    project: Callable[[StateLike, StateLike, Sequence[torch.Generator]], StateLike] | None = None
    """Makes the direction of a step of the trained tensors `(K, ...)` and their gradients, which have privacy's noise
    already; random numbers come from one generator for each client and step."""

    # Functions within the towers; None: the blocks stay as they are.

    adapt_block: Callable[[int, Tensor], Tensor] | None = None
    """Changes the input `(K * B, T, width)` of a vision block. Blocks are counted from 1."""
    adapt_text_block: Callable[[Tensor | None, int, Tensor], Tensor] | None = None
    """Changes the input `(K * G, M, width)` of a text block, from which learned vector stands in each slot (as in
    `adapt_tokens`), the block's number and the input."""
    after_block: Callable[[str, int, Tensor, Tensor], Tensor] | None = None
    """Changes the output of a block of either tower, from the tower's name, the block's number, its input and its
    output, both `(N, R, width)` and client-major."""

    # Models, where the adapter stands for more than one.

    num_models: int = 1
    """How many models there are: see `models`."""
    first_loss_model: int = 0
    """The first of a step's models whose loss is trained on; those in front of it are only read by `loss_terms`."""

    @property
    def can_share_texts(self) -> bool:
        """Whether all that a step needs of its texts are class features, the same for clients with one adapter."""
        return not (self.is_large or self.reads_held_classes or self.comparison.by_image)

    @abstractmethod
    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        """Return the adapter that the server starts from, on the CPU, without an axis of clients.

        Its numbers are of the type `FrozenClip.dtype`; random ones are the same in each precision, up to rounding.

        `class_features` `(C, embed_dim)` are the frozen model's unit text features of the classes, which heads need.
        """

    @abstractmethod
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Any:
        """Return a context in which the model computes with the adapters of K clients, tensors `(K, ...)`.

        `generators`, one for each client, switch dropout on: they are for training.
        """

    @abstractmethod
    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        """Return a new OpenCLIP state dict that computes what `state_dict` with the `adapter` bound does."""

    def stays(self, name: str) -> bool:
        """Return whether a tensor never leaves its client."""
        return False

    def models(self, stack: StateLike) -> list[StateLike]:
        """Return the models that an adapter stands for, each as tensors to `bind`.

        The first is the server's, the last is the client's personal one.
        """
        return [stack]

    def models_of_step(self, stack: StateLike) -> list[StateLike]:
        """Return those of `models` that a local step computes."""
        return self.models(stack)

    def adapt_patches(self, x: Tensor) -> Tensor:
        """Change the vision stem's output `(K * B, ...)`, which the trained part of the tower gets."""
        return x

    def learned_places(self, ends: Tensor, length: int, num_classes: int) -> Tensor | None:
        """Return which learned vector stands at each position of the prompts: `(P, length)` int64, -1 for a word.

        The prompts, class-major, are read at the positions `ends` `(P,)`. None: words stand everywhere. Raises
        `UserError` if a prompt has no room for the vectors.
        """
        return None

    def adapt_tokens(self, x: Tensor, positions: Tensor, learned: Tensor | None) -> Tensor:
        """Change the text stem's output `(K * G, M, width)`, which the trained part of the tower gets.

        `positions` `(K * G, M)` are those in prompts, `learned` `(K * G, M)` says which learned vector stands there, as
        `learned_places` does.
        """
        return x

    def adapt_tokens_by_names(self, x: Tensor, positions: Tensor, learned: Tensor | None, names: Tensor) -> Tensor:
        """As `adapt_tokens`, with the frozen unit features `(C, embed_dim)` of the names of all classes."""
        return self.adapt_tokens(x, positions, learned)

    def adapt_images(self, features: Tensor) -> Tensor:
        """Change image features `(K, B, embed_dim)`, before they are normalised."""
        return features

    def adapt_classes(self, features: Tensor) -> Tensor:
        """Change the classes' unit features `(K, C, embed_dim)`."""
        return features

    def for_images(self, images: Tensor) -> StateLike:
        """Return what to bind for the class features of each of these images `(K, B, embed_dim)`: `(K * B, ...)`.

        Called while adapters of K clients are bound, where `comparison` is `by_image`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Adapter(Component):
    """What the clients train."""

    has_personal: ClassVar[bool] = False
    """Whether some of its tensors never leave their client."""
    is_large: ClassVar[bool] = False
    """Whether it is about as large as the model."""

    @property
    def knows_classes(self) -> bool:
        """Whether it has weights for each class, and so none for classes that it has not seen."""
        return False

    @property
    def adds_image_tokens(self) -> bool:
        """Whether the vision tower gets more tokens than those of the image."""
        return False

    @property
    def takes_fewer_tokens(self) -> bool:
        """Whether the vision tower may go on with fewer tokens of an image."""
        return not self.adds_image_tokens

    @property
    def changes_images(self) -> bool:
        """Whether it changes the features of images."""
        return True

    @property
    def comparison(self) -> Comparison:
        """How images and classes become logits."""
        return COSINES

    @abstractmethod
    def check_fits(self, architecture: Architecture) -> None:
        """Raise `OptionError` where the options don't fit the model."""

    @abstractmethod
    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        """Attach to `clip`. The model computes as before until an adapter is bound."""

    def templates(self, given: Sequence[str]) -> tuple[str, ...]:
        """The prompts' templates; `given` are the experiment's."""
        return tuple(given)

    def shown_templates(self, given: Sequence[str]) -> tuple[str, ...]:
        """The templates for a reader: `[learned context]` stands where vectors are learned in place of words."""
        return self.templates(given)


def check_depth(depth: int | None, architecture: Architecture) -> None:
    """Raise `OptionError` where so many blocks of each tower are more than the shallower one has; None never are."""
    limit = architecture.common_layers
    if depth is not None and depth > limit:
        blocks = f"at most {limit}, the blocks of the shallower tower of {architecture.name}"
        raise OptionError("depth", f"expected {blocks}, got {depth}")

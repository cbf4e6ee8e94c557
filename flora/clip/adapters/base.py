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
    """An adapter attached to a frozen model.

    `trained_from` says for each tower which of its stages is the first that the adapter changes: stage 0 is the
    embedding, stage 1 + i block i, stage 1 + num_layers the head, and 2 + num_layers means that it changes none.
    `is_large` says that it is about as large as the model, `mergeable` that it can be merged into its weights.
    `num_models` is how many models it stands for: see `models`. `loss_terms` are terms of its own that are added to a
    client's loss. `after_step(stack, learning_rate)`, if there is one, changes the trained tensors `(K, ...)` in place
    after each local step; the learning rate is a number, or `(K, 1)` where clients differ in it.
    `project(stack, gradients, generators)`, if there is one, returns what a step goes along in place of the gradients
    of the trained tensors `(K, ...)`, any noise of privacy included; each client and step has a generator.
    """

    trained_from: dict[str, int]
    max_clients_per_block: int | None = None
    has_dropout = False
    is_large = False
    mergeable = True
    num_models = 1
    first_loss_model = 0
    """From which of a step's models on the loss is of them; those before are there for the adapter's terms to read."""
    adapt_block: Callable[[int, Tensor], Tensor] | None = None
    """Changes what a block of the vision tower gets, `(K * B, T, width)`; its number is counted from 1."""
    adapt_text_block: Callable[[Tensor | None, int, Tensor], Tensor] | None = None
    """The same of the text tower, `(K * G, M, width)`; before the number, which learned vector stands in each slot."""
    after_block: Callable[[str, int, Tensor, Tensor], Tensor] | None = None
    """Changes what a block of a tower gives, from the tower's name, the block's number counted from 1, what it got and
    what it gives, both `(N, R, width)` and client-major."""
    place_shares: tuple[float, ...] | None = None
    """How much each of a class's T prompts counts in its mean; None: all alike."""
    reads_names = False
    """Whether `adapt_tokens_by_names` takes the place of `adapt_tokens`."""
    reads_held_classes = False
    """Whether a local step binds it with `HELD_CLASSES` `(K, C)`, True for the classes of each client's examples."""
    frozen_templates: tuple[str, ...] | None = None
    """Those of the classes' frozen features, means over templates, that losses compare with; None: the prompts' own."""
    loss_terms: tuple[LossTerm, ...] = ()
    after_step: Callable[[StateLike, float | Tensor], None] | None = None
    project: Callable[[StateLike, StateLike, Sequence[torch.Generator]], StateLike] | None = None
    is_linear = False
    """Whether linear layers on features of images, each used once, are all that it trains: see `AttachedOutside`."""
    learned_context: Mapping[str, Any] | None = None
    """What is known of vectors that are learned in place of a prompt's first words, as JSON types."""
    comparison: Comparison = COSINES
    """How images and classes become logits while adapters are bound; another one than by cosines needs `stack`."""
    stack: StateLike | None = None
    """The tensors `(K, ...)` that are bound, where it works outside of the frozen layers."""

    @property
    def can_share_texts(self) -> bool:
        """Whether all that a step needs of its texts are class features, the same for clients with one adapter."""
        return not (self.is_large or self.reads_held_classes or self.comparison.by_image)

    @abstractmethod
    def initial_state(self, rng: Rng, class_features: Tensor | None = None) -> State:
        """The adapter that the server starts from, as a state dict on the CPU, without a client axis.

        Its numbers are of the type `FrozenClip.dtype`; random ones are the same in each precision, up to rounding.

        `class_features` `(C, embed_dim)` are the frozen model's unit text features of the classes, which heads need.
        """

    @abstractmethod
    def bind(self, stack: StateLike, generators: Sequence[torch.Generator] | None = None) -> Any:
        """A context in which the model computes with the adapters of K clients, tensors `(K, ...)`.

        `generators`, one a client, switch dropout on: they are for training.
        """

    def stays(self, name: str) -> bool:
        """Whether a tensor never leaves its client."""
        return False

    def models(self, stack: StateLike) -> list[StateLike]:
        """The models that an adapter stands for, each as what to `bind`: the server's first, the client's own last."""
        return [stack]

    def models_of_step(self, stack: StateLike) -> list[StateLike]:
        """Those of `models` that a local step computes."""
        return self.models(stack)

    @abstractmethod
    def merged_state_dict(self, state_dict: StateLike, adapter: StateLike) -> State:
        """A new OpenCLIP state dict that computes what `state_dict` with `adapter` beside it does."""

    def adapt_patches(self, x: Tensor) -> Tensor:
        """Change the vision stem's output `(K * B, ...)` before the trained part sees it."""
        return x

    def learned_places(self, ends: Tensor, length: int, num_classes: int) -> Tensor | None:
        """Which learned vector stands at each position of the prompts: `(P, length)` int64, -1 where a word's does.

        The prompts, class-major, are read at the positions `ends` `(P,)`. None: words stand everywhere. Raises
        `UserError` if a prompt has no room for the vectors.
        """
        return None

    def adapt_tokens(self, x: Tensor, positions: Tensor, learned: Tensor | None) -> Tensor:
        """Change the text stem's output `(K * G, M, width)`.

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
        """What to bind for the class features of each of these images `(K, B, embed_dim)`: tensors `(K * B, ...)`.

        It is asked for while adapters of K clients are bound, where `comparison` is `by_image`.
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

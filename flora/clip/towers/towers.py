"""A frozen model with an adapter and the prompts of its classes, cut where the adapter begins: stem | suffix.

A tower is a row of stages: the embedding (0), its blocks (1 to n) and the head (n + 1). Stems run once, without
gradients; what they give is all that training and evaluation ever see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.adapters.outside import AttachedOutside, LinearUse
from flora.clip.comparison import COSINES, Comparison
from flora.clip.frozen import FrozenClip
from flora.clip.towers.blocks import AroundBlocks
from flora.clip.towers.layout import Layout, Prompts
from flora.clip.towers.speed import ALL_SPEED, SpeedOptions
from flora.clip.towers.text import MAX_TEXT_TOKENS, TextTower, frozen_features
from flora.clip.towers.vision import VisionTower
from flora.core.rng import Rng
from flora.core.tree import State


class AdaptedClip:
    """A frozen model, an adapter attached to it, and the prompts: all that local training and evaluation call.

    Where `clip` has `reads_patches` the vision tower gives features of the patches, too (`image_and_patch_features`).
    """

    def __init__(
        self,
        clip: FrozenClip,
        adapter: AttachedAdapter,
        *,
        class_names: Sequence[str],
        templates: Sequence[str],
        speed: SpeedOptions = ALL_SPEED,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.clip, self.adapter, self.speed = clip, adapter, speed
        self.class_names, self.templates = tuple(class_names), tuple(templates)
        self.descriptions = {name: tuple(sentences) for name, sentences in (descriptions or {}).items()}
        self.device = clip.device
        if clip.precision == "bf16" and not adapter.is_large:  # large ones start from the weights themselves
            clip.keep_matrices_in_bf16()
        self.vision = VisionTower(clip, adapter.trained_from["vision"], speed)
        self.text = TextTower(clip, adapter.trained_from["text"], speed, has_dropout=adapter.has_dropout)
        self.prompts = self.text.prompts(class_names, templates, self.descriptions, adapter.learned_places)
        self._learned = None if self.prompts.learned is None else self.prompts.learned.flatten().to(self.device)
        self._shares = _shares(self.prompts, adapter.place_shares, clip.dtype, self.device)
        self._names = frozen_features(clip, class_names, ("{}",)) if adapter.reads_names else None
        self._text_stem = self.text.stem(self.prompts)
        self._selects = speed.batch_classes and not adapter.has_dropout and self.text.trains_blocks
        # For all classes, each for more clients than the one before. None is dropped: recorded steps point into them.
        self._layouts = [self.prompts.for_clients(1).to(self.device)]
        self._frozen_features = self._encode_classes(self._layouts[0], self._shares) if self.text.is_frozen else None
        compared = adapter.frozen_templates
        self._unadapted = None if compared is None else frozen_features(clip, class_names, compared)
        self._unadapted_prompts: Tensor | None = None

    @property
    def comparison(self) -> Comparison:
        """How images and classes become logits: as the adapter says while one is bound, without one by cosines."""
        return COSINES if self.adapter.stack is None else self.adapter.comparison

    def logits(self, stem: Tensor, classes: Tensor) -> Tensor:
        """The logits `(K, B, C)` of stem outputs `(K * B, ...)`; `classes` are as `class_features` gives them."""
        images = self.image_features(stem, len(classes))
        if self.comparison.by_image:
            classes = self.classes_by_image(images)
        return self.logit_scale() * self.comparison.similarities(images, classes)

    def image_features(self, stem: Tensor, num_clients: int) -> Tensor:
        """Unit image features `(K, B, embed_dim)` from stem outputs `(K * B, ...)`, client-major.

        Of patches, `(K, B, P, embed_dim)`, where the comparison reads these.
        """
        if self.comparison.reads_patches:
            return self.image_and_patch_features(stem, num_clients)[1]
        features = self._encode_images(stem)
        return self._adapted_images(features[:, 0] if self.vision.reads_patches else features, num_clients)

    def image_and_patch_features(self, stem: Tensor, num_clients: int) -> tuple[Tensor, Tensor]:
        """Unit features of images `(K, B, embed_dim)`, and of the patches `(K, B, P, embed_dim)` that are left of them.

        From stem outputs `(K * B, ...)`. Patches are in the space of the class token's features, without what the
        adapter does to those alone (`adapt_images`). Where patches are merged, those that are left are in no order, and
        where others are pooled, these are the last. Raises ValueError if the model was not loaded with `reads_patches`.
        """
        if not self.vision.reads_patches:
            raise ValueError("features of patches need a model that was loaded with `reads_patches`")
        tokens = self._encode_images(stem)
        patches = F.normalize(tokens[:, 1:].unflatten(0, (num_clients, -1)), dim=-1)
        return self._adapted_images(tokens[:, 0], num_clients), patches

    @torch.no_grad()
    def frozen_image_features(self, stem: Tensor) -> Tensor:
        """Unit features `(N, embed_dim)` without an adapter, of stem outputs `(N, ...)`. None may be bound then."""
        return torch.cat([self.image_features(part, 1)[0] for part in self.vision.in_parts(stem)])

    def _adapted_images(self, features: Tensor, num_clients: int) -> Tensor:
        return F.normalize(self.adapter.adapt_images(features.unflatten(0, (num_clients, -1))), dim=-1)

    def _encode_images(self, stem: Tensor) -> Tensor:
        x = self.adapter.adapt_patches(stem)
        around = AroundBlocks(self.adapter.adapt_block, self._after("vision"))
        return self.vision.suffix(x, around).to(self.clip.dtype)

    def _after(self, tower: str) -> Callable[[int, Tensor, Tensor], Tensor] | None:
        """The function by which the adapter changes what a tower's blocks give; None if it does not."""
        return None if self.adapter.after_block is None else partial(self.adapter.after_block, tower)

    def class_features(self, num_clients: int, classes: Tensor | None = None) -> Tensor:
        """Unit text features, `(K, C, embed_dim)`: of all classes, or of each client's own `classes` `(K, C)`.

        An ensemble's mean is normalised once more. Where the comparison reads prompts they are those of each of a
        class's T prompts, `(K, C, T, embed_dim)`.
        """
        if self._frozen_features is not None:
            return self.adapter.adapt_classes(self._frozen_features.expand(num_clients, -1, -1))
        if classes is not None:
            shares = None if self._shares is None else self._shares[classes.to(self.device)]
            return self._encode_classes(self.prompts.of_classes(classes).to(self.device), shares)
        return self._encode_classes(self._layout_of_all(num_clients), self._shares)

    def classes_by_image(self, images: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The classes' features that each of the images `(K, B, d)` has for itself, `(K, B, C, d)`.

        `chosen` `(K, C)` are each client's own classes, if these are not all.
        """
        number, size = images.shape[:2]
        chosen = None if chosen is None else chosen.repeat_interleave(size, dim=0)
        stack, parts = self.adapter.for_images(images), []
        # Where nothing is kept for a gradient a few images at a time bound the memory.
        at_once = number * size
        if not torch.is_grad_enabled():
            at_once = max(1, min(at_once, MAX_TEXT_TOKENS // self.prompts.tokens.numel()))
        for start in range(0, number * size, at_once):
            part = {name: tensor[start : start + at_once] for name, tensor in stack.items()}
            with self.adapter.bind(part):
                rows = None if chosen is None else chosen[start : start + at_once]
                parts.append(self.class_features(min(at_once, number * size - start), rows))
        return torch.cat(parts).unflatten(0, (number, size))

    def traced_logits(self, stem: Tensor, num_clients: int, drawn: Tensor | None) -> tuple[Tensor, list[LinearUse]]:
        """The logits `(K, B, C)` of images, and the uses of the linear layers that they come through.

        For an adapter that `is_linear`, bound without gradients: the uses' outputs have them. `drawn` are the places of
        the prompts, where one of each class is drawn.
        """
        assert isinstance(self.adapter, AttachedOutside)
        classes = self.class_features(num_clients) if drawn is None else self.drawn_class_features(drawn)
        with self.adapter.traced() as uses:
            products = self.adapter.products(self.image_features(stem, num_clients), classes)
        return self.logit_scale() * products, uses

    def drawn_class_features(self, places: Tensor) -> Tensor:
        """Unit text features `(K, C, embed_dim)` of one prompt of each class, for each of K clients.

        `places` `(K, C)`, on the CPU, are the prompts' places in their classes, as `draw_places` gives them.
        """
        if self.text.trains_blocks:
            return self._encode_prompts(self.prompts.of_places(places).to(self.device), 1).squeeze(2)
        every = self._encode_prompts(self._layout_of_all(1 if self.text.is_frozen else len(places)), None)
        features = _picked(every, places)
        return self.adapter.adapt_classes(features) if self.text.is_frozen else features

    def _layout_of_all(self, num_clients: int) -> Layout:
        if num_clients > self._layouts[-1].num_clients:
            self._layouts.append(self.prompts.for_clients(num_clients).to(self.device))
        return self._layouts[-1].first(num_clients)

    @torch.no_grad()
    def frozen_class_features(self, places: Tensor | None = None) -> Tensor:
        """The classes' unit features `(C, embed_dim)` without an adapter, computed once. None may be bound then.

        With `places` `(K, C)` those of one prompt of each class, `(K, C, embed_dim)`, as `drawn_class_features`.
        """
        if places is not None:
            if self._unadapted_prompts is None:
                self._unadapted_prompts = self._encode_prompts(self._layout_of_all(1), None)
            return _picked(self._unadapted_prompts, places)
        if self._unadapted is None:
            self._unadapted = self.class_features(1)[0]
        return self._unadapted

    def _encode_classes(self, layout: Layout, shares: Tensor | None) -> Tensor:
        """Unit features of a layout's classes, as `class_features`; `shares` as `_shares`, or `(K, C, T)`."""
        ensembles = self._encode_prompts(layout, None)
        if self.comparison.reads_prompts:
            return ensembles
        if shares is None:
            return F.normalize(ensembles.mean(dim=2), dim=-1)
        return F.normalize((ensembles * shares.unsqueeze(-1)).sum(dim=2), dim=-1)

    def _encode_prompts(self, layout: Layout, num_places: int | None) -> Tensor:
        """Unit features `(K, C, T, embed_dim)` of a layout's prompts, `num_places` (None: T) of each class."""
        around = AroundBlocks(self._before_text_blocks(layout), self._after("text"))
        features = self.text.suffix(self._text_stem, layout, self._adapt_tokens, around).to(self.clip.dtype)
        places = num_places or self.prompts.num_places
        return F.normalize(features, dim=-1).unflatten(0, (layout.num_clients, -1, places))

    def _adapt_tokens(self, x: Tensor, layout: Layout) -> Tensor:
        learned = self._learned_in(layout)
        if self._names is None:
            return self.adapter.adapt_tokens(x, layout.positions, learned)
        return self.adapter.adapt_tokens_by_names(x, layout.positions, learned, self._names)

    def _before_text_blocks(self, layout: Layout) -> Callable[[int, Tensor], Tensor] | None:
        """The function by which the adapter changes what the text tower's blocks get; None if it does not."""
        adapt = self.adapter.adapt_text_block
        return None if adapt is None else partial(adapt, self._learned_in(layout))

    def _learned_in(self, layout: Layout) -> Tensor | None:
        """Which learned vector stands in each slot of a layout, `(K * G, M)`, if there are any."""
        if self._learned is None:
            return None
        return self._learned.view_as(layout.positions) if layout.slots is None else self._learned[layout.slots]

    def draw_places(self, rngs: Iterable[Rng]) -> Tensor | None:
        """Draw one prompt of each class for each of K clients, from its own stream: their places `(K, C)`, on the CPU.

        None where each class has only one.
        """
        if self.prompts.num_places == 1:
            return None
        counts = self.prompts.num_of_class
        numbers = np.full(self.prompts.num_classes, self.prompts.num_places) if counts is None else counts.numpy()
        return torch.from_numpy(np.stack([rng.numpy().integers(numbers) for rng in rngs]))

    def select_classes(self, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what to encode if only the classes among `labels` `(K, B)` (on the CPU) matter.

        Returns the classes `(K, C)`, rows with fewer filled up with one of their own, and the labels `(K, B)` as places
        among them; None if it is to be all classes, because that costs no more or is wanted.
        """
        if not self._selects:
            return None
        present = torch.zeros(len(labels), self.prompts.num_classes, dtype=torch.bool).scatter_(1, labels, True)
        most = int(present.sum(dim=1).max())
        if most == self.prompts.num_classes:
            return None
        classes = (~present).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        classes = torch.where(present.gather(1, classes), classes, classes[:, :1])
        return classes, (present.cumsum(dim=1) - 1).gather(1, labels)

    def initial_adapter(self, rng: Rng) -> State:
        """The adapter that the server starts from."""
        with torch.no_grad():
            return self.adapter.initial_state(rng, self.frozen_class_features())

    def release_stems(self) -> None:
        """Take what is frozen in front of the adapters out of memory; from now on only features go in."""
        self.vision.release_stem()
        self.text.release_stem()

    def logit_scale(self) -> Tensor:
        """The factor of the cosine similarities, a scalar."""
        scale: Tensor = self.clip.model.logit_scale  # type: ignore[assignment]
        return scale.to(self.clip.dtype).exp().reshape(())


def _picked(features: Tensor, places: Tensor) -> Tensor:
    """One of each class's features `(K or 1, C, T, d)`, in the places `(K, C)`: `(K, C, d)`."""
    clients, classes = (torch.arange(size, device=features.device) for size in places.shape)
    every = features.expand(len(places), -1, -1, -1)
    return every[clients.unsqueeze(1), classes, places.to(features.device)]


def _shares(
    prompts: Prompts, given: tuple[float, ...] | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The part `(C, T)` that each place has of its class's mean: what is `given`, none if it only repeats a prompt.

    None where all classes have as many prompts, and none is given: then it is the plain mean.
    """
    if given is not None:
        return torch.tensor(given, dtype=dtype, device=device).expand(prompts.num_classes, -1)
    if prompts.num_of_class is None:
        return None
    counts = prompts.num_of_class.unsqueeze(1)
    return ((torch.arange(prompts.num_places) < counts).to(dtype) / counts).to(device)

"""The variants that `flora.benchmark` compares: three loops as others write them, and ours with each cut in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.client.local_training import LocalTraining
from flora.client.objectives import Contrastive, CrossEntropy, Objective
from flora.clip.adapters.lora import Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.tokens import Merge
from flora.clip.towers.towers import AdaptedClip
from flora.communication.options import payload_bytes
from flora.core import tree
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.core.tree import State
from flora.engine.engine import Engine
from flora.engine.tasks import ClientTask, TrainingSetup
from flora.evaluation.accuracy import evaluate
from flora.features.features import Features, StoredFeatures
from flora.privacy.examples import ExamplePrivacy

# The classes of CIFAR-10 and CIFAR-100.
# fmt: off
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
CIFAR100 = (
    "apple", "aquarium fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple tree", "motorcycle", "mountain", "mouse", "mushroom", "oak tree", "orange",
    "orchid", "otter", "palm tree", "pear", "pickup truck", "pine tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow tree", "wolf", "woman", "worm",
)
# fmt: on
TEMPLATE = "a photo of a {}."
LEARNING_RATE = 1e-4
NUM_IMAGES, NUM_EVALUATED = 64, 64
# Local steps of a client-round.
ROUND_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    model: str
    num_classes: int
    batch_size: int
    num_clients: int
    rank: int
    tower: str
    num_layers: int
    targets: str
    objective: str
    device: str
    precision: str = "fp32"
    merged_per_layer: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= len(CIFAR100):
            raise UserError(f"--classes: expected 1 to {len(CIFAR100)}, got {self.num_classes}")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def class_names(self) -> tuple[str, ...]:
        """CIFAR-10's up to ten classes, CIFAR-100's above."""
        return tuple((CIFAR10 if self.num_classes <= 10 else CIFAR100)[: self.num_classes])

    def loss(self) -> Objective:
        return CrossEntropy() if self.objective == "cross_entropy" else Contrastive()

    def lora(self) -> Lora:
        layers = tuple(range(-self.num_layers, 0)) or None
        return Lora(towers=(self.tower,), targets=tuple(self.targets.split(",")), layers=layers, rank=self.rank)

    def load(self) -> FrozenClip:
        """The model with random weights."""
        backbone = Backbone(self.model, "random", self.precision, Merge(self.merged_per_layer))
        return backbone.load(self.torch_device, Rng(0))

    def images(self, clip: FrozenClip) -> tuple[Tensor, Tensor]:
        """Random preprocessed images and labels."""
        generator = Rng(0).child("images").torch()
        pixels = torch.randn(NUM_IMAGES, 3, *clip.architecture.image_size, generator=generator)
        labels = torch.randint(self.num_classes, (NUM_IMAGES,), generator=generator)
        return pixels.to(self.torch_device, clip.dtype), labels.to(self.torch_device)


@dataclass(frozen=True)
class Step:
    """A variant that is ready to run.

    `run(n)` takes n local steps of each of `num_clients` clients, from a fresh adapter and optimiser; `evaluate` is one
    evaluation.
    """

    run: Callable[[int], object]
    evaluate: Callable[[], object]
    num_clients: int
    sent_bytes: int
    flops: float | None = None


@dataclass(frozen=True)
class Variant:
    """A row of the table, in the settings in which it differs from the row above."""

    title: str
    build: Callable[[Setting], Step]
    applies: Callable[[Setting], bool] = lambda setting: True
    if_named: bool = False
    """Measured only where `--variants` names it."""


@dataclass(frozen=True, eq=False)
class PixelFeatures(Features):
    """Features of preprocessed images that are computed at each use."""

    pixels: Tensor
    labels: Tensor
    split_indices: np.ndarray
    model: AdaptedClip

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def take(self, indices: Tensor, device: torch.device, rngs: Iterable[Rng] | None = None) -> Tensor:
        return self.model.vision.stem(self.pixels[indices])

    def subset(self, indices: np.ndarray) -> PixelFeatures:
        raise NotImplementedError


def full_fine_tuning(setting: Setting) -> Step:
    """Every weight, as with any PyTorch model; prompts padded, both towers each step."""
    clip = setting.load()
    pixels, labels = setting.images(clip)
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names]).to(setting.device)
    parameters = [parameter.requires_grad_() for parameter in clip.model.parameters()]

    def run(num_steps: int) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        for _ in range(num_steps):
            batch = slice(0, setting.batch_size)
            texts = tokens if setting.objective == "cross_entropy" else tokens[labels[batch]]
            images, features, scale = clip.model(pixels[batch], texts)
            loss = plain_loss(scale * images @ features.T, labels[batch], setting)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Step(run, _plain_evaluation(clip, pixels, tokens), 1, payload_bytes(dict(clip.model.named_parameters())))


def naive_lora(setting: Setting) -> Step:
    """LoRA as everybody writes it: the image tower each step, prompts padded to the context length, one client."""
    clip = setting.load()
    pixels, labels = setting.images(clip)
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names]).to(setting.device)
    attached = setting.lora().attach(clip)

    def run(num_steps: int) -> State:
        adapter = trainable_adapter(attached, setting)
        optimizer = torch.optim.AdamW(adapter.values(), lr=LEARNING_RATE)
        for _ in range(num_steps):
            batch = slice(0, setting.batch_size)
            texts = tokens if setting.objective == "cross_entropy" else tokens[labels[batch]]
            with attached.bind(adapter):
                images, features, scale = clip.model(pixels[batch], texts)
                loss = plain_loss(scale * images @ features.T, labels[batch], setting)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        return adapter

    return Step(run, _plain_evaluation(clip, pixels, tokens), 1, payload_bytes(fresh_adapter(attached, None)))


def _cut_prompts(setting: Setting, clip: FrozenClip) -> tuple[Tensor, Tensor]:
    """The prompts' tokens up to the longest one's end, and where each of them ends."""
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names]).to(setting.device)
    ends = tokens.argmax(dim=-1)
    return tokens[:, : int(ends.max()) + 1], ends


def by_hand(setting: Setting) -> Step:
    """Build the loop of a good engineer's afternoon: features cached, distinct prompts cut at their end, one client."""
    clip = setting.load()
    pixels, labels = setting.images(clip)
    tokens, ends = _cut_prompts(setting, clip)
    attached = setting.lora().attach(clip)
    text, visual, start = clip.text, clip.visual, attached.trained_from["vision"] - 1
    with torch.no_grad():
        cached = visual._embeds(pixels) if setting.tower == "vision" else clip.model.encode_image(pixels)  # type: ignore[operator]
        for block in visual.transformer.resblocks[:start] if setting.tower == "vision" else ():
            cached = block(cached)
    del pixels

    def encode_text() -> Tensor:
        x = text.token_embedding(tokens) + text.positional_embedding[: tokens.shape[1]]
        for block in text.transformer.resblocks:
            x = block(x, attn_mask=text.attn_mask[: tokens.shape[1], : tokens.shape[1]])
        read = text.ln_final(x[torch.arange(len(x)), ends])
        return F.normalize(read @ text.text_projection, dim=-1)

    def encode_image(x: Tensor) -> Tensor:
        if setting.tower == "vision":
            for block in visual.transformer.resblocks[start:]:
                x = block(x)
            x = visual._pool(x)[0] @ visual.proj
        return F.normalize(x, dim=-1)

    frozen_texts = encode_text().detach()

    def run(num_steps: int) -> State:
        adapter = trainable_adapter(attached, setting)
        optimizer = torch.optim.AdamW(adapter.values(), lr=LEARNING_RATE)
        for _ in range(num_steps):
            batch = slice(0, setting.batch_size)
            with attached.bind(adapter):
                texts = encode_text() if setting.tower == "text" else frozen_texts
                features = texts if setting.objective == "cross_entropy" else texts[labels[batch]]
                scale = clip.model.logit_scale.exp()  # type: ignore[operator]
                logits = scale * encode_image(cached[batch]) @ features.T
                optimizer.zero_grad()
                plain_loss(logits, labels[batch], setting).backward()
            optimizer.step()
        return adapter

    @torch.no_grad()
    def evaluation() -> Tensor:
        with attached.bind(trainable_adapter(attached, setting)):
            return (encode_image(cached[:NUM_EVALUATED]) @ encode_text().T).argmax(dim=-1)

    return Step(run, evaluation, 1, payload_bytes(fresh_adapter(attached, None)))


def ours(
    speed: SpeedOptions,
    *,
    stores: bool = True,
    many_clients: bool = False,
    privacy: ExamplePrivacy | None = None,
) -> Callable[[Setting], Step]:
    """The simulator's own training path."""

    def build(setting: Setting) -> Step:
        clip = setting.load()
        pixels, labels = setting.images(clip)
        attached = setting.lora().attach(clip)
        model = AdaptedClip(clip, attached, class_names=setting.class_names, templates=(TEMPLATE,), speed=speed)
        places, features = np.arange(NUM_IMAGES), None
        if stores:
            stem = torch.cat([model.vision.stem(part) for part in pixels.split(8)])
            model.release_stems()
            rows = torch.arange(NUM_IMAGES, device=setting.torch_device)
            features = StoredFeatures(stem, rows, labels.cpu(), places)
        chosen: Features = features or PixelFeatures(pixels, labels.cpu(), places, model)
        del pixels
        number = setting.num_clients if many_clients else 1
        local = LocalTraining(
            learning_rate=LEARNING_RATE, batch_size=setting.batch_size, objective=setting.loss(), privacy=privacy
        )
        adapter, engine = fresh_adapter(attached, None), Engine(model, chosen, number)

        def run(num_steps: int) -> None:
            setup = TrainingSetup(
                1, replace(local, steps=num_steps), LEARNING_RATE, tuple(adapter), width=setting.batch_size
            )
            tasks = [
                ClientTask(client, adapter, places, Rng(0).child("client", client), setup) for client in range(number)
            ]
            for _ in engine.train(tasks):
                pass

        return Step(
            run,
            lambda: evaluate(model, fresh_adapter(attached, 1), chosen, batch_size=NUM_EVALUATED),
            number,
            payload_bytes(fresh_adapter(attached, None)),
            None if (many_clients and speed.share_first_step) or privacy else unavoidable_flops(setting, clip),
        )

    return build


def unavoidable_flops(setting: Setting, clip: FrozenClip) -> float | None:
    """Floating-point operations of one client's step that text-tower LoRA on all blocks can't avoid, or None.

    Each distinct beginning of a prompt is one token; it goes through 12 width^2 multiplications and additions a block,
    forward, and as many backward to reach the adapters below. In the first block q, k and v (3 width^2) need no
    gradient of their input; in the last, tokens that are not read need keys and values (2 width^2) alone. Weights get
    no gradient. Attention, norms, activations and the adapters themselves are not counted.
    """
    if setting.tower != "text" or setting.num_layers or setting.objective != "cross_entropy":
        return None
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names])
    ends = tokens.argmax(dim=-1).tolist()
    rows = zip(tokens.tolist(), ends, strict=True)
    num_tokens = len({tuple(row[: place + 1]) for row, end in rows for place in range(end + 1)})
    shape = clip.architecture.text
    forward = 12 * num_tokens * (shape.num_layers - 1) + 2 * num_tokens + 10 * len(ends)
    return 2 * shape.width**2 * float(2 * forward - 3 * num_tokens)


def fresh_adapter(attached: object, number: int | None) -> State:
    """A fresh adapter: for K clients, or (None) without a client axis."""
    state: State = attached.initial_state(Rng(0))  # type: ignore[attr-defined]
    return state if number is None else {name: tensor.clone() for name, tensor in tree.expand(state, number).items()}


def trainable_adapter(attached: object, setting: Setting) -> State:
    """A fresh adapter of one client, on the device, with gradients."""
    return {name: tensor.to(setting.device).requires_grad_() for name, tensor in fresh_adapter(attached, 1).items()}


def plain_loss(logits: Tensor, labels: Tensor, setting: Setting) -> Tensor:
    if setting.objective == "cross_entropy":
        return F.cross_entropy(logits, labels)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _plain_evaluation(clip: FrozenClip, pixels: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def evaluation() -> Tensor:
        images, texts, _ = clip.model(pixels[:NUM_EVALUATED], tokens)
        return (images @ texts.T).argmax(dim=-1)

    return evaluation


OFF = SpeedOptions(
    cut_prompts=False,
    share_prefixes=False,
    trim_last_block=False,
    batch_classes=False,
    share_first_step=False,
    cuda_graphs=False,
)
CUT = replace(OFF, cut_prompts=True)
SHARED = replace(CUT, share_prefixes=True)
TRIMMED = replace(SHARED, trim_last_block=True)
SELECTED = replace(TRIMMED, batch_classes=True)
RECORDED = replace(SELECTED, cuda_graphs=True)
VARIANTS = {
    "full": Variant("full fine-tuning", full_fine_tuning),
    "naive": Variant("LoRA as everybody writes it", naive_lora),
    "by hand": Variant("the strongest loop by hand", by_hand),
    "live": Variant("ours, nothing switched on", ours(OFF, stores=False)),
    "stored": Variant("+ image features once", ours(OFF)),
    "cut": Variant("+ prompts cut at their end", ours(CUT)),
    "shared": Variant("+ prefixes shared", ours(SHARED)),
    "trimmed": Variant("+ last block only where it is read", ours(TRIMMED)),
    "selected": Variant(
        "+ the batch's classes alone", ours(SELECTED), lambda setting: setting.objective == "contrastive"
    ),
    "ours": Variant("+ many clients in a step", ours(SELECTED, many_clients=True)),
    "first": Variant(
        "+ texts of their first step once",
        ours(replace(SELECTED, share_first_step=True), many_clients=True),
        lambda setting: setting.torch_device.type == "cpu" and setting.tower == "text",
    ),
    "recorded": Variant(
        "+ CUDA graphs", ours(RECORDED, many_clients=True), lambda setting: setting.torch_device.type == "cuda"
    ),
    "private": Variant(
        "many clients, with private gradients of single examples",
        ours(SELECTED, many_clients=True, privacy=ExamplePrivacy(sampling="shuffled")),
        lambda setting: setting.objective == "cross_entropy",
        if_named=True,  # a backward pass through all classes for each image: minutes a step for a hundred
    ),
}

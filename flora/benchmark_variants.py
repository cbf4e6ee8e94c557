"""The variants that `flora.benchmark` compares: three loops as others write them, and ours with each cut in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flora import tree
from flora.clip.adapters import Lora
from flora.clip.backbone import Backbone, FrozenClip
from flora.clip.towers import AdaptedClip, SpeedOptions
from flora.data.batching import client_blocks
from flora.errors import UserError
from flora.federated.communication import payload_bytes
from flora.federated.evaluation import evaluate
from flora.federated.features import StoredFeatures
from flora.federated.local import LocalTraining, train_block
from flora.federated.objectives import Contrastive, CrossEntropy, Objective
from flora.rng import Rng

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
        return Backbone(model=self.model, weights="random").load(self.torch_device, Rng(0))

    def images(self, clip: FrozenClip) -> tuple[Tensor, Tensor]:
        """Random preprocessed images and labels."""
        generator = Rng(0).child("images").torch()
        pixels = torch.randn(NUM_IMAGES, 3, *clip.architecture.image_size, generator=generator)
        labels = torch.randint(self.num_classes, (NUM_IMAGES,), generator=generator)
        return pixels.to(self.torch_device), labels.to(self.torch_device)


@dataclass(frozen=True)
class Step:
    """A variant that is ready to run: `run` takes one step of `num_clients` clients, `evaluate` one evaluation."""

    run: Callable[[], object]
    evaluate: Callable[[], object]
    num_clients: int
    sent_bytes: int
    num_tokens: int = 0
    width: int = 0


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    title: str
    build: Callable[[Setting], Step]


def full_fine_tuning(setting: Setting) -> Step:
    """Every weight, as with any PyTorch model; prompts padded, both towers each step."""
    clip = setting.load()
    pixels, labels = setting.images(clip)
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names]).to(setting.device)
    parameters = [parameter.requires_grad_() for parameter in clip.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def run() -> None:
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
    adapter = {name: tensor.to(setting.device).requires_grad_() for name, tensor in fresh_adapter(attached, 1).items()}
    optimizer = torch.optim.AdamW(adapter.values(), lr=LEARNING_RATE)

    def run() -> None:
        batch = slice(0, setting.batch_size)
        texts = tokens if setting.objective == "cross_entropy" else tokens[labels[batch]]
        with attached.bind(adapter):
            images, features, scale = clip.model(pixels[batch], texts)
            loss = plain_loss(scale * images @ features.T, labels[batch], setting)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()

    return Step(run, _plain_evaluation(clip, pixels, tokens), 1, payload_bytes(fresh_adapter(attached, None)))


def by_hand(setting: Setting) -> Step:
    """What a good engineer writes in an afternoon: features cached, distinct prompts cut at their end, one client."""
    clip = setting.load()
    pixels, labels = setting.images(clip)
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names]).to(setting.device)
    ends = tokens.argmax(dim=-1)
    tokens = tokens[:, : int(ends.max()) + 1]
    attached = setting.lora().attach(clip)
    adapter = {name: tensor.to(setting.device).requires_grad_() for name, tensor in fresh_adapter(attached, 1).items()}
    optimizer = torch.optim.AdamW(adapter.values(), lr=LEARNING_RATE)
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

    with torch.no_grad():
        frozen_texts = encode_text()

    def run() -> None:
        batch = slice(0, setting.batch_size)
        with attached.bind(adapter):
            texts = encode_text() if setting.tower == "text" else frozen_texts
            features = texts if setting.objective == "cross_entropy" else texts[labels[batch]]
            logits = clip.model.logit_scale.exp() * encode_image(cached[batch]) @ features.T  # type: ignore[operator]
            optimizer.zero_grad()
            plain_loss(logits, labels[batch], setting).backward()
        optimizer.step()

    @torch.no_grad()
    def evaluation() -> Tensor:
        with attached.bind(adapter):
            return (encode_image(cached[:NUM_EVALUATED]) @ encode_text().T).argmax(dim=-1)

    return Step(run, evaluation, 1, payload_bytes(fresh_adapter(attached, None)))


def ours(speed: SpeedOptions, *, many_clients: bool) -> Callable[[Setting], Step]:
    """The simulator's own training path."""

    def build(setting: Setting) -> Step:
        clip = setting.load()
        pixels, labels = setting.images(clip)
        attached = setting.lora().attach(clip)
        model = AdaptedClip(clip, attached, class_names=setting.class_names, templates=(TEMPLATE,), speed=speed)
        stem = torch.cat([model.vision.stem(part) for part in pixels.split(16)])
        del pixels
        model.release_stems()
        indices = torch.arange(NUM_IMAGES, device=setting.torch_device)
        features = StoredFeatures(stem, indices, labels, np.arange(NUM_IMAGES))
        number = setting.num_clients if many_clients else 1
        local = LocalTraining(learning_rate=LEARNING_RATE, batch_size=setting.batch_size, objective=setting.loss())
        examples = [np.arange(NUM_IMAGES)] * number
        (block,) = client_blocks(
            range(number), examples, Rng(0), batch_size=setting.batch_size, width=setting.batch_size, epochs=1, steps=1,
            clients_per_block=number,
        )  # fmt: skip
        adapters = fresh_adapter(attached, number)
        rngs = [Rng(0).child(client) for client in range(number)]

        def run() -> None:
            train_block(
                model, block, adapters=adapters, features=features, local=local, learning_rate=LEARNING_RATE,
                rngs=rngs,
            )  # fmt: skip

        return Step(
            run,
            lambda: evaluate(model, fresh_adapter(attached, 1), features, batch_size=NUM_EVALUATED),
            number,
            payload_bytes(fresh_adapter(attached, None)),
            num_tokens=number * model.prompts.tokens.numel(),
            width=clip.architecture.text.width,
        )

    return build


def unavoidable_flops(setting: Setting, step: Step) -> float | None:
    """Floating-point operations of one client's step that text-tower LoRA on all blocks can't avoid, or None.

    Every packed token goes through 12 width^2 multiplications and additions a block, forward, and as many backward to
    reach the adapters below, except that the first block's q, k and v (3 width^2) need no gradient of their input.
    Weights get no gradient. Attention, norms, activations and the adapters themselves are not counted.
    """
    if not step.num_tokens or setting.tower != "text" or setting.num_layers:
        return None
    num_layers = Backbone(model=setting.model, weights="random").architecture().text.num_layers
    per_block = 2 * 12 * step.width**2 * step.num_tokens / step.num_clients
    return per_block * (2 * num_layers - 3 / 12)


def fresh_adapter(attached: object, number: int | None) -> tree.State:
    """A fresh adapter: for K clients, or (None) without a client axis."""
    state: tree.State = attached.initial_state(Rng(0))  # type: ignore[attr-defined]
    return state if number is None else {name: tensor.clone() for name, tensor in tree.expand(state, number).items()}


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


VARIANTS = {
    "full": Variant("full fine-tuning", full_fine_tuning),
    "naive": Variant("LoRA as everybody writes it", naive_lora),
    "by hand": Variant("the strongest loop by hand", by_hand),
    "padded": Variant("ours: features once, prompts padded", ours(SpeedOptions(cut_prompts=False), many_clients=False)),
    "cut": Variant("+ prompts cut at their end", ours(SpeedOptions(share_prefixes=False), many_clients=False)),
    "shared": Variant("+ prefixes shared", ours(SpeedOptions(), many_clients=False)),
    "ours": Variant("+ many clients in a step", ours(SpeedOptions(), many_clients=True)),
}

"""What the first pass over images costs: decoding and our stem, against OpenCLIP's `encode_image`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flora.benchmark.timing import matrix_rate, median_seconds, timed
from flora.clip.adapters.lora import Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip
from flora.clip.towers.towers import AdaptedClip
from flora.clip.towers.vision import VisionTower
from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.data.datasets.base import ImageFiles
from flora.features.loading import StemImages

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
# The JPEG files that are made: as many pixels as a photo of ImageNet has.
SIZE, QUALITY = (500, 375), 90
# Batches that go through together with decoding. The first has nothing to wait beside, the last nothing to read.
NUM_BATCHES = 4


@dataclass(frozen=True)
class ImageSettings:
    """What is measured: each model in each precision, on batches of as many images."""

    models: tuple[str, ...]
    precisions: tuple[str, ...]
    batch_size: int
    device: str


@dataclass(frozen=True)
class ImageCost:
    """Seconds for one image: OpenCLIP's `encode_image`, our stem, reading it in one thread, stem and reading together.

    `stem_flops` are the floating-point operations of the stem's matrix products, `matrix_rate` how many of them the
    machine does a second in a product of this model's size.
    """

    model: str
    precision: str
    plain_seconds: float
    stem_seconds: float
    read_seconds: float
    together_seconds: float
    stem_flops: float
    matrix_rate: float


def compare_images(settings: ImageSettings, folder: str, *, seconds: float) -> list[str]:
    """Measure the first pass over the JPEG files below `folder`, or, if that is empty, over some made for it.

    Each quantity is measured for about `seconds`, three times at least, after a warm-up; the median is shown. Returns
    a Markdown table. Raises `UserError` if there is no JPEG file.
    """
    with tempfile.TemporaryDirectory() as made:
        paths = _jpeg_files(Path(folder)) if folder else _made_files(Path(made), settings.batch_size)
        costs = [
            _cost(model, precision, settings, paths, seconds)
            for model in settings.models
            for precision in settings.precisions
        ]
    head = ["model", "precision", "encode_image, images per second", "our stem", "x", "with decoding", "decoding takes"]
    head += ["ms to read an image in a thread", "matrix products, GFLOP/s", "the stem reaches"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for each in costs:
        cells = [each.model, each.precision, f"{1 / each.plain_seconds:.1f}", f"{1 / each.stem_seconds:.1f}"]
        cells += [f"{each.plain_seconds / each.stem_seconds:.2f}", f"{1 / each.together_seconds:.1f}"]
        cells += [f"{max(0.0, 1 - each.stem_seconds / each.together_seconds):.0%}", f"{1000 * each.read_seconds:.1f}"]
        reached = each.stem_flops / each.stem_seconds / each.matrix_rate
        lines.append("| " + " | ".join([*cells, f"{each.matrix_rate / 1e9:.0f}", f"{reached:.0%}"]) + " |")
    return lines


def stem_flops(clip: FrozenClip) -> float:
    """Floating-point operations of the matrix products that an image's features take, from pixels to features.

    A block's are 4 width^2 + 2 width * mlp_width multiplications and additions a token, and 2 tokens * width a token
    for attention. Where the class token is read, the last block computes keys and values of the others alone.
    """
    shape, tokens = clip.architecture.vision, VisionTower(clip, 0).num_tokens
    matrices = 4 * shape.width**2 + 2 * shape.width * shape.mlp_width
    block = tokens * (matrices + 2 * tokens * shape.width)
    last = 2 * tokens * shape.width**2 + (matrices - 2 * shape.width**2) + 2 * tokens * shape.width
    last = last if clip.visual.pool_type == "tok" else block
    embedding = (tokens - 1) * clip.visual.conv1.weight.numel()
    return 2.0 * (embedding + (shape.num_layers - 1) * block + last + shape.width * clip.architecture.embed_dim)


def _cost(model_name: str, precision: str, settings: ImageSettings, paths: Sequence[Path], seconds: float) -> ImageCost:
    """OpenCLIP's model runs under autocast for bf16, as its own `amp_bf16` does; ours as in an experiment."""
    device, batch_size = torch.device(settings.device), settings.batch_size
    clip = Backbone(model_name, "random", precision).load(device, Rng(0))
    adapter = Lora(towers=("text",)).attach(clip)
    model = AdaptedClip(clip, adapter, class_names=("cat", "dog"), templates=("a {}.",))
    files = ImageFiles(list(islice(cycle(paths), NUM_BATCHES * batch_size)))
    images = StemImages(files, np.arange(len(files)), model)
    started = time.perf_counter()
    pixels = torch.stack([_pixels(images, number) for number in range(batch_size)]).to(device)
    read_seconds = (time.perf_counter() - started) / batch_size
    stem_seconds = median_seconds(partial(model.vision.stem, pixels), settings.device, seconds) / batch_size
    together_seconds = _together(images, settings)
    shape, flops = clip.architecture.vision, stem_flops(clip)
    rate = matrix_rate(shape.width, shape.mlp_width, settings.device, _DTYPES[precision])
    del clip, adapter, model, images
    return ImageCost(
        model=model_name,
        precision=precision,
        plain_seconds=_plain_seconds(model_name, precision, pixels, seconds) / batch_size,
        stem_seconds=stem_seconds,
        read_seconds=read_seconds,
        together_seconds=together_seconds,
        stem_flops=flops,
        matrix_rate=rate,
    )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def _pixels(images: StemImages, number: int) -> torch.Tensor:
    image = images.read(number)
    if isinstance(image, str):
        raise UserError(f"--images: {image}")
    return image[0]


def _together(images: StemImages, settings: ImageSettings) -> float:
    """Seconds for one image where the next batch is read while one goes through the stem."""
    size = settings.batch_size
    parts = images.computed_parts([range(start, start + size) for start in range(0, len(images), size)])
    next(parts)
    seconds = timed(lambda: list(islice(parts, NUM_BATCHES - 2)), settings.device) / (
        (NUM_BATCHES - 2) * settings.batch_size
    )
    parts.close()  # type: ignore[attr-defined]
    return seconds


def _plain_seconds(model: str, precision: str, pixels: torch.Tensor, seconds: float) -> float:
    """Seconds for a batch through OpenCLIP's own vision tower, which nothing of ours has changed."""
    as_loaded = "fp32" if precision == "bf16" else precision
    clip = Backbone(model, "random", as_loaded).load(pixels.device, Rng(0))

    @torch.no_grad()
    def encode() -> None:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
            clip.model.encode_image(pixels.to(clip.dtype))  # type: ignore[operator]

    return median_seconds(encode, str(pixels.device), seconds)


def _jpeg_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"--images: {folder}: expected a folder with JPEG files below it")
    return files


def _made_files(folder: Path, number: int) -> list[Path]:
    """Write JPEG files of coloured clouds, which are about as hard to decode as photos."""
    generator = Rng(0).child("images").numpy()
    paths = [folder / f"{i}.jpg" for i in range(number)]
    for path in paths:
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        noise = generator.normal(0, 8, (SIZE[1], SIZE[0], 1))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
    return paths

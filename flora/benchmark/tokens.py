"""What merging patches in the vision tower saves: images a second without gradients, and a training step's time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from flora.benchmark.timing import median_seconds
from flora.benchmark.variants import Setting, ours
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.vision import VisionTower
from flora.core.errors import UserError


@dataclass(frozen=True)
class TokenCost:
    """What a model costs whose blocks merge `per_layer` patches each.

    `num_last` is the number of patches that the last block begins with. `stem_seconds` is for one image through a
    frozen vision tower, `step_seconds` for one local step of one client that trains LoRA in all blocks of it.
    """

    per_layer: int
    num_last: int
    stem_seconds: float
    step_seconds: float


def compare_tokens(setting: Setting, numbers: str, *, seconds: float) -> list[str]:
    """Measure each of the comma-separated numbers of patches that a block merges; return a Markdown table.

    Each quantity is measured for about `seconds`, three times at least, after a warm-up; the median is shown. Raises
    `UserError` if one of them is no whole number from 0 on.
    """
    costs = [_cost(replace(setting, tower="vision", merged_per_layer=each), seconds) for each in _numbers(numbers)]
    first = costs[0]
    ratio = f"x {first.per_layer}"
    head = ["merged in a block", "patches in the last", "images per second, frozen", ratio]
    head += [f"ms per LoRA step of {setting.batch_size} images", ratio]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for each in costs:
        cells = [str(each.per_layer), str(each.num_last), f"{1 / each.stem_seconds:.1f}"]
        cells += [f"{first.stem_seconds / each.stem_seconds:.2f}", f"{1000 * each.step_seconds:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{first.step_seconds / each.step_seconds:.2f}"]) + " |")
    return lines


def _numbers(written: str) -> list[int]:
    parts = [part.strip() for part in written.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise UserError(f"--tokens: expected whole numbers from 0 on, separated by commas, got {wrong[0]!r}")
    return [int(part) for part in parts]


def _cost(setting: Setting, seconds: float) -> TokenCost:
    clip = setting.load()
    num_layers = clip.architecture.vision.num_layers
    tower = VisionTower(clip, 2 + num_layers)
    pixels = setting.images(clip)[0][: setting.batch_size]
    stem_seconds = median_seconds(partial(tower.stem, pixels), setting.device, seconds) / len(pixels)
    num_last = tower.num_tokens - 1
    for _ in range(num_layers - 1):
        num_last -= min(setting.merged_per_layer, num_last // 2)
    del clip, tower, pixels
    step = ours(SpeedOptions())(setting)
    return TokenCost(
        setting.merged_per_layer, num_last, stem_seconds, median_seconds(partial(step.run, 1), setting.device, seconds)
    )

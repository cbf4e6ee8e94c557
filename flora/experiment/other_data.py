"""Other data sets that a run's model is evaluated on, whose classes nobody trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flora.clip.towers.towers import AdaptedClip
from flora.config.schema import ExperimentConfig
from flora.core.processes import Processes
from flora.core.progress import Tell
from flora.core.registry import name_of
from flora.data.datasets.base import ImageData
from flora.experiment.images import Loader, naming
from flora.features.features import Features


@dataclass(frozen=True, eq=False)
class OtherData:
    """Another data set: the same model and adapter with the prompts of its classes, and its test images."""

    model: AdaptedClip
    features: Features


def load_other_data(
    config: ExperimentConfig, images: Mapping[str, ImageData], like: AdaptedClip, tell: Tell, processes: Processes
) -> dict[str, OtherData]:
    """Run the stem over the test images of each data set of `evaluation.also`, and return these by name.

    `images` are the data sets' by name; the model and the adapter are those of `like`.

    Prompts come from the data sets' own templates unless `prompts.templates` names some.
    """
    loaded = {}
    for dataset in config.evaluation.also:
        name = name_of(dataset)
        data, given = images[name], config.prompts.templates or dataset.templates
        model = AdaptedClip(
            like.clip,
            like.adapter,
            class_names=data.class_names,
            templates=config.adapter.templates(given),
            speed=config.speed,
        )
        loader = Loader(config, model, tell, dataset.skips_unreadable, processes)
        with naming(f"evaluation.also ({name})"):
            features = loader.load({name: data.test})[name]
        if loader.problems:
            tell.log(f"evaluation.also ({name}): left out: {len(loader.problems):,} images can't be read")
        loaded[name] = OtherData(model, features)
    return loaded

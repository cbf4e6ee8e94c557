"""Other data sets that a run's model is evaluated on, whose classes nobody trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flora.clip.towers.towers import AdaptedClip
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.processes import Processes
from flora.core.progress import Tell
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.data.datasets.base import ImageData
from flora.experiment.images import Loader, images_of, naming
from flora.features.features import Features


@dataclass(frozen=True, eq=False)
class OtherData:
    """Another data set: the same model and adapter with the prompts of its classes, and its test images."""

    model: AdaptedClip
    features: Features


def find_other_data(config: ExperimentConfig, rng: Rng, tell: Tell) -> dict[str, ImageData]:
    """The data sets of `evaluation.also` by their names, before a model is loaded: split as in runs of their own.

    Raises `UserError` naming the setting if one is not there, or has no two classes or no test images.
    """
    found = {}
    for dataset in config.evaluation.also:
        setting = f"evaluation.also ({name_of(dataset)})"
        data = images_of(setting, dataset, rng.child("data"), tell)
        if len(data.class_names) < 2 or not len(data.test):
            raise UserError(f"{setting}: expected test images of at least two classes")
        found[name_of(dataset)] = data
    return found


def other_data(
    config: ExperimentConfig, found: Mapping[str, ImageData], models: Sequence[AdaptedClip], tell: Tell, by: Processes
) -> dict[str, OtherData]:
    """The model and the test images of each data set that was `found`; their stems run here.

    Prompts come from the data sets' own templates unless `prompts.templates` names some.
    """
    result = {}
    for dataset in config.evaluation.also:
        name, clip, adapter = name_of(dataset), models[0].clip, models[0].adapter
        given = config.prompts.templates or dataset.templates
        data = found[name]
        model = AdaptedClip(
            clip,
            adapter,
            class_names=data.class_names,
            templates=config.adapter.templates(given),
            speed=config.speed,
        )
        loader = Loader(config, model, tell, dataset.unreadable == "skip", by)
        with naming(f"evaluation.also ({name})"):
            features = loader.load({name: data.test})[name]
        if loader.problems:
            tell.log(f"evaluation.also ({name}): left out: {len(loader.problems):,} images can't be read")
        result[name] = OtherData(model, features)
    return result

"""What takes time to load or to compute: models, the adapter that a run starts from, the features of its images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flora.clip.adapter_check import check_adapter
from flora.clip.frozen import FrozenClip, parameter_count
from flora.clip.towers.text import with_classes
from flora.clip.towers.towers import AdaptedClip
from flora.config.schema import ExperimentConfig
from flora.core.devices import choose_device
from flora.core.processes import Processes
from flora.core.progress import Tell
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.shared import Shared
from flora.core.tree import State, state_digest
from flora.experiment.images import Images, SplitFeatures, features_key, features_of_splits
from flora.experiment.other_data import OtherData, load_other_data
from flora.experiment.start import starting_adapter
from flora.features.features import images_digest


@dataclass(frozen=True, eq=False)
class BuildContext:
    """What all of building needs: the configuration, its seed tree, who is told, the processes that do it together.

    `shared` has what other experiments of this process have made, and what they will find.
    """

    config: ExperimentConfig
    rng: Rng
    tell: Tell
    processes: Processes
    shared: Shared


@dataclass(frozen=True, eq=False)
class Models:
    """The frozen model with the prompts of its classes, and with those of new ones if there are any; its parameters."""

    models: list[AdaptedClip]
    backbone_parameters: int
    digests: dict[str, str]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What takes time to load or to compute: models, the adapter that a run starts from, the features of its images.

    `models` are the model with the prompts of its classes, and with those of classes that were set aside if there are
    any. `by_template`, `digests` and `other_data` are as in `Experiment`.
    """

    models: list[AdaptedClip]
    backbone_parameters: int
    by_template: Mapping[str, AdaptedClip]
    start: State
    features: SplitFeatures
    digests: dict[str, str]
    other_data: Mapping[str, OtherData]

    @property
    def model(self) -> AdaptedClip:
        """The model with the prompts of the classes that are trained on."""
        return self.models[0]


def prepare(context: BuildContext, images: Images) -> Prepared:
    """Load the models and compute the features, but for what is shared with other experiments.

    Raises `UserError` naming the setting or the file.
    """
    config, shared, tell, processes = context.config, context.shared, context.tell, context.processes
    device = choose_device(config.device, processes)
    loaded = shared.of(_models_key(config, device, images), lambda: _models(context, device, images))
    model = loaded.models[0]
    by_template = shared.of(
        ("by template", id(model), config.evaluation.templates), lambda: _models_by_template(config, model, tell)
    )
    start = starting_adapter(config, model)
    features = shared.of(
        features_key(config, images.data, model),
        lambda: features_of_splits(config, images.data, model, tell, processes),
    )
    other_data = shared.of(
        ("other data", id(model), id(images.other), repr(config.cache)),
        lambda: load_other_data(config, images.other, model, tell, processes),
    )
    digests = loaded.digests | ({"start_sha256": state_digest(start)} if start else {}) | features.digests
    if other_data:
        digests["other_images_sha256"] = images_digest([each.features for each in other_data.values()])
    return Prepared(loaded.models, loaded.backbone_parameters, by_template, start, features, digests, other_data)


def moved(context: BuildContext, prepared: Prepared) -> Prepared:
    """The same with the features of the splits on the model's device, if they fit into half of its free memory."""
    features, device = prepared.features, prepared.model.device
    return replace(prepared, features=context.shared.of(("moved", id(features)), lambda: features.moved(device)))


def _models_key(config: ExperimentConfig, device: torch.device, images: Images) -> Hashable:
    """The key of the models among those that experiments share: the seed, too, where their weights are random."""
    seed = config.seed if config.backbone.weights == "random" else None
    parts = config.backbone, config.adapter, config.prompts, config.data.templates, config.speed, images.descriptions
    personal = config.personal if config.personal.has_personal else None
    names = images.class_names, images.new_class_names
    return "models", seed, repr(parts), personal, names, str(device), config.evaluation.patches is not None


def _models(context: BuildContext, device: torch.device, images: Images) -> Models:
    """Load the frozen model, and adapt it."""
    config, tell = context.config, context.tell
    clip = config.backbone.load(device, context.rng.child("backbone"))
    number = parameter_count(clip.model)
    digests = {"backbone_sha256": state_digest(clip.model.state_dict())}
    precision = config.backbone.precision
    tell.log(f"{clip.architecture.name}: {number:,} frozen parameters on {clip.device}, {precision}")
    models = adapted_models(config, clip, (images.class_names, images.new_class_names), images.descriptions)
    _warn_of_cut_prompts(models, tell)
    _check_clients_per_block(config, models[0])
    if not type(config.adapter).__module__.startswith("flora."):
        check_adapter(config.adapter, models[0])
    if not models[0].text.is_cut_at_end:
        tell.log("the text tower is not causal or not read at the end-of-text token: prompts stay padded")
    return Models(models, number, digests | images.descriptions_digest)


def adapted_models(
    config: ExperimentConfig,
    clip: FrozenClip,
    groups: Sequence[Sequence[str]],
    descriptions: Mapping[str, Sequence[str]],
) -> list[AdaptedClip]:
    """The model with the configuration's adapter and the prompts of each of `groups` of class names that isn't empty.

    All share the adapter. `descriptions` are more sentences for some classes, by their names.
    """
    given = config.prompts.templates or config.data.templates
    reads_patches = config.evaluation.patches is not None or config.adapter.comparison.reads_patches
    clip = replace(clip, reads_patches=reads_patches)
    clip = with_classes(clip, groups, given)
    adapter = config.attach(clip)
    templates = config.adapter.templates(given)
    return [
        AdaptedClip(
            clip,
            adapter,
            class_names=names,
            templates=templates,
            speed=config.speed,
            descriptions={name: descriptions[name] for name in names if name in descriptions},
        )
        for names in groups
        if names
    ]


def _models_by_template(config: ExperimentConfig, model: AdaptedClip, tell: Tell) -> dict[str, AdaptedClip]:
    """The same model with the prompts of each of `evaluation.templates` alone; they share all but the prompts."""
    by_template = {
        template: AdaptedClip(
            model.clip, model.adapter, class_names=model.class_names, templates=(template,), speed=config.speed
        )
        for template in config.evaluation.templates
    }
    _warn_of_cut_prompts(list(by_template.values()), tell)
    return by_template


def _warn_of_cut_prompts(models: Sequence[AdaptedClip], tell: Tell) -> None:
    for line in dict.fromkeys(line for model in models for line in model.text.cut_prompts):
        tell.log(f"warning: prompts: {line}")


def _check_clients_per_block(config: ExperimentConfig, model: AdaptedClip) -> None:
    limit, asked = model.adapter.max_clients_per_block, config.clients.per_block
    if limit is not None and asked is not None and asked > limit:
        raise OptionError("clients.per_block", f"expected at most {limit} with this adapter, got {asked}")

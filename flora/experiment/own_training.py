"""What the server has to train on by itself: images of other data sets, and descriptions of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flora.clip.adapters.base import AttachedAdapter
from flora.clip.towers.text import TextTower
from flora.clip.towers.towers import AdaptedClip
from flora.config.descriptions import check_known, read_descriptions
from flora.config.rules import below
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.registry import OptionError, name_of, show, suggest
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageData, Split, checked_images
from flora.data.prompts import PromptOptions
from flora.data.value_range import with_one_range
from flora.engine.engine import Engine
from flora.experiment.images import Tell
from flora.features.features import Features, StoredFeatures, images_digest, load_features
from flora.federated.own_training import OwnExamples, OwnTraining


@dataclass(frozen=True, eq=False)
class ServerData:
    """What the server has: labelled images, images without a label, and sentences with the classes that they describe.

    Labels are places among all classes of the run, those set aside behind the others. None where it has none.
    """

    synthetic: Split | None = None
    public: Split | None = None
    sentences: tuple[tuple[str, int], ...] = ()


def find_server_data(config: ExperimentConfig, data: ImageData, rng: Rng, tell: Tell) -> ServerData:
    """Find what the server has, and check it, before the model is loaded. Raises `UserError` naming the setting."""
    server, names = config.server, (*data.class_names, *data.new_class_names)
    synthetic = public = None
    if server.synthetic is not None:
        setting = "server.synthetic.data"
        found = _images(setting, server.synthetic.data, rng.child("synthetic"), tell)
        split = _drawn(setting, found.train, server.synthetic.num_images, rng.child("synthetic images"))
        with below("server.synthetic"):
            own_names = PromptOptions(class_names=server.synthetic.class_names).rename(found.class_names)
        synthetic = _relabelled(setting, split, own_names, names)
    if server.distillation is not None:
        setting = "server.distillation.data"
        found = _images(setting, server.distillation.data, rng.child("public"), tell)
        public = _drawn(setting, found.train, server.distillation.num_images, rng.child("public images"))
        public = replace(public, labels=np.zeros(len(public), np.int64))
    return ServerData(synthetic, public, _sentences(config, names))


def _images(setting: str, dataset: Dataset, rng: Rng, tell: Tell) -> ImageData:
    found = checked_images(setting, dataset, dataset.load_with_progress(rng, tell.progress))
    return with_one_range(found, dataset.value_range, whole=found, progress=tell.progress, log=tell.log)[0]


def _drawn(setting: str, split: Split, number: int | None, rng: Rng) -> Split:
    """As many of a split's images, drawn at random, in their order."""
    if number is None:
        return split
    if number > len(split):
        option = setting.removesuffix("data") + "num_images"
        raise OptionError(option, f"expected at most {len(split)}, the images there are, got {number}")
    return split.subset(np.sort(rng.numpy().permutation(len(split))[:number]))


def _relabelled(setting: str, split: Split, own_names: Sequence[str], names: Sequence[str]) -> Split:
    """A split whose labels are places among `names`. Raises `UserError` if it has a class that is not among them."""
    unknown = next((own_names[label] for label in np.unique(split.labels) if own_names[label] not in names), None)
    if unknown is not None:
        raise UserError(
            f"{setting}: class {show(unknown)} is none of the run's; {suggest(unknown, names)}; "
            "server.synthetic.class_names can rename it"
        )
    places = np.array([names.index(name) if name in names else -1 for name in own_names])
    return replace(split, labels=places[split.labels])


def _sentences(config: ExperimentConfig, names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Each sentence of `server.text_rounds.descriptions`, with the place among `names` of the class it describes."""
    if config.server.text_rounds is None:
        return ()
    path = config.server.text_rounds.descriptions
    setting = "server.text_rounds.descriptions"
    described = read_descriptions(path, setting)
    check_known(path, described, names, setting)
    renamed = dict(zip(names, config.prompts.rename(tuple(names)), strict=True))
    pairs = [(name, each.replace("{}", renamed[name])) for name, own in described.items() for each in own]
    sentences = {sentence: names.index(name) for name, sentence in pairs}
    if len(sentences) < len(pairs):
        texts = [text for _, text in pairs]
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(f"{setting}: {path}: {show(twice)} is there twice")
    return tuple(sentences.items())


def own_training(
    config: ExperimentConfig, found: ServerData, models: Sequence[AdaptedClip], tell: Tell
) -> tuple[OwnTraining, OwnExamples | None, dict[str, str]]:
    """What the server trains on after rounds, and before round 1; and a digest of it all, by its name.

    `models` are the model with the prompts of the classes that are trained on, and with those of classes set aside.
    """
    server, digest = config.server, hashlib.sha256(repr(found.sentences).encode())
    images: dict[str, Features] = {}
    for name, split in {"synthetic": found.synthetic, "public": found.public}.items():
        if split is not None:
            images[name] = _features(config, split, models[0], tell)
            digest.update(images_digest([images[name]]).encode() + images[name].labels.numpy().tobytes())
    for_all = _with_all_classes(models) if found.synthetic is not None or found.sentences else models[0]
    warm_up = public = texts = None
    if server.synthetic is not None:
        warm_up = OwnExamples(Engine(for_all, images["synthetic"], 1), server.synthetic.training())
    if server.distillation is not None:
        public = OwnExamples(Engine(models[0], images["public"], 1, log=tell.log), server.distillation.training())
    if server.text_rounds is not None:
        _check_images_stay(config, models[0].adapter, 2 + models[0].clip.architecture.vision.num_layers)
        features = _text_features(for_all, found.sentences)
        texts = OwnExamples(Engine(for_all, features, 1), server.text_rounds.training(), server.text_rounds.every)
    digests = {"server_data_sha256": digest.hexdigest()} if images or found.sentences else {}
    return OwnTraining(public, texts), warm_up, digests


def _features(config: ExperimentConfig, split: Split, model: AdaptedClip, tell: Tell) -> Features:
    (features,), _ = load_features(
        [split], model, cache=config.cache, skip_unreadable=False, progress=tell.progress, log=tell.log
    )
    return features


def _with_all_classes(models: Sequence[AdaptedClip]) -> AdaptedClip:
    """The model with the prompts of all classes, those set aside behind the others."""
    if len(models) == 1:
        return models[0]
    descriptions: Mapping[str, Sequence[str]] = {**models[0].descriptions, **models[1].descriptions}
    return AdaptedClip(
        models[0].clip,
        models[0].adapter,
        class_names=[name for model in models for name in model.class_names],
        templates=models[0].templates,
        speed=models[0].speed,
        descriptions=descriptions,
    )


def _check_images_stay(config: ExperimentConfig, adapter: AttachedAdapter, num_stages: int) -> None:
    """Raise `OptionError` if the adapter changes image features: descriptions stand in for the frozen model's."""
    if adapter.trained_from["vision"] < num_stages or type(adapter).adapt_images is not AttachedAdapter.adapt_images:
        raise OptionError(
            "server.text_rounds", f"expected none, because adapter {name_of(config.adapter)} changes image features"
        )


def _text_features(model: AdaptedClip, sentences: Sequence[tuple[str, int]]) -> StoredFeatures:
    """The frozen model's features of sentences, `(N, embed_dim)`, in the shape of a whole vision tower's output."""
    tower = TextTower(model.clip, 2 + model.clip.architecture.text.num_layers)
    texts = [text for text, _ in sentences]
    stem: Tensor = tower.stem(tower.prompts(texts, ("{}",))).to(model.clip.dtype)
    if model.vision.reads_patches:
        stem = stem.unsqueeze(1)
    labels = torch.tensor([label for _, label in sentences])
    return StoredFeatures(stem, torch.arange(len(stem), device=stem.device), labels, np.arange(len(stem)))

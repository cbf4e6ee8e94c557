"""What the server has to train on by itself: images of other data sets, and descriptions of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flora.clip.towers.text import TextTower
from flora.clip.towers.towers import AdaptedClip
from flora.config.descriptions import check_known, read_descriptions
from flora.config.rules import in_section
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.processes import ALONE, Processes
from flora.core.progress import Tell
from flora.core.registry import show, suggest
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageData, Split
from flora.data.prompts import PromptOptions
from flora.engine.engine import Engine
from flora.experiment.images import Loader, images_of, naming
from flora.features.features import Features, StoredFeatures, images_digest
from flora.federated.server_training import ServerExamples, ServerTraining


@dataclass(frozen=True, eq=False)
class ServerData:
    """What the server has: labelled images, images without a label, and sentences with the classes that they describe.

    Labels are places among all classes of the run, those set aside behind the others.
    """

    synthetic: Split | None = None
    public: Split | None = None
    sentences: tuple[tuple[str, int], ...] = ()


def find_server_data(config: ExperimentConfig, data: ImageData, rng: Rng, tell: Tell) -> ServerData:
    """Find what the server has, and check it, before the model is loaded. Raises `UserError` naming the setting."""
    server, names = config.server, (*data.class_names, *data.new_class_names)
    synthetic = public = None
    if server.synthetic is not None:
        other = images_of("server.synthetic.data", server.synthetic.data, rng.child("synthetic"), tell)
        split = _drawn(other.train, server.synthetic.num_images, rng.child("synthetic images"))
        with in_section("server.synthetic"):
            own_names = PromptOptions(class_names=server.synthetic.class_names).rename(other.class_names)
        synthetic = _relabelled(split, own_names, names)
    if server.distillation is not None:
        other = images_of("server.distillation.data", server.distillation.data, rng.child("public"), tell)
        public = _drawn(other.train, server.distillation.num_images, rng.child("public images"))
        public = replace(public, labels=np.zeros(len(public), np.int64))
    return ServerData(synthetic, public, _sentences(config, names))


def _drawn(split: Split, number: int | None, rng: Rng) -> Split:
    """At most as many of a split's images, drawn at random, in their order."""
    if number is None or number >= len(split):
        return split
    return split.subset(np.sort(rng.numpy().permutation(len(split))[:number]))


def _relabelled(split: Split, own_names: Sequence[str], names: Sequence[str]) -> Split:
    """A split whose labels are places among `names`. Raises `UserError` if it has a class that is not among them."""
    unknown = next((own_names[label] for label in np.unique(split.labels) if own_names[label] not in names), None)
    if unknown is not None:
        raise UserError(
            f"server.synthetic.data: class {show(unknown)} is none of the run's; {suggest(unknown, names)}; "
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
    class_of: dict[str, str] = {}
    for name, sentences in described.items():
        for sentence in (each.replace("{}", renamed[name]) for each in sentences):
            other = class_of.setdefault(sentence, name)
            if other != name:
                raise UserError(f"{setting}: {path}: {show(sentence)} describes both {show(other)} and {show(name)}")
    return tuple((sentence, names.index(name)) for sentence, name in class_of.items())


def server_training(
    config: ExperimentConfig,
    data: ServerData,
    models: Sequence[AdaptedClip],
    clients_per_block: int,
    tell: Tell,
    processes: Processes = ALONE,
) -> ServerTraining:
    """What the server trains on, as features.

    `models` are the model with the prompts of the classes that are trained on, and with those of classes set aside.
    """
    server, model = config.server, models[0]
    for_all = _with_all_classes(models) if data.synthetic is not None or data.sentences else model
    loader = Loader(config, model, tell, skip_unreadable=False, processes=processes)
    synthetic = public = texts = None
    if server.synthetic is not None and data.synthetic is not None:
        features = _features("synthetic", server.synthetic.data, data.synthetic, loader)
        synthetic = ServerExamples("server.synthetic", Engine(for_all, features, 1), server.synthetic.training())
    if server.distillation is not None and data.public is not None:
        features = _features("distillation", server.distillation.data, data.public, loader)
        engine = Engine(model, features, clients_per_block, log=tell.log)
        public = ServerExamples("server.distillation", engine, server.distillation.training())
    if server.text_rounds is not None:
        features = _text_features(for_all, data.sentences, tell)
        engine = Engine(for_all, features, 1)
        texts = ServerExamples("server.text_rounds", engine, server.text_rounds.training(), server.text_rounds.every)
    return ServerTraining(synthetic, public, texts)


def server_digests(training: ServerTraining, data: ServerData) -> dict[str, str]:
    """A SHA-256 of what the server trains on, for each section of the configuration that says so."""
    digests = {}
    for examples in training.all:
        features, digest = examples.engine.features, hashlib.sha256()
        if features.digests is None:
            digest.update(repr(data.sentences).encode())
        else:
            digest.update(images_digest([features]).encode())
        digest.update(features.labels.numpy().tobytes())
        digests[f"{examples.setting.replace('.', '_')}_sha256"] = digest.hexdigest()
    return digests


def _features(name: str, dataset: Dataset, split: Split, loader: Loader) -> Features:
    """A split's features, of the data set of `server.NAME`."""
    loader = replace(loader, skip_unreadable=dataset.skips_unreadable, problems=[])
    with naming(f"server.{name}.data"):
        features = loader.load({name: split})[name]
    if loader.problems:
        number, first = len(loader.problems), loader.problems[0]
        loader.tell.log(f"server.{name}.data: left out: {number:,} images can't be read; the first: {first}")
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


def _text_features(model: AdaptedClip, sentences: Sequence[tuple[str, int]], tell: Tell) -> StoredFeatures:
    """The frozen model's features of sentences, `(N, embed_dim)`, in the shape of a whole vision tower's output."""
    tower = TextTower(model.clip, 2 + model.clip.architecture.text.num_layers)
    texts, longest = [text for text, _ in sentences], model.clip.architecture.context_length
    too_long = [text for text in texts if model.clip.num_tokens(text) > longest]
    if too_long:
        tell.log(
            f"warning: server.text_rounds.descriptions: the model reads {longest} tokens: {len(too_long)} sentences "
            f"are cut off, the first is {show(too_long[0])}"
        )
    stem = tower.stem(tower.texts(texts)).to(model.clip.dtype)
    if model.vision.reads_patches:
        stem = stem.unsqueeze(1)
    labels = torch.tensor([label for _, label in sentences])
    return StoredFeatures(stem, torch.arange(len(stem), device=stem.device), labels, np.arange(len(stem)))

"""List what a run works with: its environment, its prompts, what each client has, and whose each image is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flora.clip.towers.towers import AdaptedClip
from flora.core.states import ClientData
from flora.data.datasets.base import Split
from flora.experiment.build import Experiment
from flora.features.features import Features
from flora.runs.environment import environment

EXAMPLE_COLUMNS = ("image", "class", "split", "client", "name")


def prompts_as_used(experiment: Experiment) -> dict[str, Any]:
    """The content of `prompts.json`: each class's prompts as the text tower gets them, as JSON types."""
    config, data, model = experiment.config, experiment.data, experiment.federation.engine.model
    assert data is not None
    given = config.prompts.templates or config.data.templates
    shown = dict(zip(model.templates, config.adapter.shown_templates(given), strict=True))
    content: dict[str, Any] = {
        "templates": list(shown.values()),
        "learned_context": model.adapter.learned_context,
        "max_tokens": model.clip.architecture.context_length,
        "classes": _classes(model, data.class_names, list(shown.values())),
    }
    models = [model]
    if experiment.new is not None:
        models.append(experiment.new.model)
        content["new_classes"] = _classes(models[1], data.new_class_names, list(shown.values()))
    cut = [pair for each in models for pair in each.text.num_tokens_of_cut]
    return content | {"cut_off": [shown.get(template, template).format(name) for name, template in cut]}


def _classes(model: AdaptedClip, data_names: Sequence[str], templates: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            **({} if data_name == name else {"data_name": data_name}),
            "prompts": [template.format(name) for template in (*templates, *model.descriptions.get(name, ()))],
        }
        for name, data_name in zip(model.class_names, data_names, strict=True)
    ]


def partition_as_used(experiment: Experiment) -> dict[str, Any]:
    """The content of `partition.json`: what each client has, as JSON types."""
    federation, class_names = experiment.federation, experiment.class_names
    labels = federation.engine.features.labels.numpy()

    def rows(clients: Sequence[ClientData], first: int) -> list[dict[str, Any]]:
        return [_share(client, index, labels, class_names) for index, client in enumerate(clients, start=first)]

    content: dict[str, Any] = {
        "class_names": list(class_names),
        "num_train": len(labels),
        "num_test": len(experiment.test),
        "clients": rows(federation.clients, 0),
    }
    if experiment.unseen:
        content["unseen_clients"] = rows(experiment.unseen, len(federation.clients))
    if federation.canaries is not None:
        content["canaries"] = federation.canaries.to_dict()
    if any(client.name is not None for client in federation.clients):
        content["clients_without_training_images"] = list(experiment.left_out)
    return content


def _share(client: ClientData, index: int, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The row of one client in `partition.json`, as JSON types; `labels` are those of all training examples."""
    counts = np.bincount(labels[client.train], minlength=len(class_names))
    return {
        "client": index,
        **({} if client.name is None else {"name": client.name}),
        "num_train": len(client.train),
        **({"num_unlabelled": len(client.unlabelled)} if len(client.unlabelled) else {}),
        "num_held_out": len(client.held_out),
        "class_counts": {name: int(count) for name, count in zip(class_names, counts, strict=True) if count},
    }


def environment_as_used(experiment: Experiment) -> dict[str, Any]:
    """The content of `environment.json`: what the run depends on besides its configuration, as JSON types."""
    engine, limits = experiment.federation.engine, experiment.value_range
    return {
        **environment(engine.model.device, experiment.config.seed, engine.clients_per_block, engine.processes.size),
        **({} if engine.num_runs == 1 else {"runs_in_one_step": engine.num_runs}),
        "value_range": None if limits is None else list(limits),
        **experiment.digests,
    }


def examples_as_used(experiment: Experiment) -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of `examples.csv`, as `EXAMPLE_COLUMNS`: whose each image is, and what for.

    `split` is train, unlabelled (a training image of which the client does not know the label), held_out, test or new
    (classes that were set aside), or unused: a training image that no client has; unseen_train, unseen_unlabelled and
    unseen_held_out are those of clients that never train. An image that several clients have
    has a row for each. Images that can't be read have none.
    """
    data, federation = experiment.data, experiment.federation
    features = federation.engine.features
    assert data is not None
    used = np.zeros(len(features), bool)
    for index, client in enumerate([*federation.clients, *experiment.unseen]):
        prefix = "unseen_" if index >= len(federation.clients) else ""
        for split, examples in (
            (f"{prefix}train", client.train),
            (f"{prefix}unlabelled", client.unlabelled),
            (f"{prefix}held_out", client.held_out),
        ):
            used[examples] = True
            for row in _rows(data.train, features, examples, data.class_names):
                yield *row, split, str(index), client.name or ""
    others: list[tuple[str, Split, Features, np.ndarray, Sequence[str]]] = [
        ("unused", data.train, features, np.flatnonzero(~used), data.class_names),
        ("test", data.test, experiment.test, np.arange(len(experiment.test)), data.class_names),
    ]
    if experiment.new is not None and data.new is not None:
        new = experiment.new.features
        others.append(("new", data.new, new, np.arange(len(new)), data.new_class_names))
    for split, images, kept, examples, class_names in others:
        for row in _rows(images, kept, examples, class_names):
            yield *row, split, "", ""


def _rows(
    images: Split, features: Features, examples: np.ndarray, class_names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Each image's name, and that of its class."""
    for place in features.split_indices[examples].tolist():
        image = images.source.name(int(images.source_indices[place]))
        yield image, class_names[int(images.labels[place])]

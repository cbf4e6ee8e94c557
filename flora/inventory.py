"""What a run works with, as it is written down at its start: its prompts, and whose each image is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flora.clip.towers import AdaptedClip
from flora.experiment import Experiment


def prompts_as_used(experiment: Experiment) -> dict[str, Any]:
    """The content of `prompts.json`: each class's prompts as the text tower gets them, as JSON types."""
    config, data, model = experiment.config, experiment.data, experiment.federation.model
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
        models.append(experiment.new[0])
        content["new_classes"] = _classes(models[1], data.new_class_names, list(shown.values()))
    cut = [pair for each in models for pair in each.text.num_tokens_of_cut]
    return content | {"cut_off": [shown[template].format(name) for name, template in cut]}


def _classes(model: AdaptedClip, data_names: Sequence[str], templates: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            **({} if data_name == name else {"data_name": data_name}),
            "prompts": [template.format(name) for template in templates],
        }
        for name, data_name in zip(model.class_names, data_names, strict=True)
    ]

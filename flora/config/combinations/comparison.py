"""What adapters combine with that compare images and classes in another way than by cosines of one feature each."""

from __future__ import annotations

from flora.clip.comparison import COSINES
from flora.config.combinations.rule import Rule
from flora.config.schema import ExperimentConfig

COMPARISON: tuple[Rule, ...] = (
    Rule(
        "local.objective",
        "an adapter that compares images and classes in its own way needs an objective of logits alone (cross_entropy, "
        "multi_positive)",
        lambda c: _compares_otherwise(c) and not c.local.objective.from_logits,
        "expected cross_entropy or multi_positive: {objective} compares features by itself, and {adapter} has its own "
        "way",
    ),
    Rule(
        "local.penalty",
        "and a penalty of logits alone (none, distillation, prograd, reciprocal_consistency)",
        lambda c: _compares_otherwise(c) and not c.local.penalty.from_logits,
        "expected none, distillation, prograd or reciprocal_consistency: {penalty} compares features by itself, and "
        "{adapter} has its own way",
    ),
    Rule(
        "evaluation.patches",
        "and nothing that patches add to a similarity",
        lambda c: _compares_otherwise(c) and c.evaluation.patches is not None,
        "expected none, because {adapter} compares images and classes in its own way",
    ),
    Rule(
        "backbone.tokens",
        "an adapter that compares patches needs all tokens of an image",
        lambda c: c.adapter.comparison.reads_patches and not c.backbone.tokens.is_idle,
        "expected all, because {adapter} compares the patches of an image",
    ),
    Rule(
        "server.text_rounds",
        "and no text rounds: descriptions have no patches",
        lambda c: c.adapter.comparison.reads_patches and c.server.text_rounds is not None,
        "expected none, because {adapter} compares the patches of an image, and descriptions have none",
    ),
    Rule(
        "local.self_training",
        "an adapter that makes class features of each image needs images with labels alone",
        lambda c: c.adapter.comparison.by_image and c.local.active_self_training is not None,
        "expected none, because {adapter} makes class features of each image of a step that has a label",
    ),
)


def _compares_otherwise(config: ExperimentConfig) -> bool:
    """Whether the adapter compares images and classes in another way than by cosines."""
    return config.adapter.comparison != COSINES

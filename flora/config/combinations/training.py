"""What sampling, prompts, augmentation and features that are kept combine with."""

from __future__ import annotations

from flora.clip.adapters.base import Adapter
from flora.config.combinations.rule import Rule
from flora.config.schema import ExperimentConfig

TRAINING: tuple[Rule, ...] = (
    Rule(
        "local.sampling",
        "sampling that weighs examples (by_loss, effective_number) needs an objective that is a mean over examples "
        "(cross_entropy)",
        lambda c: c.local.sampling.weighs and not c.local.objective.weighs_examples,
        "{sampling} weighs examples: expected local.objective cross_entropy, got {objective}",
    ),
    Rule(
        "split",
        "classes set aside (base_to_new) need an adapter without weights for each class",
        lambda c: c.split.sets_classes_aside and c.adapter.knows_classes,
        "base_to_new needs an adapter without weights for each class, got {adapter}",
    ),
    Rule(
        "prompts.descriptions",
        "descriptions need an adapter that reads the experiment's prompts",
        lambda c: c.prompts.descriptions is not None and _makes_prompts(c),
        "expected none, because {adapter} has prompts of its own",
    ),
    Rule(
        "local.prompts",
        "drawn prompts need an adapter that trains with the experiment's prompts, and has no weights for each class",
        lambda c: c.local.prompts == "random" and (_makes_prompts(c) or c.adapter.knows_classes),
        "expected ensemble, because {adapter} does not train with the experiment's prompts",
    ),
    Rule(
        "local.prompts",
        "prompts can be drawn where classes have several",
        lambda c: (
            c.local.prompts == "random"
            and c.prompts.descriptions is None
            and len(c.prompts.templates or c.data.templates) == 1
        ),
        "expected ensemble: with one template and no prompts.descriptions there is nothing to draw",
    ),
    Rule(
        "evaluation.templates",
        "templates to evaluate with need an adapter that reads the experiment's prompts then, without weights for each "
        "class",
        lambda c: bool(c.evaluation.templates) and (_makes_prompts(c) or c.adapter.knows_classes),
        "expected none, because {adapter} does not read the experiment's prompts",
    ),
    Rule(
        "evaluation.also",
        "other data sets to evaluate on need an adapter without weights for each class",
        lambda c: bool(c.evaluation.also) and c.adapter.knows_classes,
        "expected none, because {adapter} has weights for each class of the run's own data",
    ),
    Rule(
        "evaluation.also",
        "and a reduction of tokens (backbone.tokens) that does not read the classes of the run",
        lambda c: bool(c.evaluation.also) and not c.backbone.tokens.is_idle and c.backbone.tokens.reads_classes,
        "expected none, because backbone.tokens reads the classes of the run's own data",
    ),
    Rule(
        "backbone.tokens",
        "fewer tokens of an image need an adapter that adds none, and changes none behind a block",
        lambda c: not c.backbone.tokens.is_idle and not c.adapter.takes_fewer_tokens,
        "expected all, because {adapter} needs all tokens of an image",
    ),
    Rule(
        "evaluation.patches",
        "what patches add to a similarity needs an adapter that adds none to those of the image",
        lambda c: c.evaluation.patches is not None and c.adapter.adds_image_tokens,
        "expected none, because {adapter} adds tokens to those of the image",
    ),
    Rule(
        "cache.enabled",
        "images that are augmented have no features to keep, unless a number of views of each is kept (cache.views)",
        lambda c: bool(c.cache.enabled) and c.local.augmentation.changes_images and c.cache.views is None,
        "expected false or null where local.augmentation changes images: their features can't be kept, but those of a "
        "number of views can, cache.views",
    ),
    Rule(
        "cache.views",
        "views are kept where features are, and where something makes them",
        lambda c: c.cache.views is not None and (c.cache.enabled is False or not _makes_views(c)),
        "expected none: no image is changed at random (local.augmentation, local.self_training), or cache.enabled is "
        "false",
    ),
    Rule(
        "cache.storage",
        "features of fewer tokens (backbone.tokens) are not kept in bfloat16, which can't hold all sizes of tokens",
        lambda c: c.cache.storage == "bfloat16" and not c.backbone.tokens.is_idle,
        "expected computed or float16, because bfloat16 can't hold the sizes of tokens (backbone.tokens)",
    ),
    Rule(
        "evaluation.centralized",
        "training on all images in one place, for comparison, needs clients (no clients.centralized)",
        lambda c: c.evaluation.centralized and c.clients.centralized,
        "expected false: with clients.centralized the run itself trains on all images in one place",
    ),
    Rule(
        "clients.held_out_fraction",
        "clients that never train need others that do (no clients.centralized)",
        lambda c: bool(c.clients.held_out_fraction) and c.clients.centralized,
        "expected 0, because with clients.centralized there is one client, with the images of all",
    ),
    Rule(
        "local.self_training",
        "self-training needs images without a label",
        lambda c: c.local.self_training is not None and c.clients.labelled_fraction == 1,
        "there are no images without a label: expected clients.labelled_fraction below 1",
    ),
)


def _makes_views(config: ExperimentConfig) -> bool:
    """Whether training images are changed at random."""
    self_training = config.local.active_self_training
    of_others = () if self_training is None else (self_training.weak, self_training.strong)
    return any(each.changes_images for each in (config.local.augmentation, *of_others))


def _makes_prompts(config: ExperimentConfig) -> bool:
    """Whether the adapter has prompts of its own in place of the experiment's."""
    return type(config.adapter).templates is not Adapter.templates

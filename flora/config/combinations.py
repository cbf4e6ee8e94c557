"""What combines with what: one table of rules, each a predicate, the settings that it is about, and a reason.

`check_combinations` reads it, docs/combinations.md is generated from it, and a test runs every pair that it allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flora.clip.adapters.base import Adapter
from flora.clip.adapters.lora import Lora
from flora.communication.network import StragglerPolicy
from flora.config.schema import ExperimentConfig
from flora.core.registry import Component, OptionError, name_of
from flora.server.aggregators import Mean
from flora.server.optimizers import ServerSgd
from flora.server.strategies.base import Strategy


@dataclass(frozen=True)
class Rule:
    """What can't be together: where `refuses` says so, an error names `setting` and says `message`.

    `message` may have the names of the configuration's components in braces: {strategy}, {aggregator}, {correction},
    {personal}, {adapter}, {objective}, {sampling}. `what` is the rule in words, for a reader of the docs.
    """

    setting: str
    what: str
    refuses: Callable[[ExperimentConfig], bool]
    message: str


def check_combinations(config: ExperimentConfig) -> None:
    """Raise `OptionError` naming a setting for the first rule of the table that refuses the configuration."""
    for rule in RULES:
        if rule.refuses(config):
            raise OptionError(rule.setting, rule.message.format(**dict(_names(config))))


def _names(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    components: dict[str, Component] = {
        "strategy": config.server.strategy,
        "aggregator": config.server.aggregator,
        "correction": config.local.correction,
        "personal": config.personal,
        "adapter": config.adapter,
        "objective": config.local.objective,
        "sampling": config.local.sampling,
    }
    for key, component in components.items():
        yield key, name_of(component)


def _remembers(config: ExperimentConfig) -> bool:
    """Whether the correction has a memory at the clients and the server."""
    return bool(config.local.correction.memory(torch.empty(1)))


def _is_plain_mean(config: ExperimentConfig) -> bool:
    return (config.server.aggregator, config.server.optimizer) == (Mean(), ServerSgd())


def _has_personal(config: ExperimentConfig) -> bool:
    """Whether some tensors stay with their clients."""
    return config.server.strategy.has_personal or config.adapter.has_personal


def _trains_own(config: ExperimentConfig) -> bool:
    """Whether clients train a second adapter in each round."""
    return config.personal.in_round(config.local) is not None


def _waits_for_buffer(config: ExperimentConfig) -> bool:
    return config.server.schedule.waits_for_buffer


def _server_trains(config: ExperimentConfig) -> bool:
    """Whether the server trains the adapter by itself."""
    return any((config.server.synthetic, config.server.distillation, config.server.text_rounds))


def _makes_views(config: ExperimentConfig) -> bool:
    """Whether training images are changed at random."""
    own = config.local.active_self_training
    of_others = () if own is None else (own.weak, own.strong)
    return any(each.changes_images for each in (config.local.augmentation, *of_others))


def _makes_prompts(config: ExperimentConfig) -> bool:
    """Whether the adapter has prompts of its own in place of the experiment's."""
    return type(config.adapter).templates is not Adapter.templates


_EXPECT_NO_MEMORY = "expected none or fedprox, because"
_SYNCHRONOUS = "expected synchronous, because {strategy}"

RULES: tuple[Rule, ...] = (
    Rule(
        "server.strategy",
        "a strategy that replaces the plain mean (flexlora, lora_fair, flora_stacking, fedex_lora) needs aggregator "
        "mean, server optimizer sgd with its defaults, and no correction that remembers",
        lambda c: c.server.strategy.replaces_mean and (not _is_plain_mean(c) or _remembers(c)),
        "{strategy} replaces the plain mean: expected aggregator mean, optimizer sgd with its defaults, and no "
        "correction that the server remembers",
    ),
    Rule(
        "local.optimizer_state",
        "an optimiser's state can't be kept where the strategy trains other tensors from round to round (rolora)",
        lambda c: c.local.optimizer_state == "kept" and c.server.strategy.alternates,
        "expected fresh, because the strategy trains other tensors from round to round",
    ),
    Rule(
        "local.optimizer_state",
        "nor where what clients train starts anew each round (flora_stacking)",
        lambda c: c.local.optimizer_state == "kept" and c.server.strategy.restarts,
        "expected fresh, because the strategy starts anew each round",
    ),
    Rule(
        "local.optimizer_state",
        "nor where A and B get another basis each round (flexlora)",
        lambda c: c.local.optimizer_state == "kept" and c.server.strategy.changes_basis,
        "expected fresh, because the strategy gives A and B another basis each round",
    ),
    Rule(
        "communication.error_feedback",
        "error feedback needs a strategy that trains the same tensors each round and does not replace the mean",
        lambda c: c.communication.error_feedback and (c.server.strategy.alternates or c.server.strategy.replaces_mean),
        "expected false, because what is lost of one round's factors is no part of the next one's",
    ),
    Rule(
        "communication.upload",
        "a correction that reads deltas (feddyn) needs uploads that lose nothing",
        lambda c: c.local.correction.reads_deltas and not c.communication.upload.is_identity,
        "expected none, because {correction} reads the deltas themselves",
    ),
    Rule(
        "communication.broadcast",
        "a strategy with a residual (flora_stacking, fedex_lora) needs a broadcast that loses nothing",
        lambda c: c.server.strategy.keeps_residual and not c.communication.broadcast.is_identity,
        "expected none, because the strategy sends a residual",
    ),
    Rule(
        "local.correction",
        "a correction that remembers (scaffold, feddyn) needs the same trained tensors each round",
        lambda c: _remembers(c) and c.server.strategy.alternates,
        f"{_EXPECT_NO_MEMORY} the strategy trains other tensors from round to round",
    ),
    Rule(
        "local.correction",
        "and no tensors that stay with their clients (fedsa_lora, plora, dual_lora)",
        lambda c: _remembers(c) and _has_personal(c),
        f"{_EXPECT_NO_MEMORY} some tensors stay with their clients",
    ),
    Rule(
        "local.correction",
        "and no clients' own ranks",
        lambda c: _remembers(c) and c.clients.ranks is not None,
        f"{_EXPECT_NO_MEMORY} clients have ranks of their own",
    ),
    Rule(
        "server.screening.policy",
        "and no clipping of updates",
        lambda c: _remembers(c) and c.server.screening.policy == "clip",
        "expected skip or abort, because {correction} remembers what clip takes away",
    ),
    Rule(
        "server.aggregator",
        "and the aggregator mean",
        lambda c: _remembers(c) and c.server.aggregator != Mean(),
        "expected mean, because {correction} remembers the mean over all clients, those that {aggregator} leaves out "
        "or scales down included",
    ),
    Rule(
        "local.correction",
        "and a strategy that weighs each client by itself (a method `weight`, not `weights`)",
        lambda c: _remembers(c) and type(c.server.strategy).weights is not Strategy.weights,
        "expected none or fedprox, because {correction} needs the weights of all clients, and {strategy} has `weights` "
        "of its own: give it a `weight` instead",
    ),
    Rule(
        "personal",
        "ditto needs an adapter of which no tensor stays with its client anyway",
        lambda c: _trains_own(c) and _has_personal(c),
        "{personal} can't be used, because some of the adapter's tensors stay with their clients anyway",
    ),
    Rule(
        "personal",
        "and a strategy that keeps the basis of A and B",
        lambda c: _trains_own(c) and c.server.strategy.changes_basis,
        "{personal} can't be used, because the strategy gives A and B another basis each round, and a distance from "
        "them means nothing",
    ),
    Rule(
        "personal",
        "and one without a residual",
        lambda c: _trains_own(c) and c.server.strategy.keeps_residual,
        "{personal} can't be used, because the strategy restarts or corrects the adapter by a residual",
    ),
    Rule(
        "clients.ranks",
        "clients' own ranks need adapter lora",
        lambda c: c.clients.ranks is not None and not isinstance(c.adapter, Lora),
        "expected adapter lora, got {adapter}",
    ),
    Rule(
        "clients.ranks",
        "and a strategy for factors of different sizes (hetlora, flexlora, flora_stacking)",
        lambda c: c.clients.ranks is not None and not c.server.strategy.takes_ranks,
        "{strategy} has no rule for factors of different sizes: expected server.strategy hetlora, flexlora or "
        "flora_stacking",
    ),
    Rule(
        "clients.ranks",
        "and the plain mean",
        lambda c: c.clients.ranks is not None and not _is_plain_mean(c),
        "expected server.aggregator mean and server.optimizer sgd with its defaults",
    ),
    Rule(
        "clients.ranks",
        "and communication that loses nothing",
        lambda c: c.clients.ranks is not None and not c.communication.is_exact,
        "expected communication.broadcast and communication.upload to lose nothing",
    ),
    Rule(
        "server.stragglers",
        "a policy for stragglers needs a network",
        lambda c: c.network is None and c.server.stragglers != StragglerPolicy(),
        "expected a network: without one all clients deliver at once",
    ),
    Rule(
        "network",
        "a buffered schedule needs a network",
        lambda c: _waits_for_buffer(c) and c.network is None,
        "missing: a buffered schedule needs to know who is how fast",
    ),
    Rule(
        "server.stragglers",
        "and no policy for stragglers",
        lambda c: _waits_for_buffer(c) and c.server.stragglers != StragglerPolicy(),
        "expected the defaults: a buffered schedule waits for its buffer alone",
    ),
    Rule(
        "server.schedule",
        "and clients that remember nothing of their last update",
        lambda c: (
            _waits_for_buffer(c)
            and (_remembers(c) or c.local.optimizer_state == "kept" or c.communication.error_feedback)
        ),
        "buffered can't be used where clients remember what belongs to their last update: expected no error feedback, "
        "local.optimizer_state fresh, local.correction none or fedprox",
    ),
    Rule(
        "server.schedule",
        "and no adapters of the clients' own but by fine_tuning",
        lambda c: _waits_for_buffer(c) and (_has_personal(c) or _trains_own(c)),
        "buffered can't be used with adapters of the clients' own",
    ),
    Rule(
        "server.schedule",
        "and a strategy that trains the same tensors each round",
        lambda c: _waits_for_buffer(c) and c.server.strategy.alternates,
        f"{_SYNCHRONOUS} trains other tensors from round to round than an update of an earlier round has",
    ),
    Rule(
        "server.schedule",
        "and one whose A and B are the same from round to round",
        lambda c: _waits_for_buffer(c) and (c.server.strategy.restarts or c.server.strategy.changes_basis),
        f"{_SYNCHRONOUS} gives A and B another basis each round",
    ),
    Rule(
        "server.schedule",
        "and one that does not replace the mean",
        lambda c: _waits_for_buffer(c) and c.server.strategy.replaces_mean,
        f"{_SYNCHRONOUS} needs the products B A of clients that began from the same adapter",
    ),
    Rule(
        "server.schedule",
        "and no clients' own ranks",
        lambda c: _waits_for_buffer(c) and c.clients.ranks is not None,
        f"{_SYNCHRONOUS} is used with clients' own ranks, and needs what each of them began with",
    ),
    Rule(
        "adapter.start",
        "an adapter to begin from needs a strategy that does not start anew each round (flora_stacking)",
        lambda c: isinstance(c.adapter, Lora) and bool(c.adapter.start) and c.server.strategy.restarts,
        "expected none, because {strategy} starts anew each round",
    ),
    Rule(
        "server.strategy",
        "a server that trains by itself (server.synthetic, distillation, text_rounds) needs a strategy and an adapter "
        "of which no tensor stays with its client, without a residual, and that do not start anew each round",
        lambda c: (
            _server_trains(c) and (_has_personal(c) or c.server.strategy.restarts or c.server.strategy.keeps_residual)
        ),
        "{strategy} with adapter {adapter} can't be used where the server trains by itself (server.synthetic, "
        "server.distillation, server.text_rounds)",
    ),
    Rule(
        "server.text_rounds",
        "text rounds need an adapter that leaves the features of images as they are: descriptions stand in for them",
        lambda c: c.server.text_rounds is not None and c.adapter.changes_images,
        "expected none, because adapter {adapter} changes the features of images, for which descriptions stand in",
    ),
    Rule(
        "server.text_rounds.every",
        "and rounds enough to have one",
        lambda c: c.server.text_rounds is not None and 0 < c.rounds < c.server.text_rounds.every,
        "expected at most the number of rounds",
    ),
    Rule(
        "rounds",
        "synthetic images, on which the server trains before round 1, need a round",
        lambda c: c.server.synthetic is not None and c.rounds == 0,
        "expected at least 1 with server.synthetic: round 0 is the frozen model",
    ),
    Rule(
        "server.distillation",
        "distillation, whose teacher is the mean of all, needs the aggregator mean",
        lambda c: c.server.distillation is not None and not isinstance(c.server.aggregator, Mean),
        "expected none, because {aggregator} leaves some clients out, and the teacher is the mean of all",
    ),
    Rule(
        "server.distillation",
        "distillation needs the adapters that clients of one round ended with: no buffered schedule",
        lambda c: c.server.distillation is not None and _waits_for_buffer(c),
        "expected none: updates of a buffered schedule come from different rounds",
    ),
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
        "drawn prompts need one that trains with the experiment's prompts: no prompt_context, no head",
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
        "templates to evaluate with need one that reads prompts then: no prompt_context, no head",
        lambda c: bool(c.evaluation.templates) and (_makes_prompts(c) or c.adapter.knows_classes),
        "expected none, because {adapter} does not read the experiment's prompts",
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
        "local.self_training",
        "self-training needs images without a label",
        lambda c: c.local.self_training is not None and c.clients.labelled_fraction == 1,
        "there are no images without a label: expected clients.labelled_fraction below 1",
    ),
)
"""A rule that begins with "and" or "nor" goes on with the one before it."""

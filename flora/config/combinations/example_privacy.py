"""What differential privacy of single examples (`local.privacy`) combines with: what bounds what an example adds."""

from __future__ import annotations

from flora.client.sampling import Shuffled
from flora.clip.adapters.generated import FedTpg
from flora.clip.adapters.lora import Lora
from flora.config.combinations.rule import Rule
from flora.config.schema import ExperimentConfig

EXAMPLE_PRIVACY: tuple[Rule, ...] = (
    Rule(
        "local.objective",
        "private gradients of single examples (local.privacy) need an objective that is a mean over examples "
        "(cross_entropy)",
        lambda c: _is_private(c) and not c.local.objective.weighs_examples,
        "expected cross_entropy with local.privacy: the loss of {objective} couples the examples of a batch, and none "
        "has a gradient of its own",
    ),
    Rule(
        "local.penalty",
        "and a penalty that is a mean over examples, or the same for each (none, anchor, distillation)",
        lambda c: _is_private(c) and not c.local.penalty.is_by_example,
        "expected none, anchor or distillation with local.privacy: {penalty} couples the examples of a batch, and none "
        "has a gradient of its own",
    ),
    Rule(
        "local.sampling",
        "and batches that don't depend on classes or losses (shuffled; local.privacy.sampling says how they are drawn)",
        lambda c: _is_private(c) and c.local.sampling != Shuffled(),
        "expected shuffled with local.privacy: with {sampling} one example changes how often others are seen, or how "
        "much they count, and no bound holds",
    ),
    Rule(
        "local.self_training",
        "and no self-training",
        lambda c: _is_private(c) and c.local.active_self_training is not None,
        "expected none with local.privacy: images without a label are learned from in steps that are not bounded",
    ),
    Rule(
        "adapter.dropout",
        "and no dropout",
        lambda c: _is_private(c) and isinstance(c.adapter, Lora) and c.adapter.dropout > 0,
        "expected 0 with local.privacy: its masks are drawn for a whole batch, not for single examples",
    ),
    Rule(
        "adapter.names",
        "and no context that is made of the names of a client's own classes (fedtpg)",
        lambda c: _is_private(c) and isinstance(c.adapter, FedTpg) and c.adapter.names == "client",
        "expected all with local.privacy: which classes a client has would change every example's gradient",
    ),
    Rule(
        "clients.ranks",
        "and no clients' own ranks",
        lambda c: _is_private(c) and c.clients.ranks is not None,
        "expected none with local.privacy: noise would fill the ranks that a client does not have",
    ),
)


def _is_private(config: ExperimentConfig) -> bool:
    return config.local.privacy is not None

"""What an adapter to begin from, and a server that trains by itself, combine with."""

from __future__ import annotations

from flora.clip.adapters.lora import Lora
from flora.config.combinations.rule import Rule, has_personal, server_trains, waits_for_buffer
from flora.server.aggregators import Mean

SERVER_TRAINING: tuple[Rule, ...] = (
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
            server_trains(c) and (has_personal(c) or c.server.strategy.restarts or c.server.strategy.keeps_residual)
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
        lambda c: c.server.distillation is not None and waits_for_buffer(c),
        "expected none: updates of a buffered schedule come from different rounds",
    ),
)

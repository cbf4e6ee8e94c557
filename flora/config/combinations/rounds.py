"""What networks and schedules of rounds combine with."""

from __future__ import annotations

from flora.communication.network import StragglerPolicy
from flora.config.combinations.rule import Rule, has_personal, remembers, trains_own, waits_for_buffer

_SYNCHRONOUS = "expected synchronous, because {strategy}"

ROUNDS: tuple[Rule, ...] = (
    Rule(
        "server.stragglers",
        "a policy for stragglers needs a network",
        lambda c: c.network is None and c.server.stragglers != StragglerPolicy(),
        "expected a network: without one all clients deliver at once",
    ),
    Rule(
        "network",
        "a buffered schedule needs a network",
        lambda c: waits_for_buffer(c) and c.network is None,
        "missing: a buffered schedule needs to know who is how fast",
    ),
    Rule(
        "server.stragglers",
        "and no policy for stragglers",
        lambda c: waits_for_buffer(c) and c.server.stragglers != StragglerPolicy(),
        "expected the defaults: a buffered schedule waits for its buffer alone",
    ),
    Rule(
        "server.schedule",
        "and clients that remember nothing of their last update",
        lambda c: (
            waits_for_buffer(c)
            and (remembers(c) or c.local.optimizer_state == "kept" or c.communication.error_feedback)
        ),
        "buffered can't be used where clients remember what belongs to their last update: expected no error feedback, "
        "local.optimizer_state fresh, local.correction none or fedprox",
    ),
    Rule(
        "server.schedule",
        "and no adapters of the clients' own but by fine_tuning",
        lambda c: waits_for_buffer(c) and (has_personal(c) or trains_own(c)),
        "buffered can't be used with adapters of the clients' own",
    ),
    Rule(
        "server.schedule",
        "and a strategy that trains the same tensors each round",
        lambda c: waits_for_buffer(c) and c.server.strategy.alternates,
        f"{_SYNCHRONOUS} trains other tensors from round to round than an update of an earlier round has",
    ),
    Rule(
        "server.schedule",
        "and one whose A and B are the same from round to round",
        lambda c: waits_for_buffer(c) and (c.server.strategy.restarts or c.server.strategy.changes_basis),
        f"{_SYNCHRONOUS} gives A and B another basis each round",
    ),
    Rule(
        "server.schedule",
        "and one that does not replace the mean",
        lambda c: waits_for_buffer(c) and c.server.strategy.replaces_mean,
        f"{_SYNCHRONOUS} needs the products B A of clients that began from the same adapter",
    ),
    Rule(
        "server.schedule",
        "and no clients' own ranks",
        lambda c: waits_for_buffer(c) and c.clients.ranks is not None,
        f"{_SYNCHRONOUS} is used with clients' own ranks, and needs what each of them began with",
    ),
)

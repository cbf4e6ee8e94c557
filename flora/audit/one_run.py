"""What a run's canaries show, beside the guarantee that the run states."""

from __future__ import annotations

from typing import Any

from flora.audit.membership import as_json
from flora.audit.subject import Subject
from flora.privacy.attacks import success
from flora.privacy.one_run import lower_bound

# The metric of the records in which a mechanism states its epsilon, by whose privacy it is.
GUARANTEES = {"client": "epsilon", "example": "example_epsilon"}
# Where a run states no guarantee.
DELTA = 1e-5


def guarantees(subject: Subject) -> dict[str, float | None]:
    """Return the epsilon that the run states for its clients and for their examples, None where it states none."""
    last = subject.records[-1].metrics
    return {unit: last.get(metric) for unit, metric in GUARANTEES.items()}


def stated_delta(subject: Subject, unit: str) -> float:
    """Return the delta of the run's guarantee for its clients or their examples; without one, the usual."""
    config = subject.run.config
    privacy = config.privacy if unit == "client" else config.local.privacy
    return DELTA if privacy is None else float(privacy.delta)


def canary_audit(subject: Subject, *, delta: float | None, confidence: float) -> dict[str, Any] | None:
    """Guess which canaries were in from the last adapter, and return the bound on epsilon; None without canaries.

    The bound is on the epsilon of the whole run, for what the canaries are: clients or examples. Without `delta` it is
    at that of the run's guarantee.
    """
    planted = subject.experiment.federation.canaries
    if planted is None:
        return None
    scores, was_in = planted.canaries.scores(planted.coins, subject.evidence), planted.coins.was_in
    delta = stated_delta(subject, planted.canaries.unit) if delta is None else delta
    bound = lower_bound(scores, was_in, delta=delta, confidence=confidence)
    return {
        "unit": planted.canaries.unit,
        "epsilon_lower_bound": bound.epsilon,
        "delta": delta,
        "confidence": confidence,
        "num_canaries": bound.guesses.num_canaries,
        "num_guesses": bound.guesses.num_guesses,
        "num_right": bound.guesses.num_right,
    } | as_json(success(scores[was_in], scores[~was_in], subject.rng.child("canaries")))

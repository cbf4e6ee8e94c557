"""Reject updates that must not be averaged: not finite, of wrong shapes, or far larger than the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flora.core import tree
from flora.core.errors import DivergedError
from flora.core.records import Rejection
from flora.core.registry import OptionError, Options, option
from flora.core.states import ClientUpdate
from flora.core.tree import StateLike

NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Screening(Options):
    """What becomes of a client's update that is not finite, of wrong shapes, or out of bounds."""

    policy: str = option(
        "skip: the round goes on without it; abort: the run ends with an error; clip: one that is too large is scaled "
        "down to the bound, any other is skipped",
        "skip",
        choices=("skip", "abort", "clip"),
    )
    max_norm_ratio: float | None = option(
        "largest norm of an update, as a multiple of the median of the cohort's finite ones; none: no bound",
        None,
        at_least=1,
    )

    def check(self) -> None:
        if self.policy == "clip" and self.max_norm_ratio is None:
            raise OptionError("max_norm_ratio", "policy clip needs one, such as 10")


def screen(
    updates: Sequence[ClientUpdate], adapter: StateLike, options: Screening
) -> tuple[list[ClientUpdate], list[Rejection]]:
    """The updates that may be averaged, in their order, and what was found wrong with the others.

    With `clip`, one that is too large is among the first, scaled down, and nothing is said of it. The bound needs at
    least three finite updates, because of two nobody knows which is the odd one, and a median above zero.
    """
    accepted, rejections = [], []
    expected = tree.kinds(adapter)
    for update in updates:
        reason = _fault(update, expected)
        if reason is None:
            accepted.append(update)
        else:
            rejections.append(Rejection(update.client, update.failed_step, reason))
    if options.max_norm_ratio is None or len(accepted) < 3:
        return accepted, rejections
    norms = [tree.norm(update.delta) for update in accepted]
    median = float(torch.tensor(norms, dtype=torch.float64).quantile(0.5))
    if median == 0:
        return accepted, rejections
    bound, within = options.max_norm_ratio * median, []
    for update, norm in zip(accepted, norms, strict=True):
        if norm <= bound:
            within.append(update)
        elif options.policy == "clip":
            within.append(dataclasses.replace(update, delta=tree.scale(update.delta, bound / norm)))
        else:
            reason = f"norm {norm:.3g}, the cohort's median is {median:.3g}"
            rejections.append(Rejection(update.client, None, reason))
    return within, sorted(rejections, key=lambda rejection: rejection.client)


def refusal(round: int, rejection: Rejection, learning_rate: float) -> DivergedError:
    """The error that ends a run because of a client's update."""
    if rejection.reason != NOT_FINITE:
        return DivergedError(f"round {round}: client {rejection.client}'s update can't be used: {rejection.reason}")
    if rejection.step == 0 and round > 1:  # before it has taken a step
        return DivergedError(
            f"round {round}: client {rejection.client} diverged at step 0 ({rejection.reason}), at the adapter that "
            f"the server sent: lower server.optimizer.learning_rate, or local.learning_rate ({learning_rate:g})"
        )
    at = "" if rejection.step is None else f" at step {rejection.step}"
    return DivergedError(
        f"round {round}: client {rejection.client} diverged{at} ({rejection.reason}) at learning rate "
        f"{learning_rate:g}; lower local.learning_rate or set local.clip_norm"
    )


def _fault(update: ClientUpdate, expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> str | None:
    """Return what makes an update unusable, whose names, shapes and types are to be the expected; None if nothing."""
    if tree.kinds(update.delta) != expected:
        return "wrong names, shapes or types"
    if update.failed_step is not None or not math.isfinite(update.loss):
        return NOT_FINITE
    if not tree.is_finite(update.delta) or not tree.is_finite(update.extra):
        return NOT_FINITE
    return None

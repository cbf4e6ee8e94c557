"""Strategies that average tensors each by itself: all of them, or all but those that stay with their clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from flora.client.corrections import NoCorrection
from flora.client.local_training import LocalTraining
from flora.core.registry import OptionError, option, register
from flora.server.strategies.base import Strategy


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(Strategy):
    """All tensors, A and B each by itself (FedIT, arXiv:2305.05644; arXiv:2404.15182)."""


@register("fedper")
@dataclass(frozen=True)
class FedPer(Strategy):
    """Tensors whose names match stay with their clients, the others are averaged (FedPer, arXiv:1912.00818).

    All are trained together. With the head as what stays it is FedPer, with the norms it is FedBN (arXiv:2102.07623),
    with the first layers LG-FedAvg (arXiv:2001.01523). The server's own adapter has the start of what it never sees, so
    the result is what clients reach with theirs.
    """

    has_personal = True

    stay: tuple[str, ...] = option(
        "patterns of the names of tensors that stay, such as head.*, *.ln_* or text.*; * stands for anything",
        ("head.*",),
    )

    def check(self) -> None:
        if not self.stay:
            raise OptionError("stay", "expected at least one pattern, such as head.*")

    def check_names(self, names: Sequence[str]) -> None:
        for pattern in self.stay:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError("strategy.stay", f"{pattern!r} matches no tensor; there are {_shown(names)}")
        if all(map(self.stays, names)):
            raise OptionError("strategy.stay", f"all tensors would stay, and none travel; there are {_shown(names)}")

    def stays(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.stay)

    def broadcasts(self, name: str) -> bool:
        return not self.stays(name)


@register("fedrep")
@dataclass(frozen=True)
class FedRep(FedPer):
    """What stays is trained first, then what travels, each while the other is frozen (FedRep, arXiv:2102.07078).

    Algorithm 1: a client goes on with its own tensors beside those that the server sent, for `own_epochs` passes or
    `own_steps` steps, and then takes the steps of `local` with what travels beside the tensors that it came to. Who
    does not take part keeps what it had. What each phase draws, and its optimiser, are its own.
    Differs from the authors' code, where clients train their heads once more before they are tested (`personal:
    fine_tuning` trains all of it), all weigh the same (`weighting: uniform`), and who first takes part in a later round
    begins with the mean of the others' heads, here with the first head, as in algorithm 1. With the PyTorch that it
    names, 0.4, heads go on along their momentum in the second phase; with one of today they do as here.
    """

    own_epochs: int = option(
        "passes over a client's examples that train what stays, before those of `local`",
        1,
        at_least=1,
        at_most=1_000_000,
    )
    own_steps: int | None = option(
        "steps that train what stays, the same for every client, in place of `own_epochs`",
        None,
        at_least=1,
        at_most=10_000_000,
    )

    def check(self) -> None:
        super().check()
        if self.own_steps is not None and self.own_epochs != 1:
            raise OptionError("own_steps", "give either `own_steps` or `own_epochs`, not both")

    def before_the_others(self, local: LocalTraining) -> LocalTraining | None:
        epochs = 1 if self.own_steps is not None else self.own_epochs
        alone = replace(local, optimizer_state="fresh", correction=NoCorrection())
        return replace(alone, epochs=epochs, steps=self.own_steps)


def _shown(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")

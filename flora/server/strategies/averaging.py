"""Strategies that average tensors each by itself: all of them, or all but those that stay with their clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

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


def _shown(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")

"""What goes into a secure sum and what comes of it: who stays how long, bytes and messages by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flora.privacy.fixed_point import Words

PHASES = ("keys", "shares", "input", "unmasking")


@dataclass(frozen=True)
class Attendance:
    """Through how many of the four phases each client goes that was asked, by id: 4 is to the end.

    The masked input of `late` ones is sent, but comes when nobody waits for it.
    """

    num_phases: Mapping[int, int]
    late: frozenset[int] = frozenset()


@dataclass
class Traffic:
    """Bytes that clients send and get in each phase, and the number of messages."""

    uplink_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    downlink_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    num_messages: int = 0

    def up(self, phase: str, num_bytes: int) -> None:
        """Count a message of a client."""
        self.uplink_bytes[phase] += num_bytes
        self.num_messages += 1

    def down(self, phase: str, num_bytes: int) -> None:
        """Count a message of the server to a client."""
        self.downlink_bytes[phase] += num_bytes
        self.num_messages += 1


@dataclass(frozen=True, eq=False)
class SumOutcome:
    """The words `(P,)` of the sum over the clients `summed`; None, and the `failure` in words, if too few stayed.

    `num_phases` is how many phases of messages there were, `num_agreements` how many pairs of keys were agreed on.
    """

    words: Words | None
    summed: tuple[int, ...]
    traffic: Traffic
    num_phases: int
    num_agreements: int = 0
    failure: str | None = None

"""Numbers of things: exact shares of them, and how a text says them."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache


@lru_cache(maxsize=4096)
def part_of(share: float, number: int) -> Fraction:
    """Return exactly `share` times `number`, the share being the decimal number that one writes for it.

    0.29 of 100 is 29, of which a product of floating-point numbers falls short: its `math.floor` is 28.
    """
    return Fraction(repr(float(share))) * int(number)


def counted(number: int, noun: str) -> str:
    """Return "1 client" or "2,000 clients": the noun takes an s where there is not exactly one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"

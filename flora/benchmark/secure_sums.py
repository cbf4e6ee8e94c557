"""What a secure sum costs: time of all parts, and bytes of a client. Part of `flora.benchmark`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.evaluation.summary import size
from flora.privacy.fixed_point import FixedPoint, Ring
from flora.privacy.secure_sums import PairwiseMasks
from flora.privacy.traffic import Attendance

NUM_NUMBERS = 16_384
"""Of an adapter: 66 KB in fp32."""
NEIGHBOURS = 40
DROPPED = 0.05
"""Share of the clients that are gone between their shares and their masked input."""


def compare_secure_sums(numbers: str) -> list[str]:
    """Time sums over as many clients, once each; return a Markdown table. Raises `UserError` for what is no number."""
    parts = numbers.split(",")
    wrong = [part for part in parts if not part.isdecimal() or int(part) < 2]
    if wrong:
        raise UserError(f"--secure-sums: expected whole numbers of clients from 2, got {wrong[0]!r}")
    PairwiseMasks().require()
    lines = [
        "| clients | neighbours | pairs of keys | CPU seconds of all parts | a client sends | a client gets |",
        "|---|---|---|---|---|---|",
    ]
    for number in map(int, parts):
        lines.append(_row(number, None))
        if number > NEIGHBOURS + 1:
            lines.append(_row(number, NEIGHBOURS))
    return [*lines, "", f"{NUM_NUMBERS:,} numbers in 32 bits; uploads without a secure sum: {size(4 * NUM_NUMBERS)}"]


def _row(number: int, neighbours: int | None) -> str:
    """Return a line of the table: a sum over `number` clients."""
    options, ring = PairwiseMasks(neighbours=neighbours), Ring(32, NUM_NUMBERS + 1)
    words = FixedPoint.for_sum(32, 1.0, number).encode(np.linspace(-1, 1, ring.num_words))
    num_phases = {client: 2 if client < DROPPED * number else 4 for client in range(number)}
    inputs = {client: words for client, phases in num_phases.items() if phases > 2}
    started = time.process_time()
    outcome = options.add_up(inputs, Attendance(num_phases), ring, Rng(0))
    seconds = time.process_time() - started
    if outcome.words is None:
        raise UserError(f"--secure-sums: {number} clients: {outcome.failure}")
    traffic = options.client_traffic(number, ring.payload_bytes)
    cells: Sequence[str] = (
        f"{number:,}",
        "all" if neighbours is None else str(neighbours),
        f"{outcome.num_agreements:,}",
        f"{seconds:.2f}",
        size(sum(traffic.uplink_bytes.values())),
        size(sum(traffic.downlink_bytes.values())),
    )
    return f"| {' | '.join(cells)} |"

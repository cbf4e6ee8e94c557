"""The metrics and figures there are, each declared once; `round_metric` adds one of your own."""

from __future__ import annotations

# Imported for what they declare, in the order of columns and rows.
from flora.evaluation import server_metrics, client_metrics, round_metrics, privacy_metrics  # noqa: F401  # isort: skip
from flora.evaluation.declaring import (
    COMPUTED,
    FIGURES,
    METRICS,
    ServerView,
    complete,
    computed,
    declare,
    round_metric,
    summed_up,
)

__all__ = [
    "COMPUTED",
    "FIGURES",
    "METRICS",
    "ServerView",
    "complete",
    "computed",
    "declare",
    "round_metric",
    "summed_up",
]

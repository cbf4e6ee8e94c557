"""FLoRA: federated low-rank adaptation of a frozen CLIP model, simulated in one process.

What a program needs is here by name, and imported when it is used; a run itself is `flora.simulate.simulate(config)`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when they are asked for: PyTorch takes seconds, and the command's help should not.
_NAMES = {
    "Hooks": "flora.core.hooks",
    "Merge": "flora.clip.towers.tokens",
    "RunResult": "flora.runs.loop",
    "Sink": "flora.runs.sinks",
    "TextRelevance": "flora.clip.towers.tokens",
    "load_adapted": "flora.export",
    "load_config": "flora.config.parse",
    "option": "flora.core.registry",
    "reduce_tokens": "flora.clip.towers.tokens",
    "register": "flora.core.registry",
    "resume": "flora.runs.loop",
    "round_metric": "flora.evaluation.metrics",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'flora' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])

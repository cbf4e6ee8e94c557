"""Options of the exact ways to be faster."""

from __future__ import annotations

from dataclasses import dataclass

from flora.core.registry import Options, option


@dataclass(frozen=True)
class SpeedOptions(Options):
    """Ways to compute the same numbers faster; each can be switched off to measure what it brings."""

    cut_prompts: bool = option(
        "end prompts at their end-of-text token (causal text towers; with dropout the masks are drawn anew)", True
    )
    share_prefixes: bool = option(
        "compute tokens that prompts begin with in common once (needs cut_prompts; off where adapters have dropout, "
        "because each prompt has masks of its own)",
        True,
    )
    trim_last_block: bool = option(
        "a tower's last block computes only the tokens that are read (with dropout the masks are drawn anew)", True
    )
    batch_classes: bool = option(
        "objectives that look at a batch alone encode the prompts of its classes alone (off where adapters have "
        "dropout)",
        True,
    )
    share_first_step: bool = option(
        "on a CPU, clients of a block that start from one adapter encode the classes once in their first step (off "
        "where adapters have dropout, and for full fine-tuning)",
        True,
    )
    cuda_graphs: bool = option(
        "on CUDA, record a local step once and replay it (off where adapters have dropout)", True
    )


ALL_SPEED = SpeedOptions()
"""Everything exact that there is."""

"""The options of communication, and the number of bytes that a state dict takes when it is sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import safetensors.torch
import torch

from flora.communication.compressors import Compressor, NoCompression
from flora.core import tree
from flora.core.registry import OptionError, Options, name_of, option
from flora.core.tree import StateLike


@dataclass(frozen=True)
class CommunicationOptions(Options):
    """How what travels is written.

    Clients train from what they read of the broadcast, and send what they changed of that; the server adds it to its
    own adapter, which no client ever sees whole (FedLPP, arXiv:2406.10976).
    """

    broadcast: Compressor = option("how the server's adapter is written for the way down", NoCompression())
    upload: Compressor = option("how a client's delta is written for the way up", NoCompression())
    error_feedback: bool = option("clients add to a delta what was lost of those before (arXiv:1809.07599)", False)

    def check(self) -> None:
        if self.broadcast.is_for_deltas:
            raise OptionError(
                "broadcast", f"{name_of(self.broadcast)} would set weights to zero: expected none or a quantiser"
            )
        if self.error_feedback and self.upload.is_identity:
            raise OptionError("error_feedback", "expected an upload that loses something")

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost on the way."""
        return self.broadcast.is_identity and self.upload.is_identity


def payload_bytes(state: StateLike) -> int:
    """The length in bytes of `state` as safetensors, header included."""
    return _payload_bytes(tuple(tree.kinds(state).items()))


@lru_cache(maxsize=64)
def _payload_bytes(kinds: tuple[tuple[str, tuple[torch.Size, torch.dtype]], ...]) -> int:
    # The length depends on names, types and shapes alone.
    return len(safetensors.torch.save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in kinds}))

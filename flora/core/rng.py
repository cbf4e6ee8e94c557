"""A named seed tree, so that adding a client, an evaluation or a log line changes no other random number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rng:
    """A node of the tree. Its streams depend on the root seed and on the names that lead to it, on nothing else."""

    seed: int
    path: tuple[str | int, ...] = ()

    def child(self, *names: str | int) -> Rng:
        """The node below this one that `names` lead to: `rng.child("round", 3).child("client", 17)`."""
        # NumPy's integers print differently from Python's, and the path is hashed as text.
        return Rng(self.seed, self.path + tuple(name if isinstance(name, str) else int(name) for name in names))

    def seed64(self) -> int:
        """This node's 64-bit seed: the first eight bytes of SHA-256 over the root seed and the path."""
        return int.from_bytes(self.key()[:8], "little")

    def key(self) -> bytes:
        """This node's 32 bytes for a cipher: SHA-256 over the root seed and the path. Whoever has the seed has it."""
        text = repr((self.seed, self.path))
        return hashlib.sha256(text.encode()).digest()

    def numpy(self) -> np.random.Generator:
        """A fresh NumPy generator (PCG64) for this node."""
        return np.random.Generator(np.random.PCG64(self.seed64()))

    def torch(self) -> torch.Generator:
        """A fresh CPU generator for this node; the CPU's, so that all devices agree."""
        # torch.Generator takes a signed 64-bit seed.
        return torch.Generator().manual_seed(self.seed64() >> 1)

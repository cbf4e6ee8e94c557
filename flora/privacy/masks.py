"""Masks: keys that two clients agree on, what is expanded from a seed, and messages that only one client can read.

Needs the extra `[privacy]` (cryptography).
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

KEY_BYTES = 32
TAG_BYTES = 16
"""What a sealed message is longer than the message."""


class KeyPair:
    """An X25519 key pair (RFC 7748), from a private key of 32 bytes."""

    def __init__(self, private: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.private = private
        self._key = X25519PrivateKey.from_private_bytes(private)

    @cached_property
    def public(self) -> bytes:
        """The key that others get, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def agreed(self, other: bytes) -> bytes:
        """Return the secret of 32 bytes that this pair and the owner of the public key `other` have in common."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        return derived("agreement", self._key.exchange(X25519PublicKey.from_public_bytes(other)))


class Agreements:
    """What pairs of keys agree on, each pair's secret computed once for both of its owners, who would get the same."""

    def __init__(self) -> None:
        self._known: dict[frozenset[bytes], bytes] = {}

    def __len__(self) -> int:
        return len(self._known)

    def between(self, pair: KeyPair, other: bytes) -> bytes:
        """Return what `pair` agrees on with the public key `other`."""
        both = frozenset((pair.public, other))
        if both not in self._known:
            self._known[both] = pair.agreed(other)
        return self._known[both]


def derived(use: str, secret: bytes) -> bytes:
    """Return 32 bytes for one use of a secret, from which neither it nor those for other uses can be told."""
    return hashlib.sha256(f"flora {use}:".encode() + secret).digest()


def expand(seed: bytes, count: int, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray:
    """Return `count` words that nobody without the seed can tell from uniform ones: ChaCha20's stream (RFC 7539).

    A seed of 32 bytes is for one stream alone: the nonce is always zero.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(count * dtype.itemsize)), dtype=dtype)


def field_elements(seed: bytes, count: int, prime: int) -> np.ndarray:
    """Return `count` uniform numbers below a prime of 16 bits: words of the seed's stream, the larger ones left out."""
    drawn = count
    while True:
        drawn += 16 + drawn * (2**16 - prime) // 2**15
        words = expand(seed, drawn, np.dtype("<u2"))
        fit = words[words < prime]
        if len(fit) >= count:
            return fit[:count].astype(np.int64)


def seal(key: bytes, message: bytes, sender: int, receiver: int) -> bytes:
    """Encrypt and authenticate a message (ChaCha20-Poly1305) under a key that two clients agreed on.

    The sender is the nonce: each of the two sends one message under the key.
    """
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce, names = _names(sender, receiver)
    return ChaCha20Poly1305(key).encrypt(nonce, message, names)


def unseal(key: bytes, sealed: bytes, sender: int, receiver: int) -> bytes:
    """Return what was sealed. Raises `cryptography.exceptions.InvalidTag` for any other key, message or client."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce, names = _names(sender, receiver)
    return ChaCha20Poly1305(key).decrypt(nonce, sealed, names)


def _names(sender: int, receiver: int) -> tuple[bytes, bytes]:
    return sender.to_bytes(12, "little"), sender.to_bytes(4, "little") + receiver.to_bytes(4, "little")

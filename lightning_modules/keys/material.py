"""From a secret to numbers: Argon2id once a run, HKDF-SHA256 once a face, a ChaCha20 stream for numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from argon2.exceptions import HashingError
from argon2.low_level import Type, hash_secret_raw
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jaxtyping import Float
from torch import Tensor

from lightning_modules.keys.secret import Hidden, Secret

SALT_BYTES = NONCE_BYTES = CHECK_BYTES = 16
KEY_BYTES = 32


@dataclass(frozen=True)
class Cost:
    """What one guess of a secret costs (Argon2id, RFC 9106); the default is the RFC's second recommendation.

    Args:
        time: Passes over the memory, at most 16.
        memory: Memory in KiB, at least 8 a lane, at most 1 GiB.
        lanes: Parallel lanes, at most 16.

    Raises:
        ValueError: If a number is out of range: headers come from strangers and may not stall a machine.
    """

    time: int = 3
    memory: int = 64 * 1024
    lanes: int = 4

    def __post_init__(self) -> None:
        _bounded("lanes", self.lanes, 1, 16)
        _bounded("time", self.time, 1, 16)
        _bounded("memory in KiB", self.memory, 8 * self.lanes, 1024 * 1024)


def _bounded(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"the Argon2id {name} must be a whole number from {low} to {high}, got {value!r:.40}")


def need_bytes(name: str, value: bytes, count: int) -> None:
    """Refuse (``ValueError``) what is not ``count`` bytes."""
    if len(value) != count:
        raise ValueError(f"expected a {name} of {count} bytes, got {len(value)}")


def _hkdf(key: bytes, nonce: bytes, info: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) with the nonce as salt; 32 bytes."""
    return HKDF(SHA256(), length=KEY_BYTES, salt=nonce, info=info.encode()).derive(key)


def fresh() -> bytes:
    """16 random bytes for a salt (one a run) or a nonce (one a face)."""
    return os.urandom(16)


def stretch(secret: Secret, salt: bytes, cost: Cost | None = None) -> MasterKey:
    """Argon2id of the secret: slow on purpose, once a run.

    Args:
        secret: What the person holds.
        salt: 16 random bytes; they travel in the header.
        cost: What one guess shall cost; ``None``: the default :class:`Cost`.

    Raises:
        ValueError: If the salt has another length, or the memory is not to be had.
    """
    cost = cost or Cost()
    need_bytes("salt", salt, SALT_BYTES)
    try:
        return MasterKey(
            hash_secret_raw(
                secret._value,
                salt,
                cost.time,
                cost.memory,
                cost.lanes,
                hash_len=KEY_BYTES,
                type=Type.ID,
                version=19,
            )
        )
    except HashingError as error:
        raise ValueError(f"Argon2id cannot run with {cost.memory} KiB of memory: {error}") from None


class MasterKey(Hidden):
    """The stretched secret, 32 bytes; everything else is derived from it.

    Args:
        value: 32 bytes.
    """

    __slots__ = ()

    def __init__(self, value: bytes) -> None:
        need_bytes("master key", value, KEY_BYTES)
        super().__init__(value)

    @classmethod
    def from_seed(cls, seed: int | str) -> MasterKey:
        """A master key out of a number or name, for validation and tests: reproducible, so no secret."""
        return cls(_hkdf(str(seed).encode(), b"", "keyveil/1/seed"))

    def derive(self, label: str, nonce: bytes) -> Key:
        """The key of one face: HKDF-SHA256 of this key with ``label`` (who asks) and a 16-byte ``nonce``."""
        need_bytes("nonce", nonce, NONCE_BYTES)
        return Key(_hkdf(self._value, nonce, f"keyveil/1/key/{label}"))

    def check_value(self, nonce: bytes) -> bytes:
        """16 bytes by which a header knows its secret again; never in decoy mode, since they test guesses."""
        need_bytes("nonce", nonce, NONCE_BYTES)
        return _hkdf(self._value, nonce, "keyveil/1/check")[:CHECK_BYTES]

    def wrap(self, other: MasterKey, nonce: bytes) -> bytes:
        """Another master key, hidden under this one: 32 bytes that look random, and that any key unwraps.

        The stream is not authenticated on purpose: in decoy mode nothing may tell a right secret from a wrong one, and
        in verify mode the record around it is authenticated.
        """
        stream = self.derive("wrap", nonce).material(KEY_BYTES)
        return bytes(a ^ b for a, b in zip(stream, other._value, strict=True))

    def unwrap(self, wrapped: bytes, nonce: bytes) -> MasterKey:
        """Undo :meth:`wrap`; under another key another master key comes out."""
        return MasterKey(self.wrap(MasterKey(wrapped), nonce))


class Key(Hidden):
    """The key of one face: 32 bytes, stretched to any length by ChaCha20 (RFC 8439).

    Each kind of number reads a stream of its own, named in the cipher's nonce. Numbers are float64 on the CPU
    and the same on every platform and release; ``tests/data/key_vectors.json`` holds them.

    Args:
        value: 32 bytes.

    Example:
        >>> key = MasterKey.from_seed(0).derive("face", bytes(16))
        >>> key.bits(4)
        tensor([-1., -1., -1., -1.], dtype=torch.float64)
    """

    __slots__ = ()

    def __init__(self, value: bytes) -> None:
        need_bytes("key", value, KEY_BYTES)
        super().__init__(value)

    def _stream(self, purpose: str, count: int) -> bytes:
        # block counter 0 (4 bytes), then the 96-bit nonce
        nonce = bytes(4) + purpose.encode().ljust(12, b"\0")
        return Cipher(ChaCha20(self._value, nonce), mode=None).encryptor().update(bytes(count))

    def _integers(self, purpose: str, count: int) -> np.ndarray:
        return np.frombuffer(self._stream(purpose, 8 * count), dtype="<u8")

    def material(self, count: int = KEY_BYTES) -> bytes:
        """Raw bytes, for a cipher that seals (AES-256-GCM)."""
        return self._stream("material", count)

    def bits(self, count: int) -> Float[Tensor, " count"]:
        """Password bits, -1 or +1."""
        packed = np.frombuffer(self._stream("bits", -(-count // 8)), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(packed, count=count, bitorder="little") * 2.0 - 1.0)

    def normal(self, count: int) -> Float[Tensor, " count"]:
        """Independent N(0, 1) numbers, by Box-Muller from 53-bit uniforms."""
        return torch.from_numpy(self._normal("normal", count))

    def _normal(self, purpose: str, count: int) -> np.ndarray:
        pairs = -(-count // 2)
        uniform = (self._integers(purpose, 2 * pairs) >> np.uint64(11)).astype(np.float64).reshape(pairs, 2)
        radius = np.sqrt(-2.0 * np.log((uniform[:, :1] + 1.0) * 2.0**-53))  # (0, 1]: no logarithm of 0
        angle = uniform[:, 1:] * (2.0 * np.pi * 2.0**-53)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]

    def rotation(self, size: int, bands: int = 1) -> Float[Tensor, "size size"]:
        """A rotation of ``size`` dimensions that falls into ``bands`` equal blocks, each uniform over all (Haar)."""
        side = size // bands
        normals = torch.from_numpy(self._normal("rotation", bands * side * side))
        return rotations(normals.reshape(bands, side, side))

    def seed(self) -> int:
        """A 63-bit seed for a generator that wants one."""
        return int(self._integers("seed", 1)[0] >> np.uint64(1))


def rotations(normals: Float[Tensor, "*batch bands side side"]) -> Float[Tensor, "*batch size size"]:
    """Rotations of ``bands`` independent blocks along the diagonal, out of independent N(0, 1) numbers."""
    *batch, bands, side, _ = normals.shape
    blocks = orthogonalize(normals)
    whole = normals.new_zeros(*batch, bands, side, bands, side)
    for band in range(bands):
        whole[..., band, :, band, :] = blocks[..., band, :, :]
    return whole.reshape(*batch, bands * side, bands * side)


def orthogonalize(normals: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch size size"]:
    r"""Uniform (Haar) rotations out of matrices of independent normals.

    Householder QR with the diagonal of :math:`R` made positive, which makes the factor unique and uniform
    over O(n) (Mezzadri, 2007), then the last column turned where the determinant is -1.

    Args:
        normals: Independent N(0, 1) entries; float64 for keys.
    """
    packed, tau = torch.geqrf(normals)
    q = torch.linalg.householder_product(packed, tau)
    sign = torch.where(packed.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    # det Q without an LU: each reflector (tau != 0) has determinant -1
    turn = torch.where(tau != 0, -1.0, 1.0).to(q).prod(-1) * sign.prod(-1)
    return q * torch.cat([sign[..., :-1], sign[..., -1:] * turn.unsqueeze(-1)], -1).unsqueeze(-2)

"""What numbers a method wants for a key, and the rings of right and wrong keys it is judged with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.keys.material import NONCE_BYTES, Key, MasterKey, rotations

BITS_OFF = (2, 4, 8, 16, 32)
COSINES = (0.5, 0.99)


@dataclass(frozen=True)
class KeySpec:
    """What numbers a method wants for a key.

    Args:
        kind: ``"bits"`` (-1 or +1), ``"normal"`` (N(0, 1)), ``"rotation"`` (a matrix) or ``"none"``.
        length: Count of the bits or numbers, or dimension of the rotation; 0 for ``"none"``.
        bands: Into how many equal blocks along its diagonal, of two dimensions or more, a rotation falls.

    Raises:
        ValueError: If there is no such kind, or the length or the bands do not suit it.

    Example:
        >>> spec = KeySpec("bits", 64)
        >>> spec.numbers(KeyRing.from_seed(0).right(0)).shape
        torch.Size([64])
    """

    kind: Literal["none", "bits", "normal", "rotation"]
    length: int
    bands: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("none", "bits", "normal", "rotation"):
            raise ValueError(f"expected a key of kind none, bits, normal or rotation, got {self.kind!r}")
        if (self.length == 0) != (self.kind == "none") or self.length < 0:
            raise ValueError(f"a key of kind {self.kind!r} cannot have length {self.length}")
        suit = self.kind == "rotation" and self.length % max(self.bands, 1) == 0 and self.length >= 2 * self.bands
        if self.bands < 1 or (self.bands > 1 and not suit):
            raise ValueError(f"a key of kind {self.kind!r} and length {self.length} cannot have {self.bands} bands")

    @classmethod
    def of(cls, transform: nn.Module) -> KeySpec:
        """What a transform of the room :mod:`flows` wants."""
        return cls(transform.key_kind, transform.key_length, getattr(transform, "key_bands", 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one key's numbers."""
        return (self.length, self.length) if self.kind == "rotation" else (self.length,)

    def numbers(self, key: Key) -> Tensor:
        """The key's numbers in this method's form, float32 on the CPU, of :attr:`shape`."""
        if self.kind == "none":
            return torch.zeros(0)
        if self.kind == "rotation":
            return key.rotation(self.length, self.bands).float()
        return getattr(key, self.kind)(self.length).float()

    def random(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Random keys for training, ``(batch, *shape)`` float32; not for hiding anything.

        Args:
            batch: How many.
            generator: Where chance comes from; ``None``: torch's global generator.
            device: Where they go; ``None``: the generator's device.
        """
        place = generator.device if generator is not None else None
        options = {"generator": generator, "device": place}
        if self.kind == "bits":
            drawn = torch.randint(0, 2, (batch, *self.shape), **options) * 2.0 - 1.0
        elif self.kind == "rotation":
            side = self.length // self.bands
            drawn = rotations(torch.randn((batch, self.bands, side, side), dtype=torch.float64, **options))
        else:
            drawn = torch.randn((batch, *self.shape), dtype=torch.float64, **options)
        return drawn.float().to(device or place or drawn.device)

    def one_off(self, numbers: Tensor, index: int = 0, cosine: float = 0.9) -> Tensor | None:
        """The nearest wrong keys: one bit flipped, or a vector of the same length at a given cosine.

        Args:
            numbers: Right keys, ``(B, *shape)``.
            index: Which bit (modulo their count), or which of the directions away from the vector.
            cosine: How near a wrong vector is.

        Returns:
            Wrong keys, ``(B, *shape)``; ``None`` where nothing is near (rotations of a seed, no key at all).
        """
        if self.kind == "bits":
            wrong = numbers.clone()
            wrong[..., index % self.length] *= -1
            return wrong
        if self.kind != "normal" or self.length < 2:
            return None
        away = MasterKey.from_seed(f"one-off {index}").derive("one-off", bytes(NONCE_BYTES)).normal(self.length)
        unit = torch.nn.functional.normalize(numbers.double(), dim=-1)
        away = away.to(unit) - (unit @ away.to(unit)).unsqueeze(-1) * unit
        away = torch.nn.functional.normalize(away, dim=-1)
        mixed = cosine * unit + (1 - cosine**2) ** 0.5 * away
        return (mixed * numbers.double().norm(dim=-1, keepdim=True)).to(numbers)

    def nearby(self, numbers: Tensor, sample: Tensor) -> dict[str, Tensor]:
        """Wrong keys at further distances from the right ones than :meth:`one_off`'s, for a curve.

        Args:
            numbers: Right keys, ``(B, *shape)``.
            sample: Number of each face in its data set, ``(B,)``: which bits are wrong differs from face to face.

        Returns:
            Word of the protocol → wrong keys ``(B, *shape)``: ``bits-2`` to ``bits-32``, as long as that is less than
            half of the bits, or ``cosine-0.5`` and ``cosine-0.99``; nothing where nothing is near.
        """
        if self.kind == "bits":
            chance = [MasterKey.from_seed(f"bits off {int(s)}").derive("bits off", bytes(NONCE_BYTES)) for s in sample]
            rank = torch.stack([key.normal(self.length).argsort().argsort() for key in chance]).to(numbers.device)
            counts = [count for count in BITS_OFF if 2 * count < self.length]
            return {f"bits-{count}": torch.where(rank < count, -numbers, numbers) for count in counts}
        found = {f"cosine-{cosine}": self.one_off(numbers, cosine=cosine) for cosine in COSINES}
        return {word: wrong for word, wrong in found.items() if wrong is not None}

    def check(self, numbers: Tensor, batch: int) -> Tensor:
        """The numbers as they are, if they are ``batch`` keys of this kind.

        Raises:
            ValueError: If their shape or type is another.
        """
        if not numbers.is_floating_point():
            raise ValueError(f"expected a key of floating-point numbers, got {numbers.dtype}")
        found, unit = (
            tuple(numbers.shape),
            {"bits": "bits", "rotation": "dimensions"}.get(self.kind, "numbers"),
        )
        if found[1:] != self.shape:
            told = found[-1] if len(found) == 1 + len(self.shape) else f"shape {found}"
            name = "key_bits" if self.kind == "bits" else "key length"
            raise ValueError(
                f"expected a key of {self.length} {unit}, got {told}; a key fits only models built with the same {name}"
            )
        if found[0] != batch:
            raise ValueError(f"expected {batch} keys, one a face, got {found[0]}")
        return numbers


@dataclass(frozen=True)
class KeyRing:
    """Right and wrong keys of the faces of a data set, for training's evaluation and the bench.

    Args:
        master: Where right keys come from.
        wrong_master: Where wrong keys come from: another secret.
        label: Who asks; two labels give unrelated keys.
    """

    master: MasterKey
    wrong_master: MasterKey
    label: str = "face"

    @classmethod
    def from_seed(cls, seed: int, label: str = "face") -> KeyRing:
        """A ring out of a number, the same on every machine."""
        return cls(MasterKey.from_seed(seed), MasterKey.from_seed(f"{seed} wrong"), label)

    def nonce(self, sample: int, index: int = 0) -> bytes:
        """The nonce of a face's ``index``-th key, by the face's number in its data set; 16 bytes."""
        return index.to_bytes(8, "big") + sample.to_bytes(8, "big")

    def right(self, sample: int) -> Key:
        """The key that hides this face and brings it back."""
        return self.master.derive(self.label, self.nonce(sample))

    def other(self, sample: int, index: int = 0) -> Key:
        """An unrelated key under which the same face is hidden again; ``index`` counts such keys."""
        return self.master.derive(self.label, self.nonce(sample, 1 + index))

    def wrong(self, sample: int, index: int = 0) -> Key:
        """The key another secret gives for the right nonce; ``index`` counts such secrets."""
        label = self.label if index == 0 else f"{self.label}/wrong/{index}"
        return self.wrong_master.derive(label, self.nonce(sample))

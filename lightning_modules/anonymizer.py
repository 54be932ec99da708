"""The interface of every method: two verbs, ``anonymize`` and ``recover``, and the one evaluation step all share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from datamodules.batch import FaceBatch, face_batch
from lightning_modules.carriers import through_file
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.trained import card_hashes, check_cards

if TYPE_CHECKING:
    from lightning import LightningDataModule

Image = Float[Tensor, "batch 3 height width"]


class RoundTrip(NamedTuple):
    """What one method did to a batch of faces; all a metric may see.

    Pictures are RGB in [-1, 1], ``(B, 3, H, W)``, decoded from the saved 8-bit file; an absent leg is ``(B, 0)``.

    Attributes:
        original: The faces as they came.
        anonymized: Under the right key.
        other: The same faces under a second, unrelated key.
        recovered: From the anonymized file with the right key.
        wrongly_recovered: From the anonymized file with a random wrong key.
        nearly_recovered: With a key one bit off (cosine 0.9 for normal keys); absent where that is n/a.
        wrong_attribute: With the right key and one attribute wrong; absent where attributes are no factors.
        other_again: The faces under further unrelated keys, ``(B, keys, 3, H, W)``.
        wrong_again: From the anonymized file with further random wrong keys, likewise.
        near_again: With further keys that are nearly right, likewise.
        inverted: The method's auto-encoding without any key, the upper bound of a recovery.
        identity: Number of the person, ``(B,)`` int64.
        sample: Number of the face in its data set, ``(B,)`` int64.
        mask: Face region, ``(B, 1, H, W)``, or ``(B, 0)``.
    """

    original: Tensor
    anonymized: Tensor
    other: Tensor
    recovered: Tensor
    wrongly_recovered: Tensor
    nearly_recovered: Tensor
    wrong_attribute: Tensor
    other_again: Tensor
    wrong_again: Tensor
    near_again: Tensor
    inverted: Tensor
    identity: Int[Tensor, " batch"]
    sample: Int[Tensor, " batch"]
    mask: Tensor

    @classmethod
    def of(cls, original: Tensor, **known: Tensor) -> RoundTrip:
        """A round trip with the legs that are known; the others are absent."""
        absent = dict.fromkeys(cls._fields, original.new_zeros((len(original), 0)))
        return cls(**{**absent, "original": original, **known})


def resize(image: Float[Tensor, "batch 3 height width"], size: int) -> Float[Tensor, "batch 3 height2 width2"]:
    """Resize square pictures ``(B, 3, H, H)`` to ``size`` pixels, antialiased when shrinking."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, size=(size, size), mode="bilinear", antialias=True).clamp(-1, 1)


class ReversibleAnonymizer(L.LightningModule):
    """A method that hides faces under a key and, if it can, brings them back.

    A method states its picture ``size`` in pixels, its ``key_spec``, whether it is ``reversible`` and the card names
    of the networks its losses used (``loss_networks``), so that no such network is taken for its judge.
    """

    size: int
    key_spec: KeySpec = KeySpec("none", 0)
    reversible: bool = True
    loss_networks: frozenset[str] = frozenset()
    attributes: int = 0
    """Attributes of a face that are factors beside the key."""
    fine: bool = False
    """Whether recovery reads single pixels, so that an anonymized face keeps its finest detail when it is pasted into a
    picture, at the price of some grain."""

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Hide the faces under ``key``, one row a face; returns ``(B, 3, size, size)`` in [-1, 1]."""
        raise TypeError(f"{type(self).__name__} must define anonymize(face, key)")

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """Bring anonymized faces back under ``key``; returns ``(B, 3, size, size)`` in [-1, 1].

        Raises:
            ValueError: If the method is not reversible.
        """
        raise ValueError(f"{type(self).__name__} is not reversible; only the sealed original can be recovered")

    def kept_beside(self, face: FaceBatch, key: Tensor) -> Tensor | None:
        """What has to be kept beside the anonymized faces for :meth:`recover`, which gets it as ``face.w``; no secret.

        ``(B, ...)``, of nothing but face and key; ``None`` where the pictures are enough, as they should be.
        """
        return None

    def code_of(self, face: FaceBatch) -> Tensor | None:
        """What ``--seal code`` keeps of originals, ``(B, n)``: what recovery else reads off the pictures, less well.

        ``None`` where a method has no such code.
        """
        return None

    def recover_from(self, face: FaceBatch, code: Tensor) -> Image:
        """Bring anonymized faces back by their own codes, ``(B, n)`` of :meth:`code_of`, instead of a key.

        Raises:
            ValueError: If the method has no such code.
        """
        raise ValueError(f"{type(self).__name__} has no code of a face to seal or to recover from")

    def invert(self, face: FaceBatch) -> Image | None:
        """Encode and decode without a key: the bound of any recovery. ``None`` where a method has none."""
        return None

    def prepare(self, datamodule: LightningDataModule) -> None:
        """Collect, once, what a method needs of the training faces without training on them (k-same's gallery)."""

    def fit_size(self, face: FaceBatch) -> FaceBatch:
        """The same batch with its pictures at this method's size."""
        return face._replace(image=resize(face.image, self.size))

    @torch.no_grad()
    def round_trip(self, batch: FaceBatch, keys: KeyRing, carrier: str = "png") -> RoundTrip:
        """Anonymize, save, and recover from the saved bytes alone, as every figure is measured.

        Args:
            batch: Faces of any size; pictures are compared at the size they came in.
            keys: Where right, other and wrong keys come from.
            carrier: Name of the file format between the two verbs (:mod:`lightning_modules.carriers`).
        """
        size, absent = batch.image.shape[-1], batch.image.new_zeros((len(batch.image), 0))
        face = self.fit_size(batch)
        right, other, wrong = (
            torch.stack([self.key_spec.numbers(draw(int(sample))) for sample in batch.sample]).to(self.device)
            for draw in (keys.right, keys.other, keys.wrong)
        )
        saved = through_file(self.anonymize(face, right), carrier)
        # Nothing else of the original passes this line; attributes do where they are factors, which the holder knows.
        received = face_batch(saved, attributes=face.attributes[:, : self.attributes], w=self.kept_beside(face, right))

        def read(key: Tensor | None) -> Tensor:
            if key is None or not self.reversible:
                return absent
            return resize(through_file(self.recover(received, key), "png"), size)

        made = {
            "anonymized": resize(saved, size),
            "recovered": read(right),
            "wrongly_recovered": read(wrong),
            "nearly_recovered": read(self.key_spec.one_off(right)),
        }
        if self.key_spec.kind != "none":
            made["other"] = resize(through_file(self.anonymize(face, other), carrier), size)
        if (inverted := self.invert(face)) is not None:
            made["inverted"] = resize(through_file(inverted, "png"), size)
        return RoundTrip.of(batch.image, identity=batch.identity, sample=batch.sample, mask=batch.mask, **made)

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> RoundTrip:
        """The shared evaluation step; metrics and grids read it in callbacks."""
        return self.round_trip(batch, KeyRing.from_seed(0))

    def test_step(self, batch: FaceBatch, batch_idx: int) -> RoundTrip:
        """As :meth:`validation_step`, on the test people."""
        return self.round_trip(batch, KeyRing.from_seed(1))

    def on_validation_start(self) -> None:
        """Have what the method needs of the training faces, as in a comparison."""
        self._prepare()

    def on_test_start(self) -> None:
        """As :meth:`on_validation_start`."""
        self._prepare()

    def on_predict_start(self) -> None:
        """As :meth:`on_validation_start`."""
        self._prepare()

    def _prepare(self) -> None:
        if getattr(self.trainer, "datamodule", None) is not None:
            with torch.no_grad():
                self.prepare(self.trainer.datamodule)

    def predict_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:
        """Anonymized pictures ``(B, 3, size, size)`` for a prediction writer, under keys of seed 0."""
        keys = KeyRing.from_seed(0)
        numbers = torch.stack([self.key_spec.numbers(keys.right(int(s))) for s in batch.sample]).to(self.device)
        return self.anonymize(self.fit_size(batch), numbers)

    def frozen_cards(self) -> dict[str, str]:
        """Card name → hash of every frozen network this method was trained against."""
        return card_hashes(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the class, and the hashes of the frozen networks: they are rebuilt from cards, never stored."""
        checkpoint["method"] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["cards"] = self.frozen_cards()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained against other frozen networks.

        Raises:
            ValueError: If a card's hash differs from the one noted in the checkpoint.
        """
        check_cards(checkpoint.get("cards", {}), self.frozen_cards())

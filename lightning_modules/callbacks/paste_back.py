"""Faces back into the pictures that they came from, and the check that nobody is known there again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch.callbacks import BasePredictionWriter
from numpy import ndarray
from torch import Tensor

from datamodules.alignment import compose, invert, transform, warp
from datamodules.batch import FaceBatch
from datamodules.detection import Detector, main_face, overlap
from datamodules.photos import OpenPhoto, Photos
from lightning_modules.calibration import load_calibration
from lightning_modules.carriers import from_pixels, to_pixels
from lightning_modules.judges import CosineJudge, OwnNetwork

MARGIN = 0.02  # share of the crop's side by which a changed region is widened, and over which its border is soft
OVERLAP = 0.4  # intersection over union of the boxes of a face before and after, below which it is out of place
RIM = 0.06  # share of the crop's side over which a paste fades towards the crop's border
STEPS, STEP, KEPT = 8, 1.5, 0.5  # of back-projection: how often, how far, and how much of the step before
TRIES = 4  # keys a face is given until nobody is known again


class StillRecognizedError(ValueError):
    """A face that is still taken for its original."""


class Gate:
    """Whether a face is still taken for its original, by a recogniser at its threshold for FAR 0.1 %.

    The recogniser is the identity network of the losses: its yes is a reason to refuse, its no is no proof. The
    threshold is that of ``keyveil judges calibrate``, from 1.9 million pairs of LFW's test people.

    Args:
        judge: The recogniser; ``None`` takes the identity network of its card.
        threshold: Similarity above which two faces are one person; ``None`` reads the calibration.
    """

    def __init__(self, judge: CosineJudge | None = None, threshold: float | None = None) -> None:
        self.judge = OwnNetwork() if judge is None else judge
        self.threshold = load_calibration(self.judge).threshold if threshold is None else threshold

    def similarity(self, originals: list[ndarray], others: list[ndarray]) -> list[float]:
        """Cosine of each face of ``originals`` to its partner; crops ``(S, S, 3)`` uint8."""
        if not originals:
            return []
        a, b = (
            self.judge.embed(torch.stack([from_pixels(crop) for crop in crops])).double()
            for crops in (originals, others)
        )
        return (a * b).sum(1).tolist()

    def knows(self, people: list[ndarray], others: list[ndarray]) -> list[bool]:
        """Whether each crop ``(S, S, 3)`` of ``others`` is taken for one of ``people``."""
        a, b = (
            self.judge.embed(torch.stack([from_pixels(crop) for crop in crops])).double() for crops in (others, people)
        )
        return ((a @ b.mT).amax(1) > self.threshold).tolist()


def opacity(crop: UInt8[ndarray, "s s 3"], made: UInt8[ndarray, "s s 3"]) -> Float[ndarray, "s s"]:
    """How much of a made face replaces the crop: 1 where the two differ, 0 a little beside it.

    The changed region is closed and widened, so that the soft border lies outside of it; towards the border of the
    crop it fades, so that a wholly changed crop becomes a square with a soft rim.
    """
    size = crop.shape[0]
    reach = max(1, round(MARGIN * size))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    changed = (crop != made).any(2).astype(np.uint8)
    padded = cv2.copyMakeBorder(changed, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)[reach:-reach, reach:-reach]
    wide = cv2.dilate(closed, cv2.getStructuringElement(cv2.MORPH_RECT, (2 * reach + 1, 2 * reach + 1)))
    soft = cv2.blur(wide.astype(np.float32), (2 * reach + 1, 2 * reach + 1), borderType=cv2.BORDER_REPLICATE)
    ramp = np.clip((np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5) / (RIM * size), 0, 1)
    ramp = (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)
    return soft * np.minimum(ramp[:, None], ramp[None, :])


def put_back(
    picture: UInt8[ndarray, "h w 3"],
    crop: UInt8[ndarray, "s s 3"],
    made: UInt8[ndarray, "s s 3"],
    matrix: Float[ndarray, "2 3"],
    legible: bool = False,
) -> tuple[int, int, int, int]:
    """Paste a made face into its picture, in place: where it differs from the crop it replaces what was there.

    No difference is added: the fine detail of what was there would stay. Outside the region every pixel stays.

    A face that is enlarged by pasting and cut out again for recovery is smoother than it was made, and a code in its
    fine detail is lost. With ``legible`` the paste is corrected by what is missing after cutting out, several times,
    with momentum (iterative back-projection; Irani & Peleg, 1991).

    Args:
        picture: RGB picture, changed in place.
        crop: What was cut out of it.
        made: What the method made of that.
        matrix: Map from picture pixels to crop pixels.
        legible: Whether somebody will cut it out again and read its finest detail. Grain comes with it, the more the
            less the face is enlarged.

    Returns:
        Left, top, right, bottom of the pixels that may have changed; an empty rectangle where none did.
    """
    height, width = picture.shape[:2]
    size = crop.shape[0]
    corners = transform(invert(matrix), np.array([(0, 0), (size, 0), (0, size), (size, size)]) - 0.5)
    left, top = np.clip(np.floor(corners.min(0)).astype(int), 0, (width, height))
    right, bottom = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, (width, height))
    if left >= right or top >= bottom:
        return 0, 0, 0, 0
    to_crop = compose(matrix, np.array([[1.0, 0.0, left], [0.0, 1.0, top]]))
    extent = (int(right - left), int(bottom - top))
    covering = opacity(crop, made)
    alpha = _resample(covering, to_crop, extent, cv2.INTER_LINEAR)
    ys, xs = np.nonzero(alpha > 0)
    if not len(ys):
        return 0, 0, 0, 0
    inner = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    new = _resample(made.astype(np.float32), to_crop, extent, cv2.INTER_CUBIC)[inner]
    share = alpha[inner][:, :, None]
    y, x = int(top + ys.min()), int(left + xs.min())
    patch = picture[y : y + share.shape[0], x : x + share.shape[1]]
    before, moved = patch.copy(), np.zeros_like(new)
    behind = warp(picture, matrix, size) if legible else crop

    def lay() -> None:
        mixed = (share * new + (1 - share) * before).round().clip(0, 255).astype(np.uint8)
        patch[...] = np.where(share > 0, mixed, before)

    lay()
    enlarged = np.linalg.det(matrix[:, :2]) < 1
    cover = covering[:, :, None]
    wanted = cover * made + (1 - cover) * behind
    inside = _inside(matrix, size, picture.shape[:2])[:, :, None]
    for _ in range(STEPS if legible and enlarged else 0):
        missing = (wanted - warp(picture, matrix, size)) * inside
        moved = KEPT * moved + STEP * _resample(missing, to_crop, extent, cv2.INTER_CUBIC)[inner]
        new += moved
        lay()
    return x, y, x + share.shape[1], y + share.shape[0]


def _inside(matrix: Float[ndarray, "2 3"], size: int, extent: tuple[int, ...]) -> Float[ndarray, "s s"]:
    """1 where a pixel of the crop lies in the picture of this height and width, 0 elsewhere."""
    x, y = np.meshgrid(np.arange(size, dtype=np.float64), np.arange(size, dtype=np.float64))
    places = transform(invert(matrix), np.stack([x.ravel(), y.ravel()], 1))
    there = ((places >= 0) & (places <= np.array(extent[::-1]) - 1)).all(1)
    return there.reshape(size, size).astype(np.float32)


def _resample(values: ndarray, to_crop: ndarray, extent: tuple[int, int], how: int) -> ndarray:
    """Crop values at the pixels of a part of the picture; areas are averaged first where the crop is the finer one."""
    scale = float(np.sqrt(abs(np.linalg.det(to_crop[:, :2]))))
    border = cv2.BORDER_CONSTANT if values.ndim == 2 else cv2.BORDER_REPLICATE
    if scale > 1:
        size = values.shape[0]
        small = max(1, round(size / scale))
        values = cv2.resize(values, (small, small), interpolation=cv2.INTER_AREA)
        shrink = small / size
        to_crop = compose(np.array([[shrink, 0, shrink / 2 - 0.5], [0, shrink, shrink / 2 - 0.5]]), to_crop)
    return cv2.warpAffine(values, to_crop, extent, flags=how | cv2.WARP_INVERSE_MAP, borderMode=border)


def misplaced(detector: Detector, crop: UInt8[ndarray, "s s 3"], written: UInt8[ndarray, "s s 3"]) -> bool:
    """Whether the face that a crop is of is not found there any more in what was written; without one, never."""
    before = main_face(detector.detect(crop), *crop.shape[:2])
    if before is None:
        return False
    return not any(overlap(before.box, after.box) >= OVERLAP for after in detector.detect(written))


_OF_A_TRY = ("made", "nonces", "touched", "similarity", "misplaced")  # of an open picture


def _pixels(image: Tensor) -> UInt8[ndarray, "s s 3"]:
    """What a method made, as 8 bits.

    Raises:
        ValueError: It is no picture.
    """
    if torch.isnan(image).any():
        raise ValueError("the method made values that are not numbers; its weights are damaged")
    return to_pixels(image)


class PasteBack(BasePredictionWriter):
    """Pastes each picture's faces back when its last one is made, and hands the picture on.

    With a gate, each face is cut out of the finished picture again and compared with its original; one that is still
    taken for it gets another key, up to three times, and then the picture is given up. With a detector too, so does one
    that is no longer found where it was, as where a key asks the generator for more than it can draw; such a picture is
    written nevertheless, if nobody is known in it.

    Args:
        gate: The check; ``None`` for recovery.
        detector: What looks for faces where they were; ``None`` looks for none.

    Attributes:
        failures: At the end, how many pictures could not be done.
    """

    def __init__(self, gate: Gate | None = None, detector: Detector | None = None) -> None:
        super().__init__("batch")
        self.gate, self.detector = gate, detector
        self.failures = 0

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: FaceBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collect what was made of a batch's faces, ``(B, 3, size, size)``, and finish the pictures it completes."""
        photos: Photos = trainer.datamodule
        samples = [int(sample) for sample in batch.sample]
        for image, sample in zip(prediction, samples, strict=True):
            opened, index = photos.open.pop(sample)
            opened.made[index] = _pixels(image)
            if any(made is None for made in opened.made):
                continue
            try:
                pixels = self._finish(opened, photos, pl_module)
            except StillRecognizedError as error:
                photos.job.failed(opened.photo.found, opened.photo.digest, error)
            else:
                photos.job.done(opened, pixels)

    def _finish(self, opened: OpenPhoto, photos: Photos, step: L.LightningModule) -> UInt8[ndarray, "h w 3"]:
        """The picture with its faces, checked."""
        tries = TRIES if getattr(step, "keyed", False) else 1
        known: list[int] = []
        best: tuple[int, ndarray, dict[str, list[Any]]] | None = None  # in which nobody is known
        for _ in range(tries):
            for index in sorted({*known, *opened.misplaced}):
                opened.made[index] = self._again(opened, index, photos, step)
            pixels = opened.photo.pixels.copy()
            faces = zip(opened.crops, opened.made, opened.places, strict=True)
            legible = self.gate is not None and step.method.fine
            opened.touched = [put_back(pixels, crop, made, place.matrix, legible) for crop, made, place in faces]
            if self.gate is None:
                return pixels
            written = [warp(pixels, place.matrix, photos.size) for place in opened.places]
            before = self.gate.similarity(opened.crops, list(opened.made))
            after = self.gate.similarity(opened.crops, written)
            opened.similarity = list(zip(before, after, strict=True))
            known = [index for index, value in enumerate(after) if not value <= self.gate.threshold]
            seen = enumerate(zip(opened.crops, written, strict=True))
            looking = self.detector is not None and tries > 1
            opened.misplaced = [index for index, crops in seen if looking and misplaced(self.detector, *crops)]
            if not known and (best is None or len(opened.misplaced) < best[0]):
                best = len(opened.misplaced), pixels, {name: list(getattr(opened, name)) for name in _OF_A_TRY}
            if not known and not opened.misplaced:
                break
        if best is not None:
            for name, values in best[2].items():
                setattr(opened, name, values)
            return best[1]
        told = f"{len(known)} of its {len(opened.places)} faces {'is' if len(known) == 1 else 'are'}"
        often = "once" if tries == 1 else f"with {tries} keys"
        raise StillRecognizedError(f"{told} still recognized, tried {often}, so the picture is not written")

    @staticmethod
    def _again(opened: OpenPhoto, index: int, photos: Photos, step: L.LightningModule) -> UInt8[ndarray, "s s 3"]:
        """One face under another key."""
        number = -1  # of no face in the queue
        photos.open[number] = (opened, index)
        row = FaceBatch(*(value[None].to(step.device) for value in opened.row(index, number)))
        try:
            return _pixels(step.predict_step(row, 0)[0])
        finally:
            del photos.open[number]

    def on_predict_epoch_end(self, *args: Any) -> None:
        """Nothing: the pictures are handed on already."""

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the pictures that could not be done, of all processes."""
        own = torch.tensor(float(trainer.datamodule.job.failures), device=pl_module.device)
        self.failures = int(trainer.strategy.reduce(own, reduce_op="sum"))

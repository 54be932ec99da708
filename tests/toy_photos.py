"""Stand-ins for pictures of people: smooth colours as faces at known places, a keyed method that turns them about."""

from __future__ import annotations

import random

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from datamodules.alignment import template
from datamodules.detection import Detection
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.judges import CosineJudge
from lightning_modules.keys import KeySpec

FACE = 100  # pixels of a picture's width a face


def picture(faces=1, seed=0, height=120):
    """Smooth noise, ``(height, 100 a face, 3)`` uint8; 60 pixels wide without a face."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8 * max(1, faces), 3), dtype=np.uint8)
    return cv2.resize(coarse, (FACE * faces or 60, height), interpolation=cv2.INTER_CUBIC)


def draw_alike(monkeypatch):
    """Salts and nonces are the same in every run: by chance, a toy's eight keys come twice."""
    drawn = random.Random(1)
    for verb in ("anonymizing", "clips", "rekey"):
        monkeypatch.setattr(f"experiments.{verb}.fresh", lambda: drawn.randbytes(16))


class ToyDetector:
    """A face in each 100 pixels of a picture's width."""

    name = "toy"

    def detect(self, picture):
        found = []
        for index in range(picture.shape[1] // FACE):
            left, top = index * FACE + 10, picture.shape[0] / 2 - 40
            box = np.array([left + 20, top + 20, left + 60 + index, top + 70], np.float32)
            points = template("ffhq", 80) + (left, top)
            # below what a face must score that lies or hangs: pictures turned hold none
            found.append(Detection(box, 0.7 - index / 100, points.astype(np.float32)))
        return found


class ToyMethod(ReversibleAnonymizer):
    """Turns, mirrors and inverts the middle of a crop by three bits, and leaves it as it is for one key of eight."""

    size, key_spec = 64, KeySpec("bits", 3)

    def anonymize(self, face, key):
        return torch.stack([self._turn(image, bits, 1) for image, bits in zip(face.image, key, strict=True)])

    def recover(self, face, key):
        return torch.stack([self._turn(image, bits, -1) for image, bits in zip(face.image, key, strict=True)])

    def code_of(self, face):
        return face.image.flatten(1)

    def recover_from(self, face, code):
        return code.view_as(face.image)

    @staticmethod
    def _turn(image, bits, direction):
        image, middle = image.clone(), image[:, 16:48, 16:48]
        if bits[0] > 0:
            middle = -middle
        if bits[1] > 0:
            middle = middle.flip(1)
        if bits[2] > 0:
            middle = middle.roll(direction, 0)
        image[:, 16:48, 16:48] = middle
        return image


class ToyFactors(ToyMethod):
    """Shows its faces in other colours by two attributes."""

    attributes = 2

    def anonymize(self, face, key):
        return self._coloured(super().anonymize(face, key), face, 1)

    def recover(self, face, key):
        return super().recover(face._replace(image=self._coloured(face.image, face, -1)), key)

    @staticmethod
    def _coloured(image, face, direction):
        steps = ((face.attributes[:, 0] > 0) + 2 * (face.attributes[:, 1] > 0)).long() % 3
        image = image.clone()
        for one, by in zip(image, steps, strict=True):
            one[:, 16:48, 16:48] = one[:, 16:48, 16:48].roll(direction * int(by), 0)
        return image


class Untouched(ReversibleAnonymizer):
    """Hides nobody."""

    size = 64

    def anonymize(self, face, key):
        return face.image.clone()


class ToyJudge(CosineJudge):
    """Knows a face by its colours."""

    name, weights, networks, runs_on = "toy", "none", frozenset(), "toy"

    def _embed(self, images):
        middle = F.adaptive_avg_pool2d(images[:, :, 16:48, 16:48], 8).flatten(1)
        return F.normalize(middle - middle.mean(1, keepdim=True), dim=1)

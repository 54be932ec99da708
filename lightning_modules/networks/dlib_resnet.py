"""dlib's recogniser on an aligned crop; imports no torch, so that worker processes start fast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

Describer = Callable[[UInt8[ndarray, "height width 3"]], Float[ndarray, " dim"]]

# Median of dlib's own detections (left, top, right, bottom) on 200 aligned LFW faces, as a share of the crop.
# The points found inside it lie 0.2 px (of 256) from those found inside the detector's own rectangle.
_FACE = (45 / 256, 78 / 256, 194 / 256, 228 / 256)


def describer(landmarks: str, recognition: str) -> Describer:
    """Function from a square crop, RGB uint8, to its 128 numbers.

    The crop is aligned, so the face rectangle is a constant and no detector runs; five points are found
    inside it and the 150-px chip is cut from them, as in dlib's own example.

    Args:
        landmarks: Path of the five-point shape predictor.
        recognition: Path of the recognition network.

    Raises:
        ImportError: If dlib is not installed.
    """
    try:
        import dlib
    except ImportError as error:
        raise ImportError("the judge dlib needs the package dlib-bin: pip install 'keyveil[judges]'") from error
    points, network = dlib.shape_predictor(landmarks), dlib.face_recognition_model_v1(recognition)

    def describe(crop: UInt8[ndarray, "height width 3"]) -> Float[ndarray, " dim"]:
        face = dlib.rectangle(*(round(share * len(crop)) for share in _FACE))
        chip = dlib.get_face_chip(crop, points(crop, face), size=150, padding=0.25)
        return np.array(network.compute_face_descriptor(chip))

    return describe


class Worker:
    """A describer that is made once in each worker process."""

    describe: Describer

    @classmethod
    def start(cls, landmarks: str, recognition: str) -> None:
        """Load the networks."""
        cls.describe = staticmethod(describer(landmarks, recognition))

    @classmethod
    def run(cls, crop: UInt8[ndarray, "height width 3"]) -> Float[ndarray, " dim"]:
        """Describe one crop."""
        return cls.describe(crop)

"""What frozen networks read off a face beside who it is: pose, expression, eyes, gender and age; all only measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from datamodules.alignment import template
from lightning_modules.anonymizer import Image, resize
from lightning_modules.judges import FaceRes
from lightning_modules.networks.crop import WORKING_SIZE, FixedCrop
from lightning_modules.networks.landmarks import GREY, Landmarks68
from lightning_modules.weights import find, locate

Reader = Callable[[Image], Tensor]
"""Aligned pictures of any size, RGB in [-1, 1] → one row of numbers a face, on the CPU."""

HAPPY = 3  # of the seven expressions: the one that CelebA's smiling faces have
CLOSED = 0.95  # least probability of a closed eye: at one half, shaded and narrow eyes outnumber the closed ones
_EYE, _EYE_PAD = 24, 1.6  # side of the eye network's crop in pixels, and that side in widths of the eye (KNOWN)
_CORNERS = (36, 42)  # of the 68 landmarks: where each eye's six begin


class _Onnx:
    """A network of one input, exported for one face at a time."""

    def __init__(self, card: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(locate(card)), options, providers=["CPUExecutionProvider"])

    def __call__(self, blobs: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch outputs classes"]:
        rows = [np.stack(self._session.run(None, {"input": blob[None].numpy()}), 1)[0] for blob in blobs]
        return torch.from_numpy(np.stack(rows))


def _square(left: float, top: float, side: float, size: int) -> FixedCrop:
    """Crop of ``size`` pixels from a square of the aligned crop, given in shares of its side."""
    shares = (template("ffhq", WORKING_SIZE) + 0.5) / WORKING_SIZE
    return FixedCrop((shares - np.array([left, top])) / side * size - 0.5, size)


class HeadPose:
    """Yaw, pitch and roll in degrees, ``(B, 3)``, by a ShuffleNet with 3 x 66 bins; card ``head-pose``.

    KNOWN, from the code beside the file: 224 px, ImageNet's mean and deviation, bins of 3 degrees from -99, of whose
    softmax the mean is taken (Ruiz et al., 2018, "Fine-Grained Head Pose Estimation Without Keypoints"). OURS: red
    first (the code beside the file has blue first), and the square of the aligned crop; of both, what on 200 CelebA
    faces mirrored best. On 600 of them, whose yaws have a deviation of 15 degrees, yaw and mirrored yaw cancel within
    0.7 degrees at the median beside a constant 1.5 degrees each, which no difference shows; in 16 they miss by more
    than 10. Turning 120 pictures by 15 degrees turned the roll by 14.9 on average.
    """

    def __init__(self) -> None:
        self._run, self._crop = _Onnx("head-pose"), _square(0.1, 0.22, 0.8, 224)
        self._mean, self._std = (
            torch.tensor(numbers).view(3, 1, 1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )

    @torch.no_grad()
    def __call__(self, images: Image) -> Float[Tensor, "batch 3"]:
        """Degrees."""
        bins = self._run(((self._crop(images.cpu().float()) + 1) / 2 - self._mean) / self._std).softmax(2)
        return (bins * torch.arange(66.0)).sum(2) * 3 - 99


class Expression:
    """Probabilities of seven expressions, ``(B, 7)``, by a DenseNet-121; card ``expression``.

    KNOWN, from the code beside the file: 224 px of colour in [0, 1]. Not known are the expressions' names; the fourth
    is that of smiling faces. OURS: blue first (the code beside the file has red first), and the square of the aligned
    crop. On 800 CelebA faces, 89 px wide, it is the likeliest or not as the label Smiling says in 84 % (area under ROC
    .94; with red first 78 % and .91 at best, on 400). Its word for a face is not steady: mirroring 200 faces left the
    likeliest of the seven as it was in 84 %, and whether it is the happy one in 91 %.
    """

    def __init__(self) -> None:
        self._run, self._crop = _Onnx("expression"), _square(0.1, 0.22, 0.8, 224)

    @torch.no_grad()
    def __call__(self, images: Image) -> Float[Tensor, "batch 7"]:
        """Probabilities."""
        return self._run((self._crop(images.cpu().float()).flip(1) + 1) / 2)[:, 0].softmax(1)


class EyesClosed:
    """Probability that each eye is closed, ``(B, 2)``, the picture's left one first; card ``eyes-open``.

    KNOWN, from the code beside the file: 24 px of grey in [0, 1], a square of 1.6 widths of the eye about its lids, by
    68 landmarks. No data set here has a label of closed eyes, and they are rare: of 2,000 LFW faces it has 70 with both
    eyes more likely closed, of which 25 show no pupil when looked at (the others are shaded, narrow, or behind dark
    glasses), and 30 above :data:`CLOSED`, of which 21 do; 47 and 23 from pictures of 128 px. How many it misses is not
    known.
    """

    def __init__(self) -> None:
        self._run, self._landmarks = _Onnx("eyes-open"), Landmarks68()

    @torch.no_grad()
    def __call__(self, images: Image) -> Float[Tensor, "batch 2"]:
        """Probabilities."""
        images = resize(images.cpu().float(), WORKING_SIZE)
        points = self._landmarks(images)
        grey = (images * torch.tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True) / 2 + 0.5
        eyes = [self._run(eye_crop(grey, points[:, start : start + 6]))[:, 0].softmax(1) for start in _CORNERS]
        return torch.stack([eye[:, 0] for eye in eyes], 1)


def eye_crop(
    grey: Float[Tensor, "batch 1 side side"], points: Float[Tensor, "batch 6 2"]
) -> Float[Tensor, "batch 1 24 24"]:
    """Square about the four points of the lids, 1.6 times as wide as the eye.

    Args:
        grey: Pictures.
        points: The eye's six landmarks in shares of the side, from its left corner on.
    """
    centre = points[:, [1, 2, 4, 5]].mean(1)
    side = (points[:, 3, 0] - points[:, 0, 0]) * _EYE_PAD
    ticks = ((torch.arange(2 * _EYE) + 0.5) / (2 * _EYE) - 0.5) * side[:, None]  # twice as dense, then averaged
    across, down = centre[:, :1] + ticks, centre[:, 1:] + ticks
    at = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), -1)
    return F.avg_pool2d(F.grid_sample(grey, at * 2 - 1, align_corners=False, padding_mode="border"), 2)


class GenderAge:
    """Probability of an apparently male face and apparent age in years, ``(B, 2)``; card ``faceres``.

    By :class:`~lightning_modules.judges.FaceRes`. On 1,007 CelebA faces it agrees with the label Male in 98.8 %, and
    under 40 years (:data:`OLD`) with the label Young in 89 %.
    """

    def __init__(self) -> None:
        self._network = FaceRes()

    def __call__(self, images: Image) -> Float[Tensor, "batch 2"]:
        """Probability and years."""
        return torch.stack(self._network.attributes(images), 1)


OLD = 40.0
"""Apparent years from which a face is not young."""

READERS: dict[str, tuple[Callable[[], Reader], tuple[str, ...]]] = {
    "head-pose": (HeadPose, ("head-pose",)),
    "expression": (Expression, ("expression",)),
    "eyes-open": (EyesClosed, ("eyes-open", "landmarks68")),
    "faceres": (GenderAge, ("faceres", "faceres-graph")),
}
"""What makes each reader, by the card of the network that decides, and all cards it needs."""


class Remembered:
    """A reader that reads a picture once (ours): the originals of a data set come again with every method.

    Args:
        reader: Who reads.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader, self._known = reader, dict[bytes, Tensor]()

    def __call__(self, images: Image) -> Float[Tensor, "batch numbers"]:
        """Rows of all pictures; only new ones are read."""
        keys = [sha256(image.float().cpu().contiguous().numpy().tobytes()).digest() for image in images]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        if new:
            self._known |= zip(new, self.reader(images[list(new.values())]), strict=True)
        return torch.stack([self._known[key] for key in keys])


def missing(name: str) -> str | None:
    """Why the reader of that name in :data:`READERS` cannot be had; ``None`` where it can."""
    lacking = [card for card in READERS[name][1] if find(card) is None]
    return f"weights missing: {', '.join(lacking)}" if lacking else None


@lru_cache
def reader(name: str) -> Remembered:
    """The reader of that name in :data:`READERS`, one for all who ask.

    Raises:
        WeightsError: If a file it needs cannot be found.
    """
    return Remembered(READERS[name][0]())

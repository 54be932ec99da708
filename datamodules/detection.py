"""Finding faces and their five points in a picture: YuNet where its file is found, otherwise CenterFace."""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from lightning_modules.weights import card, find, locate


class Detection(NamedTuple):
    """One face of a picture, in its pixels.

    Attributes:
        box: Left, top, right, bottom, ``(4,)`` float32.
        score: Confidence in [0, 1].
        landmarks: The five points in the order of :mod:`datamodules.alignment`, ``(5, 2)`` float32.
    """

    box: ndarray
    score: float
    landmarks: ndarray


@runtime_checkable
class Detector(Protocol):
    """What finds faces. ``name`` tells detectors and their weights apart in the name of a cache."""

    name: str

    def detect(self, picture: UInt8[ndarray, "h w 3"]) -> list[Detection]:
        """Find the faces of an RGB picture, the most certain first; none gives an empty list."""
        ...


class YuNet:
    """YuNet (Wu et al., 2023) run by OpenCV: about 3 ms a picture on a CPU.

    Args:
        path: Its ONNX file; ``None`` asks the weight card ``yunet``.
        threshold: Least confidence of a face.
        working: Side in pixels to which a picture's longer side is brought before the search. Larger finds
            smaller faces and costs time.
    """

    def __init__(self, path: str | None = None, threshold: float = 0.6, working: int = 320) -> None:
        file = locate("yunet", path)
        self.name = f"yunet-{card('yunet').sha256[:12]}-{working}-{threshold}"
        self.working = working
        loud = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns at every load
        self._network = cv2.FaceDetectorYN.create(str(file), "", (working, working), threshold)
        cv2.utils.logging.setLogLevel(loud)
        self._lock = threading.Lock()  # its input size is a state of the network

    def detect(self, picture: UInt8[ndarray, "h w 3"]) -> list[Detection]:
        """Find the faces of an RGB picture, the most certain first."""
        canvas, back, shift = _canvas(picture, self.working)
        with self._lock:
            self._network.setInputSize((canvas.shape[1], canvas.shape[0]))
            _, rows = self._network.detect(cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR))
        found = []
        for row in np.empty((0, 15), np.float32) if rows is None else rows:
            corners = np.stack([row[:2], row[:2] + row[2:4]])
            box, points = (corners - shift) * back, (row[4:14].reshape(5, 2) - shift) * back
            found.append(Detection(box.reshape(4), float(row[14]), points))
        return sorted(found, key=lambda face: -face.score)


class CenterFace:
    """CenterFace (Xu et al., 2019) run by onnxruntime.

    The output maps have stride 4: a heat map of face centres, log sizes, offsets of the centres and five
    points as shares of the box.

    Args:
        path: Its ONNX file; ``None`` asks the weight card ``centerface``.
        threshold: Least confidence of a face.
        working: Side in pixels to which a picture's longer side is brought before the search.
    """

    def __init__(self, path: str | None = None, threshold: float = 0.5, working: int = 320) -> None:
        import onnx
        import onnxruntime

        file = locate("centerface", path)
        self.name = f"centerface-{card('centerface').sha256[:12]}-{working}-{threshold}"
        self.threshold, self.working = threshold, working
        model = onnx.load(str(file))
        for value in [*model.graph.input, *model.graph.output]:
            if value.name in {"input.1", "537", "538", "539", "540"}:
                # The published file states 10 pictures of 32 pixels; the network is fully convolutional.
                for axis, size in zip("bchw", value.type.tensor_type.shape.dim, strict=True):
                    if axis != "c":
                        size.dim_param = f"{value.name}_{axis}"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every unused batch-norm counter
        options.intra_op_num_threads = 1  # pictures, not layers, are spread over threads
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def detect(self, picture: UInt8[ndarray, "h w 3"]) -> list[Detection]:
        """Find the faces of an RGB picture, the most certain first."""
        canvas, back, shift = _canvas(picture, self.working)
        pixels = canvas.transpose(2, 0, 1)[None].astype(np.float32)  # RGB in [0, 255], as its authors feed it
        heat, size, offset, points = (
            out[0] for out in self._session.run(["537", "538", "539", "540"], {"input.1": pixels})
        )
        y, x = np.nonzero(heat[0] > self.threshold)
        if not len(y):
            return []
        score = heat[0, y, x]
        extent = np.exp(size[:, y, x].T)[:, ::-1] * 4  # stored height first
        centre = (np.stack([x, y], 1) + offset[:, y, x].T[:, ::-1] + 0.5) * 4
        corner = centre - extent / 2
        marks = points[:, y, x].T.reshape(-1, 5, 2)[:, :, ::-1] * extent[:, None] + corner[:, None]
        boxes = np.concatenate([corner, extent], 1)
        keep = cv2.dnn.NMSBoxes(boxes.tolist(), score.tolist(), self.threshold, 0.3)
        boxes[:, 2:] += boxes[:, :2]
        return [
            Detection(
                ((boxes[i].reshape(2, 2) - shift) * back).reshape(4).astype(np.float32),
                float(score[i]),
                ((marks[i] - shift) * back).astype(np.float32),
            )
            for i in np.asarray(keep, np.int64).reshape(-1)
        ]


def default_detector() -> Detector:
    """YuNet where its file is found on this machine, otherwise CenterFace."""
    return YuNet() if find("yunet") is not None else CenterFace()


def intersection(a: Float[ndarray, " 4"], b: Float[ndarray, " 4"]) -> float:
    """Area that two boxes share: left, top, right, bottom."""
    return float(np.prod((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)))


def overlap(a: Float[ndarray, " 4"], b: Float[ndarray, " 4"]) -> float:
    """Intersection over union of two boxes: left, top, right, bottom; 0 where both are empty."""
    inner = intersection(a, b)
    both = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - inner
    return inner / both if both > 0 else 0.0


def main_face(detections: list[Detection], height: int, width: int) -> Detection | None:
    """The face that a portrait is of: large and near the middle; ``None`` where there is none.

    Ranks by area less twice the squared distance from the picture's centre, as insightface does.
    """
    middle = np.array([width, height]) / 2

    def rank(face: Detection) -> float:
        corners = face.box.reshape(2, 2)
        return float(np.prod(corners[1] - corners[0]) - 2 * ((corners.mean(0) - middle) ** 2).sum())

    return max(detections, key=rank, default=None)


def _canvas(picture: UInt8[ndarray, "h w 3"], working: int) -> tuple[UInt8[ndarray, "hh ww 3"], ndarray, ndarray]:
    """Bring a picture to working size on a grey canvas.

    A margin of an eighth, since detectors miss faces that fill a picture; sides are multiples of 32, as
    strides want.

    Returns:
        The canvas and what leads back: pixel = (canvas pixel - shift) * back.
    """
    height, width = picture.shape[:2]
    margin = working // 8
    scale = (working - 2 * margin) / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = cv2.resize(picture, inner, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    sides = [-(-(side + 2 * margin) // 32) * 32 for side in inner]
    left, top = (sides[0] - inner[0]) // 2, (sides[1] - inner[1]) // 2
    canvas = np.full((sides[1], sides[0], 3), 128, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = resized
    back = np.array([width / inner[0], height / inner[1]], np.float32)
    # A canvas pixel c shows picture pixel (c - left + 1/2) * back - 1/2: pixel centres are whole numbers.
    return canvas, back, np.array([left, top], np.float32) - 0.5 + 0.5 / back

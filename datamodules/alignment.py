"""Five points of a face to an upright crop, and back.

A point is (x, y) in pixels as OpenCV counts them: the centre of the first pixel is (0, 0). The five points
are, in this order, the eye on the picture's left, the eye on its right, the nose, the left and the right
corner of the mouth.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

# Part of a cache's name: count it up when a change below moves or alters pixels.
VERSION = 1

# Means over faces of the frozen FFHQ generator at 256 px, in pixels. The half pixel turns pixel coordinates
# (first centre at 0) into a share of the crop (left border at 0), so that one template serves every size.
FFHQ_TEMPLATE: Float[ndarray, "5 2"] = (
    np.array([(96.1, 119.0), (160.3, 118.8), (130.4, 160.1), (99.7, 186.1), (156.5, 185.9)]) + 0.5
) / 256

# The 112-px crop of ArcFace-type recognisers (Deng et al., 2019; insightface's `arcface_dst`), in pixels.
ARCFACE_TEMPLATE: Float[ndarray, "5 2"] = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)


def template(name: str, size: int) -> Float[ndarray, "5 2"]:
    """Where the five points lie in a square crop, in its pixels.

    The only place where a template meets a size.

    Args:
        name: ``"ffhq"`` (the generator's crop, which every :class:`~datamodules.batch.FaceBatch` has) or
            ``"arcface"``.
        size: Side of the crop in pixels.

    Raises:
        ValueError: The name is another.

    Example:
        >>> template("ffhq", 256)[0].round(1).tolist(), template("arcface", 112)[2].round(1).tolist()
        ([96.1, 119.0], [56.0, 71.7])
    """
    shares = {"ffhq": FFHQ_TEMPLATE, "arcface": (ARCFACE_TEMPLATE + 0.5) / 112}
    if name not in shares:
        raise ValueError(f"expected a template of {sorted(shares)}, got {name!r}")
    return shares[name] * size - 0.5


def similarity_transform(source: Float[ndarray, "n 2"], target: Float[ndarray, "n 2"]) -> Float[ndarray, "2 3"]:
    r"""Rotation, scale and shift that carry ``source`` nearest to ``target``.

    Minimises :math:`\sum_i \|t_i - (c R s_i + b)\|^2` over rotations :math:`R` without reflection, in closed
    form (Umeyama, 1991, equations 39-42).

    Args:
        source: Points to move.
        target: Points to meet.

    Returns:
        Matrix ``[cR | b]``, float64, as ``cv2.warpAffine`` takes it.

    Raises:
        ValueError: Fewer than two distinct points, or a point that is not finite.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("expected finite points, got NaN or infinity among the landmarks of a face")
    mean_source, mean_target = source.mean(0), target.mean(0)
    source, target = source - mean_source, target - mean_target
    variance = (source**2).sum() / len(source)
    if variance < 1e-12 or (target**2).sum() < 1e-12:
        raise ValueError("expected at least two distinct points, got landmarks that all fall on one place")
    u, stretch, v = np.linalg.svd(target.T @ source / len(source))
    mirror = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    linear = (u * mirror) @ v * ((stretch * mirror).sum() / variance)
    return np.column_stack([linear, mean_target - linear @ mean_source])


def crop_map(source: str, source_size: int, target: str, target_size: int) -> Float[ndarray, "2 3"]:
    """Fixed map from the pixels of one kind of crop to another's, from template to template.

    Example:
        >>> crop_map("ffhq", 256, "ffhq", 128).round(3).tolist()
        [[0.5, 0.0, -0.25], [-0.0, 0.5, -0.25]]
    """
    return similarity_transform(template(source, source_size), template(target, target_size))


def invert(matrix: Float[ndarray, "2 3"]) -> Float[ndarray, "2 3"]:
    """Map that undoes an affine map.

    Raises:
        ValueError: The map folds the plane, so nothing undoes it.
    """
    linear, shift = np.asarray(matrix, np.float64)[:, :2], np.asarray(matrix, np.float64)[:, 2]
    if abs(np.linalg.det(linear)) < 1e-12:
        raise ValueError("expected an affine map that can be undone, got one with determinant 0")
    back = np.linalg.inv(linear)
    return np.column_stack([back, -back @ shift])


def compose(outer: Float[ndarray, "2 3"], inner: Float[ndarray, "2 3"]) -> Float[ndarray, "2 3"]:
    """Affine map that applies ``inner`` first, then ``outer``."""
    return np.column_stack([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2] + outer[:, 2]])


def transform(matrix: Float[ndarray, "2 3"], points: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
    """Move points by an affine map."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def warp(picture: UInt8[ndarray, "h w 3"], matrix: Float[ndarray, "2 3"], size: int) -> UInt8[ndarray, "s s 3"]:
    """Resample a picture to a square crop.

    What lies outside the picture is its reflection, which blurs and fades to the median colour away from the
    border, as FFHQ's own alignment does (Karras et al., 2019): a plain reflection shows a second face beside
    a close-up.

    Args:
        picture: RGB picture.
        matrix: Map from picture pixels to crop pixels.
        size: Side of the crop.
    """
    height, width = picture.shape[:2]
    outside = _distance_outside(height, width, matrix, size)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    if scale < 1:
        # warpAffine reads a fixed number of pixels around a point, which aliases when shrinking: average
        # areas first, so that the warp itself neither shrinks nor enlarges.
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        shrink = np.array([small[0] / width, small[1] / height])
        picture = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
        back = np.column_stack([np.diag(1 / shrink), 0.5 / shrink - 0.5])
        matrix = compose(matrix, back)
    crop = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    if outside.max() <= 0 or outside.min() > 0:
        return crop
    # FFHQ's ramps: blurred fully a twentieth of the crop outside, faded fully at three twentieths
    away = outside[:, :, None] / (0.15 * size)
    faded = crop.astype(np.float32)
    faded += (cv2.GaussianBlur(faded, (0, 0), 0.02 * size) - faded) * np.clip(away * 3, 0, 1)
    faded += (np.median(crop[outside <= 0], axis=0) - faded) * np.clip(away, 0, 1)
    return faded.round().clip(0, 255).astype(np.uint8)


def _distance_outside(height: int, width: int, matrix: Float[ndarray, "2 3"], size: int) -> Float[ndarray, "s s"]:
    """How far each pixel of a crop lies outside the picture, in crop pixels; 0 inside."""
    back = invert(matrix).astype(np.float32)
    steps = np.arange(size, dtype=np.float32)
    x = back[0, 0] * steps + back[0, 1] * steps[:, None] + back[0, 2]
    y = back[1, 0] * steps + back[1, 1] * steps[:, None] + back[1, 2]
    dx = np.maximum(np.maximum(-x, x - (width - 1)), 0)
    dy = np.maximum(np.maximum(-y, y - (height - 1)), 0)
    return np.hypot(dx, dy) * np.sqrt(abs(np.linalg.det(matrix[:, :2])))


def align(
    picture: UInt8[ndarray, "h w 3"],
    landmarks: Float[ndarray, "5 2"],
    size: int,
    name: str = "ffhq",
) -> tuple[UInt8[ndarray, "s s 3"], Float[ndarray, "2 3"]]:
    """Cut a face out of a picture, upright on a template.

    Args:
        picture: RGB picture.
        landmarks: Its five points, in pixels.
        size: Side of the crop in pixels.
        name: Template, see :func:`template`.

    Returns:
        The crop and the map from picture pixels to crop pixels, whose :func:`invert` leads back.

    Raises:
        ValueError: The landmarks fall on one place or are not finite.

    Example:
        >>> crop, matrix = align(np.zeros((300, 200, 3), np.uint8), template("ffhq", 180), size=128)
        >>> crop.shape, matrix.shape
        ((128, 128, 3), (2, 3))
    """
    matrix = similarity_transform(landmarks, template(name, size))
    return warp(picture, matrix, size), matrix

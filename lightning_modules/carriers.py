"""Pictures as bytes: the 8-bit files between ``anonymize`` and ``recover``, and all rounding there is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from datamodules.files import write_whole

Picture = Float[Tensor, "3 height width"]
Pixels = UInt8[np.ndarray, "height width 3"]

FILE_CARRIERS = ("png", "jpeg95", "jpeg75", "jpeg50", "webp80", "half", "noise1")
"""Carriers that are a file format; ``photo``, ``latent`` and ``sealed`` are other ways to travel."""

_CODECS = {
    "png": (".png", []),
    "jpeg95": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95]),
    "jpeg75": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 75]),
    "jpeg50": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 50]),
    "webp80": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]),
}
_SUFFIXES = {".png": "png", ".jpg": "jpeg95", ".jpeg": "jpeg95", ".webp": "webp80"}


def to_pixels(image: Picture) -> Pixels:
    """Round ``(3, H, W)`` in [-1, 1] to RGB grey levels 0…255, ``(H, W, 3)``; values outside are clamped.

    Raises:
        ValueError: If a value is not a number.
    """
    if torch.isnan(image).any():
        raise ValueError("a picture holds values that are not numbers; the model that made it has diverged")
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


def from_pixels(pixels: Pixels) -> Picture:
    """Grey levels ``(H, W, 3)`` to ``(3, H, W)`` in [-1, 1]: level 0 is -1, level 255 is 1."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 127.5 - 1


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        # Divides in the order of from_pixels, so that both land on the very same floats.
        return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def quantize(images: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Round to the 8-bit grid as saving does, with the gradient of the identity.

    The straight-through estimator (Bengio et al., 2013): what a method recovers from during training, so that
    it never learns to hide codes below half a grey level.

    Example:
        >>> quantize(torch.full((1, 3, 1, 1), 0.0))[0, :, 0, 0] * 127.5
        tensor([0.5000, 0.5000, 0.5000])
    """
    return _Quantize.apply(images)


def _noise(pixels: Pixels) -> Pixels:
    """One grey level up or down at every value, drawn from a seed that is the picture's own hash."""
    seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "big")
    step = np.random.default_rng(seed).integers(0, 2, size=pixels.shape, dtype=np.int16) * 2 - 1
    return (pixels.astype(np.int16) + step).clip(0, 255).astype(np.uint8)


def encode(image: Picture, carrier: str = "png") -> bytes:
    """Bytes of the file a picture is sent in.

    ``half`` is a PNG of half the height and width (area average); ``noise1`` a PNG with every value one grey
    level off, up or down, drawn from the picture's own hash so that it is the same each time.

    Args:
        image: RGB in [-1, 1], ``(3, H, W)``.
        carrier: One of :data:`FILE_CARRIERS`.

    Raises:
        ValueError: If the carrier is not a file format or the picture holds values that are not numbers.
    """
    if carrier not in FILE_CARRIERS:
        raise ValueError(f"unknown file carrier {carrier!r}; expected one of {', '.join(FILE_CARRIERS)}")
    pixels = to_pixels(image)
    if carrier == "half":
        height, width = pixels.shape[:2]
        pixels = cv2.resize(pixels, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA)
    elif carrier == "noise1":
        pixels = _noise(pixels)
    suffix, options = _CODECS.get(carrier, _CODECS["png"])
    return cv2.imencode(suffix, np.ascontiguousarray(pixels[..., ::-1]), options)[1].tobytes()


def decode(data: bytes) -> Picture:
    """Picture of any file OpenCV reads, RGB in [-1, 1]; a camera's orientation is followed, alpha dropped.

    Raises:
        ValueError: If the bytes are not a picture.
    """
    pixels = None
    if data:
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:  # absurd sizes in a damaged header
            pixels = None
    if pixels is None:
        raise ValueError(f"these {len(data)} bytes are not a picture (or a damaged one); expected PNG, JPEG or WebP")
    return from_pixels(pixels[..., ::-1])


def through_file(
    images: Float[Tensor, "batch 3 height width"], carrier: str = "png"
) -> Float[Tensor, "batch 3 height width"]:
    """Save and read back each picture; ``half`` is brought back to the size that was sent (cubic).

    The result lies on the 8-bit grid, on the device of ``images``, and carries no gradient.
    """
    read = []
    for image in images:
        picture = decode(encode(image, carrier))
        if picture.shape != image.shape:
            height, width = image.shape[-2:]
            picture = from_pixels(cv2.resize(to_pixels(picture), (width, height), interpolation=cv2.INTER_CUBIC))
        read.append(picture)
    return torch.stack(read).to(images.device) if read else images.detach().float()


def through_file_straight(
    images: Float[Tensor, "batch 3 height width"], carrier: str
) -> Float[Tensor, "batch 3 height width"]:
    """As :func:`through_file`, with the gradient of the identity (straight-through): what training recovers from."""
    return images + (through_file(images.clamp(-1, 1), carrier) - images).detach()


def send_straight(
    images: Float[Tensor, "batch 3 height width"], jpeg: float, step: int, quality: int = 75
) -> Float[Tensor, "batch 3 height width"]:
    """What arrives of a picture in training: 8 bits, or those of a JPEG; the gradient passes straight through.

    Args:
        images: In [-1, 1].
        jpeg: Share of the steps that send a JPEG.
        step: Number of the training step, which draws: the same on every process.
        quality: Of the JPEG: 95, 75 or 50.
    """
    draw = torch.rand((), generator=torch.Generator().manual_seed(step))
    return through_file_straight(images, f"jpeg{quality}") if draw < jpeg else quantize(images)


def write_picture(path: str | Path, image: Picture) -> None:
    """Write ``(3, H, W)`` in [-1, 1] whole or not at all: beside its place first, then renamed.

    The suffix chooses: ``.png`` is exact on the 8-bit grid, ``.jpg`` quality 95, ``.webp`` quality 80.

    Raises:
        ValueError: If the suffix is of no known format.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"cannot write {path}: expected a name ending in {', '.join(_SUFFIXES)}")
    data = encode(image, _SUFFIXES[path.suffix.lower()])
    try:
        write_whole(path, data)
    except OSError as error:
        raise OSError(f"cannot write the picture {path}: {error.strerror or error}") from error


def read_picture(path: str | Path) -> Picture:
    """Read a picture file as RGB in [-1, 1], ``(3, H, W)``.

    Raises:
        OSError: If the file cannot be opened or is not a picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"cannot read the picture {path}: {error.strerror or error}") from error
    try:
        return decode(data)
    except ValueError as error:
        raise OSError(f"cannot read the picture {path}: {error}") from error

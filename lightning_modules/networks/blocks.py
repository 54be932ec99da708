"""Blocks of a picture: their means, the oval of those that hold the face, and what is painted over it (all ours)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CELLS = 8  # blocks of the side of a picture, whatever its size

# Oval of an aligned crop that holds the face: centre and half axes (x, y) in shares of the side.
CENTRE, AXES = (0.5, 0.54), (0.37, 0.5)


def oval(side: int) -> Float[Tensor, "side side"]:
    """Blocks of an aligned crop that hold the face: 1, and 0 around it, which then stays bit for bit (ours).

    It needs no network and is the same for every picture, so that recovery has it too.

    Raises:
        ValueError: If ``side`` is no multiple of 8.
    """
    if side % CELLS:
        raise ValueError(f"the side of a picture must be a multiple of {CELLS}, got {side}")
    ticks = (torch.arange(CELLS) + 0.5) / CELLS
    x, y = (ticks - CENTRE[0]) / AXES[0], (ticks - CENTRE[1]) / AXES[1]
    inside = x[None].square() + y[:, None].square() < 1
    return inside.float().repeat_interleave(side // CELLS, 0).repeat_interleave(side // CELLS, 1)


def means(image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
    """Each pixel the mean of its block."""
    return F.interpolate(F.adaptive_avg_pool2d(image.float(), CELLS), image.shape[2:])


def with_means_of(
    image: Float[Tensor, "batch 3 h w"], made: Float[Tensor, "batch 3 h w"]
) -> Float[Tensor, "batch 3 h w"]:
    """``made`` with the block means of ``image``: lifted smoothly first, so that blocks get no edges (ours)."""
    for _ in range(2):
        made = made + blurred(image - made)
    return made + means(image - made)


def covered(image: Float[Tensor, "batch 3 h w"], window: Float[Tensor, "h w"]) -> Float[Tensor, "batch 3 h w"]:
    """Pictures whose window shows no more than the means of blocks; where these change much, it goes beyond ±1."""
    return torch.where(window > 0, blurred(image), image)


def painted(
    image: Float[Tensor, "batch 3 h w"], paint: Float[Tensor, "batch 3 h w"], window: Float[Tensor, "h w"]
) -> Float[Tensor, "batch 3 h w"]:
    """Paint over a covered window (ours).

    The means of blocks stay, but for what is clipped; what is around stays bit for bit.
    """
    made = with_means_of(image, covered(image, window) + paint.float())
    return torch.where(window > 0, made.clamp(-1, 1), image)


def blurred(image: Tensor) -> Tensor:
    """A picture of its block means, without edges between them."""
    return F.interpolate(F.adaptive_avg_pool2d(image.float(), CELLS), image.shape[2:], mode="bicubic")

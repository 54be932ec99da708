"""How a frozen recogniser is asked in a loss, so that what answers it is seen by others too."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def view(images: Float[Tensor, "batch 3 size size"], draw: int) -> Float[Tensor, "batch 3 size2 size2"]:
    """Pictures as they are, mirrored, at half their size, or both: by a draw that all pictures of a step share (ours).

    A network that stays as it is can be led astray by a pattern that nobody else takes for another face. A pattern that
    outlives the mirror and a mean over 2 × 2 pixels is more likely to be one.

    Args:
        images: In [-1, 1].
        draw: A seed that decides, the same on every process.
    """
    mirrored, halved = torch.rand(2, generator=torch.Generator().manual_seed(draw)) < 0.5
    images = images.flip(-1) if mirrored else images
    return F.avg_pool2d(images, 2) if halved else images


def codes_of(recognizer: nn.Module, images: list[Tensor], draw: int) -> tuple[Tensor, ...]:
    """Unit codes ``(B, d)`` of several pictures of each face, in one :func:`view`; of the first without gradients."""
    with torch.no_grad():
        original = recognizer(view(images[0], draw))
    return original, *recognizer(view(torch.cat(images[1:]), draw)).float().chunk(len(images) - 1)

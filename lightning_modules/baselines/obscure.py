"""Blur, pixelate and black box: the floor of every table. No key, no way back, nothing learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as VF

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer


class Obscure(ReversibleAnonymizer):
    """Base of the methods that wash a face out.

    Args:
        size: Pixels of a picture.
    """

    reversible = False

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.size = size


class Blur(Obscure):
    """Gaussian blur.

    Args:
        sigma: Standard deviation as a share of the picture's side; 0.06 is about what a newspaper does.
        size: Pixels of a picture.
    """

    def __init__(self, sigma: float = 0.06, size: int = 128) -> None:
        super().__init__(size)
        self.sigma = sigma

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Blur the whole crop."""
        sigma = self.sigma * self.size
        kernel = min(2 * int(3 * sigma) + 1, 2 * (self.size // 2) - 1)
        return VF.gaussian_blur(face.image, [kernel, kernel], [sigma, sigma])


class Pixelate(Obscure):
    """Replace blocks by their mean.

    Args:
        blocks: Blocks along a side.
        size: Pixels of a picture.
    """

    def __init__(self, blocks: int = 12, size: int = 128) -> None:
        super().__init__(size)
        self.blocks = blocks

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Average and repeat."""
        coarse = F.adaptive_avg_pool2d(face.image, self.blocks)
        return F.interpolate(coarse, size=(self.size, self.size), mode="nearest")


class BlackBox(Obscure):
    """Paint the inner face black: the box around eyes, nose and mouth with the forehead, in the aligned crop."""

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Black out rows 25–90 % and columns 20–80 % of the crop."""
        top, bottom, left, right = (round(share * self.size) for share in (0.25, 0.90, 0.20, 0.80))
        image = face.image.clone()
        image[:, :, top:bottom, left:right] = torch.tensor(-1.0)
        return image

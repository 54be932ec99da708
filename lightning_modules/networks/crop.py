"""The fixed way from our aligned crop to another network's crop: one affine map, differentiable."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.alignment import invert, similarity_transform, template

# Every picture is brought to this many pixels first, so that its size does not matter.
WORKING_SIZE = 256


class FixedCrop(nn.Module):
    """Crop of ``size`` pixels whose five points lie on ``points``, out of FFHQ-style crops of any size.

    Both templates are constant, so the map between them is one similarity (Umeyama, 1991) for every face. It
    is sampled twice as densely as asked and averaged 2x2: the antialiasing that a smaller crop needs.

    Args:
        points: Five points (eyes, nose, mouth corners) in pixels of the wanted crop.
        size: Side of the wanted crop in pixels.
    """

    grid: Tensor

    def __init__(self, points: Float[np.ndarray, "5 2"], size: int) -> None:
        super().__init__()
        back = invert(similarity_transform(template("ffhq", WORKING_SIZE), points))
        # Centres of the half pixels of the wanted crop, in its pixels (the first one's centre is 0, 0).
        ticks = (np.arange(2 * size) - 0.5) / 2
        x, y = np.meshgrid(ticks, ticks)
        source = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.asarray(back, dtype=np.float64).T
        grid = (2 * source + 1) / WORKING_SIZE - 1  # grid_sample's [-1, 1], align_corners=False
        self.register_buffer("grid", torch.as_tensor(grid, dtype=torch.float32), persistent=False)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 size size"]:
        """Crop pictures; what lies outside of them repeats their border."""
        if images.shape[-2:] != (WORKING_SIZE, WORKING_SIZE):
            images = F.interpolate(
                images,
                size=(WORKING_SIZE, WORKING_SIZE),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
        grid = self.grid.to(images.dtype).expand(len(images), -1, -1, -1)
        fine = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return F.avg_pool2d(fine, 2)

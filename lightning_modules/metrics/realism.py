"""Do two sets of pictures look alike as sets? Distances between distributions of features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


@torch.no_grad()
def frechet(
    network: nn.Module, images: Float[Tensor, "n 3 height width"], reference: Float[Tensor, "m 3 height width"]
) -> float:
    """Fréchet distance of two sets of pictures, of a network's features as FID takes it of Inception's (0: alike).

    Heusel et al., 2017, by torchmetrics. With fewer pictures than features it is biased upwards, so figures compare
    only at equal numbers of pictures.

    Args:
        network: Pictures in [-1, 1] → features ``(B, d)``; `fd_face` takes the identity network's.
        images: Pictures in [-1, 1], at least two.
        reference: Pictures to compare with, at least two.

    Raises:
        ValueError: If a set has fewer than two pictures.
    """
    if min(len(images), len(reference)) < 2:
        raise ValueError(f"a distribution takes two pictures at least, got {len(images)} and {len(reference)}")
    features = [torch.cat([network(part) for part in pictures.split(32)]) for pictures in (images, reference)]
    handed_on = nn.Identity()
    handed_on.num_features = features[0].shape[1]  # torchmetrics asks for it
    metric = FrechetInceptionDistance(feature=handed_on)
    for found, real in zip(features, (False, True), strict=True):
        metric.update(found, real=real)
    return max(0.0, float(metric.compute()))

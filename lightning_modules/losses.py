"""Losses that methods share: pure functions of tensors, weighted by named numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.metrics.recovery import ms_ssim

Codes = Float[Tensor, "batch dim"]
Image = Float[Tensor, "batch 3 height width"]


def weighted_sum(terms: Mapping[str, Tensor], weights: Any, partial: bool = False) -> Tensor:
    """``Σ weight · term`` over terms of the same names as the fields of the dataclass ``weights``.

    Args:
        terms: Each term by its name.
        weights: Their weights.
        partial: Let weights be without a term, as in a first stage.

    Raises:
        ValueError: If a term has no weight or, unless ``partial``, a weight no term.
    """
    numbers = dataclasses.asdict(weights)
    if missing := set(terms) - set(numbers) if partial else set(terms) ^ set(numbers):
        raise ValueError(f"loss terms and weights must have the same names; unmatched: {', '.join(sorted(missing))}")
    return sum(numbers[name] * term for name, term in terms.items())


def pull_together(a: Codes, b: Codes, floor: float = 0.1) -> Tensor:
    """``mean(1 − max(cos(a, b), floor))``, as in RiDDLE's and iFADIT's released code."""
    return (1 - F.cosine_similarity(a, b).clamp(min=floor)).mean()


def push_apart(a: Codes, b: Codes, floor: float = 0.1) -> Tensor:
    """``mean(max(cos(a, b), floor))``: nothing to gain below ``floor``; as in RiDDLE's and iFADIT's released code."""
    return F.cosine_similarity(a, b).clamp(min=floor).mean()


def spread(codes: Codes, floor: float = 0.1) -> Tensor:
    """Mean over pairs of one batch of ``max(cos, floor)``: people in a batch should differ.

    Source: the within-batch diversity sum of iFADIT's released code, as a mean.
    """
    unit = F.normalize(codes, dim=1)
    cosine = (unit @ unit.T).clamp(min=floor)
    count = len(codes)
    return (cosine.sum() - cosine.diagonal().sum()) / max(count * (count - 1), 1)


def ms_ssim_loss(image: Image, target: Image) -> Tensor:
    """``1 − MS-SSIM`` of pictures in [-1, 1], with as many scales as their size allows (Wang et al., 2003)."""
    with torch.autocast(image.device.type, enabled=False):  # variances are differences of squares: bf16 loses them
        return 1 - ms_ssim(image.float().clamp(-1, 1) / 2 + 0.5, target.float() / 2 + 0.5).mean()


def feature_distance(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the squared distance of features ``(B, C, h, w)``, unit-normalised over channels.

    LPIPS (Zhang et al., 2018, equation 1) without its learned channel weights, over whatever network gave the features:
    it goes by that network's name, never by LPIPS's.
    """
    return sum(
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
        for a, b in zip(features, targets, strict=True)
    ) / len(features)


def landmark_error(landmarks: nn.Module | None, image: Image, target: Image) -> Float[Tensor, " batch"]:
    """Mean squared distance of the landmarks of each two pictures, in units of 1 % of the side; 0 without a network.

    Args:
        landmarks: Frozen landmark network, pictures → ``(B, n, 2)`` in shares of the side.
        image: Takes the gradient.
        target: Takes none.
    """
    if landmarks is None:
        return image.new_zeros(len(image))
    with torch.no_grad():
        wanted = landmarks(target)
    return 1e4 * (landmarks(image) - wanted).square().sum(2).mean(1)

"""The loss terms of SDN that no other method has: margins, triplet, and the two bounds on mutual information."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flows.precision import full_precision

Features = Float[Tensor, "batch d"]


def angular_margin(
    features: Features,
    centres: Float[Tensor, "people d"],
    identity: Int[Tensor, " batch"],
    margin: float = 0.1,
) -> Tensor:
    """Additive angular margin softmax, scale 16 (Deng et al., 2019), over unit features."""
    with full_precision(features.device):  # in bf16 a cosine of 1 - 1e-6 is 1, where the arc has no slope
        cosine = (features.float() @ F.normalize(centres, dim=1).T).clamp(-1 + 1e-6, 1 - 1e-6)
        target = F.one_hot(identity, len(centres)).bool()
        logits = torch.where(target, torch.cos(torch.acos(cosine) + margin), cosine)
        return F.cross_entropy(16 * logits, identity)


def distance(a: Features, b: Features) -> Float[Tensor, " batch"]:
    """Angle of each pair in right angles, ``2/π · arccos cos(a, b)``, in [0, 2].

    It meets ``1 − cos`` at 0, 1 and 2, but has a slope at 0, where anonymized faces start that are still the original:
    the cosine is flat there and never let them leave (ours).
    """
    with full_precision(a.device):
        cosine = F.cosine_similarity(a.float(), b.float())
        return 2 / math.pi * torch.acos(cosine.clamp(-1 + 1e-5, 1 - 1e-5))


def triplet(anchor: Features, near: Features, far: Features, margin: float = 0.5) -> Tensor:
    """``mean(max(0, d(anchor, near) − d(anchor, far) + margin))``, d by :func:`distance`."""
    return F.relu(distance(anchor, near) - distance(anchor, far) + margin).mean()


def gaussian_log_likelihood(y: Features, mean: Features, log_variance: Features) -> Float[Tensor, " batch"]:
    """``log N(y; mean, exp(log_variance))`` of each row, in nats."""
    return -0.5 * ((y - mean).square() / log_variance.exp() + log_variance + math.log(2 * math.pi)).sum(1)


def club(y: Features, mean: Features, log_variance: Features) -> Tensor:
    """CLUB upper bound on I(x; y) in nats: ``E[log q(yᵢ|xᵢ)] − E[log q(yⱼ|xᵢ)]`` over all pairs of the batch.

    Source: Cheng et al., "CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information", ICML 2020, equation 10.
    ``q`` is fitted by maximum likelihood in an optimizer of its own.
    """
    joint = (y - mean).square() / log_variance.exp()
    crossed = (y[None] - mean[:, None]).square().mean(1) / log_variance.exp()
    return 0.5 * (crossed - joint).sum(1).mean()


def layout(image: Float[Tensor, "batch 3 h w"], target: Float[Tensor, "batch 3 h w"], cells: int = 16) -> Tensor:
    """L1 of the means over a grid of ``cells`` × ``cells``: pose, hair and light stay, features may change (ours).

    The same L1 pixel by pixel would ask for the original's features too, against the terms that hide them.
    """
    return F.l1_loss(F.adaptive_avg_pool2d(image, cells), F.adaptive_avg_pool2d(target, cells))


def room(painted: Float[Tensor, "batch 3 h w"], brightest: float = 0.8) -> Tensor:
    """Mean of what lies beyond ``±brightest`` of a painted face: a texture laid on it would be clipped there (ours)."""
    return F.relu(painted.abs() - brightest).mean()


def sameness(
    one: Float[Tensor, "batch 3 h w"], two: Float[Tensor, "batch 3 h w"], usual: Float[Tensor, " batch"]
) -> Tensor:
    """By how much two passwords' faces are nearer to each other than two people are, in shares of that (ours).

    After mode seeking (Mao et al., CVPR 2019), which has no end. A classifier can be told that two faces differ by what
    nobody sees; here they must differ to the eye, in pictures of 32 px (:func:`apart`).
    """
    return F.relu(1 - apart(one, two) / usual.clamp(min=1e-3)).mean()


def apart(one: Float[Tensor, "batch 3 h w"], two: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
    """L1 of each two pictures, made 32 px small."""
    return F.adaptive_avg_pool2d(one - two, 32).abs().mean((1, 2, 3))

"""What keys in bands would leave for anybody to see, the lengths of the bands, hidden too."""

from __future__ import annotations

from math import pi

import torch
from jaxtyping import Float
from torch import Tensor

_LOGISTIC = 1.702  # the logistic curve of this slope is the normal distribution function to within 0.01


def sticks(u: Float[Tensor, "batch d"], bands: int) -> Float[Tensor, "batch rest"]:
    r"""Logits of how much each band but the last takes of what those before it left, ``(B, bands − 1)``.

    With :math:`e_b` the squared length of a unit code's share of band b: :math:`s_b = e_b / (1 - e_1 - … - e_{b-1})`
    (stick breaking); any numbers are the logits of some unit code.
    """
    shares = u.unflatten(1, (bands, -1)).square().sum(2)
    left = shares.flip(1).cumsum(1).flip(1)[:, 1:]  # what is left after band b
    return shares[:, :-1].log() - left.log()


def shift_lengths(
    u: Float[Tensor, "batch d"],
    rotation: Float[Tensor, "batch d d"],
    usual: Float[Tensor, "2 rest"],
    bands: int,
    *,
    back: bool,
) -> tuple[Float[Tensor, "batch d"], Float[Tensor, " batch"]]:
    r"""Hide the lengths of a unit code's bands by a pad out of the key; directions within bands stay (ours).

    The :func:`sticks`, standardised by what is usual, become quantiles q in (0, 1) by a logistic curve. Then

    .. math:: q' = (q + k) \bmod 1

    with k uniform in [0, 1) and unknown is uniform whatever q was: a one-time pad. Back goes the same way with −k. A
    band's k is the sum of the angles of the pairs :math:`(Q_{2i,2i}, Q_{2i,2i+1})` of its rotation, in turns: uniform,
    0 for no rotation, and what a turned code tells of so many rows leaves nothing of their sum.

    In float32 that is exact for codes within about six standard deviations of real ones; what is farther off comes
    back with its directions within bands, but with lengths rounded towards the usual.

    Args:
        u: Unit codes where they are round.
        rotation: The key's rotations, in so many blocks.
        usual: Mean and standard deviation of real codes' sticks.
        bands: How many bands, at least 2.
        back: Undo it.

    Returns:
        Unit codes, and ``log |det J|`` on the unit sphere.
    """
    side = u.shape[1] // bands
    blocks = rotation.unflatten(1, (bands, side)).unflatten(3, (bands, side))
    blocks = torch.stack([blocks[:, b, :, b] for b in range(bands - 1)], 1)
    even = torch.arange(0, side - 1, 2, device=u.device)
    pad = (torch.atan2(blocks[..., even, even + 1], blocks[..., even, even]) / (2 * pi)).sum(2)
    logits = sticks(u, bands)
    quantile = torch.sigmoid(_LOGISTIC * (logits - usual[0]) / usual[1])
    tiny = 8 * torch.finfo(u.dtype).eps
    moved = torch.remainder(quantile - pad if back else quantile + pad, 1).clamp(tiny, 1 - tiny)
    new_logits = usual[0] + usual[1] * torch.logit(moved) / _LOGISTIC
    before, density = _shares(logits, quantile, side)
    after, new_density = _shares(new_logits, moved, side)
    scaled = u.unflatten(1, (bands, side)) * ((after - before) / 2).exp()[..., None]
    return scaled.flatten(1), new_density - density


def _shares(logits: Tensor, quantile: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Log of the bands' squared lengths, and of the sphere's volume by that of quantiles and directions."""
    taken, left = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    before = torch.cat([torch.zeros_like(left[:, :1]), left.cumsum(1)], 1)  # log of what is left for band b
    shares = before + torch.cat([taken, torch.zeros_like(taken[:, :1])], 1)
    slope = taken + left - quantile.log() - (-quantile).log1p()
    return shares, (side / 2 - 1) * shares.sum(1) + before[:, :-1].sum(1) + slope.sum(1)

"""The keyed rotation of whole codes: the control that shows what leaving the manifold of real codes costs."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flows.precision import full_precision


def rotate(key: Float[Tensor, "batch dim dim"], z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Apply one rotation to each code, ``Q z``."""
    return torch.einsum("bij,bj->bi", key, z)


def turned_by(rotation: Float[Tensor, "batch dim dim"], angle: float | None) -> Float[Tensor, "batch dim dim"]:
    r"""How far a key may turn codes: :math:`\exp(\theta (Q_k - Q_k^\top)/2)` (after Cao et al., ICCV 2021).

    Args:
        rotation: Of the key.
        angle: :math:`\theta` in radians; ``None`` takes the rotation as it is.
    """
    if angle is None:
        return rotation
    return torch.linalg.matrix_exp(angle * (rotation - rotation.mT) / 2)


class KeyedOrthogonal(nn.Module):
    r"""Rotate codes by the key, :math:`z_a = Q_k z` with exact inverse :math:`z = Q_k^\top z_a`.

    Lengths and angles between codes under one key are kept and :math:`|\det Q_k| = 1`, but a random rotation
    of the whole sphere maps a person to a code that is nobody's: real codes fill only a part of it (see
    :class:`flows.conjugate.Conjugate`).

    Args:
        dim: Length of an identity code; a key is a ``dim`` × ``dim`` rotation.
        angle: How far the key may turn a code, in radians (:func:`turned_by`); ``None``: as far as it does.

    Example:
        >>> flow = KeyedOrthogonal(dim=2)
        >>> quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
        >>> flow(torch.tensor([[1.0, 0.0]]), quarter)[0]
        tensor([[0., 1.]])
    """

    key_kind: ClassVar[str] = "rotation"

    def __init__(self, dim: int = 512, angle: float | None = None) -> None:
        super().__init__()
        self.dim = self.key_length = dim
        self.angle = angle

    def forward(
        self, z: Float[Tensor, "batch dim"], key: Float[Tensor, "batch dim dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Hide codes under ``key``; ``log |det J|`` is zero, since a rotation keeps volumes."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        with full_precision(z.device):
            z_a = rotate(turned_by(key.to(dtype), self.angle), z.to(dtype))
        return z_a, z_a.new_zeros(len(z_a))

    def inverse(
        self, z_a: Float[Tensor, "batch dim"], key: Float[Tensor, "batch dim dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
        """Open codes hidden under ``key``; ``log |det J|`` is zero."""
        return self.forward(z_a, key.mT)

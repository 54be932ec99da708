"""The one statement of layout and range: what travels from a data set to a method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class FaceBatch(NamedTuple):
    """Aligned faces and what is known about them.

    A field that is absent is a ``(B, 0)`` tensor (``(0,)`` for one face), since the default collate refuses ``None``.

    Attributes:
        image: RGB in [-1, 1], aligned to the generator's five-point template
            (:data:`datamodules.alignment.FFHQ_TEMPLATE`), ``(B, 3, H, W)``.
        identity: Number of the person within the data set, ``(B,)`` int64.
        attributes: Binary attributes as -1 / +1, ``(B, m)``.
        mask: Face region, 1 inside, ``(B, 1, H, W)``.
        w: Exact style code of a generated face, ``(B, L, 512)``.
        z: Identity code of a cached face, ``(B, d)``, where a latent data module gives codes for pictures.
        sample: Number of the face within its data set, the same whatever the split, order or process, ``(B,)`` int64.
        place: Affine map from picture pixels (x, y) to this crop's pixels, ``(B, 2, 3)`` float32.
    """

    image: Float[Tensor, "*batch 3 height width"]
    identity: Int[Tensor, "*batch"]
    attributes: Float[Tensor, "*batch m"]
    mask: Tensor
    w: Tensor
    z: Tensor
    sample: Int[Tensor, "*batch"]
    place: Tensor


def labels(face: FaceBatch, count: int) -> Float[Tensor, "batch count"]:
    """The first ``count`` attributes of each face, as -1 / +1.

    Raises:
        ValueError: If the faces have fewer.
    """
    if (found := face.attributes.shape[1]) < count:
        raise ValueError(f"expected {count} attributes a face, got {found}; give the data set labels, or ask for none")
    return face.attributes[:, :count]


def face_batch(
    image: Tensor,
    *,
    identity: Tensor | None = None,
    attributes: Tensor | None = None,
    mask: Tensor | None = None,
    w: Tensor | None = None,
    z: Tensor | None = None,
    sample: Tensor | None = None,
    place: Tensor | None = None,
) -> FaceBatch:
    """Build a :class:`FaceBatch`, batched ``(B, 3, H, W)`` or single ``(3, H, W)``; absent fields become empty."""
    lead = image.shape[:-3]
    empty = image.new_zeros((*lead, 0))
    number = torch.zeros(lead, dtype=torch.int64, device=image.device)
    return FaceBatch(
        image=image,
        identity=number if identity is None else identity,
        attributes=empty if attributes is None else attributes,
        mask=empty if mask is None else mask,
        w=empty if w is None else w,
        z=empty if z is None else z,
        sample=number if sample is None else sample,
        place=empty if place is None else place,
    )

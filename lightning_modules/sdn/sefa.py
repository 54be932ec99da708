"""SeFa: directions of a decoder's styles in closed form.

Source: Shen & Zhou, "Closed-Form Factorization of Latent Semantics in GANs", CVPR 2021.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.sdn.networks import STYLE, AdaIN, Decoder


@torch.no_grad()
def style_directions(decoder: Decoder, count: int) -> Float[Tensor, "count style"]:
    r"""The unit directions that move a decoder's modulations furthest.

    They are the leading eigenvectors of :math:`\sum_i A_i^\top A_i` over the layers that read a style. KNOWN: that
    SDN's edits come from this factorization. OURS: which layers: the affine of each AdaIN, the scale of each
    upsampling stage, and the share of the first layer that reads the tiled style.

    Args:
        decoder: SDN's.
        count: How many, 1 to 256.

    Returns:
        Directions, the strongest first; of v and −v the one whose largest entry is above 0, so that weights decide
        signs.

    Raises:
        ValueError: If there are not so many.
    """
    if not 1 <= count <= STYLE:
        raise ValueError(f"a style of {STYLE} numbers has 1 to {STYLE} directions, not {count}")
    layers = [module.affine.weight for module in decoder.modules() if isinstance(module, AdaIN)]
    layers += [scale.weight for scale in decoder.scales]
    layers.append(decoder.inject.weight[:, -STYLE:, 0, 0])
    moved = sum(weight.double().mT @ weight.double() for weight in layers)
    found = torch.linalg.eigh(moved).eigenvectors.flip(1).mT[:count]  # eigh sorts upwards
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    return (found * largest.sign()).to(layers[0])

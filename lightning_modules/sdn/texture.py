"""How SDN's pictures carry their originals: frequencies of blocks, turned by a hash (all ours)."""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flows.precision import full_precision
from lightning_modules.networks.blocks import CELLS

BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue, as JPEG weighs them (ITU-R BT.601)


class BlockCosines(nn.Module):
    """A picture as 8 by 8 blocks: their means, and the lower cosine frequencies of what is left (ours).

    The means say where what is, and in which light; the frequencies whose face it is. Each frequency is divided by
    what it usually has in pictures, whose amplitude falls with frequency (Field, 1987), to the power 0.3: spread evenly
    over the frequencies, a code would look like noise; spread as they are, the faint ones would drown in rounding.

    A texture carries such a code, colours included, in brightness alone, and is read by JPEG's own weights of
    brightness, which see nothing of what JPEG does to colours: it halves their resolution.

    Args:
        size: Pixels of the side of a picture, a multiple of 8.
        luma: Frequencies of brightness that are kept of a block of a picture of 64 px; of others as many a pixel.
        chroma: Frequencies of each of two colours, likewise. All together are at most the frequencies of brightness.
    """

    def __init__(self, size: int, luma: int = 30, chroma: int = 5) -> None:
        super().__init__()
        side = size // CELLS
        waves = cosines(side)
        planes = torch.einsum("ui,vj->uvij", waves, waves).flatten(0, 1)
        ticks = torch.arange(side)
        order = (ticks[:, None].square() + ticks[None].square()).flatten()
        lowest = order.argsort(stable=True)[1:]
        colours = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
        colours = colours / colours.norm(dim=1)[:, None]
        chosen = [lowest[: count * side * side // 64] for count in (luma, chroma, chroma)]
        rows = [colour[None, :, None, None] * planes[at][:, None] for colour, at in zip(colours, chosen, strict=True)]
        usual = [share / order[at].sqrt() for share, at in zip((1, 0.4, 0.4), chosen, strict=True)]
        carrying = lowest[: sum(len(at) for at in chosen)]
        loud = order[carrying].float() ** -0.15
        loud = (loud / loud.square().mean().sqrt())[:, None, None, None]
        gray = planes[carrying][:, None]
        parts = {
            "basis": torch.cat(rows),
            "usual": (torch.cat(usual) ** 0.3 / (torch.cat(usual) ** 0.3).mean())[:, None, None],
            "written": loud * colours[0][None, :, None, None] * gray,
            "read": torch.tensor(BRIGHTNESS)[None, :, None, None] * gray / colours[0, 0] / loud,
        }
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    @property
    def depth(self) -> int:
        """How many frequencies are kept of a block."""
        return len(self.basis)

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch depth 8 8"]:
        """The code of a picture: its frequencies, each in units of what is usual."""
        return self._analysed(image, self.basis) / self.usual

    def picture(self, code: Float[Tensor, "batch depth 8 8"]) -> Float[Tensor, "batch 3 h w"]:
        """The picture of a code; its blocks have mean 0."""
        return self._synthesized(code * self.usual, self.basis)

    def texture(self, code: Float[Tensor, "batch depth 8 8"]) -> Float[Tensor, "batch 3 h w"]:
        """A gray texture that carries a code; its blocks have mean 0."""
        return self._synthesized(code, self.written)

    def carried(self, texture: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch depth 8 8"]:
        """The code that a texture carries."""
        return self._analysed(texture, self.read)

    @staticmethod
    def _analysed(image: Tensor, rows: Tensor) -> Tensor:
        with full_precision(image.device):
            return F.conv2d(image.float(), rows, stride=rows.shape[-1])

    @staticmethod
    def _synthesized(code: Tensor, rows: Tensor) -> Tensor:
        with full_precision(code.device):
            return F.conv_transpose2d(code.float(), rows, stride=rows.shape[-1])


def turned(
    code: Float[Tensor, "batch channels side side"], signs: Float[Tensor, "batch channels side side 3"], back: bool
) -> Float[Tensor, "batch channels side side"]:
    """Rotate the channels of each block of a code by ``D₃ C D₂ C D₁``: signs, cosine transform, signs, and so on.

    Close to a random rotation (Yu et al., "Orthogonal Random Features", 2016) and as cheap as two convolutions of one
    pixel. Each block has signs of its own: under the same ones for all of a face, what its blocks have in common would
    give the rotation away. Turned back under other signs, codes have nothing in common with the right ones, before
    anything is learned; only the length of each block's code shows (ours).

    Args:
        code: Codes.
        signs: The diagonals D₁, D₂ and D₃ of each block, in {−1, +1}.
        back: Undo the rotation.
    """
    first, second, third = signs.to(code).unbind(-1)
    matrix = cosines(code.shape[1]).to(code)[:, :, None, None]
    with full_precision(code.device):
        if back:
            matrix = matrix.transpose(0, 1)
            return F.conv2d(F.conv2d(code * third, matrix) * second, matrix) * first
        return F.conv2d(F.conv2d(code * first, matrix) * second, matrix) * third


@cache
def cosines(order: int) -> Float[Tensor, "order order"]:
    """The orthonormal discrete cosine transform (type II) of any order, one frequency a row."""
    ticks = torch.arange(order, dtype=torch.float64)
    rows = torch.cos(math.pi / order * ticks[:, None] * (ticks[None] + 0.5)) * math.sqrt(2 / order)
    rows[0] /= math.sqrt(2)
    return rows.float()


def hashed(factors: Float[Tensor, "batch length"], bits: int) -> Float[Tensor, "batch bits"]:
    """Bits of SHAKE-256 over the signs of factors, in {−1, +1}: one sign changed changes half of them (ours)."""
    digests = [hashlib.shake_256(bytes(signs)).digest((bits + 7) // 8) for signs in (factors > 0).tolist()]
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(factors), -1)
    return factors.new_tensor(2.0 * np.unpackbits(rows, axis=1, count=bits, bitorder="little") - 1)

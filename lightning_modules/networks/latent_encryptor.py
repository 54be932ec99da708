"""RiDDLE's latent encryptor: transformer layers that read style codes, and attend to a password."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

CODE = 512  # numbers of a style code's row

Rows = Float[Tensor, "batch rows 512"]


class LatentEncryptor(nn.Module):
    """The mapper: rows of a code and a password → rows of another code; the same network both ways.

    Args:
        groups: Rows of each group, coarse ones first.
        heads: Attention heads.
        inside: Width of the feed-forward part.
    """

    def __init__(self, groups: list[int], heads: int = 4, inside: int = 1024) -> None:
        super().__init__()
        self.groups = groups
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(CODE, heads, inside, dropout=0.0, batch_first=True, norm_first=True)
            for _ in groups
        )
        self.out = nn.ModuleList(nn.Linear(CODE, CODE) for _ in groups)
        for out in self.out:
            out.weight.data.copy_(-torch.eye(CODE))  # M(x) = −(x + s(k)): applied twice it gives x back
            nn.init.zeros_(out.bias)
        self.places = nn.Parameter(0.1 * torch.randn(2, sum(groups), CODE))
        self.register_buffer("centre", torch.zeros(sum(groups), CODE))

    def forward(self, w: Rows, password: Float[Tensor, "batch 512"]) -> Rows:
        """Encrypt or decrypt codes under passwords, which are centred w codes."""
        seen = (w - self.centre + self.places[0]).split(self.groups, 1)
        asked = (password[:, None] + self.places[1]).split(self.groups, 1)
        made = [out(layer(x, k)) for layer, out, x, k in zip(self.layers, self.out, seen, asked, strict=True)]
        return self.centre + self.places[0] + torch.cat(made, 1)

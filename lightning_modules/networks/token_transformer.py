"""A transformer that guesses masked tokens of a grid from the others (after BERT, Devlin et al., 2019, and MaskGIT).

Source: Chang et al., "MaskGIT: Masked Generative Image Transformer", CVPR 2022. Sizes are OURS.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 32  # channels of an attention head


class TokenTransformer(nn.Module):
    """Tokens and which of them are masked → logits of every token.

    Each cell's place is a learned row and a learned column.

    Args:
        side: Tokens along a side of the grid.
        codes: How many tokens there are to choose from.
        width: Channels, a multiple of 32.
        layers: How many.

    Example:
        >>> tokens = torch.zeros(2, 4, 4, dtype=torch.int64)
        >>> tuple(TokenTransformer(side=4, codes=8, width=32, layers=1)(tokens, tokens == 0).shape)
        (2, 8, 4, 4)
    """

    def __init__(self, side: int, codes: int, width: int, layers: int) -> None:
        super().__init__()
        # N(0, 1), not BERT's 0.02, with which eight grids took several times as many steps to be learned by heart
        self.embedding = nn.Embedding(codes + 1, width)  # the last one stands for a mask
        self.rows, self.columns = (nn.Parameter(torch.randn(side, width)) for _ in range(2))
        self.layers = nn.ModuleList(_Layer(width) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, codes)
        nn.init.zeros_(self.out.weight)  # starts by holding all tokens for equally likely

    def forward(
        self, tokens: Int[Tensor, "batch side side"], masked: Bool[Tensor, "batch side side"]
    ) -> Float[Tensor, "batch codes side side"]:
        """Logits of tokens; what is masked is not looked at."""
        shown = tokens.masked_fill(masked, self.embedding.num_embeddings - 1)
        x = (self.embedding(shown) + self.rows[:, None] + self.columns).flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x)).float().mT.unflatten(2, tokens.shape[1:])


class _Layer(nn.Module):
    """Attention and a perceptron, each with its norm before (Xiong et al., 2020); no dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.projections, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "batch cells width"]) -> Float[Tensor, "batch cells width"]:
        q, k, v = self.projections(self.norms[0](x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + self.mixed(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norms[1](x))

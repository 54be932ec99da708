"""A small VQGAN: pictures as a grid of tokens, and back (Esser et al., 2021, "Taming Transformers", section 3.1).

Sizes are OURS, as are codes of unit length (after Yu et al., 2022, "Vector-quantized Image Modeling with Improved
VQGAN"), of which few lie idle. Blocks of 2 × 2 pixels are channels inside, as in our U-Net.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flows.precision import full_precision
from lightning_modules.processes import everyone

IDLE = 0.1  # a code that is used less than a tenth as often as on average starts anew


class Encoder(nn.Module):
    """Picture ``(B, 3, S, S)`` → features ``(B, dim, S/2ˢ, S/2ˢ)``, s being ``stages``.

    Args:
        stages: Halvings, at least 1.
        width: Channels at half the size, a multiple of 8; doubled by each further halving.
        dim: Length of a feature.
    """

    def __init__(self, stages: int, width: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), _Residual(width)]
        for stage in range(stages - 1):
            inner = width << stage
            layers += [nn.Conv2d(inner, 2 * inner, 4, 2, 1), _Residual(2 * inner)]
        channels = width << (stages - 1)
        layers += [_Residual(channels), nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch dim side side"]:
        """Features of pictures in [-1, 1]."""
        return self.layers(image)


class Decoder(nn.Module):
    """Codes ``(B, dim, S/2ˢ, S/2ˢ)`` → picture ``(B, 3, S, S)``; arguments as the encoder's."""

    def __init__(self, stages: int, width: int, dim: int) -> None:
        super().__init__()
        channels = width << (stages - 1)
        layers: list[nn.Module] = [nn.Conv2d(dim, channels, 3, padding=1), _Residual(channels), _Residual(channels)]
        for stage in reversed(range(stages - 1)):
            outer = width << stage
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(2 * outer, outer, 3, padding=1), _Residual(outer)]
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Float[Tensor, "batch dim side side"]) -> Float[Tensor, "batch 3 h w"]:
        """Pictures; they may go beyond [-1, 1]."""
        return self.layers(codes).float()


class Codebook(nn.Module):
    """Unit codes, each token the number of one; they follow the features by averages, without an optimizer.

    The averages are van den Oord et al.'s (2017, appendix A.1), over the faces of all processes. Codes that lie idle
    start anew at features of the batch, drawn from the number of updates: as all do at the first one.

    Args:
        count: How many codes.
        dim: Length of a code.
        keep: Share of an average that stays at an update.

    Example:
        >>> book, features = Codebook(4, 8), torch.randn(2, 8, 3, 3)
        >>> book.follow(features)
        >>> tuple(book.codes_of(book.tokens(features)).shape)
        (2, 8, 3, 3)
    """

    def __init__(self, count: int, dim: int, keep: float = 0.95) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("codes", torch.zeros(count, dim))
        self.register_buffer("sums", torch.zeros(count, dim))
        self.register_buffer("use", torch.zeros(count))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def empty(self) -> bool:
        """Whether it has not met a feature yet."""
        return int(self.updates) == 0

    def tokens(self, features: Float[Tensor, "batch dim side side"]) -> Int[Tensor, "batch side side"]:
        """The number of the code nearest to each feature."""
        with full_precision(features.device):  # bf16 takes neighbours for one another
            return torch.einsum("bdhw,nd->bnhw", F.normalize(features.float()), self.codes).argmax(1)

    def codes_of(self, tokens: Int[Tensor, "batch side side"]) -> Float[Tensor, "batch dim side side"]:
        """The codes of tokens."""
        return self.codes[tokens].permute(0, 3, 1, 2)

    def forward(self, features: Float[Tensor, "batch dim side side"], share: float = 1.0) -> tuple[Tensor, Tensor]:
        """The nearest codes, through which gradients pass straight, and the commitment: squared distances to them.

        Args:
            features: Of any length.
            share: How far on the way from features to codes; where it grows from 0, features spread before codes hold
                them. Where codes held them from the start, 6 of 512 were in use after 70 steps.
        """
        unit = F.normalize(features.float())
        codes = self.codes_of(self.tokens(features))
        return unit + share * (codes - unit).detach(), (unit - codes).square().sum(1).mean()

    @torch.no_grad()
    def follow(self, features: Float[Tensor, "batch dim side side"]) -> None:
        """Let the codes follow a batch of features."""
        rows = everyone(F.normalize(features.float()).permute(0, 2, 3, 1)).flatten(0, 2)
        with full_precision(rows.device):
            met = F.one_hot((rows @ self.codes.mT).argmax(1), len(self.codes)).to(rows)
            share = len(self.codes) / len(rows)  # so that 1 is how often a code is used on average
            self.use.lerp_(share * met.sum(0), 1 - self.keep)
            self.sums.lerp_(share * met.mT @ rows, 1 - self.keep)
        idle = self.use < IDLE
        drawn = torch.randint(len(rows), idle.shape, generator=torch.Generator().manual_seed(int(self.updates)))
        self.sums[idle], self.use[idle] = rows[drawn.to(rows.device)][idle], 1.0
        self.codes.copy_(F.normalize(self.sums))
        self.updates += 1


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)

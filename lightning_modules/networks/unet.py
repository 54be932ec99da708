"""A small U-Net: pictures in, pictures out (Ronneberger et al., 2015, "U-Net")."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Pictures of a face ``(B, 3·n, S, S)`` → one picture; it starts by handing out the last one as it came.

    Blocks of 2 × 2 pixels are channels inside (Shi et al., 2016), so that the widest layers see a quarter of the
    pixels; what it finds is added to the last picture.

    Args:
        pictures: How many pictures of each face there are.
        width: Channels of the first stage, a multiple of 8; doubled by each stage, up to fourfold.
        depth: Stages of half the size each; S is a multiple of ``2 ** (depth + 1)``.
        code: Length of a code of each face that is added in the bottleneck; 0 for none.

    Example:
        >>> UNet(width=8, depth=2)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, pictures: int = 1, width: int = 32, depth: int = 3, code: int = 0) -> None:
        super().__init__()
        widths = [width << min(stage, 2) for stage in range(depth + 1)]
        self.downs = nn.ModuleList(_stage(i, o) for i, o in zip([12 * pictures, *widths], widths, strict=False))
        self.ups = nn.ModuleList(_stage(widths[at] + widths[at + 1], widths[at]) for at in reversed(range(depth)))
        self.out = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.inject = nn.Linear(code, widths[-1]) if code else None
        self.to(memory_format=torch.channels_last)

    def forward(
        self, image: Float[Tensor, "batch channels size size"], code: Float[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch 3 size size"]:
        """What becomes of pictures in [-1, 1], under a code if it takes one; it may go beyond."""
        x, passed = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last), []
        for down in self.downs:
            x = down(F.avg_pool2d(x, 2) if passed else x)
            passed.append(x)
        if self.inject is not None:
            x = x + self.inject(code)[:, :, None, None]
        for up, beside in zip(self.ups, passed[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), beside], 1))
        return image[:, -3:] + F.pixel_shuffle(self.out(x), 2)


def _stage(channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside in (channels, out):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
    return nn.Sequential(*layers)

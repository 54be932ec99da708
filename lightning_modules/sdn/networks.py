"""The networks of SDN: encoder, factors, decoder, classifier, and the small heads of its information terms.

Sizes are OURS (methods: the paper gives none). A picture of 128 px at width 64 is the paper-like size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

CODE = 16  # pixels of the side of the spatial code, whatever the size of the picture
STYLE = 256


def stages(size: int) -> int:
    """Stride-2 stages from pictures of ``size`` pixels to the spatial code: 2, 3 and 4 for 64, 128 and 256."""
    return (size // CODE).bit_length() - 1


class Encoder(nn.Module):
    """Picture ``(B, 3, H, W)`` → spatial code ``(B, 2ˢ·width, H/2ˢ, W/2ˢ)`` after s stages: a vector would lose it.

    Norms stand in the residual branches alone: behind the stem they would take contrast and colour from the code, and
    no recovery could give them back.
    """

    def __init__(self, width: int, stages: int = 3, blocks: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, padding=3), nn.LeakyReLU(0.2)]
        for stage in range(stages):
            inner = width << stage
            layers += [nn.Conv2d(inner, 2 * inner, 4, 2, 1), nn.LeakyReLU(0.2)]
        layers += [_Residual(width << stages) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers)
        self.apply(_keep_variance)

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch code side side"]:
        """Encode pictures in [-1, 1]."""
        return self.layers(image)


def _keep_variance(module: nn.Module) -> None:
    """He initialization: without norms on the way, torch's own default would fade the picture within four layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.2)
        nn.init.zeros_(module.bias)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.InstanceNorm2d(channels, affine=True),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.InstanceNorm2d(channels, affine=True),
        )
        nn.init.zeros_(self.body[-1].weight)  # starts as the identity (zero gamma, Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Factors(nn.Module):
    """Password bits, attributes and the direction (+1 anonymize, −1 recover) → style ``(B, 256)``."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(length + 1, STYLE), nn.LeakyReLU(0.2), nn.Linear(STYLE, STYLE), nn.LeakyReLU(0.2)
        )

    def forward(self, factors: Float[Tensor, "batch length"], direction: float) -> Float[Tensor, "batch style"]:
        """Embed factors in {−1, +1} under one direction."""
        flag = factors.new_full((len(factors), 1), direction)
        return self.layers(torch.cat([factors, flag], 1))


class AdaIN(nn.Module):
    """Instance norm whose scale and shift come from a style (Huang & Belongie, 2017); SeFa reads its affine.

    Args:
        channels: Channels of the input.
        gain: Scale before training: 1, or 0 at the end of a residual branch.
    """

    def __init__(self, channels: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.affine = nn.Linear(STYLE, 2 * channels)

    def forward(self, x: Float[Tensor, "batch channels h w"], style: Float[Tensor, "batch style"]) -> Tensor:
        """Normalise each channel of each picture, then scale and shift it by the style."""
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, 1)
        return F.instance_norm(x) * (self.gain + scale) + shift


class _StyledResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = AdaIN(channels), AdaIN(channels, gain=0.0)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x), style))
        return x + self.norm2(self.conv2(inner), style)


class Decoder(nn.Module):
    """Spatial code and style → what is added to a picture, and how much of its detail is doubted, as a logit.

    One decoder serves both directions (dual inference).

    AdaIN in the residual branches; the upsampling stages are scaled by the style and not normalised, so that contrast
    passes.
    """

    def __init__(self, width: int, stages: int = 3, blocks: int = 6) -> None:
        super().__init__()
        channels = width << stages
        self.inject = nn.Conv2d(channels + STYLE, channels, 1)
        self.blocks = nn.ModuleList(_StyledResidual(channels) for _ in range(blocks))
        self.ups = nn.ModuleList(
            nn.Conv2d(width << stage, width << (stage - 1), 3, padding=1) for stage in range(stages, 0, -1)
        )
        self.scales = nn.ModuleList(nn.Linear(STYLE, width << (stage - 1)) for stage in range(stages, 0, -1))
        self.apply(_keep_variance)
        self.out = nn.Conv2d(width, 4, 7, padding=3)
        nn.init.zeros_(self.out.weight)  # starts by adding nothing
        nn.init.zeros_(self.out.bias)

    def forward(
        self, code: Float[Tensor, "batch code side side"], style: Float[Tensor, "batch style"]
    ) -> Float[Tensor, "batch 4 h w"]:
        """Decode under a style, which is tiled into the code and modulates every layer."""
        tiled = style[:, :, None, None].expand(-1, -1, *code.shape[2:])
        x = self.inject(torch.cat([code, tiled], 1))
        for block in self.blocks:
            x = block(x, style)
        for up, scale in zip(self.ups, self.scales, strict=True):
            x = up(F.interpolate(x, scale_factor=2.0)) * (1 + scale(style))[:, :, None, None]
            x = F.leaky_relu(x, 0.2)
        return self.out(x).float()


class Classifier(nn.Module):
    """ResNet-type feature extractor: picture → unit feature ``(B, 256)``; trained beside the rest, from scratch."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1), nn.InstanceNorm2d(width, affine=True), nn.ReLU()]
        for stage in range(3):
            inner = width << stage
            layers += [
                nn.Conv2d(inner, 2 * inner, 3, 2, 1),
                nn.InstanceNorm2d(2 * inner, affine=True),
                nn.ReLU(),
                _Residual(2 * inner),
            ]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(16 * 8 * width, features)

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch features"]:
        """Unit features of pictures in [-1, 1]."""
        grid = F.adaptive_avg_pool2d(self.body(image), 4)
        return F.normalize(self.out(grid.flatten(1)).float(), dim=1)


class PasswordHead(nn.Module):
    """Reads the password bits off (x, x_a), so that the generator cannot ignore them; logits ``(B, bits)``."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in [(6, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)]:
            layers += [nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(16 * 8 * width, bits)

    def forward(self, image: Tensor, anonymized: Tensor) -> Float[Tensor, "batch bits"]:
        """Logits of the bits."""
        grid = F.adaptive_avg_pool2d(self.body(torch.cat([image, anonymized], 1)), 4)
        return self.out(grid.flatten(1))


class GaussianHead(nn.Module):
    """Diagonal Gaussian ``q(y | x)`` for the variational bounds: mean and clamped log-variance from a small MLP."""

    def __init__(self, features: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, features), nn.LeakyReLU(0.2), nn.Linear(features, 2 * features))

    def forward(self, x: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "batch d"]]:
        """Mean and log-variance of y given x."""
        mean, log_variance = self.layers(x).float().chunk(2, 1)
        return mean, log_variance.clamp(-6, 2)

"""The networks of SDN: encoder, factors, decoder, classifier, and the small heads of its information terms.

Sizes are OURS (methods: the paper gives none). A picture of 128 px at width 64 is the paper-like size.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flows.precision import full_precision

CODE = 16  # pixels of the side of the spatial code, whatever the size of the picture
STYLE = 256
CELLS = 8  # blocks of the side of a picture, whatever its size


def stages(size: int) -> int:
    """Stride-2 stages from pictures of ``size`` pixels to the spatial code: 2, 3 and 4 for 64, 128 and 256."""
    return (size // CODE).bit_length() - 1


# Oval of an aligned crop that holds the face: centre and half axes (x, y) in shares of the side.
CENTRE, AXES = (0.5, 0.54), (0.37, 0.5)


def oval(side: int) -> Float[Tensor, "side side"]:
    """Blocks of an aligned crop that hold the face: 1, and 0 around it, which then stays bit for bit (ours).

    It needs no network and is the same for every picture, so that recovery has it too.
    """
    ticks = (torch.arange(CELLS) + 0.5) / CELLS
    x, y = (ticks - CENTRE[0]) / AXES[0], (ticks - CENTRE[1]) / AXES[1]
    inside = x[None].square() + y[:, None].square() < 1
    return inside.float().repeat_interleave(side // CELLS, 0).repeat_interleave(side // CELLS, 1)


class BlockCosines(nn.Module):
    """A picture as 8 by 8 blocks: their means, and the lower cosine frequencies of what is left (ours).

    The means say where what is, and in which light; the frequencies whose face it is. Each frequency is divided by
    what it usually has in pictures, whose amplitude falls with frequency (Field, 1987), to the power 0.3: spread evenly
    over the frequencies, a code would look like noise; spread as they are, the faint ones would drown in rounding.

    Args:
        size: Pixels of the side of a picture, a multiple of 8.
        luma: Frequencies of brightness that are kept of a block of a picture of 64 px; of others as many a pixel.
        chroma: Frequencies of each of two colours, likewise.
    """

    def __init__(self, size: int, luma: int = 48, chroma: int = 12) -> None:
        super().__init__()
        side = size // CELLS
        waves = cosines(side)
        planes = torch.einsum("ui,vj->uvij", waves, waves).flatten(0, 1)
        ticks = torch.arange(side)
        order = (ticks[:, None].square() + ticks[None].square()).flatten()
        lowest = order.argsort(stable=True)[1:]
        colours = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
        rows, usual = [], []
        for colour, count, share in zip(
            colours / colours.norm(dim=1)[:, None], (luma, chroma, chroma), (1, 0.4, 0.4), strict=True
        ):
            chosen = lowest[: count * side * side // 64]
            rows.append(colour[None, :, None, None] * planes[chosen][:, None])
            usual.append(share / order[chosen].sqrt())
        self.register_buffer("basis", torch.cat(rows), persistent=False)
        usual = torch.cat(usual) ** 0.3
        self.register_buffer("usual", (usual / usual.mean())[:, None, None], persistent=False)

    @property
    def depth(self) -> int:
        """How many frequencies are kept of a block."""
        return len(self.basis)

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch depth 8 8"]:
        """The code of a picture: its frequencies, each in units of what is usual."""
        with full_precision(image.device):
            return F.conv2d(image.float(), self.basis, stride=self.basis.shape[-1]) / self.usual

    def picture(self, code: Float[Tensor, "batch depth 8 8"]) -> Float[Tensor, "batch 3 h w"]:
        """The picture of a code; its blocks have mean 0."""
        with full_precision(code.device):
            return F.conv_transpose2d(code.float() * self.usual, self.basis, stride=self.basis.shape[-1])


def means(image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
    """Each pixel the mean of its block."""
    return F.interpolate(F.adaptive_avg_pool2d(image.float(), CELLS), image.shape[2:])


def turned(
    code: Float[Tensor, "batch channels side side"], signs: Float[Tensor, "batch channels two"], back: bool
) -> Float[Tensor, "batch channels side side"]:
    """Rotate the channels of a code by ``D₂ C D₁``: diagonals of signs around a cosine transform (ours).

    Turned back under other signs, codes have nothing in common with the right ones, before anything is learned.

    Args:
        code: Codes.
        signs: The diagonals D₁ and D₂ of each face, in {−1, +1}.
        back: Undo the rotation.
    """
    first, last = signs[:, :, None, None, :].to(code).unbind(-1)
    matrix = cosines(code.shape[1]).to(code)[:, :, None, None]
    with full_precision(code.device):
        if back:
            return F.conv2d(code * last, matrix.transpose(0, 1)) * first
        return F.conv2d(code * first, matrix) * last


@cache
def cosines(order: int) -> Float[Tensor, "order order"]:
    """The orthonormal discrete cosine transform (type II) of any order, one frequency a row."""
    ticks = torch.arange(order, dtype=torch.float64)
    rows = torch.cos(math.pi / order * ticks[:, None] * (ticks[None] + 0.5)) * math.sqrt(2 / order)
    rows[0] /= math.sqrt(2)
    return rows.float()


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


def hashed(factors: Float[Tensor, "batch length"], bits: int) -> Float[Tensor, "batch bits"]:
    """Bits of SHAKE-256 over the signs of factors, in {−1, +1}: one sign changed changes half of them (ours)."""
    rows = []
    for signs in (factors > 0).tolist():
        digest = hashlib.shake_256(bytes(signs)).digest((bits + 7) // 8)
        rows.append([1.0 if digest[i // 8] >> i % 8 & 1 else -1.0 for i in range(bits)])
    return factors.new_tensor(rows).reshape(-1, bits)


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

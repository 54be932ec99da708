"""The trained networks of iFADIT: attribute encoder, fusion, and identity compensation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

CODE = 512


class AttributeEncoder(nn.Module):
    """Feature-pyramid encoder: picture → one attribute code per style row, ``(B, rows, 512)``.

    KNOWN: pSp-type (Richardson et al., 2021): three levels of a pyramid feed coarse, middle and fine style rows, and
    the trunk starts from a recogniser's weights. OURS: which trunk, its widths, and the shared 4×4 read-out of a level.

    Args:
        rows: Style rows that the encoder tells apart; a generator's later rows repeat the last one.
        width: Channels of the first stage of a trunk of its own; 32 is a light one, 64 with ``blocks=3`` the GPU size.
        blocks: Residual blocks a stage of a trunk of its own.
        input_size: Pixels of the picture that the encoder sees.
        trunk: Three stages at a quarter, an eighth and a sixteenth of the picture's side, trained on; ``None`` makes
            a residual trunk of its own.
    """

    def __init__(
        self,
        rows: int,
        width: int = 32,
        blocks: int = 2,
        input_size: int = 128,
        trunk: list[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.stages = nn.ModuleList(trunk or _residual_trunk(width, blocks))
        with torch.no_grad():
            widths, x = [], torch.zeros(1, 3, 64, 64)
            for stage in self.stages:
                x = stage(x)
                widths.append(x.shape[1])
        channels = widths[-1] // 2 if trunk is None else widths[-1]
        self.lateral = nn.ModuleList(nn.Conv2d(w, channels, 1) for w in widths)
        self.read = nn.ModuleList(nn.Linear(16 * channels, CODE) for _ in range(3))
        coarse, middle = round(rows * 7 / 17), round(rows * 13 / 17)  # of MobileStyleGAN's 17: up to 16 px, up to 64 px
        self.level_of_row = [(row >= coarse) + (row >= middle) for row in range(rows)]
        self.rows = nn.ModuleList(nn.Linear(CODE, CODE) for _ in range(rows))

    def train(self, mode: bool = True) -> AttributeEncoder:
        """Train, but keep a borrowed trunk's batch norms as they are: a face must not depend on its batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch rows 512"]:
        """Encode pictures in [-1, 1] of any size."""
        x = F.interpolate(image, size=(self.input_size,) * 2, mode="bilinear", antialias=True)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        pyramid, above = [], None
        for lateral, level in zip(reversed(self.lateral), reversed(features), strict=True):
            here = lateral(level)
            above = here if above is None else here + F.interpolate(above, scale_factor=2.0)
            pyramid.append(above)
        codes = [
            F.leaky_relu(read(F.adaptive_avg_pool2d(level, 4).flatten(1)), 0.2)
            for read, level in zip(self.read, pyramid, strict=True)
        ]
        return torch.stack([row(codes[at]) for row, at in zip(self.rows, self.level_of_row, strict=True)], 1)


def _residual_trunk(width: int, blocks: int) -> list[nn.Module]:
    """Stem and residual stages of ``width`` × 2, 4 and 8 channels at a quarter, an eighth, a sixteenth."""
    stem = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2), *(_Residual(width) for _ in range(blocks)))
    stages: list[nn.Module] = []
    for outer in (2 * width, 4 * width, 8 * width):
        stages.append(nn.Sequential(nn.Conv2d(outer // 2, outer, 3, 2, 1), *(_Residual(outer) for _ in range(blocks))))
    return [nn.Sequential(stem, stages[0]), *stages[1:]]


class _Residual(nn.Module):
    """Pre-activation residual block with group norm, so that a face does not depend on its batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Fusion(nn.Module):
    """``w_l = w̄ + MLP([√512·z ; a_l])``, the same weights for every style row.

    KNOWN: Linear 1024→512, LeakyReLU 0.2, Linear 512→512 (iFADIT's released inference code). OURS: the offset by the
    mean code, which makes an untrained model render the mean face, and the √512, which gives z and a the same scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * CODE, CODE), nn.LeakyReLU(0.2), nn.Linear(CODE, CODE))

    def forward(
        self,
        z: Float[Tensor, "batch 512"],
        attributes: Float[Tensor, "batch rows 512"],
        mean_w: Float[Tensor, 512],
    ) -> Float[Tensor, "batch rows 512"]:
        """W+ rows for an identity and attributes."""
        identity = (CODE**0.5 * z)[:, None].expand(-1, attributes.shape[1], -1)
        return mean_w + self.layers(torch.cat([identity, attributes], 2))


class Compensation(nn.Module):
    """ICL: what a rendered face's identity code must become before the inverse transform, ``(B, 512) → (B, 512)``.

    KNOWN: Linear 512→1024→2048→1024→512 with LeakyReLU 0.2. OURS: it adds to its input and starts at zero, and it may
    see the key.

    Args:
        key_length: Numbers of the key that it sees beside the code.
    """

    def __init__(self, key_length: int = 0) -> None:
        super().__init__()
        sizes = [CODE + key_length, 1024, 2048, 1024, CODE]
        layers: list[nn.Module] = []
        for i, o in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(i, o), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self, z: Float[Tensor, "batch 512"], key: Float[Tensor, "batch key_length"] | None = None
    ) -> Float[Tensor, "batch 512"]:
        """Compensate codes; unit codes come back as unit codes."""
        seen = CODE**0.5 * z if key is None else torch.cat([CODE**0.5 * z, key], 1)
        return F.normalize(z + self.layers(seen) / CODE**0.5, dim=1)

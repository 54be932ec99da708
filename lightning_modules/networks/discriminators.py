"""Discriminators that several methods share."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Two-scale PatchGAN with spectral norm and an attribute head (Isola et al., 2017; Miyato et al., 2018).

    Args:
        width: Channels of the first layer.
        attributes: Number of binary attributes that the head predicts; 0 for none.
    """

    def __init__(self, width: int = 64, attributes: int = 0) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_Scale(width, attributes) for _ in range(2))

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> tuple[list[Tensor], Float[Tensor, "batch attributes"]]:
        """Patch scores of both scales, each ``(B, 1, h', w')``, and attribute logits ``(B, attributes)``."""
        fine, fine_logits = self.scales[0](image)
        coarse, coarse_logits = self.scales[1](F.avg_pool2d(image, 2))
        return [fine, coarse], (fine_logits + coarse_logits) / 2


class _Scale(nn.Module):
    def __init__(self, width: int, attributes: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.body = nn.Sequential(
            *(
                nn.Sequential(spectral_norm(nn.Conv2d(i, o, 4, 2, 1)), nn.LeakyReLU(0.2))
                for i, o in zip(widths, widths[1:], strict=False)
            )
        )
        self.patch = spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1))
        self.attributes = nn.Linear(4 * width, attributes) if attributes else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(image)
        pooled = features.mean((2, 3))
        logits = pooled[:, :0] if self.attributes is None else self.attributes(pooled)
        return self.patch(features), logits

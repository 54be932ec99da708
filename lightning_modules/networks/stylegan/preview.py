"""The preview head: a 256-px picture straight from the generator's 128-px features (ours, trained by us)."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

LATE_ROWS = slice(16, 23)  # the W+ rows of the two blocks and the to-RGB that the head stands in for


class PreviewHead(nn.Module):
    """Stands in for the generator's last two blocks when 256 px are enough.

    With f the 128-px features, w̃ the mean of the rows 16…22 (so that gradients reach each of them) and sᵢ affine styles
    of w̃: ``x = s₀ ⊙ f``; ``h = φ(M x)``; three residual steps ``h += φ(Pᵢ (Dᵢ ∗ (sᵢ ⊙ h)))`` of depth-wise 3×3 and
    point-wise convolutions; and the picture is the inverse Haar transform of the 12 wavelet channels
    ``C (s₄ ⊙ h) + L (s₅ ⊙ x)``, at 256 px.

    Args:
        channels: Channels of the features.
        width: Channels inside the head.
        steps: Residual steps.
    """

    def __init__(self, channels: int = 256, width: int = 96, steps: int = 3) -> None:
        super().__init__()
        self.style = nn.Linear(512, channels)
        self.direct_style = nn.Linear(512, channels)
        self.styles = nn.ModuleList(nn.Linear(512, width) for _ in range(steps + 1))
        self.direct = nn.Conv2d(channels, 12, 1, bias=False)
        self.inward = nn.Conv2d(channels, width, 1)
        self.depthwise = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(steps))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(steps))
        self.outward = nn.Conv2d(width, 12, 1)
        for style in (self.style, self.direct_style, *self.styles):
            nn.init.zeros_(style.weight)
            nn.init.ones_(style.bias)

    @classmethod
    def load(cls, path: Path) -> PreviewHead:
        """Build the head whose weights lie in ``path`` (safetensors)."""
        state = load_file(path)
        width, channels = state["inward.weight"].shape[:2]
        head = cls(channels, width, steps=sum(name.startswith("pointwise") for name in state) // 2)
        head.load_state_dict({name: value.float() for name, value in state.items()})
        return head

    def forward(
        self, features: Float[Tensor, "batch h w channels"], w: Float[Tensor, "batch 23 512"]
    ) -> Float[Tensor, "batch 3 h2 w2"]:
        """Render the features ``(B, 128, 128, 256)`` as RGB ``(B, 3, 256, 256)`` in about [-1, 1]."""
        late = w[:, LATE_ROWS].mean(1)
        # Both maps that read the styled features, in one product: the styles scale the rows of the matrix instead.
        style = self.style(late)[:, :, None]
        inward = style * self.inward.weight.flatten(1).T
        direct = style * self.direct_style(late)[:, :, None] * self.direct.weight.flatten(1).T
        both = torch.bmm(features.flatten(1, 2), torch.cat([inward, direct], 2)).view(*features.shape[:3], -1)
        hidden, direct = both.permute(0, 3, 1, 2).split([inward.shape[2], direct.shape[2]], 1)
        hidden = F.leaky_relu(hidden + self.inward.bias[:, None, None], 0.2)
        for depthwise, pointwise, style in zip(self.depthwise, self.pointwise, self.styles, strict=False):
            hidden = hidden + F.leaky_relu(pointwise(depthwise(hidden * _scale(style, late))), 0.2)
        bands = self.outward(hidden * _scale(self.styles[-1], late)) + direct
        ll, lh, hl, hh = bands.chunk(4, dim=1)
        top, bottom, left, right = ll + lh, ll - lh, hl + hh, hl - hh
        corners = torch.stack([top + left, top - left, bottom + right, bottom - right], 2)
        return F.pixel_shuffle(corners.flatten(1, 2) * 0.5, 2)


def _scale(style: nn.Linear, late: Tensor) -> Tensor:
    return style(late)[:, :, None, None]

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

    ``B = R(c₂ ∗ φ(c₁ ∗ φ(M · (s(w̃) ⊙ f))))``: f the 128-px features, s an affine style of w̃ = the mean of the rows
    16…22 (so that gradients reach each of them), M a point-wise matrix, c₁ and c₂ 3×3 convolutions, and R the inverse
    Haar transform of the 12 wavelet channels, to 256 px.

    Args:
        channels: Channels of the features.
        width: Channels inside the head.
    """

    def __init__(self, channels: int = 256, width: int = 64) -> None:
        super().__init__()
        self.style = nn.Linear(512, channels)
        self.inward = nn.Conv2d(channels, width, 1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.outward = nn.Conv2d(width, 12, 3, padding=1)
        self.direct = nn.Conv2d(channels, 12, 1, bias=False)
        nn.init.zeros_(self.style.weight)
        nn.init.ones_(self.style.bias)

    @classmethod
    def load(cls, path: Path) -> PreviewHead:
        """Build the head whose weights lie in ``path`` (safetensors)."""
        state = load_file(path)
        head = cls(state["inward.weight"].shape[1], state["inward.weight"].shape[0])
        head.load_state_dict({name: value.float() for name, value in state.items()})
        return head

    def forward(
        self, features: Float[Tensor, "batch h w channels"], w: Float[Tensor, "batch 23 512"]
    ) -> Float[Tensor, "batch 3 h2 w2"]:
        """Render the features ``(B, 128, 128, 256)`` as RGB ``(B, 3, 256, 256)`` in about [-1, 1]."""
        late = w[:, LATE_ROWS].mean(1)
        x = features.permute(0, 3, 1, 2) * self.style(late)[:, :, None, None]
        inner = F.leaky_relu(self.inward(x), 0.2)
        inner = F.leaky_relu(self.middle(inner), 0.2)
        bands = self.direct(x) + self.outward(inner)
        ll, lh, hl, hh = bands.chunk(4, dim=1)
        top, bottom, left, right = ll + lh, ll - lh, hl + hh, hl - hh
        corners = torch.stack([top + left, top - left, bottom + right, bottom - right], 2)
        return F.pixel_shuffle(corners.flatten(1, 2) * 0.5, 2)

"""EfficientNet-lite0: what a network that has seen ImageNet, and no face in particular, finds in a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.faceres import SameConv
from lightning_modules.networks.frozen import Frozen
from lightning_modules.weights import card, locate

CARD, SIZE = "efficientnet-lite0", 224

# (widening, kernel, stride of the first, channels out, blocks)
_STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4))
_STAGES += ((6, 3, 1, 320, 1),)


def _unit(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        SameConv(channels, out, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=1e-3),  # TensorFlow's
        nn.ReLU6(),
    ]


class InvertedResidual(nn.Module):
    """Inverted residual of MobileNetV2 (Sandler et al., 2018), without squeeze-and-excitation."""

    def __init__(self, channels: int, widening: int, kernel: int, stride: int, out: int) -> None:
        super().__init__()
        inside = channels * widening
        self.residual = stride == 1 and channels == out
        self.layers = nn.Sequential(
            *(_unit(channels, inside) if widening > 1 else ()),
            *_unit(inside, inside, kernel, stride, groups=inside),
            *_unit(inside, out)[:-1],  # linear
        )

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Apply the block."""
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(Frozen):
    """Pooled features of pictures, ``(B, 1280)``; card ``efficientnet-lite0``.

    EfficientNet-B0 (Tan & Le, 2019) without squeeze-and-excitation and with ReLU6 ("lite0"), trained on ImageNet. A
    picture is brought to 224 pixels and to (x - 127) / 128 of its grey levels.

    Args:
        path: A local copy of the weights; ``None`` asks the card's sources.

    Raises:
        WeightsError: If the file cannot be found or its hash is not the card's.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.card_hashes = {CARD: card(CARD).digest}
        layers, channels = _unit(3, 32, 3, 2), 32
        for widening, kernel, stride, out, blocks in _STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, widening, kernel, 1 if block else stride, out))
                channels = out
        layers += [*_unit(320, 1280), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
        whole = nn.Sequential(*layers)
        weights = torch.load(locate(CARD, path), map_location="cpu", weights_only=True)
        # The file has its own names, but our order.
        whole.load_state_dict(dict(zip(whole.state_dict(), weights.values(), strict=True)))
        self.layers, self.classifier = whole[:-1].to(memory_format=torch.channels_last), whole[-1]
        self.freeze()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1280"]:
        """Features of pictures of any size, RGB in [-1, 1]."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        levels = (images + 1) * 127.5
        return self.layers(((levels - 127) / 128).contiguous(memory_format=torch.channels_last))

    def classify(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1000"]:
        """Logits of ImageNet's classes."""
        return self.classifier(self(images))

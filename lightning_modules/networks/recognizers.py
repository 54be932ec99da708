"""The identity network of the losses as a native module: aligned pictures → unit-length identity codes."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from jaxtyping import Float
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.alignment import ARCFACE_TEMPLATE
from lightning_modules.networks.crop import FixedCrop
from lightning_modules.networks.frozen import Frozen
from lightning_modules.weights import card, locate

# (channels in, channels inside, channels out, stride, residual blocks that follow, their channels inside)
_STAGES = ((64, 128, 64, 2, 4, 128), (64, 256, 128, 2, 6, 256), (128, 512, 128, 2, 2, 256))


class Bottleneck(nn.Module):
    """Inverted residual of MobileFaceNet: 1x1 expand, 3x3 depth-wise, linear 1x1 project; PReLU between."""

    def __init__(self, channels: int, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1 and channels == out
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inside, 1),
            nn.PReLU(inside),
            nn.Conv2d(inside, inside, 3, stride, 1, groups=inside),
            nn.PReLU(inside),
            nn.Conv2d(inside, out, 1),
        )

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Apply the block."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileFaceNet(Frozen):
    r"""Identity code :math:`z = E_{id}(x)` of a face, ``(B, 512)``, unit length; card ``mobilefacenet``.

    MobileFaceNet (Chen et al., 2018, "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification
    on Mobile Devices"), batch normalisation folded into the convolutions as in the file that the weights are
    read from. Frozen, but differentiable with respect to the picture.

    Args:
        path: A local copy of the ONNX file; ``None`` asks the card's sources.

    Raises:
        WeightsError: If the file cannot be found or its hash is not the card's.
    """

    name = "mobilefacenet"
    dim = 512

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.weights = card(self.name).digest
        self.card_hashes = {self.name: self.weights}
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 3, 2, 1),
            nn.PReLU(64),
            nn.Conv2d(64, 64, 3, 1, 1, groups=64),
            nn.PReLU(64),
        ]
        for channels, inside, out, stride, repeats, inside_after in _STAGES:
            layers.append(Bottleneck(channels, inside, out, stride))
            layers.extend(Bottleneck(out, inside_after, out) for _ in range(repeats))
        layers += [
            nn.Conv2d(128, 512, 1),
            nn.PReLU(512),
            nn.Conv2d(512, 512, 7, groups=512),  # global depth-wise convolution: 7x7 → 1x1
            nn.Conv2d(512, 512, 1),
        ]
        self.layers = nn.Sequential(*layers)
        self.crop = FixedCrop(ARCFACE_TEMPLATE, 112)
        _read_onnx(self.layers, locate(self.name, path))
        self.layers.to(memory_format=torch.channels_last)  # depth-wise convolutions: 4 times faster on a CPU
        self.freeze()

    def stages(self) -> list[nn.Sequential]:
        """Three parts of the network by resolution, from the picture on: a half to a quarter, an eighth, a sixteenth.

        Of a picture of side S they give 64 channels at S/4, 128 at S/8, and 128 at S/16.
        """
        ends, at = [], 4
        for *_, repeats, _ in _STAGES:
            ends.append((at, at + 1 + repeats))
            at += 1 + repeats
        first, *rest = (self.layers[start:end] for start, end in ends)
        return [nn.Sequential(*self.layers[:4], *first), *rest]

    def pyramid(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, list[Tensor]]:
        """Codes as :meth:`forward` gives them, and the features of each stage on the way, ``(B, C, h, w)``."""
        x = self.crop(images).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages():
            x = stage(x)
            features.append(x)
        tail = self.layers[sum(2 + repeats for *_, repeats, _ in _STAGES) - len(_STAGES) + 4 :]
        return F.normalize(tail(x).flatten(1)), features

    def embed_aligned(self, crop: Float[Tensor, "batch 3 112 112"]) -> Float[Tensor, "batch 512"]:
        """Codes of crops already on the 112-px five-point template, RGB in [-1, 1]."""
        return F.normalize(self.layers(crop.contiguous(memory_format=torch.channels_last)).flatten(1))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 512"]:
        """Codes of FFHQ-style crops of any size, RGB in [-1, 1]."""
        return self.embed_aligned(self.crop(images))


@torch.no_grad()
def _read_onnx(layers: nn.Sequential, path: Path) -> None:
    """Fill convolutions and PReLUs in the order of the graph's nodes."""
    graph = onnx.load(str(path)).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("Conv", "PRelu")]
    modules = [module for module in layers.modules() if isinstance(module, (nn.Conv2d, nn.PReLU))]
    assert len(nodes) == len(modules), (len(nodes), len(modules))
    for node, module in zip(nodes, modules, strict=True):
        weight = torch.tensor(values[node.input[1]])
        module.weight.copy_(weight.reshape(module.weight.shape))
        if isinstance(module, nn.Conv2d):
            module.bias.copy_(torch.tensor(values[node.input[2]]))

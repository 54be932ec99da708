"""The 68 landmarks of an aligned face as a native module: pictures → points, differentiable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from jaxtyping import Float
from onnx import numpy_helper
from torch import Tensor, nn

from datamodules.alignment import template
from lightning_modules.networks.crop import WORKING_SIZE, FixedCrop
from lightning_modules.networks.frozen import Frozen
from lightning_modules.weights import card, locate

INPUT = 64
"""Side of the network's own crop in pixels."""

# Left, top and side of the network's square crop in an aligned crop, as shares of its side: no published box, but the
# middle of a plateau, on which the mean distance to the other predictor's points changes by less than 0.1 px of 256:
# sides of 0.68 to 0.74, centres 0.61 to 0.66 down.
_BOX = (0.14, 0.27, 0.72)

# What OpenCV's BGR2GRAY takes of red, green and blue.
GREY = (0.299, 0.587, 0.114)

# The customary groups of the 68 (Sagonas et al., 2013, "300 Faces in-the-Wild Challenge"): half-open ranges.
JAW, BROWS, EYES, MOUTH = slice(0, 17), slice(17, 27), slice(36, 48), slice(48, 68)
CHIN, NOSE_TIP = 8, 30

# (channels in, channels inside, channels out, residual blocks that follow, their channels inside); all at stride 2
_STAGES = ((32, 64, 32, 3, 64), (32, 128, 64, 4, 128), (64, 256, 64, 2, 128))


class Bottleneck(nn.Module):
    """Inverted residual of MobileFaceNet with ReLU: 1x1 expand, 3x3 depth-wise, linear 1x1 project."""

    def __init__(self, channels: int, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1 and channels == out
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inside, 1),
            nn.ReLU(),
            nn.Conv2d(inside, inside, 3, stride, 1, groups=inside),
            nn.ReLU(),
            nn.Conv2d(inside, out, 1),
        )

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Apply the block."""
        return x + self.layers(x) if self.residual else self.layers(x)


class Landmarks68(Frozen):
    """Landmarks of a face, ``(B, 68, 2)``, in the customary order of 68; card ``landmarks68``.

    A small MobileFaceNet with ReLU that regresses the points of a 64-px grey crop. KNOWN, from the code beside the
    file: grey levels over 256, points as shares of the crop, x before y. OURS: which crop. The network was made for a
    detector's box; here it sees one fixed square of the aligned crop, chosen where its points agree best with those of
    dlib's 68-point predictor, which is not among the cards (mean distance 2.4 px of 256 on 240 LFW faces, 1.9 px on 120
    generated ones; the eyes lie 64 px apart). Frozen, but differentiable with respect to the picture.

    Args:
        path: A local copy of the ONNX file; ``None`` asks the card's sources.

    Raises:
        WeightsError: If the file cannot be found or its hash is not the card's.

    Example:
        >>> network = Landmarks68()
        >>> tuple(network(torch.zeros(2, 3, 128, 128)).shape)
        (2, 68, 2)
    """

    name = "landmarks68"

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.weights = card(self.name).digest
        self.card_hashes = {self.name: self.weights}
        layers: list[nn.Module] = [
            nn.Conv2d(1, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1, groups=32),
            nn.ReLU(),
        ]
        for channels, inside, out, repeats, inside_after in _STAGES:
            layers.append(Bottleneck(channels, inside, out, 2))
            layers.extend(Bottleneck(out, inside_after, out) for _ in range(repeats))
        layers += [
            nn.Conv2d(64, 512, 1),
            nn.ReLU(),
            nn.Conv2d(512, 512, 4, groups=512),  # global depth-wise convolution: 4x4 → 1x1
            nn.Flatten(),
            nn.Linear(512, 136),
        ]
        self.layers = nn.Sequential(*layers)
        left, top, side = _BOX
        shares = (template("ffhq", WORKING_SIZE) + 0.5) / WORKING_SIZE
        self.crop = FixedCrop((shares - np.array([left, top])) / side * INPUT - 0.5, INPUT)
        self.register_buffer("grey", torch.tensor(GREY).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("corner", torch.tensor([left, top]), persistent=False)
        self.side = side
        _read_onnx(self.layers, locate(self.name, path))
        self.layers.to(memory_format=torch.channels_last)  # as the recogniser: faster on a CPU
        self.freeze()

    def locate_in_crop(self, crop: Float[Tensor, "batch 1 64 64"]) -> Float[Tensor, "batch 68 2"]:
        """Points of the network's own crops, grey in [0, 1), as shares of that crop."""
        return self.layers(crop.contiguous(memory_format=torch.channels_last)).unflatten(1, (68, 2))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 68 2"]:
        """Points (x, y) of FFHQ-style crops of any size, RGB in [-1, 1].

        A point is a share of the crop's side: 0 is its left or upper border, 1 its right or lower one, so that a loss
        does not depend on the size. In pixels as OpenCV counts them it is ``share * side - 0.5``.
        """
        grey = ((self.crop(images) + 1) * self.grey).sum(1, keepdim=True) * (255 / 256 / 2)
        return self.corner + self.side * self.locate_in_crop(grey)


@torch.no_grad()
def _read_onnx(layers: nn.Sequential, path: Path) -> None:
    """Fill the layers in the order of the graph's nodes; fold the last normalisation into the linear layer."""
    graph = onnx.load(str(path)).graph
    values = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    modules = [module for module in layers.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(nodes) == len(modules), (len(nodes), len(modules))
    for node, module in zip(nodes, modules, strict=True):
        module.weight.copy_(values[node.input[1]])
        module.bias.copy_(values[node.input[2]])
    (norm,) = (node for node in graph.node if node.op_type == "BatchNormalization")
    scale, shift, mean, variance = (values[name] for name in norm.input[1:])
    factor = scale / torch.sqrt(variance + norm.attribute[0].f)
    modules[-1].weight.mul_(factor[:, None])
    modules[-1].bias.sub_(mean).mul_(factor).add_(shift)

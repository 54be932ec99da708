"""faceres: identity features, apparent gender and age of a face, read out of its TensorFlow.js files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.frozen import Frozen
from lightning_modules.weights import card, locate

# A tensor's bytes are stored as this and widened when read; the others (uint8, uint16) need a scale, too.
_STORED = {"float16": np.float16, None: np.float32}
_MEAN_BGR = (103.939, 116.779, 123.68)  # of VGGFace2's training, as the network's authors subtract it


class Attributes(NamedTuple):
    """What the network says about a face.

    Attributes:
        male: Probability of an apparently male face, in [0, 1].
        age: Expected apparent age in years.
    """

    male: Float[Tensor, " batch"]
    age: Float[Tensor, " batch"]


def read_tfjs(graph: Path, binary: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Nodes and weights of a TensorFlow.js graph model; weights of whole numbers are left out.

    Raises:
        ValueError: If a tensor is stored in another way, or the two files do not belong together.
    """
    model, data, at = json.loads(graph.read_text()), binary.read_bytes(), 0
    weights: dict[str, np.ndarray] = {}
    for entry in (entry for group in model["weightsManifest"] for entry in group["weights"]):
        stored = entry.get("quantization", {}).get("dtype")
        if stored not in _STORED:
            raise ValueError(f"expected tensors stored as float16 or float32 in {graph.name}, got {stored!r}")
        kind = np.dtype(np.int32 if entry["dtype"] == "int32" else _STORED[stored])
        values = np.frombuffer(data, kind, count=int(np.prod(entry["shape"])), offset=at)
        at += values.nbytes
        if entry["dtype"] == "float32":
            weights[entry["name"]] = values.astype(np.float32).reshape(entry["shape"])
    if at != len(data):
        raise ValueError(f"{binary.name} has {len(data)} bytes, but {graph.name} describes {at}")
    return model["modelTopology"]["node"], weights


class SameConv(nn.Conv2d):
    """Convolution padded as TensorFlow's ``SAME`` pads even pictures: where it strides, more after the end."""

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Pad, then convolve."""
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x, (before, after, before, after)) if total else x)


class FaceResNet(Frozen):
    """MobileNet (Howard et al., 2017) trained on VGGFace2; cards ``faceres`` and ``faceres-graph``.

    The embedding is the 1024 pooled features, not of unit length; heads for apparent gender and age sit on
    256 more (Savchenko, 2019). Batch normalisation is folded as in the file.

    Args:
        path: A local copy of the weights (``.bin``); ``None`` asks the card's sources.
        graph: A local copy of the graph (``.json``).

    Raises:
        WeightsError: If a file cannot be found or its hash is not the card's.
    """

    def __init__(self, path: str | Path | None = None, graph: str | Path | None = None) -> None:
        super().__init__()
        self.card_hashes = {name: card(name).digest for name in ("faceres", "faceres-graph")}
        nodes, weights = read_tfjs(locate("faceres-graph", graph), locate("faceres", path))
        layers: list[nn.Module] = []
        for node in nodes:  # the graph is one chain: convolution, fold, clip to [0, 6], and again
            if node["op"] in ("Conv2D", "DepthwiseConv2dNative"):
                layers += [_convolution(node, weights), nn.ReLU6()]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.features, self.gender, self.age = (_linear(name, weights) for name in ("feats", "gender_pred", "age_pred"))
        self.freeze()

    def forward(self, images: Float[Tensor, "batch 3 224 224"]) -> Float[Tensor, "batch 1024"]:
        """Pooled features of faces, RGB in [-1, 1]."""
        bgr = (images.flip(1) + 1) * 127.5 - images.new_tensor(_MEAN_BGR).view(3, 1, 1)
        return self.layers(bgr.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def attributes(self, pooled: Float[Tensor, "batch 1024"]) -> Attributes:
        """Apparent gender and age, from the pooled features."""
        features = F.relu(self.features(pooled))
        years = torch.arange(1, 101, dtype=pooled.dtype, device=pooled.device)
        return Attributes(
            male=self.gender(features).sigmoid().squeeze(1),
            age=(self.age(features).softmax(1) * years).sum(1),
        )


@torch.no_grad()
def _convolution(node: dict, weights: dict[str, np.ndarray]) -> nn.Conv2d:
    """Torch layer of one node; TensorFlow's kernels are (height, width, in, out or multiplier)."""
    kernel, stride = weights[node["input"][1]], int(node["attr"]["strides"]["list"]["i"][1])
    depthwise = node["op"] == "DepthwiseConv2dNative"
    fold = node["input"][1].removesuffix("/depthwise_kernel") + "_bn" if depthwise else node["name"].split("/")[0]
    height, channels, out = (
        kernel.shape[0],
        kernel.shape[2],
        kernel.shape[2] if depthwise else kernel.shape[3],
    )
    weight = kernel.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
    if depthwise:  # its normalisation is folded into a separate factor, a convolution's into its kernel
        weight = weight * weights[f"{fold}/batchnorm_1/mul"].reshape(-1, 1, 1, 1)
    layer = (SameConv if height == 3 else nn.Conv2d)(channels, out, height, stride, groups=channels if depthwise else 1)
    layer.weight.copy_(torch.tensor(weight))
    layer.bias.copy_(torch.tensor(weights[f"{fold}/batchnorm_1/sub"]))
    return layer


@torch.no_grad()
def _linear(name: str, weights: dict[str, np.ndarray]) -> nn.Linear:
    """Torch layer of one dense head."""
    kernel = weights[f"{name}/kernel"]
    layer = nn.Linear(*kernel.shape)
    layer.weight.copy_(torch.tensor(kernel.T))
    layer.bias.copy_(torch.tensor(weights[f"{name}/bias"]))
    return layer

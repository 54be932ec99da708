"""Perceptual distances by networks: pictures in [-1, 1] and their originals → one distance a picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import onnx
import torch
from jaxtyping import Float
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_modules.weights import WeightsError, find

Images = Float[Tensor, "batch 3 height width"]  # in [-1, 1]

LPIPS_CARD, PIEAPP_CARD, SQUEEZENET_CARD = "lpips-alex-backbone", "pieapp", "squeezenet-caffe"

SMALLEST = 64
"""Pixels that these networks need or were trained on; smaller pictures are enlarged to it."""


def _on_disk(name: str) -> Path:
    file = find(name)  # never downloads: a table should not wait for hundreds of megabytes
    if file is None:
        raise WeightsError(f"weights missing: {name}; `keyveil weights fetch {name}` brings them")
    return file


def _lpips(net: str) -> nn.Module:
    """The package's heads over a network without its weights."""
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # the package draws random weights first
        warnings.filterwarnings("ignore", module="torchvision")  # of how it asks for them
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


@lru_cache(maxsize=1)
def lpips_network() -> nn.Module:
    """LPIPS (Zhang et al., 2018), version 0.1, AlexNet; takes pictures in [-1, 1].

    Raises:
        WeightsError: If the AlexNet weights are missing; other weights would not be LPIPS.
    """
    file = _on_disk(LPIPS_CARD)
    network = _lpips("alex")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    layers = {"slice1.0": 0, "slice2.3": 3, "slice3.6": 6, "slice4.8": 8, "slice5.10": 10}
    network.net.load_state_dict(
        {
            f"{ours}.{part}": weights[f"features.{theirs}.{part}"]
            for ours, theirs in layers.items()
            for part in ("weight", "bias")
        }
    )
    return network.eval().requires_grad_(False)


class _Caffe(nn.Module):
    """Pictures as Caffe's networks want them: BGR grey levels minus ImageNet's mean colour."""

    def forward(self, images: Images) -> Images:
        return ((images + 1) * 127.5).flip(1) - images.new_tensor((104.0, 117.0, 123.0)).view(3, 1, 1)


@lru_cache(maxsize=1)
def squeeze_network() -> nn.Module:
    """LPIPS's heads for SqueezeNet over another SqueezeNet v1.1, Caffe's (ours); takes pictures in [-1, 1].

    Torchvision's, over which the heads were fitted, is a download; this one has the same shapes, so that it gives a
    distance like LPIPS, and is not LPIPS: compare it only with itself.

    Raises:
        WeightsError: If its weights are missing.
    """
    graph = onnx.load(str(_on_disk(SQUEEZENET_CARD))).graph
    network = _lpips("squeeze")
    values = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)).float() for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "Conv"][:-1]  # but for the classifier
    modules = [module for module in network.net.modules() if isinstance(module, nn.Conv2d)]
    for node, module in zip(nodes, modules, strict=True):
        module.load_state_dict({"weight": values[node.input[1]], "bias": values[node.input[2]]})
    for module in network.net.modules():
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = False  # as in the file
    network.scaling_layer = _Caffe()
    return network.eval().requires_grad_(False)


class PieAPP(nn.Module):
    """PieAPP (Prashnani et al., 2018), version 0.1, by piq with its patches 27 pixels apart; card ``pieapp``.

    Raises:
        WeightsError: If the weights are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        file = _on_disk(PIEAPP_CARD)
        from piq.pieapp import PieAPP as Metric
        from piq.pieapp import PieAPPModel

        weights = torch.load(file, map_location="cpu", weights_only=True)
        weights["ref_score_subtract.weight"] = weights["ref_score_subtract.weight"].reshape(1, 1)
        self.metric = Metric.__new__(Metric)  # whose constructor downloads
        nn.Module.__init__(self.metric)
        self.metric.model = PieAPPModel()
        self.metric.model.load_state_dict(weights)
        self.metric.data_range, self.metric.reduction = 1.0, "none"
        self.metric.stride, self.metric.enable_grad = 27, False
        self.eval().requires_grad_(False)

    def forward(self, images: Images, originals: Images) -> Float[Tensor, " batch"]:
        """Distance of each picture, of any size from 64 pixels."""
        return self.metric(*(((x + 1) / 2).clamp(0, 1) for x in (images, originals)))


@lru_cache(maxsize=1)
def pieapp_network() -> nn.Module:
    """:class:`PieAPP`, once."""
    return PieAPP()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lpips": lpips_network,
    "pieapp": pieapp_network,
    "lpips_squeeze_caffe": squeeze_network,
}
"""Name of a figure → what makes its network."""

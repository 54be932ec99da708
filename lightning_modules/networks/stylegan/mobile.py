"""MobileStyleGAN (FFHQ, 1024 px) as a native module: a W+ code in, a face out, differentiable throughout.

Source: Belousov, "MobileStyleGAN: A Lightweight Convolutional Neural Network for High-Fidelity Image Synthesis",
arXiv 2104.04767; the weights are those of the published inference graph. The arithmetic below is the graph's, laid out
for speed (ours): channels last; the style of a separable convolution scales the columns of its point-wise matrix, since
a depth-wise convolution commutes with it; the sub-bands of each inverse wavelet lie in contiguous channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.frozen import Frozen
from lightning_modules.networks.stylegan.ir import Constant, read_constants
from lightning_modules.networks.stylegan.preview import PreviewHead
from lightning_modules.weights import card, locate

SLOPE = 0.2
BATCHED_BLOCKS = 3  # from 64 px on one face at a time: a batch would fall out of every cache
PREVIEW_BLOCKS = 5  # the blocks up to 128 px; the preview head stands in for the two that follow


class Mapping(nn.Module):
    """z → w: pixel norm and eight linear layers, ``(B, 512) → (B, 512)`` (StyleGAN2, Karras et al., 2020)."""

    def __init__(self, constants: list[Constant]) -> None:
        super().__init__()
        weights = [c.value for c in constants if c.value.shape == (512, 512)]
        biases = [c.value for c in constants if c.value.shape == (512,)]
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in weights)
        for layer, weight, bias in zip(self.layers, weights, biases, strict=True):
            layer.weight.data, layer.bias.data = weight, bias

    def forward(self, z: Float[Tensor, "batch 512"]) -> Float[Tensor, "batch 512"]:
        """Map normal noise to style codes."""
        x = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE) * 2**0.5
        return x


def _bands_first(channels: int) -> Tensor:
    """Order of channels that puts the four wavelet sub-bands into four contiguous chunks.

    The graph keeps LL in the first quarter and interleaves the three details (LH, HL, HH) in the rest.
    """
    quarter = channels // 4
    details = torch.arange(quarter, channels).view(quarter, 3).T.reshape(-1)
    return torch.cat([torch.arange(quarter), details])


def inverse_haar(bands: Float[Tensor, "batch h w channels"]) -> Float[Tensor, "batch h2 w2 quarter"]:
    """Inverse 2-D Haar transform, channels last: four chunks LL, LH, HL, HH → twice the height and width."""
    ll, lh, hl, hh = bands.chunk(4, dim=-1)
    top, bottom, left, right = ll + lh, ll - lh, hl + hh, hl - hh
    rows = [torch.stack([top + left, top - left], 3), torch.stack([bottom + right, bottom - right], 3)]
    b, h, w, c = ll.shape
    return torch.stack(rows, 2).mul_(0.5).view(b, 2 * h, 2 * w, c)


class Style(nn.Module):
    """Affine map of one W+ row to per-channel scales, the graph's constant factor folded in."""

    def __init__(self, weight: Tensor, bias: Tensor, factor: float) -> None:
        super().__init__()
        self.affine = nn.Linear(512, weight.shape[0])
        self.affine.weight.data, self.affine.bias.data = weight * factor, bias.reshape(-1) * factor

    def forward(self, w: Float[Tensor, "batch 512"]) -> Float[Tensor, "batch channels"]:
        """Scales of the channels."""
        return self.affine(w)


class Separable(nn.Module):
    """Depth-wise 3×3, styled point-wise, noise, bias, leaky ReLU; ``(B, H, W, C) → (B, H, W, O)``."""

    def __init__(self, style: Style, depthwise: Tensor, pointwise: Tensor, noise: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.style = style
        self.depthwise = nn.Parameter(depthwise.reshape(-1, 1, 3, 3))
        self.pointwise = nn.Parameter(pointwise.flatten(1).T.contiguous())  # (C, O)
        self.noise = nn.Parameter(noise.reshape(1, -1, 1))
        self.bias = nn.Parameter(bias.reshape(1, 1, -1))

    def forward(self, x: Tensor, w: Float[Tensor, "batch 512"]) -> Tensor:
        """Filter ``x`` under the style of ``w``."""
        batch, height, width, channels = x.shape
        x = F.conv2d(x.permute(0, 3, 1, 2), self.depthwise, padding=1, groups=channels).permute(0, 2, 3, 1)
        matrix = self.style(w)[:, :, None] * self.pointwise
        x = torch.baddbmm(self.bias, x.reshape(batch, height * width, channels), matrix)
        return F.leaky_relu_(x.add_(self.noise), SLOPE).view(batch, height, width, -1)


class Block(nn.Module):
    """Style, inverse wavelet to twice the size, two separable convolutions; three W+ rows."""

    def __init__(self, up: Style, conv1: Separable, conv2: Separable) -> None:
        super().__init__()
        self.up, self.conv1, self.conv2 = up, conv1, conv2

    def forward(self, x: Tensor, w: Float[Tensor, "batch 3 512"]) -> Tensor:
        """Double the size of ``x``."""
        x = inverse_haar(x * self.up(w[:, 0])[:, None, None])
        return self.conv2(self.conv1(x, w[:, 1]), w[:, 2])


class MobileStyleGAN(Frozen):
    """The frozen generator: W+ code ``(B, 23, 512)`` → RGB face in about [-1, 1].

    W+ rows: 0 the first convolution; then (up, conv, conv) for each of seven blocks; 22 the last to-RGB.

    Args:
        synthesis: Local copy of ``SynthesisNetwork.bin``; by default found by its weight card.
        mapping: Local copy of ``MappingNetwork.bin``; by default found by its weight card.
        preview_head: Another preview head (safetensors) than our trained one.
        half_previews: Compute previews in bfloat16: 1.6 times faster to train on where the processor has it.

    Raises:
        WeightsError: If a file is missing or is not the one its card names.

    Example:
        >>> generator = MobileStyleGAN()
        >>> w = generator.sample_w(torch.randn(1, 512), truncation=0.7)
        >>> tuple(generator(w, size=256, preview=True).shape)
        (1, 3, 256, 256)
    """

    num_layers = 23
    native_size = 1024

    def __init__(
        self,
        synthesis: Path | None = None,
        mapping: Path | None = None,
        preview_head: Path | None = None,
        half_previews: bool = False,
    ) -> None:
        super().__init__()
        self.half_previews = half_previews
        # The preview head is not among them: a better one does not make trained weights unfit.
        names = ["mobilestylegan-mapping", "mobilestylegan-synthesis"]
        self.card_hashes = {name: card(name).digest for name in names}
        graph = locate("mobilestylegan-mapping-graph")
        self.mapping = Mapping(read_constants(graph, locate(names[0], mapping)))
        constants = read_constants(locate("mobilestylegan-synthesis-graph"), locate(names[1], synthesis))
        self._build([c for c in constants if c.value.numel() > 1 or c.value.ndim == 4])
        self.preview_head = PreviewHead.load(preview_head or locate("preview-head"))
        with torch.no_grad():
            z = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
            self.register_buffer("mean_w", self.mapping(z).mean(0))
        self.freeze()

    def _build(self, constants: list[Constant]) -> None:
        position = {c.name: i for i, c in enumerate(constants)}

        def value(name: str) -> Tensor:
            return constants[position[name]].value

        def style(name: str, order: Tensor | None = None) -> Style:
            weight, bias = value(f"m.{name}.modulation.weight"), value(f"m.{name}.modulation.bias").flatten()
            after = constants[position[f"m.{name}.modulation.bias"] + 1].value  # the graph's 1/sqrt(fan-in), if any
            factor = float(after) if after.numel() == 1 else 1.0
            return Style(weight, bias, factor) if order is None else Style(weight[order], bias[order], factor)

        def separable(name: str, order: Tensor | None = None) -> Separable:
            at = position[f"m.{name}.conv.weight_dw"]
            depthwise, pointwise, noise = (constants[at + i].value for i in range(3))
            bias = value(f"m.{name}.bias").flatten()
            if order is not None:
                pointwise, bias = pointwise[order], bias[order]
            return Separable(style(f"{name}.conv"), depthwise, pointwise, noise, bias)

        at = position["m.input.input"]
        order = _bands_first(512)
        self.start_style = style("conv1.conv")
        self.start = nn.Parameter(constants[at].value)
        self.start_weight = nn.Parameter(constants[at + 1].value[order])
        self.start_noise = nn.Parameter(constants[at + 2].value)
        self.start_bias = nn.Parameter(value("m.conv1.bias")[:, order])
        blocks = []
        for i in range(7):
            up = style(f"layers.{i}.up", order)
            width = value(f"m.layers.{i}.conv2.bias").numel()
            order = _bands_first(width) if i < 6 else None
            blocks.append(Block(up, separable(f"layers.{i}.conv1"), separable(f"layers.{i}.conv2", order)))
        self.blocks = nn.ModuleList(blocks)
        self.rgb_style = style("layers.6.to_img.conv")
        rgb_order = _bands_first(12)
        self.rgb_weight = nn.Parameter(value("m.layers.6.to_img.conv.weight").flatten(1)[rgb_order].T.contiguous())
        self.rgb_bias = nn.Parameter(value("m.layers.6.to_img.bias").flatten()[rgb_order].view(1, 1, -1))

    def sample_w(self, z: Float[Tensor, "batch 512"], truncation: float = 0.7) -> Float[Tensor, "batch 23 512"]:
        """Codes of random faces: ``w̄ + truncation · (mapping(z) − w̄)``, the same row for every layer."""
        w = self.mean_w + truncation * (self.mapping(z) - self.mean_w)
        return w[:, None].expand(-1, self.num_layers, -1)

    def features(self, w: Float[Tensor, "batch 23 512"]) -> Float[Tensor, "batch 128 128 256"]:
        """The 128-px features (channels last, sub-bands contiguous) that both the late blocks and the preview read."""
        x = self._begin(w)
        return torch.cat([self._grow(x[i : i + 1], w[i : i + 1]) for i in range(len(x))])

    def _begin(self, w: Tensor) -> Tensor:
        """The 32-px features, all faces at once."""
        styled = self.start * self.start_style(w[:, 0])[:, :, None, None]
        x = F.conv2d(styled, self.start_weight, padding=1) + self.start_noise + self.start_bias
        x = F.leaky_relu(x, SLOPE).permute(0, 2, 3, 1).contiguous()
        for i, block in enumerate(self.blocks[:BATCHED_BLOCKS]):
            x = block(x, w[:, 3 * i + 1 : 3 * i + 4])
        return x

    def _grow(self, x: Tensor, w: Tensor) -> Tensor:
        """From 32-px to 128-px features."""
        for i, block in enumerate(self.blocks[BATCHED_BLOCKS:PREVIEW_BLOCKS], BATCHED_BLOCKS):
            x = block(x, w[:, 3 * i + 1 : 3 * i + 4])
        return x

    def finish(
        self, x: Float[Tensor, "batch 128 128 256"], w: Float[Tensor, "batch 23 512"]
    ) -> Float[Tensor, "batch 3 1024 1024"]:
        """The 1024-px picture of 128-px features."""
        for i, block in enumerate(self.blocks[PREVIEW_BLOCKS:], PREVIEW_BLOCKS):
            x = block(x, w[:, 3 * i + 1 : 3 * i + 4])
        batch, height, width, _ = x.shape
        matrix = self.rgb_style(w[:, 22])[:, :, None] * self.rgb_weight
        bands = torch.baddbmm(self.rgb_bias, x.view(batch, height * width, -1), matrix)
        return inverse_haar(bands.view(batch, height, width, 12)).permute(0, 3, 1, 2).contiguous()

    def forward(
        self, w: Float[Tensor, "batch rows 512"], size: int = 1024, preview: bool = False
    ) -> Float[Tensor, "batch 3 size size"]:
        """Render codes.

        Args:
            w: One style row for each layer, ``(B, 23, 512)``.
            size: Pixels of the picture, a divisor of 1024 (of 256 for previews); smaller ones are area averages.
            preview: Render by the preview head: about ten times cheaper, at most 256 px, for training and sketches.

        Raises:
            ValueError: If ``w`` has the wrong shape or ``size`` does not divide the native size.
        """
        if w.ndim != 3 or w.shape[1:] != (self.num_layers, 512):
            raise ValueError(f"expected W+ codes (B, {self.num_layers}, 512), got {tuple(w.shape)}")
        native = 256 if preview else self.native_size
        if size < 1 or native % size:
            raise ValueError(f"a size must divide {native}, got {size}")
        finish = self.preview_head if preview else self.finish
        with torch.autocast(w.device.type, torch.bfloat16) if preview and self.half_previews else nullcontext():
            faces = ((x[None], row[None]) for x, row in zip(self._begin(w), w, strict=True))
            image = torch.cat([finish(self._grow(x, row), row) for x, row in faces]).float()
        return image if size == native else F.avg_pool2d(image, native // size)

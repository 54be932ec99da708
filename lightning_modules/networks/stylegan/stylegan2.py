r"""StyleGAN2 as a native module behind the generators' one interface: a W+ code in, a face out.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020 (arXiv 1912.04958),
skip architecture. Weights are the user's own, converted once by ``keyveil weights convert`` into the layout
read here: one safetensors file with every constant gain (1/√fan-in, the mapping's learning rate, the strength
of the noise) already multiplied in, so that nothing below depends on who trained it. All differentiable.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.frozen import Frozen

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0])
FILTER = torch.outer(FILTER, FILTER) / 16  # sums to 4: three of four samples are inserted zeros


def _filter(x: Tensor) -> Tensor:
    return FILTER.to(x).expand(x.shape[1], 1, 4, 4)


def upsample(image: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h2 w2"]:
    """Twice the size: zeros between the samples, then the [1, 3, 3, 1] filter, zero beyond the border."""
    return F.conv_transpose2d(image, _filter(image), stride=2, padding=1, groups=image.shape[1])


def modulated_conv(
    x: Float[Tensor, "batch c h w"],
    weight: Float[Tensor, "o c k k"],
    style: Float[Tensor, "batch c"],
    *,
    demodulate: bool = True,
    up: bool = False,
) -> Float[Tensor, "batch o h2 w2"]:
    r"""Convolve each sample with its own styled weights, :math:`w'_{oik} = s_i w_{oik}` (equations 1, 3).

    The style scales the input and the demodulation :math:`1 / \sqrt{\sum_{ik} w'^2_{oik} + 10^{-8}}` the
    output, which is the same thing as scaling the weights, and one convolution serves the whole batch.

    Args:
        x: Features.
        weight: Shared weights.
        style: Scale of each input channel.
        demodulate: Bring every output channel back to unit variance; the to-RGB layers do not.
        up: Double the size by a transposed convolution, followed by the [1, 3, 3, 1] filter.
    """
    x = x * style[:, :, None, None]
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = F.conv2d(x, _filter(x), padding=1, groups=x.shape[1])
    else:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    if demodulate:
        energy = style.square() @ weight.square().sum((2, 3)).T
        x = x * torch.rsqrt(energy + 1e-8)[:, :, None, None]
    return x


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 that keeps the variance."""
    return F.leaky_relu(x, 0.2) * 2**0.5


def mapping(layers: list[tuple[Tensor, Tensor]], z: Float[Tensor, "batch z"]) -> Float[Tensor, "batch w"]:
    """Map normal noise to style codes: pixel norm, then linear layers ``(weight, bias)``."""
    x = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
    for weight, bias in layers:
        x = activate(F.linear(x, weight, bias))
    return x


class Layer(nn.Module):
    """A convolution with its style: ``conv0`` (doubling), ``conv1`` or ``torgb`` of one block.

    Args:
        state: The file's tensors.
        name: Prefix of the layer within the file, such as ``b8.conv0``.
    """

    def __init__(self, state: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.up, self.to_rgb = name.endswith("conv0"), name.endswith("torgb")
        for part in ("weight", "bias", "style.weight", "style.bias"):
            self.register_parameter(part.replace(".", "_"), nn.Parameter(state[f"{name}.{part}"].float()))
        noise = state.get(f"{name}.noise")
        self.register_buffer("noise", None if noise is None else noise.float())

    def forward(self, x: Float[Tensor, "batch c h w"], w: Float[Tensor, "batch w_dim"]) -> Tensor:
        """Filter ``x`` under the style of ``w``; RGB if this is a to-RGB layer."""
        style = F.linear(w, self.style_weight, self.style_bias)
        x = modulated_conv(x, self.weight, style, demodulate=not self.to_rgb, up=self.up)
        bias = self.bias[:, None, None]
        if self.to_rgb:
            return x + bias
        return activate(x + bias if self.noise is None else x + self.noise + bias)


class StyleGAN2(Frozen):
    """A frozen StyleGAN2 of the user's: W+ code ``(B, L, 512)`` → RGB face in about [-1, 1].

    Size, widths and depth are read from the file. W+ rows: 0 the first convolution; then the two
    convolutions of each block; a to-RGB layer shares its row with the next block's first convolution, and
    the last has the last row, so that L = 2 log₂(size) - 2, 18 at 1024 px. The constant noise of the file is
    used where it has one and none where it has
    not: the same code always gives the same picture. The clamp at ±256 with which some releases guard their
        half
    precision is not applied.

    Args:
        path: A safetensors file made by ``keyveil weights convert``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a converted StyleGAN2.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        state = _read(Path(path))
        self.card_hashes = {"stylegan2": f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"}
        depth = sum(name.startswith("mapping.") for name in state) // 2
        self.mapping_weights = nn.ParameterList(state[f"mapping.{i}.weight"].float() for i in range(depth))
        self.mapping_biases = nn.ParameterList(state[f"mapping.{i}.bias"].float() for i in range(depth))
        self.const = nn.Parameter(state["const"].float())
        self.register_buffer("mean_w", state["mean_w"].float())
        self.sizes = sorted(int(name[1:].split(".")[0]) for name in state if name.endswith("torgb.weight"))
        self.native_size, self.num_layers = self.sizes[-1], 2 * len(self.sizes)
        self.blocks = nn.ModuleDict(
            {
                f"b{size}": nn.ModuleDict(
                    {name: Layer(state, f"b{size}.{name}") for name in _layers(size)},
                )
                for size in self.sizes
            }
        )
        self.freeze()

    def mapping(self, z: Float[Tensor, "batch z_dim"]) -> Float[Tensor, "batch w_dim"]:
        """Map normal noise to style codes, ``(B, 512) → (B, 512)``."""
        return mapping(list(zip(self.mapping_weights, self.mapping_biases, strict=True)), z)

    def sample_w(self, z: Float[Tensor, "batch z_dim"], truncation: float = 0.7) -> Float[Tensor, "batch L w_dim"]:
        """Codes of random faces: ``w̄ + truncation · (mapping(z) − w̄)``, the same row for every layer."""
        w = self.mean_w + truncation * (self.mapping(z) - self.mean_w)
        return w[:, None].expand(-1, self.num_layers, -1)

    def forward(
        self, w: Float[Tensor, "batch L w_dim"], size: int | None = None, preview: bool = False
    ) -> Float[Tensor, "batch 3 size size"]:
        """Render codes.

        Args:
            w: One style row for each layer.
            size: Pixels of the picture, a divisor of the native size; smaller ones are area averages.
                ``None`` is the native size.
            preview: Stop after the block of ``size`` pixels. The skip architecture has a picture there, much
                cheaper, but without what the later blocks would have added, and no gradient reaches their
                rows.

        Raises:
            ValueError: If ``w`` has the wrong shape or there is no picture of that size.
        """
        if w.ndim != 3 or w.shape[1:] != (self.num_layers, len(self.mean_w)):
            expected = f"(B, {self.num_layers}, {len(self.mean_w)})"
            raise ValueError(f"expected W+ codes {expected}, got {tuple(w.shape)}")
        size = self.native_size if size is None else size
        if size < 1 or self.native_size % size or (preview and size not in self.sizes):
            raise ValueError(f"a size must divide {self.native_size} (previews: from 4 px), got {size}")
        last = size if preview else self.native_size
        x = self.const.expand(len(w), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        image = None
        row = 0
        for resolution in self.sizes[: self.sizes.index(last) + 1]:
            block = self.blocks[f"b{resolution}"]
            for name in _layers(resolution)[:-1]:
                x = block[name](x, w[:, row])
                row += 1
            rgb = block["torgb"](x, w[:, row])
            image = rgb if image is None else upsample(image) + rgb
        return image if size == last else F.avg_pool2d(image, last // size)


def _layers(size: int) -> tuple[str, ...]:
    return ("conv1", "torgb") if size == 4 else ("conv0", "conv1", "torgb")


def _read(path: Path) -> dict[str, Tensor]:
    hint = f"{path} is not a converted StyleGAN2: make one with `keyveil weights convert SOURCE --out FILE`"
    if not path.is_file():
        raise FileNotFoundError(f"there is no generator file {path}")
    try:
        state = load_file(path)
    except SafetensorError:
        raise ValueError(hint) from None
    if not {"mean_w", "const", "mapping.0.weight", "b4.conv1.weight", "b4.torgb.weight"} <= state.keys():
        raise ValueError(hint)
    return state

"""ArcFace's IR-SE50, the identity network of iFADIT and its kin, read from a user's own file."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.alignment import ARCFACE_TEMPLATE
from lightning_modules.networks.crop import FixedCrop
from lightning_modules.networks.frozen import Frozen
from lightning_modules.trained import read_state
from lightning_modules.weights.loader import sha256

# (channels, units) of each stage; the first unit of a stage halves the side: 112 → 56 → 28 → 14 → 7 px.
STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))
REDUCTION = 16  # of the squeeze-excitation

# Parameters and submodules below are named and numbered as in the public file, so that it loads entry by entry.


class SqueezeExcitation(nn.Module):
    r"""Scale each channel by what the whole picture says: :math:`x \odot \sigma(W_2 \, \mathrm{ReLU}(W_1 \bar x))`.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.

    Args:
        channels: Channels of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // REDUCTION, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        """Scale channels."""
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Unit(nn.Module):
    """Improved residual unit of ArcFace: BN, 3×3, PReLU, 3×3 with the stride, BN, squeeze-excitation.

    Args:
        channels: Channels in.
        out: Channels out; where they differ, the shortcut is a 1×1 convolution with BN.
        stride: 1, or 2 to halve the side.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, 1, 1, bias=False),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            SqueezeExcitation(out),
        )
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)  # picks every second pixel
            if channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """Apply the unit."""
        return self.res_layer(x) + self.shortcut_layer(x)


class IRSE50(Frozen):
    r"""Identity code :math:`z = E_{id}(x)` of a face, ``(B, 512)``, unit length, from a file of the user's.

    ArcFace (Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019) with the
    50-layer improved-residual backbone and squeeze-excitation, in the layout that pSp, e4e and iFADIT load as
    ``model_ir_se50.pth``: ``input_layer``, ``body`` of 24 units, ``output_layer``. Frozen, but differentiable
    with respect to the picture.

    KNOWN: the network, and that pSp and its kin give it RGB in [-1, 1], although the public script that trained it
    appears to have exchanged red and blue (which recognises better is not measured here). OURS: the crop, which lays
    the five points on ArcFace's 112-px template; pSp cuts the rectangle 35…223 × 32…220 out of a 256-px face.

    Args:
        path: The state dict, as ``.pth`` or ``.safetensors``; nothing in the file is executed. The counters
            ``num_batches_tracked`` may be absent, nothing else.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds more than tensors, or has another layout.

    Example:
        >>> recognizer = IRSE50("weights/model_ir_se50.pth")  # doctest: +SKIP
        >>> tuple(recognizer(torch.zeros(2, 3, 256, 256)).shape)  # doctest: +SKIP
        (2, 512)
    """

    name = "ir-se50"
    dim = 512

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no recogniser file {path}: give the path of your model_ir_se50.pth")
        state = read_state(path)
        self.card_hashes = {self.name: f"sha256:{sha256(path)}"}
        units, channels = [], STAGES[0][0]
        for out, count in STAGES:
            for i in range(count):
                units.append(Unit(channels, out, 1 if i else 2))
                channels = out
        stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        head = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(), nn.Flatten(), nn.Linear(512 * 7 * 7, self.dim), nn.BatchNorm1d(self.dim)
        )
        self.layers = nn.Sequential(OrderedDict(input_layer=stem, body=nn.Sequential(*units), output_layer=head))
        _fill(self.layers, state, path)
        self.crop = FixedCrop(ARCFACE_TEMPLATE, 112)
        self.freeze()

    def stages(self) -> list[nn.Sequential]:
        """Three parts of the network by resolution, from the picture on.

        Of a picture of side S they give 128 channels at S/4, 256 at S/8 and 512 at S/16: the levels from which pSp
        builds its feature pyramid.
        """
        stem, body = self.layers.input_layer, self.layers.body
        first, second = sum(count for _, count in STAGES[:2]), sum(count for _, count in STAGES[:3])
        return [nn.Sequential(*stem, *body[:first]), body[first:second], body[second:]]

    def pyramid(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, list[Tensor]]:
        """Codes as :meth:`forward` gives them, and the features of each stage on the way, ``(B, C, h, w)``."""
        x, features = self.crop(images), []
        for stage in self.stages():
            x = stage(x)
            features.append(x)
        return F.normalize(self.layers.output_layer(x)), features

    def embed_aligned(self, crop: Float[Tensor, "batch 3 112 112"]) -> Float[Tensor, "batch 512"]:
        """Codes of crops already on the 112-px five-point template, RGB in [-1, 1]."""
        return F.normalize(self.layers(crop))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 512"]:
        """Codes of FFHQ-style crops of any size, RGB in [-1, 1]."""
        return self.embed_aligned(self.crop(images))


def _fill(layers: nn.Sequential, state: dict[str, Tensor], path: Path) -> None:
    """Load every entry, or tell the first that does not fit."""

    def counted(name: str) -> bool:  # steps of a training long over: exports leave them out
        return name.endswith("num_batches_tracked")

    hint = f"{path} is not an ArcFace IR-SE50 in the layout of model_ir_se50.pth"
    wanted = {name: tuple(value.shape) for name, value in layers.state_dict().items() if not counted(name)}
    for name, shape in wanted.items():
        if name not in state:
            raise ValueError(f"{hint}: it lacks {name!r}")
        found = tuple(getattr(state[name], "shape", ()))
        if found != shape:
            raise ValueError(f"{hint}: {name!r} should have the shape {shape}, got {found}")
    if odd := next((name for name in state if name not in wanted and not counted(name)), None):
        raise ValueError(f"{hint}: its entry {odd!r} has no place in it")
    layers.load_state_dict({name: state[name] for name in wanted}, strict=False)

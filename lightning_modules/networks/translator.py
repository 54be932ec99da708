"""The generator of methods that translate pictures under a password: CycleGAN's ResNet, with planes of numbers."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.blocks import covered, oval, painted


class Translator(nn.Module):
    """Picture and numbers → picture; each number is a constant plane beside the picture's colours.

    KNOWN (Zhu et al., 2017, "CycleGAN", after Johnson et al., 2016; Gu et al., 2020): a convolution of 7 × 7, two
    stride-2 ones, nine residual blocks, two upsampling convolutions, one of 7 × 7. OURS: norms stand in the residual
    branches alone, and are each picture's own. Batch norm would let a face depend on its batch; an instance norm behind
    the first convolution takes away what a constant plane adds, and the password with it. What is found is painted
    over the block means of an oval, which stay as the picture around it does, and is nothing before training. Added to
    the picture at hand it became stripes of a few grey levels, by which the recogniser of the loss alone was deceived.

    Under reflection padding a convolution of constant planes adds one number to each channel, so a linear layer of the
    numbers stands for them, at a sixth of the cost.

    Args:
        size: Pixels of a picture, a multiple of 8.
        planes: Numbers beside the picture.
        width: Channels of the first layer; doubled twice.
        blocks: Residual blocks.

    Example:
        >>> Translator(size=32, planes=4, width=8, blocks=1)(torch.zeros(2, 3, 32, 32), torch.ones(2, 4)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, size: int, planes: int, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        self.register_buffer("window", oval(size), persistent=False)
        self.stem = _convolution(3, width, 7)
        self.planes = nn.Linear(planes, width, bias=False)
        self.downs = nn.ModuleList(_convolution(width << at, width << (at + 1), 3, stride=2) for at in range(2))
        self.blocks = nn.ModuleList(_Residual(4 * width) for _ in range(blocks))
        self.ups = nn.ModuleList(_convolution(width << at, width << (at - 1), 3) for at in (2, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # without norms on the way, torch's own default would fade the picture
                nn.init.kaiming_normal_(layer.weight, a=0.1)
                nn.init.zeros_(layer.bias)
        self.out = _convolution(width, 3, 7)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        image: Float[Tensor, "batch 3 size size"],
        numbers: Float[Tensor, "batch planes"],
        blind: bool = False,
    ) -> Float[Tensor, "batch 3 size size"]:
        """What becomes of pictures in [-1, 1]; it stays there.

        Args:
            image: The pictures.
            numbers: A plane each.
            blind: Show the network no more of the oval than is painted over.
        """
        seen = covered(image, self.window) if blind else image
        x = F.leaky_relu(self.stem(seen) + self.planes(numbers)[:, :, None, None], 0.1)
        for down in self.downs:
            x = F.leaky_relu(down(x), 0.1)
        for block in self.blocks:
            x = block(x)
        for up in self.ups:
            x = F.leaky_relu(up(F.interpolate(x, scale_factor=2.0)), 0.1)
        return painted(image, self.out(x), self.window)


def _convolution(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, padding_mode="reflect")


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(channels, channels, 3),
            nn.InstanceNorm2d(channels, affine=True),
            nn.LeakyReLU(0.1),
            _convolution(channels, channels, 3),
            nn.InstanceNorm2d(channels, affine=True),
        )
        nn.init.zeros_(self.body[-1].weight)  # starts as the identity (zero gamma, Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)

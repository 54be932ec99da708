"""Discriminators that several methods share."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flows.precision import full_precision
from lightning_modules.processes import variance


class FaceDiscriminator(nn.Module):
    """Judges whole pictures, with the spread of their batch over all processes, and reads attributes off them.

    Strided convolutions down to 4 × 4, minibatch standard deviation and no norms (Karras et al., 2018 and 2020); its
    gradients are held by :func:`gradient_penalty`. A PatchGAN with spectral norms stayed at chance here: most patches
    of an anonymized picture lie around the face, where it is the original.

    Args:
        size: Pixels of the side, a power of two times 4.
        width: Channels of the first layer; doubled by each layer, up to eightfold.
        attributes: Number of binary attributes that the head predicts; 0 for none.
    """

    def __init__(self, size: int, width: int = 64, attributes: int = 0) -> None:
        super().__init__()
        depth = (size // 4).bit_length() - 1
        widths = [3, *(width << min(stage, 3) for stage in range(depth))]
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2)) for i, o in pairwise(widths))
        )
        self.last = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.score = nn.Linear(16 * widths[-1], 1)
        self.attributes = nn.Linear(widths[-1], attributes) if attributes else None
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                nn.init.zeros_(layer.bias)

    def forward(
        self, image: Float[Tensor, "batch 3 h w"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch attributes"]]:
        """Scores, higher for faces that look real, and logits of attributes."""
        features = F.adaptive_avg_pool2d(self.body(image), 4)
        pooled = features.mean((2, 3))
        spread = (variance(features.float()) + 1e-8).sqrt().mean().to(features).expand(len(image), 1, 4, 4)
        last = F.leaky_relu(self.last(torch.cat([features, spread], 1)), 0.2)
        logits = pooled[:, :0] if self.attributes is None else self.attributes(pooled)
        return self.score(last.flatten(1))[:, 0].float(), logits


LAZY, STEADY = 8, 0.1  # the penalty on a discriminator's gradients: every so many steps, and its weight


def lazy_penalty(discriminator: nn.Module, real: Float[Tensor, "batch 3 h w"], step: int) -> Tensor:
    """What a discriminator's loss adds in a training step: :func:`gradient_penalty`, seldom and then as much heavier.

    Lazy regularization (Karras et al., 2020, section 3.1).
    """
    if step % LAZY:
        return real.new_zeros(())
    return LAZY * STEADY / 2 * gradient_penalty(discriminator, real)


def gradient_penalty(discriminator: nn.Module, real: Float[Tensor, "batch 3 h w"]) -> Tensor:
    """R1: mean squared length of the gradient of the scores of real pictures (Mescheder et al., 2018, equation 9).

    A compiled discriminator runs as it was written here: compiled ones cannot be differentiated twice.
    """
    with full_precision(real.device), torch.compiler.set_stance("force_eager"):
        real = real.detach().float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(discriminator(real)[0].sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()

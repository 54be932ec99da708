"""A3GAN (Zhai et al., "A3GAN: Attribute-Aware Anonymization Networks for Face De-identification", ACM MM 2022).

KNOWN, from its abstract: anonymization as attribute editing, by suppression and injection. Suppressive convolution
units remove what identifies from the features of several scales; a second network (AINet) makes attributes that help to
hide, is told which may change and which may not, and injects them into the code of the face; an anonymization loss lets
what is injected shift away from the original. No key, not reversible.
OURS: every size and weight, and all of this. A suppressive unit is a convolution under gates that it reads off its own
input, and an open gate costs. Injected are some of CelebA's attributes (those that may change drawn from the face's
number, the others read off the face) and a few normal numbers from the same draw, which must be readable off the result
so that faces differ where there are no labels. The anonymization loss is the distance to the original for a frozen
recogniser, asked in changing views. The decoder is SDN's, and paints within its oval over the 8 by 8 block means of
the picture, which stay; those of 16 by 16 are asked to: without them, it paints stripes first. A first stage paints
back what can be guessed of covered faces: from nothing, 560 steps against a discriminator had made noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch, labels
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.keys import KeySpec
from lightning_modules.losses import push_apart, weighted_sum
from lightning_modules.networks.blocks import covered, oval, painted
from lightning_modules.networks.discriminators import FaceDiscriminator, lazy_penalty
from lightning_modules.networks.views import codes_of
from lightning_modules.optimization import TrainingSteps, seed_of
from lightning_modules.sdn.losses import layout
from lightning_modules.sdn.networks import STYLE, Decoder, stages

OPEN = 2.0  # gates before training, as logits: nine tenths pass


@dataclass
class A3GANWeights:
    """Weight of each term of the generator's loss (OURS)."""

    adversarial: float = 1.0
    identity: float = 2.0
    attributes: float = 0.5
    code: float = 0.2
    layout: float = 3.0
    passed: float = 0.1


class A3GAN(TrainingSteps, ReversibleAnonymizer):
    """Suppresses what identifies a face, and injects attributes in its place.

    Args:
        recognizer: Frozen identity network, from which faces are led away.
        size: Pixels of a picture: 64, 128 or 256.
        width: Channels of the first layer.
        discriminator_width: Channels of the discriminator's first layer.
        blocks: Residual blocks of the decoder.
        injected: How many of the data set's attributes, from the first on, are injected; 0 needs no labels.
        kept: How many of these, from the last on, stay those of the face.
        free: Normal numbers that are injected beside them.
        weights: Weight of each loss term.
        learning_rate: Adam's, for every optimizer.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        first: A first stage: ``autoencoder`` paints back what covered faces show; ``None``: all together.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where injected attributes come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If ``size`` is not a multiple of 32 or below 64, more is kept than injected, or nothing is free.
    """

    reversible = False

    def __init__(
        self,
        recognizer: nn.Module,
        size: int = 128,
        width: int = 24,
        discriminator_width: int = 32,
        blocks: int = 3,
        injected: int = 0,
        kept: int = 0,
        free: int = 16,
        weights: A3GANWeights = A3GANWeights(),  # noqa: B008
        learning_rate: float = 2e-4,
        decay: bool = False,
        first: Literal["autoencoder"] | None = None,
        accumulate: int = 1,
        clip: float | None = 10.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        if size < 64 or size % 32:
            raise ValueError(f"A3GAN's picture size must be a multiple of 32, at least 64; got {size}")
        if not 0 <= kept <= injected or free < 1:
            raise ValueError(f"expected 0 <= kept <= injected and free >= 1, got {kept}, {injected} and {free}")
        self.size, self.weights, self.learning_rate, self.first = size, weights, learning_rate, first
        self.injected, self.changing = injected, injected - kept
        self.drawn = KeySpec("normal", self.changing + free)
        self.recognizer = recognizer
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))
        self.register_buffer("window", oval(size), persistent=False)
        self.suppressor = Suppressor(width, stages(size))
        self.injector = nn.Sequential(
            nn.Linear(injected + free, STYLE), nn.LeakyReLU(0.2), nn.Linear(STYLE, STYLE), nn.LeakyReLU(0.2)
        )
        self.decoder = Decoder(width, stages(size), blocks)
        self.discriminator = FaceDiscriminator(size, discriminator_width, injected + free)

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Change each face by what its number draws; attributes that stay are read off it, so no labels are needed."""
        numbers = [
            self.drawn.random(1, torch.Generator().manual_seed(seed_of(self.seed, int(sample))))
            for sample in face.sample
        ]
        # the head alone: scores look at the whole batch
        logits = self.discriminator.attributes(self.discriminator.body(face.image).mean((2, 3)))
        own = torch.where(logits[:, : self.injected] > 0, 1.0, -1.0)
        return self._hide(face.image, face.image, self._injection(torch.cat(numbers).to(own), own))[0]

    def _injection(self, numbers: Tensor, own: Tensor) -> Float[Tensor, "batch length"]:
        """Attributes in {−1, +1}, first those that change by the signs of the first numbers, then the free numbers."""
        asked = torch.where(numbers[:, : self.changing] > 0, 1.0, -1.0)
        return torch.cat([asked, own[:, self.changing :], numbers[:, self.changing :]], 1)

    def _hide(self, image: Image, seen: Image, injection: Tensor) -> tuple[Image, Tensor]:
        """Another face, after what is seen of a picture, over its block means; and the share that gates let pass."""
        code, passed = self.suppressor(seen)
        return painted(image, self.decoder(code, self.injector(injection))[:, :3], self.window), passed

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Discriminator, then suppression and injection, whose step counts; or the first stage."""
        face = self.fit_size(batch)
        generator, discriminator = self.optimizers()
        own = labels(face, self.injected)
        injection = self._injection(self.training_keys(self.drawn, face.sample, 0), own)
        if self.first == "autoencoder":
            with self.turn_of(generator):
                made, _ = self._hide(face.image, covered(face.image, self.window), injection)
                error = F.l1_loss(made, face.image)
                self.descend(error, generator, batch_idx, counts=True)
            self.log_terms({"train/autoencoder": error})
            return
        made, passed = self._hide(face.image, face.image, injection)
        with self.turn_of(discriminator):
            judged = self._discriminator_loss(face.image, own, made.detach(), injection)
            self.descend(judged, discriminator, batch_idx)
        with self.turn_of(generator):
            score, read = self.discriminator(made)
            draw = seed_of(self.seed, self.global_step)
            original, hidden = codes_of(self.recognizer, [face.image, made], draw)
            terms = {
                "adversarial": F.softplus(-score).mean(),
                "identity": push_apart(hidden, original),
                "attributes": self._attribute_error(read, injection),
                "code": self._code_error(read, injection),
                "layout": layout(made, face.image),
                "passed": passed,
            }
            self.descend(weighted_sum(terms, self.weights), generator, batch_idx, counts=True)
        self.log_terms({f"train/{name}": term for name, term in (terms | {"discriminator": judged}).items()})

    def _discriminator_loss(self, image: Image, own: Tensor, made: Image, injection: Tensor) -> Tensor:
        """Real from made, attributes of real faces, and the free numbers of made ones."""
        (real, logits), (fake, read) = self.discriminator(image), self.discriminator(made)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        loss = loss + self._attribute_error(logits, own) + self._code_error(read, injection)
        return loss + lazy_penalty(self.discriminator, image, self.global_step)

    def _attribute_error(self, read: Tensor, wanted: Tensor) -> Tensor:
        if not self.injected:
            return read.new_zeros(())
        target = (wanted[:, : self.injected] + 1) / 2
        return F.binary_cross_entropy_with_logits(read[:, : self.injected], target)

    def _code_error(self, read: Tensor, injection: Tensor) -> Tensor:
        """Free numbers as a Gaussian reads them, variance 1 (InfoGAN; Chen et al., 2016)."""
        return F.mse_loss(read[:, self.injected :].float(), injection[:, self.injected :])

    def configure_optimizers(self) -> Any:
        """Adam (0.5, 0.999) for suppressor, injector and decoder, and for the discriminator."""
        return self.adversaries([self.suppressor, self.injector, self.decoder], [self.discriminator])


class SuppressiveConv(nn.Module):
    """A convolution whose outputs pass gates in [0, 1], read off the same input: ``conv(x) · σ(gate(x))``.

    Args:
        channels: Channels of the input.
        out: Channels of the output.
        stride: 2 halves the picture.
    """

    def __init__(self, channels: int, out: int, stride: int = 2) -> None:
        super().__init__()
        self.conv, self.gate = (nn.Conv2d(channels, out, 2 + stride, stride, 1) for _ in range(2))
        nn.init.kaiming_normal_(self.conv.weight, a=0.2)
        nn.init.zeros_(self.conv.bias)
        nn.init.constant_(self.gate.bias, OPEN)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> tuple[Float[Tensor, "batch out h2 w2"], Tensor]:
        """What passes, and the mean of the gates."""
        gates = torch.sigmoid(self.gate(x))
        return F.leaky_relu(self.conv(x), 0.2) * gates, gates.float().mean()


class Suppressor(nn.Module):
    """Picture → spatial code at 16 px, with suppression at every scale on the way.

    Args:
        width: Channels of the first layer, doubled by each stage.
        stages: Stages of half the size each.
    """

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, padding=3)
        scales = [SuppressiveConv(width << stage, width << (stage + 1)) for stage in range(stages)]
        self.units = nn.ModuleList([*scales, SuppressiveConv(width << stages, width << stages, stride=1)])

    def forward(self, image: Float[Tensor, "batch 3 h w"]) -> tuple[Float[Tensor, "batch code side side"], Tensor]:
        """The code, and the share that the gates of all scales let pass."""
        x, shares = F.leaky_relu(self.stem(image), 0.2), []
        for unit in self.units:
            x, share = unit(x)
            shares.append(share)
        return x, torch.stack(shares).mean()

"""CIAGAN (Maximov, Elezi & Leal-Taixé, "CIAGAN: Conditional Identity Anonymization GANs", CVPR 2020).

KNOWN: the generator never sees the inner face. It gets landmarks drawn as a picture (contour, bridge of the nose and
mouth; eyes are left out, which leaves it free), the picture with the face masked out, and a one-hot target identity,
embedded and joined in the bottleneck of a U-Net; what it makes is pasted where the face was. Losses: LSGAN, and a
siamese network, pre-trained on real faces with a proxy loss and trained beside the rest on real faces, which pulls the
made face to a real picture of the target. Targets are 1,200 people of CelebA with 30 pictures each, at 128 px. No key,
not reversible.
OURS: every size and weight. A target's code is the one-hot vector times the proxies of the siamese network, and is
added in the bottleneck: 30 pictures teach a generator what a number looks like, the 2 or 3 that we have do not. For the
same reason a face made for its own person is to be the original. The proxy loss is SDN's softmax over cosines, the
discriminator sees pictures without their landmarks and is held by R1, the mask is the feathered hull of 68 landmarks.
What is painted is averaged over 2 by 2 pixels: sub-pixel convolutions leave a grid of that period (Odena et al., 2016).
Targets are those who were met in training; a face's own is drawn from its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from flows.precision import full_precision
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.discriminators import FaceDiscriminator, lazy_penalty
from lightning_modules.networks.landmarks import JAW
from lightning_modules.networks.unet import UNet
from lightning_modules.optimization import TrainingSteps, seed_of
from lightning_modules.paste import FaceMask
from lightning_modules.processes import everyone, neighbours
from lightning_modules.sdn.losses import angular_margin
from lightning_modules.sdn.networks import Classifier

FEATURES = 256  # of the siamese network

BRIDGE, LIPS = slice(27, 31), slice(48, 60)  # of the 68 landmarks
THICK = 1.5  # pixels of a line


@dataclass
class CIAGANWeights:
    """Weight of each term of the generator's loss (OURS)."""

    adversarial: float = 1.0
    identity: float = 1.0
    reconstruct: float = 10.0


class CIAGAN(TrainingSteps, ReversibleAnonymizer):
    """Paints another training person's face where the face was, by its landmarks and what is around it.

    Args:
        landmarks: Frozen landmark network, pictures → ``(B, 68, 2)`` in shares of the side.
        size: Pixels of a picture, a power of two times 16.
        width: Channels of the generator's first stage, a multiple of 8.
        discriminator_width: Channels of the discriminator's first layer.
        siamese_width: Channels of the siamese network's first layer.
        identities: Largest number of training people; labels beyond it are refused.
        weights: Weight of each loss term.
        learning_rate: Adam's, for every optimizer.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        first: A first stage: ``siamese`` trains that network alone; ``None``: all together.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where targets come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.
    """

    reversible = False

    def __init__(
        self,
        landmarks: nn.Module,
        size: int = 128,
        width: int = 32,
        discriminator_width: int = 32,
        siamese_width: int = 16,
        identities: int = 8192,
        weights: CIAGANWeights = CIAGANWeights(),  # noqa: B008
        learning_rate: float = 2e-4,
        decay: bool = False,
        first: Literal["siamese"] | None = None,
        accumulate: int = 1,
        clip: float | None = 10.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        self.size, self.identities, self.weights = size, identities, weights
        self.learning_rate, self.first = learning_rate, first
        self.mask = FaceMask(landmarks)
        self.generator = UNet(2, width, code=FEATURES)
        self.discriminator = FaceDiscriminator(size, discriminator_width)
        self.siamese = Classifier(siamese_width, FEATURES)
        self.proxies = nn.Parameter(torch.randn(identities, FEATURES) * 0.05)
        self.register_buffer("met", torch.zeros(identities, dtype=torch.bool))

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Give each face the person whom its number draws among those met in training."""
        people = self.met.nonzero()[:, 0].tolist() or range(self.identities)
        drawn = [people[seed_of(self.seed, int(sample)) % len(people)] for sample in face.sample]
        return self._painted(face.image, face.identity.new_tensor(drawn))

    def _painted(self, image: Image, target: Int[Tensor, " batch"]) -> Image:
        return self._paint(*self._seen(image), target)

    @torch.no_grad()
    def _seen(self, image: Image) -> tuple[Image, Image, Tensor]:
        """What the generator gets of a picture, and all that it gets: landmarks, background, and the mask between."""
        with full_precision(image.device):
            drawn = sketch(self.mask.landmarks(image.float()), self.size)
            mask = self.mask(image)
        return drawn, (1 - mask) * image, mask

    def _paint(self, drawn: Image, background: Image, mask: Tensor, target: Int[Tensor, " batch"]) -> Image:
        """Paint targets into backgrounds, which stay bit for bit where the mask is 0."""
        code = F.normalize(self.proxies.detach(), dim=1)[target] * FEATURES**0.5  # entries of about 1
        made = self.generator(torch.cat([drawn, background], 1), code).float()
        made = F.avg_pool2d(F.pad(made, (0, 1, 0, 1), mode="replicate"), 2, stride=1)  # see the module's docstring
        return background + mask * made.clamp(-1, 1)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Siamese network, discriminator, then the generator, whose step counts; or the first of them alone."""
        face = self.fit_size(batch)
        generator, discriminator, siamese = self.optimizers()
        with self.turn_of(siamese):
            known = self._proxy_loss(face)
            self.descend(known, siamese, batch_idx, counts=self.first == "siamese")
        if self.first == "siamese":
            self.log_terms({"train/siamese": known})
            return
        target, wanted = neighbours(face.identity), neighbours(face.image)
        seen = self._seen(face.image)
        made, own = self._paint(*seen, target), self._paint(*seen, face.identity)
        with self.turn_of(discriminator):
            judged = self._discriminator_loss(face.image, made.detach())
            self.descend(judged, discriminator, batch_idx)
        with self.turn_of(generator):
            with torch.no_grad():
                features = self.siamese(wanted)
            terms = {
                "adversarial": (self.discriminator(made)[0] - 1).square().mean(),
                "identity": contrastive(self.siamese(made), features),
                "reconstruct": F.l1_loss(own, face.image),
            }
            self.descend(weighted_sum(terms, self.weights), generator, batch_idx, counts=True)
        terms |= {"siamese": known, "discriminator": judged}
        self.log_terms({f"train/{name}": term for name, term in terms.items()})

    def _proxy_loss(self, face: FaceBatch) -> Tensor:
        """Who is who among real faces; who is met is a target from now on."""
        if int(face.identity.max()) >= self.identities:
            raise ValueError(
                f"person number {int(face.identity.max())} does not fit proxies of {self.identities} identities; "
                "raise `identities`"
            )
        self.met[everyone(face.identity)] = True
        return angular_margin(self.siamese(face.image), self.proxies, face.identity)

    def _discriminator_loss(self, image: Image, made: Image) -> Tensor:
        """LSGAN (Mao et al., 2017): real faces at 1, made ones at 0."""
        loss = (self.discriminator(image)[0] - 1).square().mean() + self.discriminator(made)[0].square().mean()
        return loss + lazy_penalty(self.discriminator, image, self.global_step)

    def configure_optimizers(self) -> Any:
        """Adam (0.5, 0.999) for the generator, the discriminator, and the siamese network with its proxies."""
        return self.adversaries([self.generator], [self.discriminator], [self.siamese, self.proxies])


def contrastive(made: Float[Tensor, "batch d"], wanted: Float[Tensor, "batch d"]) -> Tensor:
    """Squared distance of features: the half of the contrastive loss (Hadsell et al., 2006) that is for the same."""
    return (made - wanted).square().sum(1).mean()


def sketch(points: Float[Tensor, "batch 68 2"], side: int) -> Float[Tensor, "batch 3 side side"]:
    """Contour, bridge of the nose and lips as lines: a channel each, 1 on a line and 0 beside it.

    Args:
        points: Landmarks (x, y) in shares of the side.
        side: Pixels of the picture.
    """
    mouth = points[:, LIPS]
    lines = points[:, JAW], points[:, BRIDGE], torch.cat([mouth, mouth[:, :1]], 1)
    return torch.stack([_line(line * side - 0.5, side) for line in lines], 1)


def _line(points: Float[Tensor, "batch n 2"], side: int) -> Float[Tensor, "batch side side"]:
    """Points in pixels, joined in their order; edges fade over a pixel."""
    ticks = torch.arange(side).to(points)
    pixels = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).view(1, -1, 1, 2)
    start, along = points[:, None, :-1], (points[:, 1:] - points[:, :-1])[:, None]
    share = ((pixels - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    distance = (pixels - start - share.clamp(0, 1)[..., None] * along).norm(dim=-1).amin(2)
    return (THICK / 2 + 0.5 - distance).clamp(0, 1).unflatten(1, (side, side))

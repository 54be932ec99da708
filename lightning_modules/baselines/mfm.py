"""MfM, the Multi-factor Modifier (Pan, Chen & Wu, Entropy 2023, 25(2), 272): SDN's forerunner.

KNOWN: a conditional GAN in which one network anonymizes and recovers; its factors are a password and attributes; the
right ones give the original back, others another face. Its losses are read through information theory: the mutual
information of original and recovered is raised, that of original and anonymized lowered.
OURS: every size and weight. The generator is FIT's (:mod:`lightning_modules.networks.translator`), with its oval and
its first stage, and the direction is one more plane beside the factors'; information is that of a pre-trained
recogniser's features, by SDN's two bounds, Barber and Agakov's and CLUB; the recogniser is asked in changing views; a
triplet tells from the first step where CLUB is to lead, and a head reads the password, as SDN's do; the weight of
recovery grows, as FIT's does here. What SDN has beyond it is left out: no feature extractor of its own, no cycle
(nothing is hidden again), no texture, no avalanche, so that a wrong bit is a small mistake. Shrunk, for a CPU: 64 px, a
narrow generator, 800 and 400 steps.

It recovers from the saved picture, the password and the attributes. The 16 bits are no secret, as FIT's are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch, labels
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.baselines.fit import alike
from lightning_modules.carriers import send_straight
from lightning_modules.keys import KeySpec
from lightning_modules.losses import ms_ssim_loss, weighted_sum
from lightning_modules.networks.discriminators import FaceDiscriminator, lazy_penalty
from lightning_modules.networks.translator import Translator
from lightning_modules.networks.views import codes_of
from lightning_modules.optimization import TrainingSteps, seed_of
from lightning_modules.processes import everyone, neighbours
from lightning_modules.sdn.losses import club, gaussian_log_likelihood, layout, triplet
from lightning_modules.sdn.networks import GaussianHead, PasswordHead


@dataclass
class MfMWeights:
    """Weight of each term of the generator's loss (OURS), named as SDN's."""

    reconstruct: float = 100.0
    structure: float = 10.0
    layout: float = 2.0
    adversarial: float = 1.0
    attributes: float = 1.0
    triplet: float = 10.0
    recovered_information: float = 0.01
    hidden_information: float = 0.01
    password: float = 1.0


class Legs(NamedTuple):
    """The pictures of one training step."""

    original: Tensor
    anonymized: Tensor
    other: Tensor
    recovered: Tensor
    wrong: Tensor


class MfM(TrainingSteps, ReversibleAnonymizer):
    """One network that anonymizes and recovers under a password and attributes, told the direction.

    Args:
        recognizer: Frozen identity network of the losses.
        size: Pixels of a picture, a multiple of 8.
        width: Channels of the generator's first layer.
        blocks: Residual blocks of the generator.
        discriminator_width: Channels of the discriminator's first layer; ``None``: as ``width``.
        key_bits: Bits of the password.
        attributes: Number of attribute factors; 0 for none.
        features: Length of the recogniser's codes.
        weights: Weight of each loss term.
        learning_rate: Adam's, for every optimizer.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        warmup: Training steps over which the weights of what is recovered, and of CLUB, grow to their full value.
        first: A first stage: ``painter`` paints people where a face is covered, who show their password; ``None``: all
            together.
        jpeg: Share of the training steps that send the anonymized picture as JPEG, not as PNG.
        jpeg_quality: Of that JPEG: 95, 75 or 50.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If ``size`` is no multiple of 8, or ``jpeg`` is no share.
    """

    fine = True  # recovery reads what the generator hid in single pixels

    def __init__(
        self,
        recognizer: nn.Module,
        size: int = 128,
        width: int = 64,
        blocks: int = 9,
        discriminator_width: int | None = None,
        key_bits: int = 16,
        attributes: int = 0,
        features: int = 512,
        weights: MfMWeights = MfMWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        decay: bool = False,
        warmup: int = 2000,
        first: Literal["painter"] | None = None,
        jpeg: float = 0.0,
        jpeg_quality: Literal[95, 75, 50] = 95,
        accumulate: int = 1,
        clip: float | None = 10.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        if not 0 <= jpeg <= 1:
            raise ValueError(f"jpeg must be a share from 0 to 1, got {jpeg}")
        self.size, self.weights, self.learning_rate = size, weights, learning_rate
        self.warmup, self.first, self.jpeg, self.jpeg_quality = warmup, first, jpeg, jpeg_quality
        self.key_spec, self.attributes = KeySpec("bits", key_bits), attributes
        self.generator = Translator(size, key_bits + attributes + 1, width, blocks)
        self.password_head = PasswordHead(width, key_bits)
        self.discriminator = FaceDiscriminator(size, discriminator_width or width, attributes)
        self.recovered_head, self.hidden_head = GaussianHead(features), GaussianHead(features)
        self.recognizer = recognizer.requires_grad_(False)
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``G(x, [password; attributes], +1)``."""
        return self._made(face.image, self._factors(face, key), +1.0)

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """``G(x̃_a, [password; attributes], −1)``."""
        return self._made(face.image, self._factors(face, key), -1.0)

    def _made(self, image: Image, factors: Tensor, direction: float, blind: bool = False) -> Image:
        planes = torch.cat([factors, factors.new_full((len(factors), 1), direction)], 1) / 2
        return self.generator(image, planes, blind)

    def _factors(self, face: FaceBatch, key: Tensor) -> Tensor:
        key = self.key_spec.check(key, len(face.image))
        return torch.cat([key, labels(face, self.attributes)], 1)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Estimators of information, discriminator, then the generator, whose step counts; or the first stage."""
        face = self.fit_size(batch)
        generator, discriminator, estimators = self.optimizers()
        right, other, wrong = (self.training_keys(self.key_spec, face.sample, leg) for leg in range(3))
        asked = neighbours(labels(face, self.attributes))
        if self.first == "painter":
            made = self._made(face.image, torch.cat([right, asked], 1), +1.0, blind=True)
            legs = Legs(face.image, made, made, recovered=face.image, wrong=made)
        else:
            legs = self._legs(face.image, *(torch.cat([key, asked], 1) for key in (right, other, wrong)))
            codes = codes_of(self.recognizer, list(legs), seed_of(self.seed, self.global_step))
            with self.turn_of(estimators):
                self.descend(self._estimator_loss(*codes), estimators, batch_idx)
        with self.turn_of(discriminator):
            self.descend(self._discriminator_loss(face, legs), discriminator, batch_idx)
        with self.turn_of(generator):
            terms = self._faces(legs, asked)
            read = self.password_head(legs.original, legs.anonymized).float()
            terms["password"] = F.binary_cross_entropy_with_logits(read, (right + 1) / 2)
            if self.first is None:
                terms |= self._identity(*codes) | self._recovery(legs)
            loss = weighted_sum(terms, self.weights, partial=self.first is not None)
            self.descend(loss, generator, batch_idx, counts=True)
        self.log_terms({f"train/{name}": term for name, term in terms.items()})

    def _legs(self, image: Image, right: Tensor, other: Tensor, wrong: Tensor) -> Legs:
        hidden = self._made(image.repeat(2, 1, 1, 1), torch.cat([right, other]), +1.0).chunk(2)
        received = send_straight(hidden[0], self.jpeg, self.global_step, self.jpeg_quality)
        opened = self._made(received.repeat(2, 1, 1, 1), torch.cat([right, wrong]), -1.0).chunk(2)
        return Legs(image, *hidden, *opened)

    def _estimator_loss(self, original: Tensor, hidden: Tensor, other: Tensor, recovered: Tensor, _: Tensor) -> Tensor:
        """Maximum likelihood of q(e_x | e_r) and q(e_a | e_x), on detached features."""
        original, hidden, recovered = (spread_out(codes.detach()) for codes in (original, hidden, recovered))
        likely = gaussian_log_likelihood(original, *self.recovered_head(recovered))
        return -(likely + gaussian_log_likelihood(hidden, *self.hidden_head(original))).mean()

    def _discriminator_loss(self, face: FaceBatch, legs: Legs) -> Tensor:
        real, logits = self.discriminator(legs.original)
        fakes = [self.discriminator(made.detach())[0] for made in (legs.anonymized, legs.wrong)]
        loss = (real - 1).square().mean() + sum(fake.square().mean() for fake in fakes) / len(fakes)
        loss = loss + lazy_penalty(self.discriminator, legs.original, self.global_step)
        if self.attributes:
            loss = loss + F.binary_cross_entropy_with_logits(logits, (face.attributes[:, : self.attributes] + 1) / 2)
        return loss

    def _identity(
        self, original: Tensor, hidden: Tensor, other: Tensor, recovered: Tensor, wrong: Tensor
    ) -> dict[str, Tensor]:
        """The bounds on mutual information, and who is nearer to whom."""
        e_x, e_a, e_r = (spread_out(codes) for codes in (original, hidden, recovered))
        return {
            "recovered_information": -gaussian_log_likelihood(e_x, *self.recovered_head(e_r)).mean(),
            "hidden_information": self._ramp() * club(*(everyone(part) for part in (e_a, *self.hidden_head(e_x)))),
            "triplet": triplet(original, recovered, hidden)
            + triplet(original, recovered, wrong)
            + alike(hidden, other)
            + alike(hidden, wrong),
        }

    def _faces(self, legs: Legs, asked: Tensor) -> dict[str, Tensor]:
        """How those look who are not the original."""
        judged = [self.discriminator(made) for made in (legs.anonymized, legs.wrong)]
        attributes = legs.original.new_zeros(())
        if self.attributes:
            attributes = F.binary_cross_entropy_with_logits(judged[0][1], (asked + 1) / 2)
        return {
            "layout": layout(legs.anonymized, legs.original) + layout(legs.wrong, legs.original),
            "adversarial": sum((score - 1).square().mean() for score, _ in judged) / len(judged),
            "attributes": attributes,
        }

    def _recovery(self, legs: Legs) -> dict[str, Tensor]:
        return {
            "reconstruct": self._ramp() * F.l1_loss(legs.recovered, legs.original),
            "structure": self._ramp() * ms_ssim_loss(legs.recovered, legs.original),
        }

    def _ramp(self) -> float:
        return min(1.0, self.global_step / max(1, self.warmup))

    def configure_optimizers(self) -> Any:
        """Adam (0.5, 0.999) for the generator with the head, the discriminator, and the estimators."""
        return self.adversaries(
            [self.generator, self.password_head], [self.discriminator], [self.recovered_head, self.hidden_head]
        )


def spread_out(codes: Tensor) -> Tensor:
    """Unit codes ``(B, d)`` at length √d: entries of variance 1, in reach of the estimators' log-variances."""
    return codes.shape[1] ** 0.5 * codes

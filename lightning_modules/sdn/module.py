"""SDN, the Secure Dual Network (Pan, Chen & Wu, Electronics 2024, 13(22), 4398) as a LightningModule.

KNOWN: encoder, decoder, discriminator and classifier trained jointly without any pre-trained network; factors are a
password and attributes; one network anonymizes and recovers; a wrong factor gives another face; a lower bound on
I(original; recovered) is raised and an upper bound (CLUB) on I(original; anonymized) lowered.
OURS: every size, every weight, and the password head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.carriers import quantize
from lightning_modules.keys import KeySpec
from lightning_modules.losses import hinge_fake, hinge_real, ms_ssim_loss, weighted_sum
from lightning_modules.networks.discriminators import PatchDiscriminator
from lightning_modules.optimization import TrainingSteps
from lightning_modules.sdn import losses
from lightning_modules.sdn.networks import Classifier, Decoder, Encoder, Factors, GaussianHead, PasswordHead


@dataclass
class SDNWeights:
    """Weight of each term of the generator's loss (OURS)."""

    reconstruct: float = 100.0
    structure: float = 10.0
    cycle: float = 10.0
    layout: float = 10.0
    adversarial: float = 1.0
    attributes: float = 1.0
    triplet: float = 2.0
    recovered_information: float = 0.01
    hidden_information: float = 0.01
    password: float = 1.0


class Legs(NamedTuple):
    """The five pictures of one training step."""

    anonymized: Tensor
    recovered: Tensor
    other: Tensor
    wrong: Tensor
    again: Tensor


class SDN(TrainingSteps, ReversibleAnonymizer):
    """One network that anonymizes and recovers under a password and attributes.

    Args:
        size: Pixels of a picture: 64, 128 or 256.
        width: Channels of the first layer; 64 is the paper-like size, 24 what a CPU trains.
        key_bits: Bits of the password.
        attributes: Number of attribute factors; 0 for none.
        identities: Largest number of training people; labels beyond it are refused.
        weights: Weight of each loss term.
        learning_rate: Adam's, for every optimizer.
        information_warmup: Training steps over which the weight of the CLUB term grows to its full value.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If ``size`` is not a multiple of 32 or below 64.
    """

    def __init__(
        self,
        size: int = 128,
        width: int = 64,
        key_bits: int = 64,
        attributes: int = 0,
        identities: int = 8192,
        weights: SDNWeights = SDNWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        information_warmup: int = 2000,
        accumulate: int = 1,
        clip: float | None = 10.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start)
        if size < 64 or size % 32:
            raise ValueError(f"SDN's picture size must be a multiple of 32, at least 64; got {size}")
        self.size, self.weights, self.learning_rate = size, weights, learning_rate
        self.key_spec = KeySpec("bits", key_bits)
        self.attributes, self.identities, self.information_warmup = attributes, identities, information_warmup
        self.encoder, self.decoder = Encoder(width), Decoder(width)
        self.factors = Factors(key_bits + attributes)
        self.password_head = PasswordHead(width, key_bits)
        self.discriminator = PatchDiscriminator(width, attributes)
        self.classifier = Classifier(width)
        self.centres = nn.Parameter(torch.randn(identities, 256) * 0.05)
        self.recovered_head, self.hidden_head = GaussianHead(), GaussianHead()

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Hide faces under password bits ``(B, key_bits)`` and the batch's attributes."""
        return self._decode(face.image, self._factors(face, key), +1.0)

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """Bring faces back under the same bits and attributes."""
        return self._decode(face.image, self._factors(face, key), -1.0)

    def _decode(self, image: Tensor, factors: Tensor, direction: float) -> Tensor:
        return self.decoder(self.encoder(image), self.factors(factors, direction))

    def _factors(self, face: FaceBatch, key: Tensor) -> Tensor:
        key = self.key_spec.check(key, len(face.image))
        if face.attributes.shape[1] < self.attributes:
            raise ValueError(
                f"expected {self.attributes} attributes a face, got {face.attributes.shape[1]}; "
                "give the data set labels"
            )
        return torch.cat([key, face.attributes[:, : self.attributes]], 1)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """One training step: classifier, estimators, discriminator, then the generator, whose step counts."""
        face = self.fit_size(batch)
        generator, discriminator, classifier, estimators = self.optimizers()
        factors, other, asked = self._draw_factors(face)

        legs = self._legs(face.image, factors, other)
        with self.turn_of(classifier):
            self.descend(self._classifier_loss(face), classifier, batch_idx)
        with self.turn_of(estimators):
            self.descend(self._estimator_loss(face.image, legs), estimators, batch_idx)
        with self.turn_of(discriminator):
            self.descend(self._discriminator_loss(face, legs), discriminator, batch_idx)
        with self.turn_of(generator):
            terms = self._generator_terms(face, legs, factors, asked)
            self.descend(weighted_sum(terms, self.weights), generator, batch_idx, counts=True)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})

    def _draw_factors(self, face: FaceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Right factors, other factors, and the attributes asked of the anonymized face (another face's)."""
        right, other = (self.training_keys(self.key_spec, face.sample, leg) for leg in (0, 1))
        asked = face.attributes[:, : self.attributes].roll(1, 0)
        return torch.cat([right, asked], 1), torch.cat([other, asked], 1), asked

    def _legs(self, image: Tensor, factors: Tensor, other: Tensor) -> Legs:
        code = self.encoder(image)
        anonymized = self.decoder(code, self.factors(factors, +1.0))
        received = self.encoder(quantize(anonymized))
        recovered = self.decoder(received, self.factors(factors, -1.0))
        return Legs(
            anonymized=anonymized,
            recovered=recovered,
            other=self.decoder(code, self.factors(other, +1.0)),
            wrong=self.decoder(received, self.factors(other, -1.0)),
            again=self._decode(recovered, factors, +1.0),
        )

    def _classifier_loss(self, face: FaceBatch) -> Tensor:
        if int(face.identity.max()) >= self.identities:
            raise ValueError(
                f"person number {int(face.identity.max())} does not fit a classifier of {self.identities} identities; "
                "raise `identities`"
            )
        return losses.angular_margin(self.classifier(face.image), self.centres, face.identity)

    def _estimator_loss(self, image: Tensor, legs: Legs) -> Tensor:
        """Maximum likelihood of q(e_x | e_r) and q(e_a | e_x), on detached features."""
        with torch.no_grad():
            original, anonymized, recovered = (
                self.classifier(x.detach()) for x in (image, legs.anonymized, legs.recovered)
            )
        likely = losses.gaussian_log_likelihood(original, *self.recovered_head(recovered))
        return -(likely + losses.gaussian_log_likelihood(anonymized, *self.hidden_head(original))).mean()

    def _discriminator_loss(self, face: FaceBatch, legs: Legs) -> Tensor:
        real, logits = self.discriminator(face.image)
        loss = sum(hinge_real(score) for score in real)
        for fake in (legs.anonymized, legs.recovered, legs.wrong):
            loss = loss + sum(hinge_fake(score) for score in self.discriminator(fake.detach())[0]) / 3
        if self.attributes:
            loss = loss + F.binary_cross_entropy_with_logits(logits, (face.attributes[:, : self.attributes] + 1) / 2)
        return loss

    def _generator_terms(self, face: FaceBatch, legs: Legs, factors: Tensor, asked: Tensor) -> dict[str, Tensor]:
        image = face.image
        original, anonymized, recovered, other, wrong = (
            self.classifier(x) for x in (image, legs.anonymized, legs.recovered, legs.other, legs.wrong)
        )
        judged = [self.discriminator(x) for x in (legs.anonymized, legs.recovered, legs.wrong)]
        own = face.attributes[:, : self.attributes]
        bits = factors[:, : self.key_spec.length]
        ramp = min(1.0, self.global_step / max(1, self.information_warmup))
        return {
            "reconstruct": F.l1_loss(legs.recovered, image),
            "structure": ms_ssim_loss(legs.recovered, image),
            "cycle": F.l1_loss(legs.again, legs.anonymized),
            "layout": F.l1_loss(legs.anonymized, image) + F.l1_loss(legs.wrong, image),
            "adversarial": -sum(score.mean() for scores, _ in judged for score in scores) / 3,
            "attributes": self._attribute_loss(judged[0][1], asked) + self._attribute_loss(judged[1][1], own),
            "triplet": losses.triplet(original, recovered, anonymized)
            + losses.triplet(original, recovered, wrong)
            + (1 - losses.distance(anonymized, other)).clamp(min=0).mean()
            + (1 - losses.distance(anonymized, wrong)).clamp(min=0).mean(),
            "recovered_information": -losses.gaussian_log_likelihood(original, *self.recovered_head(recovered)).mean(),
            "hidden_information": ramp * losses.club(anonymized, *self.hidden_head(original)),
            "password": F.binary_cross_entropy_with_logits(self.password_head(image, legs.anonymized), (bits + 1) / 2),
        }

    def _attribute_loss(self, logits: Tensor, asked: Tensor) -> Tensor:
        if not self.attributes:
            return logits.new_zeros(())
        return F.binary_cross_entropy_with_logits(logits, (asked + 1) / 2)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam (0.5, 0.999) for the generator, the discriminator, the classifier and the estimators."""
        groups = [
            [self.encoder, self.factors, self.decoder, self.password_head],
            [self.discriminator],
            [self.classifier],
            [self.recovered_head, self.hidden_head],
        ]
        parameters = [[p for module in group for p in module.parameters()] for group in groups]
        parameters[2].append(self.centres)
        return [torch.optim.Adam(group, lr=self.learning_rate, betas=(0.5, 0.999)) for group in parameters]

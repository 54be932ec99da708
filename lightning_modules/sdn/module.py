"""SDN, the Secure Dual Network (Pan, Chen & Wu, Electronics 2024, 13(22), 4398) as a LightningModule.

KNOWN: encoder, decoder, discriminator and classifier trained jointly without any pre-trained network; factors are a
password and attributes; one network anonymizes and recovers; a wrong factor gives another face; a lower bound on
I(original; recovered) is raised and an upper bound (CLUB) on I(original; anonymized) lowered.
OURS: every size, every weight, the password head, the avalanche, the window, that the classifier searches for the
original person in what was made of them, and the texture: the networks paint another face over the 8 by 8 block means
of a picture, which stay; what the original has beyond them lies on that face as a faint texture, turned by what the
factors hash to. Recovery paints the same face, takes it off, turns the texture back, and lets the networks mend it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch, labels
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.carriers import send_straight
from lightning_modules.keys import KeySpec
from lightning_modules.losses import ms_ssim_loss, weighted_sum
from lightning_modules.networks.blocks import blurred, means, oval, with_means_of
from lightning_modules.networks.discriminators import FaceDiscriminator, lazy_penalty
from lightning_modules.optimization import TrainingSteps
from lightning_modules.processes import everyone, neighbours
from lightning_modules.sdn import losses
from lightning_modules.sdn.networks import (
    Classifier,
    Decoder,
    Encoder,
    Factors,
    GaussianHead,
    PasswordHead,
    stages,
)
from lightning_modules.sdn.sefa import style_directions
from lightning_modules.sdn.texture import BlockCosines, hashed, turned

SURE = 4.0  # before training, detail is doubted by 2 %
LOUDEST = 4.0  # of a code: one value in ten thousand is louder, and what wrong factors leave


@dataclass
class SDNWeights:
    """Weight of each term of the generator's loss (OURS)."""

    reconstruct: float = 100.0
    structure: float = 10.0
    surrogate: float = 30.0
    cycle: float = 10.0
    layout: float = 2.0
    room: float = 10.0
    adversarial: float = 5.0
    attributes: float = 1.0
    triplet: float = 1.0
    diversity: float = 0.0
    recovered_information: float = 0.01
    hidden_information: float = 0.01
    password: float = 1.0


class Legs(NamedTuple):
    """The pictures of one training step; ``wrong`` and ``lost`` where wrong factors are tried.

    ``painted`` is the anonymized face without its texture: a discriminator that sees the texture sees nothing else.
    ``painted_other`` is that of another password.
    ``lost`` is the face that wrong factors paint, which opening with them is to end in.
    """

    painted: Tensor
    anonymized: Tensor
    recovered: Tensor
    other: Tensor
    painted_other: Tensor
    wrong: Tensor | None
    lost: Tensor | None
    again: Tensor

    def faked(self) -> list[Tensor]:
        """What the discriminator is to tell from faces."""
        return [leg for leg in (self.painted, self.wrong) if leg is not None]

    def hidden(self) -> list[Tensor]:
        """What the original person is to be lost in."""
        return [leg for leg in (self.anonymized, self.wrong) if leg is not None]


class SDN(TrainingSteps, ReversibleAnonymizer):
    """One network that anonymizes and recovers under a password and attributes.

    Args:
        size: Pixels of a picture: 64, 128 or 256.
        width: Channels of the first layer; 64 is the paper-like size, 24 what a CPU trains.
        discriminator_width: Channels of the discriminator's first layer; ``None``: as ``width``.
        key_bits: Bits of the password.
        attributes: Number of attribute factors; 0 for none.
        identities: Largest number of training people; labels beyond it are refused.
        weights: Weight of each loss term.
        learning_rate: Adam's, for every optimizer.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        information_warmup: Training steps over which the weight of the CLUB term grows to its full value.
        jpeg: Share of the training steps that send the anonymized picture as JPEG, not as PNG.
        jpeg_quality: Of that JPEG: 95, 75 or 50.
        dual: One encoder and decoder for both directions; ``False`` gives recovery its own (an ablation).
        near_misses: Share of the wrong factors that are right but for one bit or, as often, one attribute; the others
            are another password with the attributes of another face.
        wrong_factors: Open with wrong factors while training; ``False`` leaves that leg out (an ablation).
        avalanche: Hash password and attributes to the bits that the network sees, so that one wrong bit or attribute is
            as wrong as a strange password; ``False`` shows it the password's own bits.
        turning: Rotate the texture by what factors hash to, so that wrong factors miss by construction; ``False``
            leaves it as it is (an ablation).
        strength: Amplitude of the texture, as a share of the original's own detail: more looks worse and outlives more.
        window: Change the face alone, within an oval of the aligned crop: what lies around it stays as it is.
        pursuit: Weight of the classifier's search for the original person in anonymized and wrongly opened faces. At
            0 it learns from real faces alone, and changes that nobody sees can mislead it.
        first: A first stage, from scratch on the same faces: ``classifier`` trains it alone, ``autoencoder`` trains
            encoder and decoder to paint and to mend under any factors, ``painter`` trains them against the
            discriminator to paint believable people and nothing else; ``None``: all together.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If ``size`` is not a multiple of 32 or below 64, or ``jpeg`` or ``near_misses`` is no share.
    """

    fine = True  # the texture

    def __init__(
        self,
        size: int = 128,
        width: int = 64,
        discriminator_width: int | None = None,
        key_bits: int = 64,
        attributes: int = 0,
        identities: int = 8192,
        weights: SDNWeights = SDNWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        decay: bool = False,
        information_warmup: int = 2000,
        jpeg: float = 0.0,
        jpeg_quality: Literal[95, 75, 50] = 95,
        dual: bool = True,
        wrong_factors: bool = True,
        near_misses: float = 0.5,
        avalanche: bool = True,
        turning: bool = True,
        strength: float = 0.25,
        window: bool = True,
        pursuit: float = 0.5,
        first: Literal["classifier", "autoencoder", "painter"] | None = None,
        accumulate: int = 1,
        clip: float | None = 10.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        if size < 64 or size % 32:
            raise ValueError(f"SDN's picture size must be a multiple of 32, at least 64; got {size}")
        if not (0 <= jpeg <= 1 and 0 <= near_misses <= 1):
            raise ValueError(f"jpeg and near_misses must be shares from 0 to 1, got {jpeg} and {near_misses}")
        self.size, self.weights, self.learning_rate = size, weights, learning_rate
        self.key_spec = KeySpec("bits", key_bits)
        self.attributes, self.identities, self.information_warmup = attributes, identities, information_warmup
        self.jpeg, self.jpeg_quality = jpeg, jpeg_quality
        self.wrong_factors, self.near_misses = wrong_factors, near_misses
        self.avalanche, self.pursuit, self.first = avalanche, pursuit, first
        self.turning, self.strength, self.blocks = turning, strength, BlockCosines(size)
        self.register_buffer("window", oval(size) if window else torch.ones(size, size), persistent=False)
        self.encoder, self.decoder = Encoder(width, stages(size)), Decoder(width, stages(size))
        self.factors = Factors(key_bits + attributes)
        self.password_head = PasswordHead(width, key_bits)
        self.discriminator = FaceDiscriminator(size, discriminator_width or width, attributes)
        self.classifier = Classifier(width)
        self.centres = nn.Parameter(torch.randn(identities, 256) * 0.05)
        self.recovered_head, self.hidden_head = GaussianHead(), GaussianHead()
        # last, so that the others start alike with and without it
        self.opener = None if dual else nn.ModuleList([Encoder(width, stages(size)), Decoder(width, stages(size))])

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Hide faces under password bits ``(B, key_bits)`` and the batch's attributes."""
        return self._hide(face.image, self._factors(face, key))[1]

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """Bring faces back under the same bits and attributes."""
        return self._open(face.image, self._factors(face, key))[0]

    def edit(self, face: FaceBatch, key: Tensor, shift: Float[Tensor, " style"]) -> Image:
        """Hide faces with their style moved by ``shift``: a multiple of one of :meth:`edit_directions`."""
        return self._hide(face.image, self._factors(face, key), shift)[1]

    @torch.no_grad()
    def edit_directions(self, count: int) -> Float[Tensor, "count style"]:
        """SeFa's leading directions, each as long as one degree: how far styles of random factors spread along it.

        Raises:
            ValueError: If a style has not so many directions.
        """
        directions = style_directions(self.decoder, count)
        drawn = torch.randint(
            2, (1024, self.factors.layers[0].in_features - 1), generator=torch.Generator().manual_seed(0)
        )
        styles = self.factors((2.0 * drawn - 1).to(directions), +1.0)
        return directions * (styles @ directions.mT).std(0)[:, None]

    def _hide(self, image: Tensor, factors: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """The face that is painted over the original, and that face with the original as its texture."""
        painted = self._paint(image, factors, shift)
        texture = self.blocks.texture(self._turned(self.blocks(image), factors, back=False))
        return painted, self._within(image, painted + self.strength * texture)

    def _open(self, image: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """What opens, and the face that was taken off; dual inference takes the same two networks."""
        encoder, decoder = (self.encoder, self.decoder) if self.opener is None else self.opener
        with torch.no_grad():  # painting is judged by what is painted
            painted = self._paint(image, factors)
        code = self._turned(self.blocks.carried(image - painted) / self.strength, factors, back=True)
        found = self._within(image, means(image) + self.blocks.picture(code.clamp(-LOUDEST, LOUDEST)))
        made = decoder(encoder(found), self._style(factors, -1.0))
        doubt = torch.sigmoid(made[:, 3:] - SURE)
        return self._within(image, found + doubt * (blurred(image) - found) + made[:, :3]), painted

    def _paint(self, image: Tensor, factors: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """Another face, from what is around the face and from the means of its blocks, which it keeps."""
        covered = self._within(image, blurred(image))
        made = covered + self.decoder(self.encoder(covered), self._style(factors, +1.0) + shift)[:, :3]
        return self._within(image, with_means_of(image, made))

    def _turned(self, code: Tensor, factors: Tensor, back: bool) -> Tensor:
        if not self.turning:
            return code
        bits = self.key_spec.length  # those that styles see come first, and tell nothing of the others
        signs = hashed(factors, bits + 3 * code[0].numel())[:, bits:].unflatten(1, (*code.shape[1:], 3))
        return turned(code, signs, back)

    def _style(self, factors: Tensor, direction: float) -> Tensor:
        return self.factors(self._seen(factors), direction)

    def _seen(self, factors: Tensor) -> Tensor:
        """The factors as the network sees them: hashed bits, and the attributes as they are."""
        bits = self.key_spec.length
        return torch.cat([hashed(factors, bits), factors[:, bits:]], 1) if self.avalanche else factors

    def _within(self, image: Tensor, made: Tensor) -> Tensor:
        """``made`` inside the window, the picture at hand around it."""
        return torch.where(self.window > 0, made.clamp(-1, 1), image)

    def _factors(self, face: FaceBatch, key: Tensor) -> Tensor:
        key = self.key_spec.check(key, len(face.image))
        return torch.cat([key, labels(face, self.attributes)], 1)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """One training step: of a first stage, or of all networks together."""
        face = self.fit_size(batch)
        if self.first is None:
            terms = self._joint_step(face, batch_idx)
        elif self.first == "painter":
            terms = self._painter_step(face, batch_idx)
        else:
            generator, _, classifier, _ = self.optimizers()
            optimizer, loss_of = {
                "classifier": (classifier, self._classifier_loss),
                "autoencoder": (generator, self._autoencoder_loss),
            }[self.first]
            with self.turn_of(optimizer):
                terms = {self.first: loss_of(face)}
                self.descend(terms[self.first], optimizer, batch_idx, counts=True)
        self.log_terms({f"train/{name}": term for name, term in terms.items()})

    def _joint_step(self, face: FaceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Classifier, estimators, discriminator, then the generator, whose step counts."""
        generator, discriminator, classifier, estimators = self.optimizers()
        factors, other, wrong, asked = self._draw_factors(face)
        legs = self._legs(face.image, factors, other, wrong)
        with self.turn_of(classifier):
            self.descend(self._classifier_loss(face, legs), classifier, batch_idx)
        with self.turn_of(estimators):
            self.descend(self._estimator_loss(face.image, legs), estimators, batch_idx)
        with self.turn_of(discriminator):
            self.descend(self._discriminator_loss(face, legs.faked()), discriminator, batch_idx)
        with self.turn_of(generator):
            terms = self._generator_terms(face, legs, factors, asked)
            self.descend(weighted_sum(terms, self.weights), generator, batch_idx, counts=True)
        return terms

    def _painter_step(self, face: FaceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Discriminator, then a generator that paints believable people: not the original, and others for others."""
        generator, discriminator, _, _ = self.optimizers()
        factors, other, _, asked = self._draw_factors(face)
        painted = [self._paint(face.image, drawn) for drawn in (factors, other)]
        with self.turn_of(discriminator):
            judged = self._discriminator_loss(face, painted)
            self.descend(judged, discriminator, batch_idx)
        with self.turn_of(generator):
            original, one, two = (self.classifier(x) for x in (face.image, *painted))
            terms = self._looks(face, painted, asked) | {
                "triplet": _far(original, one) + _far(one, two),
                "diversity": self._sameness(face.image, *painted),
            }
            self.descend(weighted_sum(terms, self.weights, partial=True), generator, batch_idx, counts=True)
        return terms | {"discriminator": judged}

    def _draw_factors(self, face: FaceBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Right factors, another password's, wrong ones, and the attributes asked of the face (another one's)."""
        right, other = (self.training_keys(self.key_spec, face.sample, leg) for leg in (0, 1))
        own = labels(face, self.attributes)
        asked = neighbours(own)
        factors, others = torch.cat([right, asked], 1), torch.cat([other, asked], 1)
        # the first two decide near or strange, bit or attribute; the largest of the others says which one
        chance = self.training_keys(KeySpec("normal", 2 + factors.shape[1]), face.sample, 2)
        near, bit, entry = chance[:, :1], chance[:, 1:2], chance[:, 2:].clone()
        if self.attributes:  # a bit or an attribute, equally often
            entry += 1e3 * torch.where(bit > 0, 1.0, -1.0) * (torch.arange(entry.shape[1]) < right.shape[1]).to(entry)
        missed = torch.where(F.one_hot(entry.argmax(1), entry.shape[1]).bool(), -factors, factors)
        strange = torch.cat([other, neighbours(own, 2)], 1)
        return factors, others, torch.where(torch.special.ndtr(near) < self.near_misses, missed, strange), asked

    def _legs(self, image: Tensor, factors: Tensor, other: Tensor, wrong_factors: Tensor) -> Legs:
        painted, anonymized = self._hide(image, factors)
        painted_other, anonymized_other = self._hide(image, other)
        received = send_straight(anonymized.detach(), self.jpeg, self.global_step, self.jpeg_quality)
        recovered, _ = self._open(received, factors)
        wrong, lost = self._open(received, wrong_factors) if self.wrong_factors else (None, None)
        return Legs(
            painted=painted,
            anonymized=anonymized,
            recovered=recovered,
            other=anonymized_other,
            painted_other=painted_other,
            wrong=wrong,
            lost=lost,
            again=self._hide(recovered, factors)[1] if self.weights.cycle else anonymized,
        )

    def _autoencoder_loss(self, face: FaceBatch) -> Tensor:
        """Paint the face itself, as far as it can be guessed, under random factors; and mend what opens."""
        spec = KeySpec("bits", self.key_spec.length + self.attributes)
        factors = self.training_keys(spec, face.sample, 0)
        painted, anonymized = self._hide(face.image, factors)
        received = send_straight(anonymized.detach(), self.jpeg, self.global_step, self.jpeg_quality)
        pairs = [(painted, face.image), (self._open(received, factors)[0], face.image)]
        if self.wrong_factors:
            pairs.append(self._open(received, self.training_keys(spec, face.sample, 1)))
        return sum(F.l1_loss(made, wanted) + 0.1 * ms_ssim_loss(made, wanted) for made, wanted in pairs)

    def _classifier_loss(self, face: FaceBatch, legs: Legs | None = None) -> Tensor:
        """Who is who among real faces, and who was who among anonymized and wrongly opened ones."""
        if int(face.identity.max()) >= self.identities:
            raise ValueError(
                f"person number {int(face.identity.max())} does not fit a classifier of {self.identities} identities; "
                "raise `identities`"
            )
        loss = losses.angular_margin(self.classifier(face.image), self.centres, face.identity)
        for hidden in legs.hidden() if legs is not None and self.pursuit else ():
            found = losses.angular_margin(self.classifier(hidden.detach()), self.centres, face.identity)
            loss = loss + self.pursuit * found / len(legs.hidden())
        return loss

    def _estimator_loss(self, image: Tensor, legs: Legs) -> Tensor:
        """Maximum likelihood of q(e_x | e_r) and q(e_a | e_x), on detached features."""
        with torch.no_grad():
            original, anonymized, recovered = (
                self.classifier(x.detach()) for x in (image, legs.anonymized, legs.recovered)
            )
        likely = losses.gaussian_log_likelihood(original, *self.recovered_head(recovered))
        return -(likely + losses.gaussian_log_likelihood(anonymized, *self.hidden_head(original))).mean()

    def _discriminator_loss(self, face: FaceBatch, fakes: list[Tensor]) -> Tensor:
        real, logits = self.discriminator(face.image)
        loss = F.softplus(-real).mean()
        for fake in fakes:
            loss = loss + F.softplus(self.discriminator(fake.detach())[0]).mean() / len(fakes)
        loss = loss + lazy_penalty(self.discriminator, face.image, self.global_step)
        if self.attributes:
            loss = loss + F.binary_cross_entropy_with_logits(logits, (face.attributes[:, : self.attributes] + 1) / 2)
        return loss

    def _generator_terms(self, face: FaceBatch, legs: Legs, factors: Tensor, asked: Tensor) -> dict[str, Tensor]:
        image = face.image
        original, anonymized, recovered, other = (
            self.classifier(x) for x in (image, legs.anonymized, legs.recovered, legs.other)
        )
        bits = self._seen(factors)[:, : self.key_spec.length]
        ramp = min(1.0, self.global_step / max(1, self.information_warmup))
        likely = losses.gaussian_log_likelihood(original, *self.recovered_head(recovered)).mean()
        hidden = losses.club(*(everyone(part) for part in (anonymized, *self.hidden_head(original))))
        self.log_terms({"train/club_nats": hidden})  # as a term it has a weight that grows
        surrogate = image.new_zeros(())
        apart = losses.triplet(original, recovered, anonymized) + _far(anonymized, other)
        if legs.wrong is not None:
            wrong = self.classifier(legs.wrong)
            surrogate = F.l1_loss(legs.wrong, legs.lost)
            apart = apart + losses.triplet(original, recovered, wrong) + _far(anonymized, wrong)
        return self._looks(face, legs.faked(), asked) | {
            "reconstruct": F.l1_loss(legs.recovered, image),
            "structure": ms_ssim_loss(legs.recovered, image),
            "cycle": F.l1_loss(legs.again, legs.anonymized),
            "surrogate": surrogate,
            "triplet": apart,
            "diversity": self._sameness(image, legs.painted, legs.painted_other),
            "recovered_information": -likely,
            "hidden_information": ramp * hidden,
            "password": F.binary_cross_entropy_with_logits(self.password_head(image, legs.anonymized), (bits + 1) / 2),
        }

    def _looks(self, face: FaceBatch, faked: list[Tensor], asked: Tensor) -> dict[str, Tensor]:
        """How faces look that are made for others; the first is a painted one with the attributes asked."""
        judged = [self.discriminator(x) for x in faked]
        attributes = faked[0].new_zeros(())
        if self.attributes:
            attributes = F.binary_cross_entropy_with_logits(judged[0][1], (asked + 1) / 2)
        return {
            "layout": losses.layout(faked[0], face.image),
            "room": losses.room(faked[0]),
            "adversarial": sum(F.softplus(-score).mean() for score, _ in judged) / len(judged),
            "attributes": attributes,
        }

    def _sameness(self, image: Tensor, one: Tensor, two: Tensor) -> Tensor:
        """How much less two painted faces differ than two people of the batch would in this one's place."""
        if not self.weights.diversity:
            return image.new_zeros(())
        with torch.no_grad():
            strangers = [self._within(image, with_means_of(image, neighbours(image, shift))) for shift in (1, 2)]
        return losses.sameness(one, two, losses.apart(*strangers))

    def configure_optimizers(self) -> Any:
        """Adam (0.5, 0.999) for the generator, the discriminator, the classifier and the estimators."""
        return self.adversaries(
            [self.encoder, self.factors, self.decoder, self.password_head, *(self.opener or [])],
            [self.discriminator],
            [self.classifier, self.centres],
            [self.recovered_head, self.hidden_head],
        )


def _far(a: Tensor, b: Tensor) -> Tensor:
    """``mean(max(0, 1 − d))``: two people have nothing in common, but need not be opposites."""
    return (1 - losses.distance(a, b)).clamp(min=0).mean()

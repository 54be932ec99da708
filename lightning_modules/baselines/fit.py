"""FIT (Gu et al., "Password-conditioned Anonymization and Deanonymization with Face Identity Transformers", ECCV 2020).

KNOWN, from the paper and the released code: a ResNet of nine blocks sees the picture and one constant plane of ±0.5 for
each of 16 password bits, and gives a picture; the same network with the negated password takes the anonymized picture
back. Three discriminators by least squares, for anonymized, recovered and wrongly recovered faces; a head reads the
password, four bits at a time, off what went in and what came out; the identity is lost, found and lost; the faces of
two passwords, of two wrong ones, and a wrong one's and the anonymized differ; L1 to the original. Adam 1e-4 (0.5,
0.999), 128 px, 30 epochs of CASIA-WebFace in batches of 48.
OURS: the recogniser stays frozen (theirs is SphereFace, which learns on against the generator), so it is asked in
changing views, and its terms are angles with weights of their own; what is made is painted over the block means of an
oval (:mod:`lightning_modules.networks.translator`), and a first stage learns to paint people there: asked for strangers
from the start, it had painted stripes; discriminators of whole faces with a penalty in the place of PatchGANs, which
stayed at chance in SDN; the norms in the generator; a weight of recovery that grows, so that strangers come first; what
is recovered in training has been saved to 8 bits, or as JPEG.
Shrunk, for a CPU: 64 px, a narrow generator, 1,200 and 900 steps, smaller weights (configs/recipe/fit-cpu.yaml).

It recovers from the saved picture and the password. **16 bits are no secret**: all 65,536 passwords are tried in
minutes, and the opened face most like somebody whom one suspects betrays the right one. No training mends that, and a
passphrase behind the bits does not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.carriers import send_straight
from lightning_modules.keys import KeySpec
from lightning_modules.losses import weighted_sum
from lightning_modules.networks.discriminators import FaceDiscriminator, lazy_penalty
from lightning_modules.networks.translator import Translator
from lightning_modules.networks.views import codes_of
from lightning_modules.optimization import TrainingSteps, seed_of
from lightning_modules.sdn.losses import distance
from lightning_modules.sdn.networks import PasswordHead


@dataclass
class FITWeights:
    """Weight of each term of the generator's loss: the paper's, but for the four of the recogniser and two layouts.

    Those are OURS, the paper's layouts have 10: with the means of blocks given, L1 asks for the original's features.
    The recipe for a CPU has smaller ones of its own.

    Attributes:
        adversarial: Anonymized, recovered and wrongly recovered faces pass for real ones.
        password: Cross-entropy of the password, over its groups of four bits and three pairs of pictures.
        identity: Anonymized and wrongly recovered faces are strangers to the original, the recovered one is not.
        diversity: The faces of two passwords are strangers.
        wrong_diversity: Those that two wrong passwords open are.
        surrogate: The anonymized face and one that is opened wrongly are.
        layout: L1 of the anonymized picture to the original.
        wrong_layout: Of the wrongly recovered one.
        reconstruct: Of the recovered one.
    """

    adversarial: float = 1.0
    password: float = 1.0
    identity: float = 20.0
    diversity: float = 6.0
    wrong_diversity: float = 3.0
    surrogate: float = 3.0
    layout: float = 2.0
    wrong_layout: float = 2.0
    reconstruct: float = 100.0


class Legs(NamedTuple):
    """The pictures of one training step; ``other`` and ``wrong_again`` are of a second password each."""

    original: Tensor
    anonymized: Tensor
    other: Tensor
    recovered: Tensor
    wrong: Tensor
    wrong_again: Tensor


class FIT(TrainingSteps, ReversibleAnonymizer):
    """One network that anonymizes under a password and recovers under its negative.

    Args:
        recognizer: Frozen identity network of the losses.
        size: Pixels of a picture, a multiple of 8; 128 in the paper.
        width: Channels of the generator's first layer; 64 in the paper.
        blocks: Residual blocks of the generator; 9 in the paper.
        discriminator_width: Channels of the discriminators' first layer; ``None``: as ``width``.
        key_bits: Bits of the password, in groups of four; 16 in the paper.
        weights: Weight of each loss term.
        learning_rate: Adam's, for both optimizers.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        warmup: Training steps over which the weight of ``reconstruct`` grows to its full value.
        first: A first stage: ``painter`` paints people where a face is covered, who show their password; ``None``: all
            together.
        jpeg: Share of the training steps that send the anonymized picture as JPEG, not as PNG.
        jpeg_quality: Of that JPEG: 95, 75 or 50.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If ``size`` is no multiple of 8, ``key_bits`` are no groups of four, or ``jpeg`` is no share.
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
        weights: FITWeights = FITWeights(),  # noqa: B008
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
        if key_bits < 4 or key_bits % 4:
            raise ValueError(f"FIT reads passwords four bits at a time: expected a multiple of 4, got {key_bits}")
        if not 0 <= jpeg <= 1:
            raise ValueError(f"jpeg must be a share from 0 to 1, got {jpeg}")
        self.size, self.weights, self.learning_rate = size, weights, learning_rate
        self.warmup, self.first, self.jpeg, self.jpeg_quality = warmup, first, jpeg, jpeg_quality
        self.key_spec = KeySpec("bits", key_bits)
        self.generator = Translator(size, key_bits, width, blocks)
        self.password_head = PasswordHead(width, 16 * (key_bits // 4))
        self.discriminators = nn.ModuleList(FaceDiscriminator(size, discriminator_width or width) for _ in range(3))
        self.recognizer = recognizer.requires_grad_(False)
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``G(x, p)``, for passwords of ±1 ``(B, key_bits)``."""
        return self.generator(face.image, self.key_spec.check(key, len(face.image)) / 2)

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """``G(x̃_a, −p)``."""
        return self.anonymize(face, -key)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Discriminators, then the generator and the head that reads passwords, whose step counts."""
        face = self.fit_size(batch)
        generator, discriminators = self.optimizers()
        keys = [self.training_keys(self.key_spec, face.sample, leg) for leg in range(4)]
        legs = self._painted(face.image, keys[0]) if self.first == "painter" else self._legs(face.image, *keys)
        with self.turn_of(discriminators):
            self.descend(self._discriminator_loss(legs), discriminators, batch_idx)
        with self.turn_of(generator):
            terms = self._adversarial(legs)
            if self.first == "painter":
                terms["layout"] = F.l1_loss(legs.anonymized, face.image)
                terms["password"] = self._read(face.image, legs.anonymized, keys[0])
            else:
                terms |= self._strangers(legs) | self._looks(legs)
                terms["password"] = self._password(legs, right=keys[0], wrong=keys[2])
            loss = weighted_sum(terms, self.weights, partial=self.first is not None)
            self.descend(loss, generator, batch_idx, counts=True)
        self.log_terms({f"train/{name}": term for name, term in terms.items()})

    def _painted(self, image: Image, key: Tensor) -> Legs:
        """What is painted where a face is covered, for all that a discriminator looks at."""
        made = self.generator(image, key / 2, blind=True)
        return Legs(image, *[made] * 5)

    def _legs(self, image: Image, right: Tensor, other: Tensor, wrong: Tensor, wrong_again: Tensor) -> Legs:
        """``x_a = G(x, p)`` and ``G(x, p')``; then ``G(x̃_a, −p)``, and two with wrong passwords."""
        hidden = self.generator(image.repeat(2, 1, 1, 1), torch.cat([right, other]) / 2).chunk(2)
        received = send_straight(hidden[0], self.jpeg, self.global_step, self.jpeg_quality)
        opened = self.generator(received.repeat(3, 1, 1, 1), -torch.cat([right, wrong, wrong_again]) / 2).chunk(3)
        return Legs(image, *hidden, *opened)

    def _judged(self, legs: Legs) -> list[tuple[nn.Module, Tensor]]:
        """Each discriminator, and what it is to tell from faces."""
        return list(zip(self.discriminators, (legs.anonymized, legs.recovered, legs.wrong), strict=True))

    def _discriminator_loss(self, legs: Legs) -> Tensor:
        loss = legs.original.new_zeros(())
        for discriminator, made in self._judged(legs):
            real, fake = discriminator(legs.original)[0], discriminator(made.detach())[0]
            loss = loss + ((real - 1).square().mean() + fake.square().mean()) / 2
            loss = loss + lazy_penalty(discriminator, legs.original, self.global_step)
        return loss / len(self.discriminators)

    def _adversarial(self, legs: Legs) -> dict[str, Tensor]:
        scores = [discriminator(made)[0] for discriminator, made in self._judged(legs)]
        return {"adversarial": sum((score - 1).square().mean() for score in scores) / len(scores)}

    def _strangers(self, legs: Legs) -> dict[str, Tensor]:
        """Who is who to the recogniser."""
        seen = codes_of(self.recognizer, list(legs), seed_of(self.seed, self.global_step))
        x, hidden, other, recovered, wrong, wrong_again = seen
        return {
            "identity": (alike(x, hidden) + distance(x, recovered).mean() + alike(x, wrong)) / 3,
            "diversity": alike(hidden, other),
            "wrong_diversity": alike(wrong, wrong_again),
            "surrogate": alike(hidden, wrong),
        }

    def _looks(self, legs: Legs) -> dict[str, Tensor]:
        ramp = min(1.0, self.global_step / max(1, self.warmup))
        return {
            "layout": F.l1_loss(legs.anonymized, legs.original),
            "wrong_layout": F.l1_loss(legs.wrong, legs.original),
            "reconstruct": ramp * F.l1_loss(legs.recovered, legs.original),
        }

    def _password(self, legs: Legs, right: Tensor, wrong: Tensor) -> Tensor:
        """The numbers that the generator saw, read off what went in and what came out."""
        before = torch.cat([legs.original, legs.anonymized, legs.anonymized])
        after = torch.cat([legs.anonymized, legs.recovered, legs.wrong])
        return 3 * self._read(before, after, torch.cat([right, -right, -wrong]))

    def _read(self, before: Image, after: Image, key: Tensor) -> Tensor:
        """Cross-entropy of passwords ``(B, key_bits)``, in nats a picture."""
        logits = self.password_head(before, after).float().unflatten(1, (-1, 16))
        return F.cross_entropy(logits.mT, fours(key), reduction="none").sum(1).mean()

    def configure_optimizers(self) -> Any:
        """Adam (0.5, 0.999) for the generator with the head, and for the discriminators."""
        return self.adversaries([self.generator, self.password_head], self.discriminators)


def alike(a: Float[Tensor, "batch d"], b: Float[Tensor, "batch d"]) -> Tensor:
    """``mean(max(0, 1 − d))``, d the angle in right angles: strangers are at right angles, not opposites."""
    return (1 - distance(a, b)).clamp(min=0).mean()


def fours(key: Float[Tensor, "batch bits"]) -> Int[Tensor, "batch groups"]:
    """Each four bits of a password as a class of 16, the first bit the highest.

    Example:
        >>> fours(torch.tensor([[-1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]]))
        tensor([[3, 8]])
    """
    return ((key > 0).unflatten(1, (-1, 4)) * key.new_tensor([8, 4, 2, 1]).long()).sum(2)

"""FaceBERT (Im & Seo, "FaceBERT: Face De-Identification Using VQGAN and BERT", ICTC 2022) as a LightningModule.

KNOWN, from its abstract, all that we read of it: a VQGAN learns a codebook of blocks of a picture; pictures are encoded
with it, and a BERT is trained on their tokens; the faces it makes are other ones; FFHQ and CelebA-HQ.
OURS: every size, every weight, that the inner face is masked, by our oval, and written anew from what is around it; the
masks and the rounds (MaskGIT's), the recogniser's features in LPIPS's place, and the cover: an encoder sees far, so
that tokens around a face would tell of it. They are therefore read off a picture whose inner face is painted over, in
training too, and nothing of the inner face reaches the anonymized picture but through what is around it.
Shrunk from the usual sizes of a VQGAN and a BERT to what a CPU trains: 64 px for 256, 8 by 8 tokens for 16 by 16, and
four narrow layers. No key; not reversible: what was covered is gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.keys import KeySpec
from lightning_modules.losses import feature_distance, weighted_sum
from lightning_modules.networks.blocks import oval
from lightning_modules.networks.discriminators import FaceDiscriminator, lazy_penalty
from lightning_modules.networks.token_transformer import TokenTransformer
from lightning_modules.networks.vqgan import Codebook, Decoder, Encoder
from lightning_modules.optimization import TrainingSteps, seed_of
from lightning_modules.paste import paste

DIM = 32  # of a code
SHUFFLED = 4.5  # of the noise on how sure tokens are, which fades over the rounds (MaskGIT)


@dataclass
class FaceBERTWeights:
    """Weight of each term of the first stage (OURS).

    Attributes:
        pixel: L1 of the decoded picture.
        perceptual: Distance of the identity network's features.
        commitment: Squared distance of features to their codes.
        adversarial: Against a discriminator of whole pictures.
    """

    pixel: float = 2.0
    perceptual: float = 0.5
    commitment: float = 0.25
    adversarial: float = 0.05


class FaceBERT(TrainingSteps, ReversibleAnonymizer):
    """Writes the inner face anew, in tokens, from the tokens around it.

    Args:
        recognizer: Frozen identity network; its features are the perceptual term of the first stage.
        size: Pixels of a picture, a power of two times 8.
        cells: Tokens along a side: 8 or 16, at most half of ``size``.
        codes: Codes of the codebook.
        width: Channels of the first layer of the VQGAN.
        discriminator_width: Of the discriminator.
        transformer_width: Of the transformer, a multiple of 32.
        layers: Of the transformer.
        rounds: In how many rounds a face is written, the surest tokens first.
        temperature: Of the draws: lower ones are more usual faces.
        feather: Pixels, beyond the inner face, over which the picture fades in, as a share of the side.
        weights: Weight of each loss term of the first stage.
        first: A first stage: ``tokens`` trains the VQGAN; ``None``: the transformer, on the VQGAN that ``start`` holds.
        warm_up: Steps of the first stage over which codes take the place of features, and the commitment and the
            adversarial term grow to their full weights.
        learning_rate: Adam's, for every optimizer.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients.
        seed: Where masks in training come from, and the draws of each face.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If ``size`` or ``cells`` is no such number.
    """

    reversible = False

    def __init__(
        self,
        recognizer: nn.Module,
        size: int = 64,
        cells: int = 8,
        codes: int = 512,
        width: int = 32,
        discriminator_width: int = 24,
        transformer_width: int = 192,
        layers: int = 4,
        rounds: int = 8,
        temperature: float = 1.0,
        feather: float = 0.06,
        weights: FaceBERTWeights = FaceBERTWeights(),  # noqa: B008
        first: Literal["tokens"] | None = None,
        warm_up: int = 300,
        learning_rate: float = 5e-4,
        decay: bool = False,
        accumulate: int = 1,
        clip: float | None = 1.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        stages = (size // max(cells, 1)).bit_length() - 1
        if cells not in (8, 16) or stages < 1 or size != cells << stages:
            raise ValueError(
                f"FaceBERT has 8 or 16 cells along a side, and pictures of 2, 4, 8 … pixels a cell; got {cells} cells "
                f"and {size} pixels"
            )
        self.recognizer, self.size, self.rounds, self.temperature = recognizer, size, rounds, temperature
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))
        self.weights, self.first, self.warm_up, self.learning_rate = weights, first, warm_up, learning_rate
        self.encoder, self.decoder = Encoder(stages, width, DIM), Decoder(stages, width, DIM)
        self.codebook = Codebook(codes, DIM)
        self.discriminator = FaceDiscriminator(size, discriminator_width)
        self.transformer = TokenTransformer(cells, codes, transformer_width, layers)
        self.register_buffer("window", oval(size), persistent=False)
        self.register_buffer("inner", oval(cells) > 0, persistent=False)
        self.register_buffer("faded", faded(self.window, round(feather * size / 2)), persistent=False)

    # -- the verb -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Another inner face for each, drawn from the seed and its number; there is no key.

        One face at a time: in a batch the last bits of a sum differ, and one of them may tip a draw.
        """
        return torch.cat([self._another(face.image[i : i + 1], int(n)) for i, n in enumerate(face.sample)])

    @torch.no_grad()
    def invert(self, face: FaceBatch) -> Image:
        """Faces through their own tokens: what the codebook can say."""
        return self._decoded(self.codebook.tokens(self._features(face.image))).clamp(-1, 1)

    def _another(self, image: Float[Tensor, "1 3 h w"], sample: int) -> Float[Tensor, "1 3 h w"]:
        around = self.codebook.tokens(self.encoder(self._covered(image)))
        made = self._decoded(self._filled(around, torch.Generator().manual_seed(seed_of(self.seed, sample))))
        return paste(made.clamp(-1, 1), image, self.faded)

    def _filled(self, tokens: Int[Tensor, "1 side side"], random: torch.Generator) -> Int[Tensor, "1 side side"]:
        """Draw the inner tokens in rounds, and keep of each round the surest (Chang et al., 2022, section 3.2)."""
        masked, count = self.inner[None], int(self.inner.sum())
        for at in range(1, self.rounds + 1):
            logits = self.transformer(tokens, masked) / self.temperature
            drawn = (logits + gumbel(logits, random)).argmax(1)
            tokens = torch.where(masked, drawn, tokens)
            likely = logits.log_softmax(1).gather(1, drawn[:, None])[:, 0]
            sure = likely + SHUFFLED * (1 - at / self.rounds) * gumbel(likely, random)
            left = int(count * math.cos(math.pi / 2 * at / self.rounds))  # none after the last round
            order = sure.masked_fill(~masked, math.inf).flatten().argsort()
            masked = torch.zeros_like(masked).flatten().index_fill(0, order[:left], True).view_as(masked)
        return tokens

    def _decoded(self, tokens: Int[Tensor, "batch side side"]) -> Image:
        return self.decoder(self.codebook.codes_of(tokens))

    def _covered(self, image: Image) -> Image:
        """The picture with its inner face painted over, in the mean colour of what is around it."""
        around = 1 - self.window
        colour = (around * image).sum((2, 3), keepdim=True) / around.sum()
        return torch.where(self.window > 0, colour, image)

    def _features(self, image: Image) -> Float[Tensor, "batch dim side side"]:
        """Of the inner cells those of the picture; of the others those of the covered one, as when anonymizing."""
        whole, covered = self.encoder(torch.cat([image, self._covered(image)])).chunk(2)
        return torch.where(self.inner, whole, covered)

    # -- training -----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """See that there are tokens to train on.

        Raises:
            ValueError: If the transformer is to train without a codebook.
        """
        super().on_train_start()
        if self.first is None and self.codebook.empty:
            raise ValueError(
                "FaceBERT's transformer needs a trained codebook: train with first: tokens, and give that as `start`"
            )

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """One training step: of the VQGAN, or of the transformer."""
        face = self.fit_size(batch)
        terms = (self._tokens_step if self.first == "tokens" else self._masked_step)(face, batch_idx)
        self.log_terms({f"train/{name}": term for name, term in terms.items()})

    def _tokens_step(self, face: FaceBatch, batch_idx: int) -> dict[str, Tensor]:
        """The codebook, the discriminator, then encoder and decoder, whose step counts."""
        vqgan, discriminator, _ = self.optimizers()
        ramp = min(1.0, self.global_step / max(1, self.warm_up))
        features = self._features(face.image)
        self.codebook.follow(features)
        codes, commitment = self.codebook(features, ramp)
        made = self.decoder(codes)
        with self.turn_of(discriminator):
            judged = self._discriminator_loss(face.image, made.detach())
            self.descend(judged, discriminator, batch_idx)
        with self.turn_of(vqgan):
            with torch.no_grad():
                _, wanted = self.recognizer.pyramid(face.image)
            terms = {
                "pixel": F.l1_loss(made, face.image),
                "perceptual": feature_distance(self.recognizer.pyramid(made)[1], wanted),
                "commitment": ramp * commitment,
                "adversarial": ramp * F.softplus(-self.discriminator(made)[0]).mean(),
            }
            self.descend(weighted_sum(terms, self.weights), vqgan, batch_idx, counts=True)
        return terms | {"discriminator": judged}

    def _discriminator_loss(self, real: Image, made: Image) -> Tensor:
        loss = F.softplus(-self.discriminator(real)[0]).mean() + F.softplus(self.discriminator(made)[0]).mean()
        return loss + lazy_penalty(self.discriminator, real, self.global_step)

    def _masked_step(self, face: FaceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Mask some tokens of the inner face, and guess them from the others."""
        _, _, optimizer = self.optimizers()
        with torch.no_grad():
            tokens = self.codebook.tokens(self._features(face.image))
        masked = self._masks(face.sample)
        with self.turn_of(optimizer):
            terms = {"masked": masked_cross_entropy(self.transformer(tokens, masked), tokens, masked)}
            self.descend(terms["masked"], optimizer, batch_idx, counts=True)
        return terms

    def _masks(self, sample: Int[Tensor, " batch"]) -> Bool[Tensor, "batch side side"]:
        """Inner cells at random: a share of ``cos(πu/2)`` of them, u uniform, at least one (MaskGIT's)."""
        count = int(self.inner.sum())
        numbers = self.training_keys(KeySpec("normal", 1 + count), sample, 0)
        share = torch.cos(math.pi / 2 * torch.special.ndtr(numbers[:, :1]))
        ranks = numbers[:, 1:].argsort(1).argsort(1)
        masked = self.inner.repeat(len(sample), 1, 1)
        masked[:, self.inner] = ranks < (share * count).ceil()
        return masked

    def configure_optimizers(self) -> Any:
        """Adam (0.5, 0.9) for the VQGAN and its discriminator, (0.9, 0.96) for the transformer, as in their papers."""
        vqgan = [*self.encoder.parameters(), *self.decoder.parameters()]
        groups = [(vqgan, (0.5, 0.9)), (self.discriminator.parameters(), (0.5, 0.9))]
        groups.append((self.transformer.parameters(), (0.9, 0.96)))
        return self.scheduled(*(torch.optim.Adam(p, lr=self.learning_rate, betas=betas) for p, betas in groups))


def masked_cross_entropy(
    logits: Float[Tensor, "batch codes side side"],
    tokens: Int[Tensor, "batch side side"],
    masked: Bool[Tensor, "batch side side"],
) -> Tensor:
    """Cross-entropy of masked tokens in nats: each face's mean over its own, so that processes need not count them."""
    each = F.cross_entropy(logits.float(), tokens, reduction="none") * masked
    return (each.sum((1, 2)) / masked.sum((1, 2)).clamp(min=1)).mean()


def gumbel(like: Tensor, random: torch.Generator) -> Tensor:
    """Gumbel noise: the largest of logits with it is a draw from their softmax."""
    uniform = torch.rand(like.shape, generator=random, dtype=torch.float64)
    return -(-uniform.clamp(min=1e-12).log()).log().to(like)


def faded(window: Float[Tensor, "side side"], reach: int) -> Float[Tensor, "1 1 side side"]:
    """1 in all of a window, and a border that falls to 0 within ``2 · reach`` pixels outside of it.

    Inside it would let the original's inner face through.
    """
    wide = F.max_pool2d(window[None, None], 2 * reach + 1, 1, reach)
    return F.avg_pool2d(wide, 2 * reach + 1, 1, reach, count_include_pad=False)

"""iFADIT, phase 1: split a face into identity and attributes, and put it together over a frozen StyleGAN.

KNOWN (Yuan et al., 2025, arXiv 2501.04390, and its released inference code): the networks, and that identity encoder
and generator are frozen. OURS: this training recipe, after the public identity-disentanglement recipes that the
authors build on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, RoundTrip, resize
from lightning_modules.carriers import through_file
from lightning_modules.ifadit.networks import AttributeEncoder, Fusion
from lightning_modules.keys import KeyRing
from lightning_modules.losses import ms_ssim_loss, weighted_sum
from lightning_modules.optimization import TrainingSteps


@dataclass
class DisentangleWeights:
    """Weight of each term of phase 1 (OURS)."""

    identity: float = 1.0
    pixel: float = 1.0
    structure: float = 0.5
    layout: float = 1.0
    code: float = 1.0
    prior: float = 0.005


class Disentangler(nn.Module):
    """The networks of phase 1 and the way through them, shared by both phases.

    Args:
        generator: Frozen StyleGAN-type generator (W+ in, picture out).
        recognizer: Frozen identity network E_id.
        live_rows: Style rows told apart; the generator's later rows repeat the last. 17 for MobileStyleGAN, whose
            preview head reads the rows from 16 on as one.
        width: Width of the attribute encoder.
        blocks: Residual blocks a stage of the attribute encoder.
    """

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        live_rows: int = 17,
        width: int = 32,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if live_rows > generator.num_layers:
            raise ValueError(f"live_rows is {live_rows}, but this generator has {generator.num_layers} style rows")
        self.generator, self.recognizer = generator, recognizer
        self.attribute_encoder = AttributeEncoder(live_rows, width, blocks)
        self.fusion = Fusion()

    def codes(self, z: Tensor, attributes: Tensor) -> Tensor:
        """W+ codes ``(B, L, 512)`` of identities ``(B, 512)`` with attributes ``(B, live_rows, 512)``."""
        w = self.fusion(z, attributes, self.generator.mean_w)
        rest = self.generator.num_layers - w.shape[1]
        return torch.cat([w, w[:, -1:].expand(-1, rest, -1)], 1)


class IFADITDisentangle(TrainingSteps, ReversibleAnonymizer):
    """Phase 1: reconstruct faces from (identity, attributes), and let the identity be exchanged.

    Args:
        generator: Frozen generator.
        recognizer: Frozen identity network.
        size: Pixels of the pictures, a divisor of the generator's size.
        width: Width of the attribute encoder.
        blocks: Residual blocks a stage of the attribute encoder.
        live_rows: Style rows told apart.
        preview: Train on the generator's preview head, about ten times cheaper; figures are always taken in full.
        latent: Warm start without rendering, on generated faces: only the terms ``code`` and ``prior``.
        weights: Weight of each loss term.
        learning_rate: Adam's.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of the gradients.
        seed: Seed of the training.
        start: Trained weights to start from: a checkpoint, safetensors or a card.
    """

    reversible = False

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        size: int = 256,
        width: int = 32,
        blocks: int = 2,
        live_rows: int = 17,
        preview: bool = True,
        latent: bool = False,
        weights: DisentangleWeights = DisentangleWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        accumulate: int = 1,
        clip: float | None = 1.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start)
        self.size, self.preview, self.weights, self.learning_rate = size, preview, weights, learning_rate
        self.latent = latent
        self.disentangler = Disentangler(generator, recognizer, live_rows, width, blocks)
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))

    def render(self, w: Tensor) -> Image:
        """Pictures of W+ codes: by the preview head while training, in full otherwise."""
        generator = self.disentangler.generator
        return generator(w, size=self.size, preview=True) if self.preview and self.training else generator(w, self.size)

    def invert(self, face: FaceBatch) -> Image:
        """``G(MLP([E_id(x) ; E_att(x)]))``."""
        parts = self.disentangler
        return self.render(parts.codes(parts.recognizer(face.image), parts.attribute_encoder(face.image)))

    @torch.no_grad()
    def round_trip(self, batch: FaceBatch, keys: KeyRing, carrier: str = "png") -> RoundTrip:
        """Phase 1 hides nobody: only the inversion is there to be judged."""
        absent = batch.image.new_zeros((len(batch.image), 0))
        inverted = resize(through_file(self.invert(self.fit_size(batch)), carrier), batch.image.shape[-1])
        legs = dict.fromkeys(("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered"), absent)
        return RoundTrip(
            original=batch.image,
            inverted=inverted,
            identity=batch.identity,
            sample=batch.sample,
            mask=batch.mask,
            **legs,
        )

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Two steps of three reconstruct; every third gives each face the attributes of its neighbour."""
        face = self.fit_size(batch)
        parts, optimizer = self.disentangler, self.optimizers()
        crossed = not self.latent and self.global_step % 3 == 2 and len(face.image) > 1
        with torch.no_grad():
            z = parts.recognizer(face.image)
        source = face.image.roll(1, 0) if crossed else face.image
        w = parts.codes(z, parts.attribute_encoder(source))
        if self.latent:
            terms = self._latent_terms(face, w)
        else:
            terms = self._terms(face, source, z, w, self.render(w), same=not crossed)
        self.descend(weighted_sum(terms, self.weights), optimizer, batch_idx, counts=True)
        kind = "crossed" if crossed else "same"
        self.log_dict({f"train/{kind}/{name}": term.detach() for name, term in terms.items()})

    def _latent_terms(self, face: FaceBatch, w: Tensor) -> dict[str, Tensor]:
        """What can be said of codes alone.

        Raises:
            ValueError: If the faces have no style codes.
        """
        if face.w.shape[-1] != w.shape[-1]:
            raise ValueError("latent: true needs generated faces, whose style codes are known")
        terms = dict.fromkeys(("identity", "pixel", "structure", "layout"), w.new_zeros(()))
        prior = (w - self.disentangler.generator.mean_w).square().mean()
        return {**terms, "code": F.mse_loss(w, face.w), "prior": prior}

    def _terms(
        self, face: FaceBatch, source: Tensor, z: Tensor, w: Tensor, image: Tensor, same: bool
    ) -> dict[str, Tensor]:
        """Identity and layout always; the rest only where the attributes are the face's own."""
        parts, zero = self.disentangler, image.new_zeros(())
        generated = same and face.w.shape[-1] == w.shape[-1]
        return {
            "identity": (1 - F.cosine_similarity(parts.recognizer(image), z)).mean(),
            "pixel": F.mse_loss(image, face.image) if same else zero,
            "structure": 0.84 * ms_ssim_loss(image, face.image) + 0.16 * F.l1_loss(image, face.image) if same else zero,
            # Where the face is and how it is lit: 16-px pictures of the result and of the attributes' source.
            "layout": F.mse_loss(resize(image, 16), resize(source, 16)),
            "code": F.mse_loss(w, face.w) if generated else zero,
            "prior": (w - parts.generator.mean_w).square().mean(),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the attribute encoder and the fusion."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, lr=self.learning_rate)

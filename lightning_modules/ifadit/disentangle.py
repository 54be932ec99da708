"""iFADIT, phase 1: split a face into identity and attributes, and put it together over a frozen StyleGAN.

KNOWN (Yuan et al., 2025, arXiv 2501.04390, and its released inference code): the networks, and that identity encoder
and generator are frozen. OURS: this training recipe, after the public identity-disentanglement recipes that the
authors build on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from datamodules.latent import gallery_codes
from flows.conjugate import Conjugate
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, RoundTrip, resize
from lightning_modules.carriers import quantize, through_file
from lightning_modules.ifadit.networks import AttributeEncoder, Fusion
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.losses import feature_distance, landmark_error, ms_ssim_loss, weighted_sum
from lightning_modules.networks.perceptual import Perceptual, choose
from lightning_modules.optimization import TrainingSteps
from lightning_modules.processes import neighbours


@dataclass
class DisentangleWeights:
    """Weight of each term of phase 1 (OURS); a term of weight 0 is not computed.

    Attributes:
        identity: 1 − cosine of the identity code asked for and the one of the picture rendered.
        pixel: Squared error of the picture, in [-1, 1].
        structure: 0.84 (1 − MS-SSIM) + 0.16 L1.
        perceptual: LPIPS, or where its weights are missing the distance of the identity network's features; curves
            call it by what it was, ``lpips`` or ``features``.
        layout: Squared error of 16-px pictures to whom the attributes come from: where the face is, how it is lit.
        landmarks: Squared error of landmarks to whom the attributes come from, in shares of 1 % of the side.
        code: Squared error of the W+ code, on generated faces.
        echo: The same on the model's own crossed renders, whose codes it knows: what recovery will have to read.
        prior: Squared distance from the mean code.
    """

    identity: float = 1.0
    pixel: float = 1.0
    structure: float = 0.5
    perceptual: float = 0.5
    layout: float = 1.0
    landmarks: float = 0.0
    code: float = 1.0
    echo: float = 0.5
    prior: float = 0.005


Trunk = Literal["own", "recognizer"]


class Disentangler(nn.Module):
    """The networks of phase 1 and the way through them, shared by both phases.

    Args:
        generator: Frozen StyleGAN-type generator (W+ in, picture out).
        recognizer: Frozen identity network E_id.
        live_rows: Style rows told apart; the generator's later rows repeat the last. 17 for MobileStyleGAN, whose
            preview head reads the rows from 16 on as one.
        width: Width of the attribute encoder.
        blocks: Residual blocks a stage of the attribute encoder.
        trunk: ``own``: a residual trunk of that width; ``recognizer``: one that starts from the identity network.
    """

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        live_rows: int = 17,
        width: int = 32,
        blocks: int = 2,
        trunk: Trunk = "own",
    ) -> None:
        super().__init__()
        if live_rows > generator.num_layers:
            raise ValueError(f"live_rows is {live_rows}, but this generator has {generator.num_layers} style rows")
        self.generator, self.recognizer = generator, recognizer
        started = None
        if trunk == "recognizer":
            if not hasattr(recognizer, "stages"):
                raise ValueError(f"trunk: recognizer needs one with stages, such as MobileFaceNet, not {recognizer}")
            started = [copy.deepcopy(stage).requires_grad_(True) for stage in recognizer.stages()]
        self.attribute_encoder = AttributeEncoder(live_rows, width, blocks, trunk=started)
        self.fusion = Fusion()

    def codes(self, z: Tensor, attributes: Tensor) -> Tensor:
        """W+ codes ``(B, L, 512)`` of identities ``(B, 512)`` with attributes ``(B, live_rows, 512)``."""
        w = self.fusion(z, attributes, self.generator.mean_w)
        rest = self.generator.num_layers - w.shape[1]
        return torch.cat([w, w[:, -1:].expand(-1, rest, -1)], 1)

    def encode(self, image: Tensor) -> Tensor:
        """W+ codes of pictures; the identity network gets no gradient from here."""
        with torch.no_grad():
            z = self.recognizer(image)
        return self.codes(z, self.attribute_encoder(image))


@torch.no_grad()
def fit_transform(transform: nn.Module, recognizer: nn.Module, datamodule: LightningDataModule) -> None:
    """Fit a ``conjugate`` transform to the codes of the training faces, if it is one and not fitted yet."""
    if isinstance(transform, Conjugate) and not float(transform.scales[0]) > 0:
        codes, _ = gallery_codes(datamodule, recognizer)
        transform.fit_(codes.to(transform.scales.device))


class IFADITDisentangle(TrainingSteps, ReversibleAnonymizer):
    """Phase 1: reconstruct faces from (identity, attributes), and let the identity be exchanged.

    Args:
        generator: Frozen generator.
        recognizer: Frozen identity network.
        size: Pixels of the pictures, a divisor of the generator's size.
        width: Width of the attribute encoder.
        blocks: Residual blocks a stage of the attribute encoder.
        trunk: Where the attribute encoder's trunk starts: a trunk of its ``own`` or the ``recognizer``'s.
        live_rows: Style rows told apart.
        preview: Train on the generator's preview head, about ten times cheaper; figures are always taken in full.
        latent: Warm start without rendering, on generated faces: only the terms ``code`` and ``prior``.
        crossed_every: One training step of so many is crossed.
        transform: A flow of the room :mod:`flows`: crossed steps then hide each face's identity under a random key
            instead of lending it to the neighbour, so that the generator learns the people whom keys will make.
        perceptual: ``lpips``, ``features`` (of the identity network), or ``auto``: LPIPS where its weights are.
        landmarks: Frozen landmark network, pictures → ``(B, n, 2)`` in shares of the side; needed by that term.
        weights: Weight of each loss term.
        learning_rate: Adam's.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of the gradients.
        seed: Seed of the training.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If the term ``landmarks`` has a weight but no network.
    """

    reversible = False

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        size: int = 256,
        width: int = 32,
        blocks: int = 2,
        trunk: Trunk = "own",
        live_rows: int = 17,
        preview: bool = True,
        latent: bool = False,
        crossed_every: int = 3,
        transform: nn.Module | None = None,
        perceptual: Perceptual = "auto",
        landmarks: nn.Module | None = None,
        weights: DisentangleWeights = DisentangleWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        decay: bool = False,
        accumulate: int = 1,
        clip: float | None = 1.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        if weights.landmarks and landmarks is None:
            raise ValueError(
                f"the term landmarks has the weight {weights.landmarks}, but no landmarks network is given"
            )
        self.size, self.preview, self.weights, self.learning_rate = size, preview, weights, learning_rate
        self.latent, self.crossed_every = latent, crossed_every
        # in a tuple: it only makes strangers to learn from, and is no part of what is learned
        self._transform = () if transform is None else (transform.requires_grad_(False),)
        self.disentangler = Disentangler(generator, recognizer, live_rows, width, blocks, trunk)
        self.landmarks = landmarks
        self.lpips = choose(perceptual) if weights.perceptual and not latent else None
        named = [module for module in (recognizer, landmarks, self.lpips) if module is not None]
        self.loss_networks = frozenset(name for m in named for name in getattr(m, "card_hashes", {}))

    def render(self, w: Tensor) -> Image:
        """Pictures of W+ codes: by the preview head while training, in full otherwise."""
        generator = self.disentangler.generator
        return generator(w, size=self.size, preview=True) if self.preview and self.training else generator(w, self.size)

    def invert(self, face: FaceBatch) -> Image:
        """``G(MLP([E_id(x) ; E_att(x)]))``."""
        return self.render(self.disentangler.encode(face.image))

    @torch.no_grad()
    def round_trip(self, batch: FaceBatch, keys: KeyRing, carrier: str = "png") -> RoundTrip:
        """Phase 1 hides nobody: only the inversion is there to be judged."""
        inverted = resize(through_file(self.invert(self.fit_size(batch)), carrier), batch.image.shape[-1])
        return RoundTrip.of(
            batch.image, inverted=inverted, identity=batch.identity, sample=batch.sample, mask=batch.mask
        )

    def on_fit_start(self) -> None:
        """Fit the transform before the first step."""
        for transform in self._transform:
            fit_transform(transform.to(self.device), self.disentangler.recognizer, self.trainer.datamodule)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Most steps reconstruct; one of ``crossed_every`` gives each face another identity."""
        face = self.fit_size(batch)
        parts, optimizer = self.disentangler, self.optimizers()
        crossed = not self.latent and self.global_step % self.crossed_every == self.crossed_every - 1
        with torch.no_grad():
            z = parts.recognizer(face.image)
            if crossed:
                z = self._strangers(z, face.sample)
        w = parts.codes(z, parts.attribute_encoder(face.image))
        terms = dict.fromkeys((field.name for field in fields(self.weights)), w.new_zeros(()))
        terms["prior"] = (w - parts.generator.mean_w).square().mean()
        if self.latent:
            terms["code"] = self._code(face, w)
        elif crossed:
            terms |= self._crossed(face.image, z, w)
        else:
            terms |= self._same(face, z, w)
        self.descend(weighted_sum(terms, self.weights), optimizer, batch_idx, counts=True)
        kind = "crossed" if crossed else "same"
        names = {"perceptual": "features" if self.lpips is None else "lpips"}
        self.log_terms({f"train/{kind}/{names.get(name, name)}": term for name, term in terms.items()})

    def _strangers(self, z: Tensor, sample: Tensor) -> Tensor:
        """Another identity for each face: its neighbour's, or its own under a random key."""
        for transform in self._transform:
            key = self.training_keys(KeySpec.of(transform), sample, 0)
            return F.normalize(transform(z, key)[0], dim=1)
        return neighbours(z)

    def _code(self, face: FaceBatch, w: Tensor) -> Tensor:
        """Squared error of the codes, which generated faces have.

        Raises:
            ValueError: If the faces have no style codes.
        """
        if face.w.shape[1:] != w.shape[1:]:
            raise ValueError("latent: true needs faces of this very generator, whose style codes are known")
        return F.mse_loss(w, face.w)

    def _same(self, face: FaceBatch, z: Tensor, w: Tensor) -> dict[str, Tensor]:
        """The face with its own identity and attributes: a reconstruction."""
        image, zero = self.render(w), w.new_zeros(())
        met, features = self._pyramid(image)
        with torch.no_grad():
            _, wanted = self._pyramid(face.image)
        return {
            "identity": (1 - F.cosine_similarity(met, z)).mean(),
            "pixel": F.mse_loss(image, face.image),
            "structure": 0.84 * ms_ssim_loss(image, face.image) + 0.16 * F.l1_loss(image, face.image),
            "perceptual": feature_distance(features, wanted) if self.lpips is None else self.lpips(image, face.image),
            "landmarks": landmark_error(self.landmarks, image, face.image).mean(),
            "code": self._code(face, w) if face.w.shape[1:] == w.shape[1:] else zero,
        }

    def _crossed(self, source: Tensor, z: Tensor, w: Tensor) -> dict[str, Tensor]:
        """One face's identity with another's attributes; the result, encoded again, must give its code back."""
        parts, image = self.disentangler, self.render(w)
        terms = {
            "identity": (1 - F.cosine_similarity(parts.recognizer(image), z)).mean(),
            "layout": F.mse_loss(resize(image, 16), resize(source, 16)),
            "landmarks": landmark_error(self.landmarks, image, source).mean(),
        }
        if self.weights.echo:
            again = parts.encode(quantize(image.detach()))
            terms["echo"] = F.mse_loss(again, w.detach())
        return terms

    def _pyramid(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Identity codes, and features where the perceptual term wants them."""
        recognizer = self.disentangler.recognizer
        if self.lpips is None and self.weights.perceptual:
            return recognizer.pyramid(image)
        return recognizer(image), []

    def configure_optimizers(self) -> Any:
        """Adam over the attribute encoder and the fusion."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return self.scheduled(torch.optim.Adam(parameters, lr=self.learning_rate))

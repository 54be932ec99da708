"""iFADIT, phase 2: hide the identity code by a keyed transform, and bring it back from the saved picture.

KNOWN: the pipeline (anonymize, recover, ICL before the inverse only), the push/pull losses, the names of the terms and
of the ablations, and that the rendered face is pasted by a soft mask. OURS: the loss weights, the ``inject`` and
``icl`` terms, every transform but ``flow``, the latent warm start, refinement and polish, and that a recovered face is
pasted on the anonymized picture, the only one a recipient has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, resize
from lightning_modules.carriers import send_straight
from lightning_modules.ifadit.disentangle import Disentangler, Trunk, fit_transform
from lightning_modules.ifadit.networks import Compensation
from lightning_modules.ifadit.refine import polish, refine
from lightning_modules.keys import KeySpec
from lightning_modules.losses import feature_distance, landmark_error, pull_together, push_apart, spread, weighted_sum
from lightning_modules.networks.perceptual import Perceptual, choose
from lightning_modules.optimization import TrainingSteps
from lightning_modules.paste import finish, seam
from lightning_modules.processes import everyone, neighbours
from lightning_modules.trained import load_trained

Aim = Callable[[Tensor], Tensor]

SEAM = 3.0  # weight of the seam in the refinement of a pasted face: outlines agree, and faces still carry their codes
POLISHED = 10.0  # weight of the style codes while pixels are polished: at 1, pose and glasses got lost beside who it is
# Weight of the landmarks of the picture at hand in the refinement of recovered and inverted faces. Anonymized ones go
# without: held to the original's, two keys' people are too much alike (2 of 32 pairs taken for one by faceres).
POSE = 0.02
TRUNCATION = 0.75  # where refinement starts, between the mean face and what the codes say: of an odd face stays less


@dataclass
class TransformWeights:
    """Weight of each term of phase 2 (OURS, after RiDDLE); 0 is the ablation of a term.

    Attributes:
        privacy: Push the identities of x and of what two keys make of it apart.
        diversity: Push two keys' people apart, and the people of a batch.
        security: Push apart what wrong keys open, the original and what the right key opens.
        recovery: Pull the original and what the right key opens together, as code and as picture.
        image: L1 of the recovered picture to the original, and 0.05 of the anonymized ones'.
        perceptual: LPIPS of the recovered picture, or the identity network's features where its weights are missing.
        parsing: Squared error of landmarks of every leg, in units of 1 % of the side; a stand-in for parsing logits.
        inject: The rendered face must carry the code it was given.
        icl: What is read from the saved picture, compensated, must be the code that was hidden in it.
        norm: ``(log ‖z_a‖)²``: a re-encoded face carries no length, so a flow must not hide anything in it.
    """

    privacy: float = 1.0
    diversity: float = 1.0
    security: float = 1.0
    recovery: float = 1.0
    image: float = 1.0
    perceptual: float = 0.5
    parsing: float = 0.0
    inject: float = 1.0
    icl: float = 1.0
    norm: float = 0.1


class IFADITTransform(TrainingSteps, ReversibleAnonymizer):
    """The whole method: encode, hide the identity under a key, render; and back from the saved picture.

    Args:
        generator: Frozen generator.
        recognizer: Frozen identity network.
        transform: A flow with ``forward(z, key)`` and ``inverse(z, key)`` of the room :mod:`flows`.
        disentangled: Weights of phase 1 (a checkpoint, safetensors or a card); ``None`` takes those of a checkpoint
            loaded later, or leaves phase 1 untrained.
        size: Pixels of the pictures.
        width: Width of the attribute encoder, as in phase 1.
        blocks: Residual blocks a stage of the attribute encoder, as in phase 1.
        trunk: Where the encoder's trunk starts, as in phase 1.
        live_rows: Style rows told apart, as in phase 1.
        preview: Render by the preview head: ``train`` (figures in full), ``always`` or ``never``.
        mask: Finds the region of the faces of the picture at hand and of the rendered one, ``(B, 3, H, W)`` twice →
            ``(B, 1, H, W)``, for pasting the one into the other (:class:`lightning_modules.paste.FaceMask`); ``None``
            hands out the rendered picture whole.
        refine: Steps of optimisation a picture, of its style codes: an anonymized one until it gives a recipient
            with the key the original's codes, a recovered one towards the identity code that was opened.
        polish: Steps of optimisation an anonymized picture, of its pixels by at most five grey levels, after that.
        icl_sees_key: Whether the compensation reads the key; for transforms with an approximate inverse.
        one_stage: Train phase 1's networks along with the transform (an ablation).
        latent: Warm start without pictures, on the identity codes of a
            :class:`datamodules.latent.LatentDataModule`.
        jpeg: Share of the training steps that send the anonymized picture as JPEG of quality 75, not as PNG.
        perceptual: ``lpips``, ``features`` (of the identity network), or ``auto``: LPIPS where its weights are.
        landmarks: Frozen landmark network, pictures → ``(B, n, 2)`` in shares of the side: refined faces that are
            recovered keep the points of the anonymized picture. Needed by ``parsing``.
        weights: Weight of each loss term.
        learning_rate: Adam's.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of the gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.

    Raises:
        ValueError: If an option is out of its range, or ``parsing`` has a weight but no landmark network.
    """

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        transform: nn.Module,
        disentangled: str | Path | None = None,
        size: int = 256,
        width: int = 32,
        blocks: int = 2,
        trunk: Trunk = "own",
        live_rows: int = 17,
        preview: str = "train",
        mask: nn.Module | None = None,
        refine: int = 0,
        polish: int = 0,
        icl_sees_key: bool = False,
        one_stage: bool = False,
        latent: bool = False,
        jpeg: float = 0.0,
        perceptual: Perceptual = "auto",
        landmarks: nn.Module | None = None,
        weights: TransformWeights = TransformWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        decay: bool = False,
        accumulate: int = 1,
        clip: float | None = 1.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        if preview not in ("train", "always", "never"):
            raise ValueError(f"preview must be train, always or never, got {preview!r}")
        if min(refine, polish) < 0 or not 0 <= jpeg <= 1:
            raise ValueError(
                f"refine and polish must be at least 0 and jpeg a share from 0 to 1, got {refine}, {polish} and {jpeg}"
            )
        if weights.parsing and landmarks is None:
            raise ValueError(f"the term parsing has the weight {weights.parsing}, but no landmarks network is given")
        self.size, self.preview, self.weights, self.learning_rate = size, preview, weights, learning_rate
        self.mask, self.refine, self.polish, self.latent, self.jpeg = mask, refine, polish, latent, jpeg
        self.disentangler = Disentangler(generator, recognizer, live_rows, width, blocks, trunk)
        if disentangled is not None:
            load_trained(self, disentangled, prefix="disentangler.")
        if not one_stage:
            self.disentangler.requires_grad_(False)
        self.key_spec = KeySpec.of(transform)
        self.transform = transform
        self.icl_sees_key = icl_sees_key
        self.compensation = Compensation(transform.key_length if icl_sees_key else 0)
        self.landmarks = landmarks
        self.lpips = choose(perceptual) if weights.perceptual and not latent else None
        named = [module for module in (recognizer, landmarks, self.lpips) if module is not None]
        self.loss_networks = frozenset(name for m in named for name in getattr(m, "card_hashes", {}))

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``paste(G(MLP([F(E_id(x) | k) ; E_att(x)])), x)``."""
        z, attributes = self.identity(face.image), self.attributes_of(face.image)
        hidden, _ = self.transform(z, self.key_spec.check(key, len(face.image)))
        if self.training or not (self.refine or self.polish):
            return self.compose(hidden, attributes, face.image)
        # not z itself: what a transform drops, such as the lengths of bands, a stranger could link by
        left = self.open(hidden, key)
        aim = partial(self._comes_back, left, self.disentangler.codes(left, attributes), key)
        made = self.compose(hidden, attributes, face.image, aim)
        if not self.polish:
            return made
        mask = None if self.mask is None else self.mask(face.image, made)
        return polish(made, partial(aim, styles=POLISHED), self.polish, mask)

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """``paste(G(MLP([F⁻¹(ICL(E_id(x̃_a)) | k) ; E_att(x̃_a)])), x̃_a)``: the saved picture and the key are all."""
        code = self.compensate(self.identity(face.image), key)
        return self.compose(self.open(code, key), self.attributes_of(face.image), face.image)

    def code_of(self, face: FaceBatch) -> Tensor:
        """Identity codes ``(B, 512)``."""
        return self.identity(face.image)

    def recover_from(self, face: FaceBatch, code: Tensor) -> Image:
        """Bring faces back by their own identity codes ``(B, 512)``: only attributes are read off the pictures."""
        return self.compose(code, self.attributes_of(face.image), face.image)

    def invert(self, face: FaceBatch) -> Image:
        """The auto-encoding of the face, the bound of any recovery."""
        return self.compose(self.identity(face.image), self.attributes_of(face.image), face.image)

    def identity(self, image: Image) -> Tensor:
        """Unit identity codes ``(B, 512)``."""
        return self.disentangler.recognizer(image)

    def attributes_of(self, image: Image) -> Tensor:
        """Attribute codes ``(B, live_rows, 512)``."""
        return self.disentangler.attribute_encoder(image)

    def compensate(self, read: Tensor, key: Tensor) -> Tensor:
        """The code hidden in a picture, as well as it can be told from the unit code ``(B, 512)`` read from it."""
        return self.compensation(read, self.key_spec.check(key, len(read)) if self.icl_sees_key else None)

    def open(self, code: Tensor, key: Tensor) -> Tensor:
        """Undo the transform: unit codes ``(B, 512)``."""
        return F.normalize(self.transform.inverse(code, self.key_spec.check(key, len(code)))[0], dim=1)

    def compose(self, z: Tensor, attributes: Tensor, picture: Image, aim: Aim | None = None) -> Image:
        """Render an identity with attributes, and paste it where the face of ``picture`` is.

        Args:
            z: Identity codes ``(B, 512)`` of any length.
            attributes: Attribute codes ``(B, live_rows, 512)``.
            picture: Pictures ``(B, 3, size, size)`` to paste into.
            aim: What ``refine`` strives for: pictures → ``(B,)``; ``None``: that they carry ``z``, and the landmarks of
                ``picture``.
        """
        z, parts = F.normalize(z, dim=1), self.disentangler
        w = parts.codes(z, attributes)
        if self.refine and not self.training:
            mean = parts.generator.mean_w
            w = mean + TRUNCATION * (w - mean)
            mask = None if self.mask is None else self.mask(picture, self._render(w))

            def missed(image: Image) -> Tensor:
                pasted = finish(resize(image, self.size), picture, mask)
                if aim is None:
                    loss = self._carries(z, pasted) + POSE * landmark_error(self.landmarks, pasted, picture)
                else:
                    loss = aim(pasted)
                return loss if mask is None else loss + SEAM * seam(pasted, picture, mask)

            w = refine(parts.generator, w, missed, self.refine)
        rendered = self._render(w)
        return finish(rendered, picture, None if self.mask is None else self.mask(picture, rendered))

    def _render(self, w: Tensor) -> Image:
        preview = self.preview == "always" or (self.preview == "train" and self.training)
        return self.disentangler.generator(w, size=self.size, **({"preview": True} if preview else {}))

    def _carries(self, z: Tensor, image: Image) -> Tensor:
        """How far pictures and their mirror images are from carrying a code, ``(B,)``.

        Nobody reads the mirror image, but what a network sees in both of them is more likely a face, and less likely a
        pattern that it alone takes for one.
        """
        views = (image, image.flip(-1))
        return sum(1 - F.cosine_similarity(self.identity(view), z) for view in views) / len(views)

    def _comes_back(self, z: Tensor, wanted: Tensor, key: Tensor, image: Image, styles: float = 1.0) -> Tensor:
        """How far what a recipient gets is from the best to be had, ``(B,)``: code ``z`` and style codes ``wanted``."""
        opened = self.open(self.compensate(self.identity(image), key), key)
        met = self.disentangler.codes(z, self.attributes_of(image))
        return 1 - F.cosine_similarity(opened, z) + styles * (met - wanted).square().mean((1, 2))

    # -- training -----------------------------------------------------------------------------------------------

    def prepare(self, datamodule: LightningDataModule) -> None:
        """Fit a ``conjugate`` transform to the training faces, once."""
        fit_transform(self.transform, self.disentangler.recognizer, datamodule)

    def on_fit_start(self) -> None:
        """Fit the transform before the first step."""
        with torch.no_grad():
            self.prepare(self.trainer.datamodule)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Hide under two keys, save, open with the right key and with two wrong ones."""
        keys = [self.training_keys(self.key_spec, batch.sample, leg) for leg in range(4)]
        found = self._latent_terms(batch, *keys) if self.latent else self._terms(self.fit_size(batch), *keys)
        zero = next(iter(found.values())).new_zeros(())
        terms = {field.name: found.get(field.name, zero) for field in fields(self.weights)}
        self.descend(weighted_sum(terms, self.weights), self.optimizers(), batch_idx, counts=True)
        names = {"perceptual": "features" if self.lpips is None else "lpips"}
        self.log_terms({f"train/{names.get(name, name)}": term for name, term in terms.items()})

    def _terms(self, face: FaceBatch, right: Tensor, other: Tensor, *wrong: Tensor) -> dict[str, Tensor]:
        """The terms of methods.md 1.3, on pictures; a leg that only terms of weight 0 ask for is not rendered."""
        with torch.no_grad():
            z = self.identity(face.image)
        # a fitted transform gets no gradient: half of the renders then need none
        frozen = not any(p.requires_grad for part in (self.transform, self.disentangler) for p in part.parameters())
        with torch.set_grad_enabled(not frozen):
            attributes = self.attributes_of(face.image)
            hidden, hidden2 = self.transform(z, right)[0], self.transform(z, other)[0]
            legs = [self.compose(hidden, attributes, face.image)]
            if self._asked("diversity"):
                legs.append(self.compose(hidden2, attributes, face.image))
            met = [self.identity(leg) for leg in legs]
        received = send_straight(legs[0], self.jpeg, self.global_step)
        read = self.identity(received)
        code = self.compensate(read, right)
        opened = self.open(code, right)
        terms = {
            "inject": sum((1 - F.cosine_similarity(a, b)).mean() for a, b in zip(met, (hidden, hidden2), strict=False)),
            "icl": self._icl(code, hidden),
            "recovery": (1 - F.cosine_similarity(z, opened)).mean(),
            "norm": self._norm(z, hidden, right),
        }
        met_again = opened
        if self._asked("recovery", "image", "perceptual", "parsing", "security"):
            recovered = self.compose(opened, self.attributes_of(received), received)
            met_again, terms["perceptual"] = self._look(recovered, face.image)
            terms["recovery"] = terms["recovery"] + pull_together(z, met_again)
            terms["image"] = F.l1_loss(recovered, face.image) + 0.05 * sum(F.l1_loss(leg, face.image) for leg in legs)
            terms["parsing"] = sum(landmark_error(self.landmarks, leg, face.image).mean() for leg in (*legs, recovered))
        # wrong openings are judged in code space: no picture is spent
        lost = [self.open(self.compensate(read, key), key) for key in wrong]
        return terms | self._code_terms(z, met, met_again, lost)

    def _asked(self, *terms: str) -> bool:
        return any(getattr(self.weights, term) for term in terms)

    def _latent_terms(self, face: FaceBatch, right: Tensor, other: Tensor, *wrong: Tensor) -> dict[str, Tensor]:
        """The terms that need no picture; rendering and encoding again is a step towards another person's code.

        Raises:
            ValueError: If the batch holds pictures and no codes.
        """
        if not face.z.shape[-1]:
            raise ValueError("latent: true needs identity codes: a datamodules.latent.LatentDataModule")
        z = F.normalize(face.z, dim=1)
        hidden, hidden2 = self.transform(z, right)[0], self.transform(z, other)[0]
        # as far off as a rendered face's code is from the one it was given: a cosine of about 0.8
        received = F.normalize(F.normalize(hidden, dim=1) + 0.75 * neighbours(z), dim=1)
        code = self.compensate(received, right)
        opened = self.open(code, right)
        lost = [self.open(self.compensate(received, key), key) for key in wrong]
        return self._code_terms(z, [hidden, hidden2], opened, lost) | {
            "recovery": (1 - F.cosine_similarity(z, opened)).mean(),
            "icl": self._icl(code, hidden),
            "norm": self._norm(z, hidden, right),
        }

    def _code_terms(self, z: Tensor, met: list[Tensor], met_again: Tensor, lost: list[Tensor]) -> dict[str, Tensor]:
        """Privacy, diversity and security of identities."""
        strangers = [z, met_again, *lost]
        pairs = [(a, b) for i, a in enumerate(strangers) for b in strangers[i + 1 :]][1:]  # all but (x, x_r)
        return {
            "privacy": sum(push_apart(z, code) for code in met),
            "diversity": (push_apart(*met) if len(met) > 1 else 0) + spread(everyone(met[0])),
            "security": sum(push_apart(a, b) for a, b in pairs) / len(pairs),
        }

    def _norm(self, z: Tensor, hidden: Tensor, key: Tensor) -> Tensor:
        """``sphere`` hands out unit codes and knows what length it took from them."""
        if hasattr(self.transform, "norm_penalty"):
            return self.transform.norm_penalty(z, key)
        return hidden.norm(dim=1).log().square().mean()

    @staticmethod
    def _icl(code: Tensor, hidden: Tensor) -> Tensor:
        wanted = F.normalize(hidden, dim=1)
        return (code - wanted).square().sum(1).mean() + (1 - F.cosine_similarity(code, wanted)).mean()

    def _look(self, image: Image, target: Image) -> tuple[Tensor, Tensor]:
        """Identity codes of ``image``, and its perceptual distance to ``target``."""
        if not self.weights.perceptual:
            return self.identity(image), image.new_zeros(())
        if self.lpips is not None:
            return self.identity(image), self.lpips(image, target)
        with torch.no_grad():
            _, wanted = self.disentangler.recognizer.pyramid(target)
        codes, features = self.disentangler.recognizer.pyramid(image)
        return codes, feature_distance(features, wanted)

    def configure_optimizers(self) -> Any:
        """Adam over what is trained: the flow, if it learns, and the compensation."""
        return self.scheduled(
            torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)
        )

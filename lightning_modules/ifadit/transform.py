"""iFADIT, phase 2: hide the identity code by a keyed transform, and bring it back from the saved picture.

KNOWN: the pipeline (anonymize, recover, ICL before the inverse only) and the push/pull losses. OURS: the loss weights,
the ``inject`` and ``icl`` terms, and every transform but ``flow``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from flows.conjugate import Conjugate
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.carriers import quantize
from lightning_modules.ifadit.disentangle import Disentangler
from lightning_modules.ifadit.networks import Compensation
from lightning_modules.keys import KeySpec
from lightning_modules.losses import pull_together, push_apart, spread, weighted_sum
from lightning_modules.optimization import TrainingSteps
from lightning_modules.trained import load_trained


@dataclass
class TransformWeights:
    """Weight of each term of phase 2 (OURS, after RiDDLE)."""

    privacy: float = 1.0
    diversity: float = 1.0
    security: float = 1.0
    recovery: float = 1.0
    image: float = 1.0
    inject: float = 1.0
    icl: float = 1.0


class IFADITTransform(TrainingSteps, ReversibleAnonymizer):
    """The whole method: encode, hide the identity under a key, render; and back from the saved picture.

    Args:
        generator: Frozen generator.
        recognizer: Frozen identity network.
        transform: A flow with ``forward(z, key)`` and ``inverse(z, key)``: :class:`flows.coupling.KeyedCoupling` as
            published, or :class:`flows.conjugate.Conjugate`.
        disentangled: Weights of phase 1 (a checkpoint, safetensors or a card); ``None`` takes those of a checkpoint
            loaded later, or leaves phase 1 untrained.
        size: Pixels of the pictures.
        width: Width of the attribute encoder, as in phase 1.
        blocks: Residual blocks a stage of the attribute encoder, as in phase 1.
        live_rows: Style rows told apart, as in phase 1.
        preview: Render by the preview head: ``train`` (figures in full), ``always`` or ``never``.
        weights: Weight of each loss term.
        learning_rate: Adam's.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of the gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.
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
        live_rows: int = 17,
        preview: str = "train",
        weights: TransformWeights = TransformWeights(),  # noqa: B008
        learning_rate: float = 1e-4,
        accumulate: int = 1,
        clip: float | None = 1.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start)
        if preview not in ("train", "always", "never"):
            raise ValueError(f"preview must be train, always or never, got {preview!r}")
        self.size, self.preview, self.weights, self.learning_rate = size, preview, weights, learning_rate
        self.disentangler = Disentangler(generator, recognizer, live_rows, width, blocks)
        if disentangled is not None:
            load_trained(self, disentangled, prefix="disentangler.")
        self.disentangler.requires_grad_(False)
        self.transform, self.compensation = transform, Compensation()
        self.key_spec = KeySpec(transform.key_kind, transform.key_length)
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``G(MLP([F(E_id(x) | k) ; E_att(x)]))``."""
        hidden, _ = self.transform(self.identity(face.image), self.key_spec.check(key, len(face.image)))
        return self._compose(hidden, self._attributes(face.image))

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """``G(MLP([F⁻¹(ICL(E_id(x̃_a)) | k) ; E_att(x̃_a)]))``: the saved picture and the key are all it takes."""
        return self._compose(self._open(face.image, key), self._attributes(face.image))

    def invert(self, face: FaceBatch) -> Image:
        """The auto-encoding of the face, the bound of any recovery."""
        return self._compose(self.identity(face.image), self._attributes(face.image))

    def identity(self, image: Image) -> Tensor:
        """Unit identity codes ``(B, 512)``."""
        return self.disentangler.recognizer(image)

    def _attributes(self, image: Image) -> Tensor:
        return self.disentangler.attribute_encoder(image)

    def _open(self, image: Image, key: Tensor) -> Tensor:
        code = self.compensation(self.identity(image))
        return F.normalize(self.transform.inverse(code, self.key_spec.check(key, len(image)))[0], dim=1)

    def _compose(self, z: Tensor, attributes: Tensor) -> Image:
        preview = self.preview == "always" or (self.preview == "train" and self.training)
        w = self.disentangler.codes(F.normalize(z, dim=1), attributes)
        generator = self.disentangler.generator
        return generator(w, size=self.size, preview=True) if preview else generator(w, size=self.size)

    # -- training -----------------------------------------------------------------------------------------------

    def prepare(self, datamodule: LightningDataModule) -> None:
        """Fit the linear transform to the training faces, once: seconds, and nothing else is learned here."""
        if not isinstance(self.transform, Conjugate) or float(self.transform.scales[0]) > 0:
            return
        codes = [self.identity(self.fit_size(batch).image.to(self.device)) for batch in datamodule.gallery_dataloader()]
        self.transform.fit_(torch.cat(codes))

    def on_fit_start(self) -> None:
        """Fit the transform before the first step."""
        with torch.no_grad():
            self.prepare(self.trainer.datamodule)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Hide under two keys, save, open with the right key and with two wrong ones."""
        face, optimizer = self.fit_size(batch), self.optimizers()
        right, other, wrong, wrong2 = (self.training_keys(self.key_spec, face.sample, leg) for leg in range(4))
        with torch.no_grad():
            z, attributes = self.identity(face.image), self._attributes(face.image)
        learns = any(p.requires_grad for p in self.transform.parameters())
        with torch.set_grad_enabled(learns):  # a fitted transform gets no gradient: half of the renders need none
            hidden, hidden2 = self.transform(z, right)[0], self.transform(z, other)[0]
            anonymized, anonymized2 = self._compose(hidden, attributes), self._compose(hidden2, attributes)
        received = quantize(anonymized)
        code, attributes_again = self.compensation(self.identity(received)), self._attributes(received)
        opened, opened3, opened4 = (
            F.normalize(self.transform.inverse(code, key)[0], dim=1) for key in (right, wrong, wrong2)
        )
        recovered = self._compose(opened, attributes_again)
        met, met2, met_again = (self.identity(x) for x in (anonymized, anonymized2, recovered))
        strangers = [
            z,
            met_again,
            opened3,
            opened4,
        ]  # wrong openings are judged in code space: no picture is spent
        pairs = [(a, b) for i, a in enumerate(strangers) for b in strangers[i + 1 :]][1:]  # all but (x, x_r)
        terms = {
            "privacy": push_apart(z, met) + push_apart(z, met2),
            "diversity": push_apart(met, met2) + spread(met),
            "security": sum(push_apart(a, b) for a, b in pairs) / len(pairs),
            "recovery": pull_together(z, met_again) + (1 - F.cosine_similarity(z, opened)).mean(),
            "image": F.l1_loss(recovered, face.image),
            "inject": (1 - F.cosine_similarity(met, hidden)).mean(),
            "icl": (code - F.normalize(hidden, dim=1)).square().sum(1).mean()
            + (1 - F.cosine_similarity(code, hidden)).mean(),
        }
        self.descend(weighted_sum(terms, self.weights), optimizer, batch_idx, counts=True)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over what is trained: the flow, if it learns, and the compensation."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)

"""RiDDLE (Li et al., "Reversible and Diversified De-identification with Latent Encryptor", CVPR 2023).

KNOWN, from the paper and its released code: a face becomes a W+ code (e4e, cached), a password a normal vector that the
generator's own mapping network turns into w_k; one transformer decoder layer (4 heads, 1024 inside) for each of the
coarse, middle and fine rows, 4, 4 and 6 of 14, reads the face's rows and attends to the password's; the same layers
decrypt. Two encryptions, one right and two wrong decryptions a step; losses push identities apart down to a cosine of
0.1, pull the recovered one to the original, and keep pictures alike (LPIPS 1, L1 0.05). Recovery starts from the
encrypted code itself, which has to be kept: rendered and inverted again it is another one.

OURS: the generator, and iFADIT's first phase as inversion, whose 17 live rows fall into 7, 6 and 4; a learned place for
each row, since equal password rows leave attention nothing to choose; layers that begin as a mirror at the mean code,
which is nearly its own inverse; recovery from the picture alone (``path: picture``) beside that from the kept code.
Shrunk for a CPU: 256 inside, codes of 6,702 faces, and most steps in latent space (``latent``), where a linear
regression reads the identity off a code in place of a render and a recogniser: what phase 1 was asked for it reads of
faces it has not seen to a cosine of 0.98, and what a recogniser sees in their previews agrees to 0.73. A short second
stage renders.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from datamodules.latent import gallery_codes
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, resize
from lightning_modules.baselines.code_reading import Reading
from lightning_modules.baselines.inversion import Identities, Inversion, Rows
from lightning_modules.ifadit.disentangle import Trunk
from lightning_modules.ifadit.networks import CODE
from lightning_modules.keys import KeySpec
from lightning_modules.losses import feature_distance, pull_together, push_apart, spread, weighted_sum
from lightning_modules.networks.latent_encryptor import LatentEncryptor
from lightning_modules.optimization import TrainingSteps
from lightning_modules.paste import finish
from lightning_modules.processes import everyone

READ = 4096  # faces that the regressions are fitted to, at most


@dataclass
class RiDDLEWeights:
    """Weight of each term (OURS, after the released script).

    Attributes:
        privacy: Push the identities of x and of what two passwords make of it apart.
        diversity: Push two passwords' people apart, and the people of a batch.
        security: Push apart what wrong passwords open, the original and what the right one opens.
        recovery: Pull the identities of the original and of what the right password opens together.
        code: Squared error of the code that the right password opens.
        attributes: Squared error of what else changes in a code than a change of identity explains; every other leg.
        believable: How much stranger than usual the people are, as identity codes go; every other leg.
        image: L1 of the recovered picture to the original's render, and 0.05 of the other legs'.
        perceptual: Distance of the identity network's features of these two (LPIPS in the paper, on every leg).
        layout: Squared error of the other legs' 16-px pictures.
    """

    privacy: float = 1.0
    diversity: float = 1.0
    security: float = 1.0
    recovery: float = 1.0
    code: float = 10.0
    attributes: float = 3.0
    believable: float = 0.1
    image: float = 1.0
    perceptual: float = 0.5
    layout: float = 1.0


class RiDDLE(TrainingSteps, ReversibleAnonymizer):
    """Encrypt a face's style code under a password, and decrypt it by the same network.

    Args:
        generator: Frozen generator with a mapping network, ``sample_w(z, truncation)``.
        recognizer: Frozen identity network.
        disentangled: Weights of iFADIT's first phase, as for :class:`Inversion`.
        path: What recovery starts from: the ``latent`` that is kept beside the picture, or the ``picture`` alone.
        size: Pixels of the pictures, a divisor of the generator's size.
        trunk: Where the encoder's trunk starts, as in phase 1.
        width: Width of the attribute encoder, as in phase 1.
        blocks: Residual blocks a stage of it, as in phase 1.
        live_rows: Style rows told apart, as in phase 1.
        inside: Width of the mapper's feed-forward parts.
        mask: Finds the region to paste (:class:`lightning_modules.paste.FaceMask`); ``None`` hands out the rendered
            picture whole.
        latent: Train without rendering: the identity is read off codes.
        preview: Pixels of the previews to train on otherwise.
        weights: Weight of each loss term.
        learning_rate: Adam's.
        decay: Let it fall to zero along a cosine over ``trainer.max_steps``.
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of the gradients.
        seed: Where training keys come from.
        start: Trained weights to start from: a checkpoint, safetensors or a card.
    """

    key_spec = KeySpec("normal", CODE)

    def __init__(
        self,
        generator: nn.Module,
        recognizer: nn.Module,
        disentangled: str | Path | None = None,
        path: Literal["latent", "picture"] = "latent",
        size: int = 256,
        trunk: Trunk = "recognizer",
        width: int = 32,
        blocks: int = 2,
        live_rows: int = 17,
        inside: int = 1024,
        mask: nn.Module | None = None,
        latent: bool = False,
        preview: int = 128,
        weights: RiDDLEWeights = RiDDLEWeights(),  # noqa: B008
        learning_rate: float = 5e-4,
        decay: bool = False,
        accumulate: int = 1,
        clip: float | None = 1.0,
        seed: int = 0,
        start: str | Path | None = None,
    ) -> None:
        super().__init__(accumulate=accumulate, clip=clip, seed=seed, start=start, decay=decay)
        self.path, self.size, self.mask, self.latent, self.preview = path, size, mask, latent, preview
        self.weights, self.learning_rate = weights, learning_rate
        self.inversion = Inversion(generator, recognizer, disentangled, trunk, width, blocks, live_rows)
        self.trained_on = self.inversion.trained_on
        levels = self.inversion.disentangler.attribute_encoder.level_of_row
        self.encryptor = LatentEncryptor([levels.count(level) for level in range(3)], inside=inside)
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))
        self._reading: Reading | None = None

    # -- the two verbs ------------------------------------------------------------------------------------------

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``paste(G(M(E(x), w_k)), x)``."""
        return self._finish(self._encrypted(face, key), face.image)

    def kept_beside(self, face: FaceBatch, key: Tensor) -> Tensor | None:
        """The encrypted live rows in half precision, 17 · 512 numbers of two bytes, where recovery starts from them."""
        return self._encrypted(face, key).half() if self.path == "latent" else None

    def recover(self, face: FaceBatch, key: Tensor) -> Image:
        """``paste(G(M(w_a, w_k)), x̃_a)``: w_a is what was kept, or with ``path: picture`` E(x̃_a).

        Raises:
            ValueError: If nothing was kept beside the pictures.
        """
        if self.path == "picture":
            w = self._codes(face.image)
        elif face.w.shape[1:] == self.encryptor.centre.shape:
            w = face.w.float()
        else:
            raise ValueError(
                "path: latent recovers from codes kept beside the pictures; for pictures alone, path: picture"
            )
        return self._finish(self.encrypt(w, key), face.image)

    def invert(self, face: FaceBatch) -> Image:
        """``paste(G(E(x)), x)``, the bound of any recovery."""
        return self._finish(self._codes(face.image), face.image)

    def encrypt(self, w: Rows, key: Tensor) -> Rows:
        """``M(w, w_k)``, or back."""
        generator = self.inversion.disentangler.generator
        password = generator.sample_w(self.key_spec.check(key, len(w)), truncation=1.0)[:, 0] - generator.mean_w
        return self.encryptor(w, password)

    def _encrypted(self, face: FaceBatch, key: Tensor) -> Rows:
        return self.encrypt(self._codes(face.image), key)

    def _codes(self, image: Image) -> Rows:
        return self.inversion.apart(self.inversion(image))[1]

    def _finish(self, w: Rows, picture: Image) -> Image:
        rendered = self.inversion.render(w, self.size)
        return finish(rendered, picture, None if self.mask is None else self.mask(picture, rendered))

    # -- training -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Fit the regressions to the codes of the training faces, which are computed once and cached."""
        codes, _ = gallery_codes(self.trainer.datamodule, self.inversion)
        z, w = self.inversion.apart(codes[:: -(-len(codes) // READ)].to(self.device))
        self._reading = Reading.of(z, w)
        if not self.encryptor.centre.any():
            self.encryptor.centre.copy_(w.mean(0))

    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Encrypt under two passwords; decrypt the first with it and with two wrong ones."""
        right, other, *wrong = (self.training_keys(self.key_spec, batch.sample, leg) for leg in range(4))
        with torch.no_grad():
            codes = batch.z if batch.z.shape[-1] else self.inversion(self.fit_size(batch).image)
            z, w = self.inversion.apart(codes)
        hidden, hidden2 = self.encrypt(torch.cat([w, w]), torch.cat([right, other])).chunk(2)
        opened, *lost = self.encrypt(torch.cat([hidden] * 3), torch.cat([right, *wrong])).chunk(3)
        legs = {"hidden": hidden, "hidden2": hidden2, "opened": opened, "lost": lost[0], "lost2": lost[1]}
        found = self._code_terms(w, legs)
        met = {name: self._reading.identity(leg) for name, leg in legs.items()}
        if not self.latent:
            del legs["lost2"]  # one wrong opening less to render; its identity is still read
            z, seen, pictures = self._picture_terms(w, legs)
            met, found = met | seen, found | pictures
        found |= identity_terms(z, met)
        terms = {field.name: found.get(field.name, w.new_zeros(())) for field in fields(self.weights)}
        self.descend(weighted_sum(terms, self.weights), self.optimizers(), batch_idx, counts=True)
        self.log_terms({f"train/{name}": term for name, term in terms.items()})

    def _code_terms(self, w: Rows, legs: dict[str, Rows]) -> dict[str, Tensor]:
        """The terms on codes."""
        others = [leg for name, leg in legs.items() if name != "opened"]
        return {
            "code": F.mse_loss(legs["opened"], w),
            "attributes": sum(self._reading.unexplained(leg, w) for leg in others) / len(others),
            "believable": sum(self._reading.strangeness(leg) for leg in others) / len(others),
        }

    def _picture_terms(
        self, w: Rows, legs: dict[str, Rows]
    ) -> tuple[Identities, dict[str, Identities], dict[str, Tensor]]:
        """Identities of the original's render and of the legs', and the terms on pictures."""
        generator, recognizer = self.inversion.disentangler.generator, self.inversion.disentangler.recognizer
        how = {"preview": True} if hasattr(generator, "preview_head") else {}
        with torch.no_grad():
            original = self.inversion.render(w, self.preview, **how)
            z, wanted = recognizer.pyramid(original)
        images = {name: self.inversion.render(leg, self.preview, **how) for name, leg in legs.items()}
        read = {name: recognizer.pyramid(image) for name, image in images.items()}
        others = [image for name, image in images.items() if name != "opened"]
        return (
            z,
            {name: code for name, (code, _) in read.items()},
            {
                "image": F.l1_loss(images["opened"], original)
                + 0.05 * sum(F.l1_loss(image, original) for image in others),
                "perceptual": feature_distance(read["opened"][1], wanted),
                "layout": sum(F.mse_loss(resize(image, 16), resize(original, 16)) for image in others) / len(others),
            },
        )

    def configure_optimizers(self) -> Any:
        """Adam over the mapper."""
        return self.scheduled(torch.optim.Adam(self.encryptor.parameters(), lr=self.learning_rate))


def identity_terms(z: Identities, met: dict[str, Identities]) -> dict[str, Tensor]:
    """Push and pull identities: of the originals, and of each leg by its name."""
    strangers = [z, met["opened"], met["lost"], met["lost2"]]
    pairs = [(a, b) for i, a in enumerate(strangers) for b in strangers[i + 1 :]][1:]  # all but (original, opened)
    return {
        "privacy": push_apart(z, met["hidden"]) + push_apart(z, met["hidden2"]),
        "diversity": push_apart(met["hidden"], met["hidden2"]) + spread(everyone(met["hidden"])),
        "security": sum(push_apart(a, b) for a, b in pairs) / len(pairs),
        "recovery": pull_together(z, met["opened"]),
    }

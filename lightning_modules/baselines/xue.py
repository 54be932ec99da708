"""Steps on the style code away from an identity (after Xue et al., 2022).

KNOWN: steps along the sign of the gradient on the W+ code, away from the identity's embedding; inner steps that keep
the picture by MSE, a perceptual distance and SSIM; no key, not reversible. OURS: the networks, the numbers of steps
and their lengths, the identity network's features in LPIPS's place, and that a face which is far enough is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image
from lightning_modules.baselines.inverted import Inverted
from lightning_modules.losses import feature_distance, ms_ssim_loss


class LatentSteps(Inverted):
    """Walk from the face's style code to one of somebody else whose picture is much the same.

    Args:
        steps: Steps away from the identity.
        inner: Steps back to the picture after each.
        rate: Length of a step in each entry of the code.
        inner_rate: Of an inner one.
        far: Cosine to the original's identity code at which a face is left alone.
        **inversion: As for :class:`~lightning_modules.baselines.inverted.Inverted`.
    """

    def __init__(
        self,
        steps: int = 12,
        inner: int = 1,
        rate: float = 0.02,
        inner_rate: float = 0.005,
        far: float = 0.0,
        **inversion: Any,
    ) -> None:
        super().__init__(**inversion)
        self.steps, self.inner, self.rate, self.inner_rate, self.far = steps, inner, rate, inner_rate, far

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``w ← w − α sign ∇cos(E_id(G(w)), E_id(x))``, then ``w ← w − β sign ∇(MSE + features + 1 − SSIM)``."""
        recognizer = self.disentangler.recognizer
        with torch.no_grad():
            z, features = recognizer.pyramid(face.image)
            w = self.disentangler.encode(face.image)

        def like(image: Image) -> Tensor:
            return F.cosine_similarity(recognizer(image), z)

        def unlike_picture(image: Image) -> Tensor:
            kept = F.mse_loss(image, face.image) + ms_ssim_loss(image, face.image)
            return len(image) * (kept + feature_distance(recognizer.pyramid(image)[1], features))  # a sum over faces

        for _ in range(self.steps):
            w = self._stepped(w, like, self.rate, least=self.far)
            for _ in range(self.inner):
                w = self._stepped(w, unlike_picture, self.inner_rate)
        with torch.no_grad():
            return self.render(w, face.image)

    def _stepped(self, w: Tensor, loss: Callable[[Image], Tensor], rate: float, least: float | None = None) -> Tensor:
        """One step down a loss of pictures, ``(B,)`` or their sum; a face whose loss is ``least`` or less stays."""
        generator = self.disentangler.generator
        how = {"preview": True} if hasattr(generator, "preview_head") else {}
        with torch.enable_grad():
            w = w.detach().requires_grad_(True)
            losses = loss(generator(w, size=self.size, **how))
            (gradient,) = torch.autograd.grad(losses.sum(), w)
        moved = w.detach() - rate * gradient.sign()
        return moved if least is None else torch.where((losses > least)[:, None, None], moved, w.detach())

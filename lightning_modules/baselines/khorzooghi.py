"""Style mixing (Khorzooghi & Nilizadeh, "StyleGAN as a Utility-Preserving Face De-identification Method", 2022).

KNOWN: the coarse layers of the face's code, which hold pose and shape, and the other layers of an auxiliary face;
crossovers at layers 3, 4 and 5 of StyleGAN's 18; no key, not reversible. OURS: the generator, the inversion, and that
the auxiliary face is drawn anew for each face.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image
from lightning_modules.baselines.inverted import Inverted
from lightning_modules.optimization import seed_of


class StyleMixing(Inverted):
    """Coarse style rows of the face, the others of a stranger.

    Args:
        cut: Rows of the generator that are the face's own. MobileStyleGAN has three rows a resolution, StyleGAN two:
            the paper's 3, 4 and 5 are its 4, 6 and 7.
        seed: Where strangers come from.
        truncation: How far strangers are from the mean face.
        **inversion: As for :class:`~lightning_modules.baselines.inverted.Inverted`.

    Raises:
        ValueError: If the generator has not so many rows.
    """

    def __init__(self, cut: int = 6, seed: int = 0, truncation: float = 0.7, **inversion: Any) -> None:
        super().__init__(**inversion)
        if not 0 <= cut <= self.disentangler.generator.num_layers:
            raise ValueError(f"cut must be from 0 to {self.disentangler.generator.num_layers} style rows, got {cut}")
        self.cut, self.seed, self.truncation = cut, seed, truncation

    @torch.no_grad()
    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``G([w(x) up to the cut; w of a stranger from there on])``."""
        w = self.disentangler.encode(face.image)
        drawn = [
            torch.randn(1, 512, generator=torch.Generator().manual_seed(seed_of(self.seed, int(sample))))
            for sample in face.sample
        ]
        other = self.disentangler.generator.sample_w(torch.cat(drawn).to(w), truncation=self.truncation)
        return self.render(torch.cat([w[:, : self.cut], other[:, self.cut :]], 1), face.image)

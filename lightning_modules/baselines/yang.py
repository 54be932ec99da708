"""Attention-masked adversarial perturbation (after Yang et al., 2022).

KNOWN: pixels move by at most 8 to 16 of 255 levels, most where a recogniser looks, until it no longer knows the face;
no key, not reversible. Such a perturbation is made against one network: people, and networks that were not asked, still
know the face. OURS: the network, its attention (the energy of its last features), and momentum over the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer


class AdversarialPerturbation(ReversibleAnonymizer):
    """Moves pixels within ``levels`` away from what a recogniser knows.

    Args:
        recognizer: Frozen identity network that is misled.
        size: Pixels of a picture.
        levels: How far a pixel may move, of 255.
        steps: Steps.
        momentum: Share of the direction before (Dong et al., 2018).
    """

    reversible = False

    def __init__(
        self, recognizer: nn.Module, size: int = 256, levels: float = 16.0, steps: int = 20, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.recognizer, self.size, self.levels, self.steps, self.momentum = recognizer, size, levels, steps, momentum
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """``x + δ``, where ``δ`` climbs away from the embedding of ``x`` and ``|δ| ≤ levels · attention``."""
        image = face.image
        with torch.no_grad():
            z, features = self.recognizer.pyramid(image)
        most = self.levels / 127.5 * attention(features[-1], image.shape[-1])
        delta, along = torch.zeros_like(image), torch.zeros_like(image)
        for step in range(self.steps):
            with torch.enable_grad():
                moved = (image + delta).clamp(-1, 1).requires_grad_(True)
                # at the face itself the cosine is at its peak, and has no slope: begin beside it
                start = moved if step else moved + 1e-3 * torch.sin(1e4 * image)
                losses = F.cosine_similarity(self.recognizer(start), z)
                (gradient,) = torch.autograd.grad(losses.sum(), moved)
            along = self.momentum * along + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
            delta = (delta - 2.5 / self.steps * most * along.sign()).clamp(-most, most)
        return (image + delta).clamp(-1, 1).detach()


def attention(features: Tensor, size: int) -> Tensor:
    """Where a network looks: the energy of features ``(B, C, h, w)`` as ``(B, 1, size, size)``, at most 1."""
    energy = features.square().mean(1, keepdim=True).sqrt()
    energy = F.interpolate(energy, size=(size, size), mode="bilinear")
    return energy / energy.amax((2, 3), keepdim=True).clamp(min=1e-12)

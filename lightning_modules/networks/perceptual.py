"""Perceptual distances as loss terms: LPIPS where its weights are, the identity network's features where not."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_modules.metrics.perceptual import LPIPS_CARD, lpips_network
from lightning_modules.networks.frozen import Frozen
from lightning_modules.weights import card, find

Perceptual = Literal["auto", "lpips", "features"]


class LPIPS(Frozen):
    """LPIPS (Zhang et al., 2018), version 0.1, AlexNet, of pictures in [-1, 1]; frozen.

    Raises:
        WeightsError: If the AlexNet weights are missing; other weights would not be LPIPS.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = lpips_network()
        self.card_hashes = {LPIPS_CARD: card(LPIPS_CARD).digest}
        self.freeze()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Mean distance of two batches ``(B, 3, H, W)``."""
        return self.network(image, target).mean()


def choose(perceptual: Perceptual) -> LPIPS | None:
    """The network of the perceptual term; ``None`` stands for the identity network's own features.

    Raises:
        WeightsError: If ``lpips`` is asked for and its weights are missing.
    """
    if perceptual == "features" or (perceptual == "auto" and find(LPIPS_CARD) is None):
        return None
    return LPIPS()

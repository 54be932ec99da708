"""The trained inverter: an attacker with the code, the weights and pairs, but no key (ours, after protocol.md)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.anonymizer import Image
from lightning_modules.attackers import learned_blocks
from lightning_modules.networks.unet import UNet

PICTURE, IDENTITY = 1.0, 0.5  # weights of the two losses
FEW = 4  # of a batch whose identity is looked at: the recogniser costs five times what the network does


FOLDS = 4
FEWEST = 8  # pairs, so that each fold learns from some


def linear_guesses(hidden: Image, shown: Float[Tensor, "faces 3 height width"]) -> Image:
    """What :func:`~lightning_modules.attackers.learned_blocks` makes of each pair that it has not seen (cross-fitting).

    A guess by what was learned from the pair itself would be better than any that the network meets later.

    Args:
        hidden: Anonymized pictures; where there are more than originals, round after round of the same faces.
        shown: Their originals, eight or more.

    Raises:
        ValueError: If there are fewer.
    """
    if len(shown) < FEWEST:
        raise ValueError(f"an inverter learns from {FEWEST} pairs at least, got {len(shown)}")
    face = torch.arange(len(hidden)) % len(shown)
    shown, made = shown[face], torch.empty_like(hidden)
    for fold in range(FOLDS):
        out = face % FOLDS == fold
        made[out] = learned_blocks(hidden[~out], shown[~out])(hidden[out])
    return made


class Inverter(L.LightningModule):
    r"""A network from anonymized pictures to their originals.

    It starts from what is linear and the same for all faces, block by block (:func:`linear_guesses`), and mends it. Its
    loss is :math:`|u(x_a) - x|_1` over pixels and, where there is a recogniser,
    :math:`1 - \cos(E(u(x_a)), E(x))` beside it; the learning rate falls along a cosine over the trainer's
    ``max_steps``.

    Args:
        recognizer: A frozen network of identity codes that is none of the judges; ``None``: pixels alone.
        width: Of the :class:`~lightning_modules.networks.unet.UNet`.
        rate: Learning rate at the start.
    """

    def __init__(self, recognizer: nn.Module | None = None, width: int = 32, rate: float = 2e-3) -> None:
        super().__init__()
        self.recognizer, self.network, self.rate = recognizer, UNet(2, width), rate

    def forward(self, anonymized: Image, guess: Image) -> Image:
        """What it takes for the originals, in [-1, 1]."""
        return self.network(torch.cat([anonymized, guess], 1)).clamp(-1, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One step on anonymized pictures, their linear guesses, and their originals."""
        anonymized, guess, original = batch
        made = self.network(torch.cat([anonymized, guess], 1))
        loss = PICTURE * F.l1_loss(made, original)
        if self.recognizer is not None:
            codes = self.recognizer(made[:FEW]), self._code(original[:FEW])
            loss = loss + IDENTITY * (1 - F.cosine_similarity(*codes)).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _code(self, original: Image) -> Tensor:
        return self.recognizer(original)

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam, and its learning rate by step."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.rate)
        steps = max(1, self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

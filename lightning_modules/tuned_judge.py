"""A judge whose network learned from pairs to know people again: an attacker without key (ours, after protocol.md)."""

from __future__ import annotations

import copy

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.anonymizer import Image
from lightning_modules.judges import CosineJudge, Judge

TEMPERATURE = 0.05


def tunable(judge: Judge) -> bool:
    """Whether a judge has a network that can learn; files of onnxruntime and dlib's have none."""
    return isinstance(judge, CosineJudge) and isinstance(getattr(judge, "network", None), nn.Module)


class TunedJudge(L.LightningModule):
    r"""A copy of a judge's network that learns to put an anonymized face where the judge has its original.

    Its loss over known pairs :math:`(a_i, x_i)` is that of telling their people apart,
    :math:`-\log \mathrm{softmax}_i(\cos(f(a_i), g(x_j)) / \tau)_{j=i}`, where :math:`g` is the judge as it was.

    Args:
        judge: A judge with a network (:func:`tunable`); it stays as it is.
        known: Its embeddings of the known originals.
        rate: Learning rate at the start; it falls along a cosine over the trainer's ``max_steps``.

    Raises:
        ValueError: If the judge has no network.
    """

    def __init__(self, judge: CosineJudge, known: Float[Tensor, "faces dim"], rate: float = 3e-4) -> None:
        super().__init__()
        if not tunable(judge):
            raise ValueError(f"judge {judge.name!r} has no network that could be tuned")
        self.judge, self.rate = copy.deepcopy(judge), rate
        self.network: nn.Module = self.judge.network.requires_grad_(True)
        self.register_buffer("known", F.normalize(known))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One step on anonymized pictures and the rows of their originals in ``known``."""
        hidden, row = batch
        loss = F.cross_entropy(self.judge.codes(hidden) @ self.known.mT / TEMPERATURE, row)
        self.log("loss", loss, prog_bar=True)
        return loss

    def embed(self, images: Image) -> Tensor:
        """As the judge's."""
        return self.judge.embed(images)

    def configure_optimizers(self) -> dict[str, object]:
        """Adam, and its learning rate by step."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

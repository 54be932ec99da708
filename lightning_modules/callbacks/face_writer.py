"""Predictions as files: one PNG a face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from datamodules.batch import FaceBatch
from lightning_modules.carriers import write_picture


class FaceWriter(BasePredictionWriter):
    """Writes each predicted face to ``OUT/SAMPLE.png`` as soon as it is there.

    Args:
        out: Folder of the pictures; by default ``predictions`` in the trainer's root.
    """

    def __init__(self, out: str | None = None) -> None:
        super().__init__("batch")
        self.out = out

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: FaceBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures ``(B, 3, H, W)`` of a batch."""
        folder = Path(self.out or Path(trainer.default_root_dir) / "predictions")
        for image, sample in zip(prediction, batch.sample, strict=True):
            write_picture(folder / f"{int(sample):06d}.png", image)

    def on_predict_epoch_end(self, *args: Any) -> None:
        """Nothing: the pictures are on disk already."""

"""Checkpoints in training steps: the newest always under one name, and the end of a run never lost."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class TrainingCheckpoint(ModelCheckpoint):
    """Writes ``checkpoints/last.ckpt`` every so many training steps, when a run ends, and when it breaks off.

    A run that starts anew in a folder that holds checkpoints moves them aside first (``checkpoints-1``, …); a resumed
    one goes on among them.

    Args:
        every_n_train_steps: Training steps between checkpoints; only the generator's optimizer counts.
        dirpath: Folder of the checkpoints; by default ``checkpoints`` in the trainer's root.
    """

    def __init__(self, every_n_train_steps: int = 500, dirpath: str | Path | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=1,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            save_on_exception=True,
            enable_version_counter=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """When training starts anew, move older checkpoints aside."""
        super().on_train_start(trainer, pl_module)
        folder = Path(self.dirpath)
        if trainer.global_step or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        if (folder / "last.ckpt").exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
                number += 1
            folder.rename(aside)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the very last step too."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

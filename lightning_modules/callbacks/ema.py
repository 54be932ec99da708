"""An exponential moving average of what is trained; it is what is measured, and what checkpoints hold as weights."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging


class EMA(EMAWeightAveraging):
    """Averages the weights over training steps: validation, grids and ``state_dict`` in checkpoints are the average.

    Training goes on with the weights themselves, also when it is resumed; buffers, such as permutations, are taken as
    they are. Lightning's, for methods that step several optimizers by hand, and off by default.

    Args:
        decay: Share of the average that stays at each training step, such as 0.999; 0 keeps no average.

    Raises:
        ValueError: If ``decay`` is no share below 1.
    """

    def __init__(self, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {decay}")
        super().__init__(use_buffers=False, decay=decay)
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the method, unless no average is kept."""
        if self.decay:
            super().setup(trainer, pl_module, stage)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every training step."""
        return self._average_model is not None and super().should_update(step_idx, epoch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing yet: the last checkpoint, which is still to come, holds both."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the average in the method."""
        if stage == "fit" and self._averaged:
            self._copy_average_to_current(pl_module)
        self._average_model = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Both, once there is an average."""
        if self._averaged:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Both, or the weights alone, from which the average starts anew."""
        if self._average_model is not None and "current_model_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @property
    def _averaged(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        if self._averaged:
            super()._swap_models(pl_module)

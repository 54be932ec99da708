"""An exponential moving average of what is trained; it is what is measured, and what checkpoints hold as weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

WEIGHTS = "trained_weights"  # in a checkpoint, beside the average in its ``state_dict``


class EMA(Callback):
    """Averages what optimizers train: validation, grids and ``state_dict`` in checkpoints are the average.

    Training goes on with the weights themselves, also when it is resumed. Frozen networks, fixed parameters and
    buffers, such as permutations, take no part. Lightning's own averages all of them, a frozen generator too.

    Args:
        decay: Share of the average that stays at each training step, such as 0.999; 0 keeps no average.

    Raises:
        ValueError: If ``decay`` is no share below 1.
    """

    def __init__(self, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {decay}")
        self.decay, self._step = decay, 0
        self._average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # while the average is in the method

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """After a training step, let the average follow."""
        if not self.decay or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        trained = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        with torch.no_grad():
            for name, weight in pl_module.named_parameters():
                if id(weight) not in trained:
                    continue
                if name in self._average:
                    self._average[name].lerp_(weight, 1 - self.decay)
                else:
                    self._average[name] = weight.detach().clone()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the average."""
        if self._average:
            self._weights = self._put(pl_module, self._average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the weights."""
        self._put(pl_module, self._weights)
        self._weights = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """As after validation, before what is whole is saved."""
        self.on_validation_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the average in the method; the last checkpoint, which holds both, is written by now."""
        if stage == "fit":
            self._put(pl_module, self._average)
            self._average, self._step = {}, 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Both, once there is an average."""
        if self._average:
            state = checkpoint["state_dict"]
            checkpoint[WEIGHTS] = self._weights or {name: state[name] for name in self._average}
            checkpoint["state_dict"] = state | self._average

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The weights to go on with; and the average, where one is kept."""
        if trainer.state.fn != "fit" or WEIGHTS not in checkpoint:
            return
        self._put(pl_module, checkpoint[WEIGHTS])
        if self.decay:
            state = checkpoint["state_dict"]
            self._average = {n: state[n].to(pl_module.device, copy=True) for n in checkpoint[WEIGHTS]}
            self._step = checkpoint["global_step"]
        else:
            rank_zero_warn("the checkpoint holds an average of the weights, which ends here: ema.decay is 0")

    @staticmethod
    @torch.no_grad()
    def _put(pl_module: L.LightningModule, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put values into the method, and hand out what was there."""
        found = dict(pl_module.named_parameters()) if values else {}
        before = {name: found[name].detach().clone() for name in values}
        for name, value in values.items():
            found[name].copy_(value)
        return before

"""Exponential moving average of the weights that training learns."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialAverage(WeightAveraging):
    """Validate, save and end with the moving average of the weights: ``average += (1 − decay)(weights − average)``.

    As Lightning's ``EMAWeightAveraging``, but what no training moves stays as it is to the last bit, and buffers are
    copied: averaged in whole numbers, the permutations of a flow would be others, and its inverse no inverse.

    Args:
        decay: Share of the average that stays at each step, from 0 to below 1.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every step."""
        return step_idx is not None

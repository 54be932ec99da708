"""The precision island that every flow computes in: float32 or better, whatever the trainer asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast, TF32 and bf16 matrix products off for the block, and put them back after it.

    A flow and its inverse recompute the same subnets from numbers that differ by rounding; with the 8 bits
    of mantissa of bf16 the round trip is wrong by 8e-2 instead of 1e-6, and TF32's 10 bits spoil even a hard
    permutation, since it is applied as a matrix product.

    Args:
        device: Where the tensors of the block live.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)

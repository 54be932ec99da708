"""What several processes of one training tell each other, so that terms over a batch are those of all of it.

The faces of a step are dealt out in turn (:class:`~datamodules.stream.Turns`): of each row all processes have one. On
one process everything here hands back what it got.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.nn.functional import all_gather, all_reduce


def world() -> tuple[int, int]:
    """How many processes there are, and which this is."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


def everyone(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order that one process would have them; gradients go back to where they are from.

    What every process makes of them is the same, so that the mean over processes that DDP takes of gradients is right.

    Args:
        rows: ``(B, …)``, the same number on each process.

    Returns:
        ``(processes · B, …)``.
    """
    if world()[0] == 1:
        return rows
    return torch.stack(all_gather(rows.contiguous()), 1).flatten(0, 1)


@torch.no_grad()
def neighbours(rows: Tensor, shift: int = 1) -> Tensor:
    """For each row that of another face of the step: as ``roll(shift, 0)`` of all, without gradients.

    Args:
        rows: ``(B, …)``.
        shift: How far off.
    """
    processes, rank = world()
    return everyone(rows).roll(shift, 0)[rank::processes]


def variance(rows: Tensor) -> Tensor:
    """Of each entry over the rows of all processes, ``(B, …)`` → ``(…)``; without Bessel's correction.

    It can be differentiated twice, as penalties on gradients need.
    """
    processes, _ = world()
    if processes == 1:
        return rows.var(0, correction=0)
    count = processes * len(rows)
    mean = all_reduce(rows.sum(0)) / count
    return all_reduce((rows - mean).square().sum(0)) / count

"""What style codes say of identities, and identities of style codes, as linear regressions (ours)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.baselines.inversion import Identities, Rows
from lightning_modules.ifadit.networks import CODE

RIDGE = 0.006  # of the mean square: between 0.0006 and 0.06 held-out codes are read alike
SHRINK = 0.1  # likewise of identity codes, 99 % of whose variance lies in 138 of 512 directions


class Reading(NamedTuple):
    """Linear regressions between identity codes and W+ codes of training faces.

    Attributes:
        z, w: Their means.
        read: W+ code → identity code, ``(rows · 512, 512)``.
        write: Identity code → what it says of the W+ code, ``(512, rows · 512)``.
        precision: Of identity codes, so that people are 1 from their mean on average.
    """

    z: Tensor
    w: Tensor
    read: Tensor
    write: Tensor
    precision: Tensor

    @classmethod
    def of(cls, z: Identities, w: Rows) -> Reading:
        """Fit them, ridged by :data:`RIDGE` and :data:`SHRINK`."""
        mean_z, mean_w = z.mean(0), w.flatten(1).mean(0)
        y, x = z - mean_z, w.flatten(1) - mean_w
        across, along = x @ x.T, y.T @ y / len(y)
        across = across + RIDGE * across.diagonal().mean() * torch.eye(len(x)).to(x)
        precision = torch.linalg.inv(along + SHRINK * along.diagonal().mean() * torch.eye(CODE).to(x))
        read, write = x.T @ torch.linalg.solve(across, y), precision @ (y.T @ x / len(y))
        return cls(mean_z, mean_w, read, write, precision / ((y @ precision) * y).sum(1).mean())

    def identity(self, w: Rows) -> Identities:
        """Identity codes as they are read off W+ codes."""
        return self.z + (w.flatten(1) - self.w) @ self.read

    def unexplained(self, w: Rows, original: Rows) -> Tensor:
        """Mean squared difference of two codes but for what that of their identities says."""
        change = (w - original).flatten(1)
        return (change - change @ self.read @ self.write).square().mean()

    def strangeness(self, w: Rows) -> Tensor:
        """Mean over faces of how much further from the mean person they are than people usually are."""
        from_mean = self.identity(w) - self.z
        return F.relu(((from_mean @ self.precision) * from_mean).sum(1) - 1).mean()

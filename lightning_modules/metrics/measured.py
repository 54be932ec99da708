"""What every measurement has in common: one value a face, its mean, its interval, its line of results."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.protocol import Figure, is_share

DRAWS = 1000
"""Bootstrap resamples behind an interval."""

LEGS = (("anonymized", "right"), ("recovered", "right"), ("wrongly_recovered", "random"))
"""Leg and key of the pictures that questions about a face, not about whose it is, are asked of."""


class Measured(NamedTuple):
    """Values of one figure, face by face.

    Attributes:
        metric, leg, reference, key, region, group: Words of the protocol.
        values: One a face, ``(N,)``; a share is the mean of zeros and ones. ``None`` where the figure is n/a.
        person: Whose face, ``(N,)``, the unit of resampling. ``None``: ``values`` is one number without an
            interval.
        why: Reason of missing values.
        judge, judge_weights, threshold: Where a judge was asked.
        n: Number of scores behind a figure that has no values a face.
        reach: Its interval, where that is not one of a mean over faces.
    """

    metric: str
    leg: str
    values: Tensor | None
    person: Tensor | None = None
    reference: str | None = None
    key: str = "right"
    region: str | None = None
    why: str | None = None
    judge: str | None = None
    judge_weights: str | None = None
    threshold: float | None = None
    n: int | None = None
    group: str | None = None
    reach: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Flat name: ``anonymized/tar@far=1e-3/same-image``, ``wrongly_recovered/one-bit/psnr``."""
        key = self.key if self.leg == "wrongly_recovered" else None
        return "/".join(part for part in (self.leg, key, self.metric, self.reference, self.region, self.group) if part)

    def figure(self) -> Figure:
        """The line of results; the caller adds method, data, config … with ``dataclasses.replace``."""
        words = {
            "metric": self.metric,
            "leg": self.leg,
            "reference": self.reference,
            "key": self.key,
            "region": self.region,
            "group": self.group,
            "judge": self.judge,
            "judge_weights": self.judge_weights,
            "threshold": self.threshold,
        }
        if self.values is None or not len(self.values):
            return Figure(**words, value=None, why=self.why or "no face to measure", n=0)
        n = len(self.values) if self.n is None else self.n
        value = float(self.values.double().mean())
        if not np.isfinite(value):
            return Figure(**words, value=None, why="the values are not finite", n=n)
        if self.person is None:
            low, high = self.reach or (None, None)
            return Figure(**words, value=value, low=low, high=high, n=n)
        low, high = interval(self.values, self.person, share=is_share(self.metric))
        return Figure(**words, value=value, low=low, high=high, n=n)


@lru_cache(maxsize=2)  # the figures of one table share their people, and thus their draws
def _draws(units: int) -> Int[np.ndarray, "draws units"]:
    return np.random.default_rng(0).integers(units, size=(DRAWS, units), dtype=np.int32)


def _means(values: Float64[np.ndarray, " n"], unit: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " draws"]:
    """Mean over the faces of each resample of units, a unit bringing all its faces."""
    total, count = np.bincount(unit, values), np.bincount(unit).astype(np.float64)
    draws = _draws(len(total))
    return total[draws].sum(1) / count[draws].sum(1)


def interval(values: Float[Tensor, " n"], person: Int[Tensor, " n"], share: bool = False) -> tuple[float, float]:
    r"""Bootstrap 95 % interval of the mean, resampling people with all their faces.

    Where only one person is there, faces are resampled. A share of exactly none or all would get an interval
    of no width, as if a thousand faces proved "never"; it gets the exact binomial bound for as many trials as
    there are people instead, :math:`1 - 0.025^{1/n}` from the end.

    Args:
        values: One a face.
        person: Number of the person, same length.
        share: Whether the values are shares in [0, 1].
    """
    numbers = values.detach().double().cpu().numpy()
    unit = np.unique(person.cpu().numpy(), return_inverse=True)[1].reshape(-1)
    if unit.max() == 0:
        unit = np.arange(len(numbers))
    if share and (numbers == numbers[0]).all() and numbers[0] in (0, 1):
        reach = 1 - 0.025 ** (1 / (unit.max() + 1))
        return (0.0, reach) if numbers[0] == 0 else (1 - reach, 1.0)
    low, high = np.quantile(_means(numbers, unit), (0.025, 0.975))
    return float(low), float(high)


class RoundTripMetric(Metric):
    """A measurement of round trips: ``update(trip)``, ``compute()`` for a logger, ``figures()`` for a table.

    A measurement declares its states and defines ``update`` and :meth:`measured`.
    """

    full_state_update = False

    def measured(self) -> list[Measured]:
        """All figures, from the states (synchronized over processes by the caller)."""
        raise TypeError(f"{type(self).__name__} must define measured()")

    def compute(self) -> dict[str, Tensor]:
        """Mean of each figure under its flat name; figures that are n/a are left out."""
        return {
            figure.name: figure.values.double().mean().float()
            for figure in self.measured()
            if figure.values is not None and len(figure.values)
        }

    def synced(self) -> AbstractContextManager[None]:
        """While it lasts, the states are those of all processes."""
        return self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )

    def figures(self) -> list[Figure]:
        """Lines of results with intervals; on several processes all must call it."""
        with self.synced():
            return [figure.figure() for figure in self.measured()]


def gathered(state: list[Tensor] | Tensor) -> Tensor | None:
    """One tensor of a ``"cat"`` state (a list before, a tensor after synchronization); ``None`` if empty."""
    if isinstance(state, list):
        state = torch.cat(state) if state else torch.empty(0)
    return state if state.numel() else None


def legs_of(trip: RoundTrip, near_key: str = "one-bit") -> dict[tuple[str, str], Tensor]:
    """The made pictures of a round trip by (leg, key) of the protocol; absent ones are left out."""
    legs = {
        ("anonymized", "right"): trip.anonymized,
        ("recovered", "right"): trip.recovered,
        ("wrongly_recovered", "random"): trip.wrongly_recovered,
        ("wrongly_recovered", near_key): trip.nearly_recovered,
        ("wrongly_recovered", "attribute"): trip.wrong_attribute,
        ("inverted", "none"): trip.inverted,
    }
    return {name: image for name, image in legs.items() if image.numel()}

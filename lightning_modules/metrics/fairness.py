"""Does it treat groups of people alike? Shares by apparent gender and age, and the gap between groups."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_modules.anonymizer import Image
from lightning_modules.metrics.measured import Measured, interval
from lightning_modules.metrics.readers import OLD, Reader, missing, reader
from lightning_modules.protocol import GAPS, GROUPS

LEAST = 20
"""Faces of a group below which nothing is said of it."""


class Groups:
    """To which group of :data:`~lightning_modules.protocol.GROUPS` an original belongs, by its apparent gender and age.

    Apparent to a network (:class:`~lightning_modules.metrics.readers.GenderAge`), whatever the people are.

    Args:
        read: Probability of an apparently male face and years; ``None`` takes that network, and without its weights
            no face belongs to a group.
    """

    def __init__(self, read: Reader | None = None) -> None:
        self.why = missing("faceres") if read is None else None
        self._read = None if self.why else (read or reader("faceres"))

    def __call__(self, images: Image) -> Int[Tensor, "batch 2"]:
        """Number of each face's group of gender, then of age; -1 where nothing is known."""
        if self._read is None:
            return torch.full((len(images), len(GROUPS)), -1)
        male, age = self._read(images).unbind(1)
        return torch.stack([male > 0.5, age >= OLD], 1).long()


def by_group(share: Measured, groups: Int[Tensor, "n 2"], why: str | None = None) -> list[Measured]:
    r"""A share of each group, and for each attribute the gap between the best and the worst of its groups.

    The gap is :math:`p_a - p_b \ge 0` of the groups :math:`a, b` with the highest and the lowest share. Its interval is
    made of theirs, :math:`[l_a, u_a]` and :math:`[l_b, u_b]`, which know that a share of none is not never:

    .. math:: p_a - p_b - \sqrt{(p_a - l_a)^2 + (u_b - p_b)^2}, \quad p_a - p_b + \sqrt{(u_a - p_a)^2 + (p_b - l_b)^2}

    (Newcombe, 1998, method 10; MOVER), so that it reaches below 0 where chance alone could make such a gap.
    A group with fewer than 20 faces is n/a, and so is the gap with it.

    Args:
        share: Of all faces; nan where a face has none.
        groups: As :class:`Groups` gives them, for the same faces.
        why: Reason why no face has a group.
    """
    if share.values is None or share.person is None:
        return []
    figures, known = [], ~share.values.isnan()
    for column, (attribute, words) in enumerate(GROUPS.items()):
        inside = [known & (groups[:, column] == number) for number in range(len(words))]
        small = [
            f"fewer than {LEAST} faces of {word}" for word, of in zip(words, inside, strict=True) if not _enough(of)
        ]
        for word, of in zip(words, inside, strict=True):
            part = share._replace(values=share.values[of], person=share.person[of], group=word)
            lacking = why or f"fewer than {LEAST} faces of the group"
            figures.append(part if _enough(of) else part._replace(values=None, person=None, why=lacking))
        gap = share._replace(metric=GAPS[share.metric], group=attribute)
        if small:
            figures.append(gap._replace(values=None, person=None, why=why or small[0]))
        else:
            figures.append(_gap(gap, inside))
    return figures


def _enough(inside: Bool[Tensor, " n"]) -> bool:
    return int(inside.sum()) >= LEAST


def _gap(share: Measured, inside: list[Bool[Tensor, " n"]]) -> Measured:
    """The gap, with an interval from those of its two groups."""
    means = [float(share.values[of].double().mean()) for of in inside]
    low, *_, high = sorted(range(len(means)), key=means.__getitem__)
    few, many = (interval(share.values[inside[at]], share.person[inside[at]], share=True) for at in (low, high))
    gap = means[high] - means[low]
    down = math.hypot(means[high] - many[0], few[1] - means[low])
    up = math.hypot(many[1] - means[high], means[low] - few[0])
    reach = (gap - down, gap + up)
    n = int((inside[low] | inside[high]).sum())
    return share._replace(values=torch.tensor([gap]), person=None, n=n, reach=reach)

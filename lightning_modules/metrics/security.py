"""Does a wrong key open anything? Acceptance and similarity of wrongly recovered faces."""

from __future__ import annotations

from itertools import combinations

import torch

from lightning_modules.metrics.identity import WRONG, Embeddings
from lightning_modules.metrics.measured import Measured


def security(faces: Embeddings) -> list[Measured]:
    """``tar@far=1e-3`` and ``similarity`` of faces opened with random wrong keys and a nearly right one.

    A face's figure is the mean over its random wrong keys. Of several of them there are also, with the reference
    ``other-key``, the ``similarity`` of what two of them open, and ``diversity``, the share of such pairs told apart.

    The right key's figures, which these stand beside, are
    :func:`lightning_modules.metrics.recovery.recovered_identity`.
    """
    opened = [name for name in faces.pictures if name.startswith(WRONG)]
    tries = [faces.acceptance(name, WRONG, "random") for name in opened]
    return [
        *(_mean(figures) for figures in zip(*tries, strict=True)),
        *(_between(faces, opened) if len(opened) > 1 else []),
        *faces.acceptance("nearly_recovered", WRONG, faces.near_key),
    ]


def _mean(figures: tuple[Measured, ...]) -> Measured:
    """One figure of several keys: face by face their mean."""
    if figures[0].values is None:
        return figures[0]
    return figures[0]._replace(values=torch.stack([figure.values for figure in figures]).mean(0))


def _between(faces: Embeddings, opened: list[str]) -> list[Measured]:
    similarity = torch.stack([faces.paired(a, b) for a, b in combinations(opened, 2)])
    accepted = faces.accepted(similarity)
    told_apart = None if accepted is None else 1 - accepted.mean(0)
    return [
        faces.measured("diversity", WRONG, "other-key", told_apart, "random"),
        faces.measured("similarity", WRONG, "other-key", similarity.mean(0), "random"),
    ]

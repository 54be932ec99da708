"""Does a wrong key open anything? Acceptance and similarity of wrongly recovered faces."""

from __future__ import annotations

import torch

from lightning_modules.metrics.identity import Embeddings
from lightning_modules.metrics.measured import Measured

WRONG = "wrongly_recovered"


def security(faces: Embeddings) -> list[Measured]:
    """``tar@far=1e-3`` and ``similarity`` of faces opened with random wrong keys, nearly right ones, a wrong attribute.

    A face's figure is the mean over its wrong keys. Of several random ones there are also, with the reference
    ``other-key``, the ``similarity`` of what two of them open, and ``diversity``, the share of such pairs told apart.

    The right key's figures, which these stand beside, are
    :func:`lightning_modules.metrics.recovery.recovered_identity`.
    """
    figures = []
    for leg, key in (
        (WRONG, "random"),
        ("nearly_recovered", faces.near_key),
        ("wrong_attribute", "attribute"),
    ):
        tries = [faces.acceptance(name, WRONG, key) for name in faces.tries(leg)]
        figures += [_mean(of_all_keys) for of_all_keys in zip(*tries, strict=True)]
    if len(opened := faces.tries(WRONG)) > 1:
        similarity, apart = faces.between(opened)
        told = None if apart is None else apart.mean(0)
        figures.append(faces.measured("diversity", WRONG, "other-key", told, "random"))
        figures.append(faces.measured("similarity", WRONG, "other-key", similarity.mean(0), "random"))
    return figures


def _mean(figures: tuple[Measured, ...]) -> Measured:
    """One figure of several keys: face by face their mean."""
    if figures[0].values is None:
        return figures[0]
    return figures[0]._replace(values=torch.stack([figure.values for figure in figures]).mean(0))

"""Does a wrong key open anything? Acceptance and similarity of wrongly recovered faces."""

from __future__ import annotations

import torch

from lightning_modules.metrics.identity import Embeddings
from lightning_modules.metrics.measured import Measured

WRONG, TAR = "wrongly_recovered", "tar@far=1e-3"


def security(faces: Embeddings) -> list[Measured]:
    """``tar@far=1e-3`` and ``similarity`` of faces opened with random wrong keys, nearly right ones, a wrong attribute.

    A face's figure is the mean over its wrong keys. Of several random ones there are also, with the reference
    ``other-key``, the ``similarity`` of what two of them open, and ``diversity``, the share of such pairs told apart.

    ``tar_worst_bit`` is the acceptance of the one bit, of those that were flipped in every face, that guards
    least: the largest of their means over faces, so chance pushes it up. It is the protocol's worst case over all bits
    where as many keys were tried as there are bits.

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
        if key == "one-bit" and len(tries) > 1:
            figures += [_worst(of_all_keys) for of_all_keys in zip(*tries, strict=True) if of_all_keys[0].metric == TAR]
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


def _worst(figures: tuple[Measured, ...]) -> Measured:
    """Of several keys, each tried on every face, the one whose acceptance is largest."""
    worst = figures[0]
    if worst.values is not None:
        worst = max(figures, key=lambda figure: float(figure.values.double().mean()))
    return worst._replace(metric="tar_worst_bit")

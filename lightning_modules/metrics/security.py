"""Does a wrong key open anything? Acceptance and similarity of wrongly recovered faces."""

from __future__ import annotations

from lightning_modules.metrics.identity import Embeddings
from lightning_modules.metrics.measured import Measured


def security(faces: Embeddings) -> list[Measured]:
    """``tar@far=1e-3`` and ``similarity`` of faces opened with a random wrong key and a nearly right one.

    The right key's figures, which these stand beside, are
    :func:`lightning_modules.metrics.recovery.recovered_identity`.
    """
    return [
        *faces.acceptance("wrongly_recovered", "wrongly_recovered", "random"),
        *faces.acceptance("nearly_recovered", "wrongly_recovered", faces.near_key),
    ]

"""Per-picture optimisation of style codes: towards the identity code that a picture is to carry (ours)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATE = 0.02
NEARNESS = 1.0


@torch.no_grad()
def refine(generator: nn.Module, recognizer: nn.Module, w: Tensor, z: Tensor, steps: int) -> Tensor:
    """Style codes near ``w`` whose picture carries the identity codes ``z``.

    Adam on ``w``, face by face independent of the batch, of ``(1 − cos(E_id(G(w)), z)) + mean (w − w₀)²``, on previews
    of 256 px. Only what a recipient has goes in: the codes asked for.

    Args:
        generator: Frozen generator; rendered by its preview head if it has one.
        recognizer: Frozen identity network.
        w: W+ codes ``(B, L, 512)`` to start from.
        z: Unit identity codes ``(B, 512)``.
        steps: Steps of Adam.

    Returns:
        Codes ``(B, L, 512)``: of each face the best met, by the same loss.
    """
    start, z = w.detach(), z.detach()
    how = {"preview": True} if hasattr(generator, "preview_head") else {}
    size = min(256, generator.native_size)
    best, lowest = start.clone(), torch.full((len(w),), torch.inf, device=w.device)
    code = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([code], lr=RATE, betas=(0.9, 0.99))
    for step in range(steps + 1):
        with torch.enable_grad():
            image = generator(code, size=size, **how)
            losses = 1 - F.cosine_similarity(recognizer(image), z)
            losses = losses + NEARNESS * (code - start).square().mean((1, 2))
            better = losses.detach() < lowest
            best[better], lowest[better] = code.detach()[better], losses.detach()[better]
            if step == steps:
                break
            (code.grad,) = torch.autograd.grad(losses.sum(), code)
        optimizer.step()
    return best

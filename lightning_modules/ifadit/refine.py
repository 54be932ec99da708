"""Per-picture optimisation of style codes: until the picture says what it is to say (ours)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RATE = 0.02
NEARNESS = 1.0


@torch.no_grad()
def refine(generator: nn.Module, w: Tensor, aim: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Style codes near ``w`` whose picture comes closer to an aim.

    Adam on ``w``, face by face independent of the batch, of ``aim(G(w)) + mean (w − w₀)²``, on previews of 256 px.

    Args:
        generator: Frozen generator; rendered by its preview head if it has one.
        w: W+ codes ``(B, L, 512)`` to start from.
        aim: Pictures ``(B, 3, H, W)`` in [-1, 1] → one loss a face ``(B,)``.
        steps: Steps of Adam.

    Returns:
        Codes ``(B, L, 512)``: of each face the best met, by the same loss.
    """
    start = w.detach()
    how = {"preview": True} if hasattr(generator, "preview_head") else {}
    size = min(256, generator.native_size)
    best, lowest = start.clone(), torch.full((len(w),), torch.inf, device=w.device)
    code = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([code], lr=RATE, betas=(0.9, 0.99))
    for step in range(steps + 1):
        with torch.enable_grad():
            losses = aim(generator(code, size=size, **how)) + NEARNESS * (code - start).square().mean((1, 2))
            better = losses.detach() < lowest
            best[better], lowest[better] = code.detach()[better], losses.detach()[better]
            if step == steps:
                break
            (code.grad,) = torch.autograd.grad(losses.sum(), code)
        optimizer.step()
    return best

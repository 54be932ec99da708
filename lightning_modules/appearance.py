"""What can be seen of a face apart from who it is: a few numbers a picture, by frozen networks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.anonymizer import Image, resize
from lightning_modules.judges import FaceRes
from lightning_modules.networks.landmarks import GREY, Landmarks68


class Appearance:
    """Measures traits of aligned faces (ours), one column each, named by :attr:`names`.

    - ``male``: probability of an apparently male face, by :class:`~lightning_modules.judges.FaceRes`;
    - ``age``: apparent age in years, by the same;
    - ``mouth open``: mean gap of the inner lips; ``smile``: how far the corners of the mouth lie above the middle of
      the upper lip; ``eyes open``: mean height of the eyes; ``turn``: how far the tip of the nose lies to the right of
      the middle of the jaw's ends; all from 68 landmarks, upright on the line of the eyes and in their distance;
    - ``moustache``: how much darker the skin between nose and lip is than the cheeks, in shares of white;
    - ``brightness``: mean grey of the picture, in shares of white.

    Args:
        device: Where the networks run.

    Raises:
        WeightsError: If the file of one cannot be found.
    """

    names = ("male", "age", "mouth open", "smile", "eyes open", "turn", "moustache", "brightness")

    def __init__(self, device: str = "cpu") -> None:
        self._faceres, self._landmarks = FaceRes(device), Landmarks68().to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Image) -> Float[Tensor, "batch traits"]:
        """Traits of pictures in [-1, 1], on the CPU."""
        guess = self._faceres.attributes(images)
        points = self._landmarks(images.to(self._device)).cpu()
        grey = (resize(images.cpu(), 64) * torch.tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True) / 2 + 0.5
        return torch.stack([guess.male, guess.age, *drawn(points), *shaded(points, grey)], 1)


def drawn(points: Float[Tensor, "batch 68 2"]) -> list[Float[Tensor, " batch"]]:
    """``mouth open``, ``smile``, ``eyes open`` and ``turn`` of landmarks."""
    between = points[:, 42:48].mean(1) - points[:, 36:42].mean(1)
    eyes, right = between.norm(dim=1), F.normalize(between, dim=1)
    down = torch.stack([-right[:, 1], right[:, 0]], 1)  # y grows downwards
    gap = (points[:, 61:64] - points[:, [67, 66, 65]]).norm(dim=2).mean(1)
    lift = ((points[:, 51] - points[:, [48, 54]].mean(1)) * down).sum(1)
    lids = (points[:, [37, 38, 43, 44]] - points[:, [41, 40, 47, 46]]).norm(dim=2).mean(1)
    beside = ((points[:, 30] - points[:, [0, 16]].mean(1)) * right).sum(1)
    return [value / eyes for value in (gap, lift, lids, beside)]


def shaded(points: Float[Tensor, "batch 68 2"], grey: Float[Tensor, "batch 1 h w"]) -> list[Float[Tensor, " batch"]]:
    """``moustache`` and ``brightness`` of grey pictures in [0, 1]."""
    lip = points[:, [32, 33, 34]].lerp(points[:, [50, 51, 52]], 0.5)
    cheeks = points[:, [31, 35]].lerp(points[:, [2, 14]], 0.5)
    at = torch.cat([lip, cheeks], 1)[:, :, None] * 2 - 1
    found = F.grid_sample(grey, at, align_corners=False, padding_mode="border")[:, 0, :, 0]
    return [found[:, 3:].mean(1) - found[:, :3].mean(1), grey.mean((1, 2, 3))]

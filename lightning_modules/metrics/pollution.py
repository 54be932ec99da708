"""Does hiding a face spoil what is not the face? Changes of background, seam, eyes and hair."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics.measured import Measured, RoundTripMetric, gathered, legs_of
from lightning_modules.networks.landmarks import BROWS, EYES, Landmarks68
from lightning_modules.paste import distance_to_hull, outline
from lightning_modules.weights import find

LEGS = (("anonymized", "right"), ("recovered", "right"))
FIGURES = ("background_shift", "seam", "eye_shift", "hair_shift")
CARD = "landmarks68"
# In shares of the side: where the background begins, the band along the face's outline, hair around the forehead, and
# how far the region of the eyes reaches beyond the points of eyes and brows.
AWAY, BAND, HAIR, LIDS = 0.1, 0.03, 0.12, 0.02


class Pollution(RoundTripMetric):
    """What SDN's Table 3 names (KNOWN: the four questions; OURS: the figures), of anonymized and recovered faces.

    Regions come from 68 landmarks of the original. With the face's outline as in
    :class:`~lightning_modules.paste.FaceMask`:

    - ``background_shift``: mean absolute change of colour further than a tenth of the side outside the outline;
    - ``hair_shift``: the same above the brows, up to 12 % of the side outside the outline;
    - ``eye_shift``: the same around eyes and brows;
    - ``seam``: by how much the mean gradient of grey along the outline grew; negative where it was smoothed.

    All in shares of white, the gradient per pixel. Without the landmarks' weights they are n/a.
    """

    def __init__(self) -> None:
        super().__init__()
        found = find(CARD) is not None
        self._landmarks = [Landmarks68()] if found else []  # in a list, so that it is no submodule
        self.add_state("person", [], dist_reduce_fx="cat")
        for leg, _ in LEGS:
            self.add_state(leg, [], dist_reduce_fx="cat")

    def update(self, trip: RoundTrip) -> None:
        """Measure a batch."""
        self.person.append(trip.identity.to(self.device))
        original = trip.original.float() / 2 + 0.5
        for network in self._landmarks:
            points = network.to(original.device)(trip.original.float())
        for leg, images in legs_of(trip).items():
            if leg in LEGS:
                rows = images.new_zeros(len(images), len(FIGURES))
                if self._landmarks:
                    rows = pollution(images.float() / 2 + 0.5, original.to(images), points.to(images))
                getattr(self, leg[0]).append(rows.to(self.device))

    def measured(self) -> list[Measured]:
        """Four figures a leg."""
        person, figures = gathered(self.person), []
        for leg, key in LEGS:
            rows = gathered(getattr(self, leg))
            if rows is None or person is None:
                continue
            for column, metric in enumerate(FIGURES):
                values = rows[:, column] if self._landmarks else None
                why = None if self._landmarks else f"weights missing: {CARD}"
                figures.append(Measured(metric, leg, values, person, key=key, why=why))
        return figures


def pollution(
    image: Float[Tensor, "batch 3 side side"],
    original: Float[Tensor, "batch 3 side side"],
    points: Float[Tensor, "batch 68 2"],
) -> Float[Tensor, "batch 4"]:
    """The four figures of each face, in the order of :data:`FIGURES`.

    Args:
        image: Changed pictures in [0, 1].
        original: The originals in [0, 1].
        points: Landmarks of the originals in shares of the side.
    """
    side = image.shape[-1]
    distance = distance_to_hull(outline(points, 0.45), side)
    eyes = distance_to_hull(torch.cat([points[:, EYES], points[:, BROWS]], 1), side)
    height = ((torch.arange(side, device=image.device) + 0.5) / side)[None, None, :, None]
    above = height < points[:, BROWS, 1].mean(1)[:, None, None, None]
    changed = (image - original).abs().mean(1, keepdim=True)
    band = (distance.abs() < BAND).float()
    return torch.stack(
        [
            _inside(changed, (distance > AWAY).float()),
            _inside(_gradient(image), band) - _inside(_gradient(original), band),
            _inside(changed, (eyes < LIDS).float()),
            _inside(changed, ((distance > 0) & (distance < HAIR) & above).float()),
        ],
        1,
    )


def _inside(values: Tensor, region: Tensor) -> Float[Tensor, " batch"]:
    return (values * region).sum((1, 2, 3)) / region.sum((1, 2, 3)).clamp(min=1)


def _gradient(image: Tensor) -> Float[Tensor, "batch 1 side side"]:
    """Length of the central differences of grey, per pixel."""
    grey = F.pad(image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    down, across = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1], grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    return (down.square() + across.square()).sqrt() / 2

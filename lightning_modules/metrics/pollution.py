"""Does hiding a face spoil what is not the face? Changes of background, seam, eyes and hair."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics.measured import Measured, RoundTripMetric, gathered, legs_of
from lightning_modules.networks.landmarks import BROWS, EYES, Landmarks68
from lightning_modules.paste import DILATION, FEATHER, FOREHEAD, distance_to_hull, outline
from lightning_modules.weights import find

LEGS = (("anonymized", "right"), ("recovered", "right"))
FIGURES = ("background_shift", "seam", "eye_shift", "hair_shift")
CARD = "landmarks68"
# In shares of the side: hair and background begin where a mask ends; hair reaches so far, and the background begins
# there; how far the region of the eyes reaches beyond the points of eyes and brows.
EDGE, HAIR, LIDS = DILATION + FEATHER / 2, 0.16, 0.02


class Pollution(RoundTripMetric):
    """What SDN's Table 3 names (KNOWN: the four questions; OURS: the figures), of anonymized and recovered faces.

    Regions come from 68 landmarks of the original, by the outline and the border of
    :class:`~lightning_modules.paste.FaceMask`:

    - ``background_shift``: mean absolute change of colour further than 16 % of the side outside the outline;
    - ``hair_shift``: the same above the brows, from the end of the mask to there;
    - ``eye_shift``: the same around eyes and brows;
    - ``seam``: by how much more the gradient of grey grew where the mask falls from 1 to 0 than beside it, to either
      side; a picture that is blurred everywhere has none.

    All in shares of white, the gradient per pixel. A face with no pixel in a region has no such figure. Without the
    landmarks' weights they are n/a.
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
                if not self._landmarks:
                    figures.append(Measured(metric, leg, None, key=key, why=f"weights missing: {CARD}"))
                    continue
                values = rows[:, column]
                kept = ~values.isnan()
                figures.append(Measured(metric, leg, values[kept], person[kept], key=key))
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
    distance = distance_to_hull(outline(points, FOREHEAD), side)
    eyes = distance_to_hull(torch.cat([points[:, EYES], points[:, BROWS]], 1), side)
    height = ((torch.arange(side, device=image.device) + 0.5) / side)[None, None, :, None]
    above = height < points[:, BROWS, 1].mean(1)[:, None, None, None]
    changed = (image - original).abs().mean(1, keepdim=True)
    grown = (_gradient(image) - _gradient(original)).clamp(min=0)
    border = (distance - DILATION).abs()
    seam = _mean(grown, border < FEATHER / 2) - _mean(grown, (border >= FEATHER / 2) & (border < FEATHER))
    return torch.stack(
        [
            _mean(changed, distance > HAIR),
            seam,
            _mean(changed, eyes < LIDS),
            _mean(changed, (distance > EDGE) & (distance < HAIR) & above),
        ],
        1,
    )


def _mean(values: Tensor, region: Tensor) -> Float[Tensor, " batch"]:
    """Mean over a region of each picture; nan where it is empty."""
    return (values * region).sum((1, 2, 3)) / region.sum((1, 2, 3))


def _gradient(image: Tensor) -> Float[Tensor, "batch 1 side side"]:
    """Length of the central differences of grey, per pixel."""
    grey = F.pad(image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    down, across = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1], grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    return (down.square() + across.square()).sqrt() / 2

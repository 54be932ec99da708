"""Is it still a usable face? Detection, and how far box and landmarks move."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.detection import Detection, Detector
from lightning_modules.anonymizer import RoundTrip
from lightning_modules.carriers import to_pixels
from lightning_modules.metrics.fairness import Groups, by_group
from lightning_modules.metrics.measured import LEGS, Measured, RoundTripMetric, gathered, legs_of


class FacesDetected(RoundTripMetric):
    """``detected``, ``box_shift`` and ``landmark_shift`` of anonymized, recovered and wrongly opened faces.

    - ``detected``: of the faces found in the original crop, the share still found.
    - ``box_shift``: distance between the boxes' centres over the distance between the original's eyes; of
      faces found in both pictures.
    - ``landmark_shift``: mean distance of the five points, over the same.

    Args:
        detector: Finds faces in an RGB picture, the most certain first.
        groups: To which group a face belongs, to tell ``detected`` of anonymized and recovered faces group by group;
            ``None`` tells nothing of groups.
    """

    def __init__(self, detector: Detector, groups: Groups | None = None) -> None:
        super().__init__()
        self.detector, self.groups = detector, groups
        self.add_state("person", [], dist_reduce_fx="cat")
        self.add_state("group", [], dist_reduce_fx="cat")
        for leg, _ in LEGS:
            self.add_state(leg, [], dist_reduce_fx="cat")

    def update(self, trip: RoundTrip) -> None:
        """Look for the faces of a batch in each of its pictures."""
        originals = [self._find(image) for image in trip.original]
        known = [face is not None for face in originals]
        self.person.append(trip.identity.to(self.device)[torch.tensor(known, device=self.device)])
        if self.groups is not None:
            self.group.append(self.groups(trip.original)[torch.tensor(known)].to(self.device))
        for leg, images in legs_of(trip).items():
            if leg in LEGS:
                rows = [
                    _moved(face, self._find(image))
                    for face, image in zip(originals, images, strict=True)
                    if face is not None
                ]
                getattr(self, leg[0]).append(torch.tensor(rows, device=self.device).reshape(-1, 3))

    def measured(self) -> list[Measured]:
        """Three figures a leg, and those of its groups."""
        person, group, figures = gathered(self.person), gathered(self.group), []
        for leg, key in LEGS:
            rows = gathered(getattr(self, leg))
            if rows is None or person is None:
                continue
            found = rows[:, 0] > 0
            figures.append(Measured("detected", leg, rows[:, 0], person, key=key))
            if self.groups is not None and group is not None and key == "right":
                figures += by_group(figures[-1], group, self.groups.why)
            for column, metric in ((1, "box_shift"), (2, "landmark_shift")):
                figures.append(Measured(metric, leg, rows[found, column], person[found], key=key))
        return figures

    def _find(self, image: Tensor) -> Detection | None:
        return next(iter(self.detector.detect(to_pixels(image))), None)


def _moved(before: Detection, after: Detection | None) -> tuple[float, float, float]:
    """Found or not, shift of the box's centre, mean shift of the points (in eye distances, or nan)."""
    if after is None:
        return 0.0, float("nan"), float("nan")
    eyes = float(np.linalg.norm(before.landmarks[0] - before.landmarks[1]))
    centres = [(np.asarray(face.box[:2]) + np.asarray(face.box[2:])) / 2 for face in (before, after)]
    shift = np.linalg.norm(before.landmarks - after.landmarks, axis=1).mean()
    return 1.0, float(np.linalg.norm(centres[0] - centres[1])) / eyes, float(shift) / eyes

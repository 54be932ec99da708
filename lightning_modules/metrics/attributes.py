"""Does a face keep what is not who it is? Pose, expression, eyes, gender, age and attributes, by frozen networks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics.measured import LEGS, Measured, RoundTripMetric, gathered, legs_of
from lightning_modules.metrics.readers import CLOSED, HAPPY, OLD, READERS, Reader, missing, reader

Readings = dict[str, Tensor]  # reader → its row of each face


class FaceAttributes(RoundTripMetric):
    """What anonymized, recovered and wrongly opened faces (under a random key) keep of the original's, face by face.

    - ``pose_deg``: angle of the rotation between the two poses of the head, in degrees;
    - ``expression_agree``: whether the most likely of seven expressions is the same;
    - ``eyes_agree``: whether both eyes are closed in both pictures or in neither;
    - ``gender_agree``: whether the apparent gender is the same;
    - ``age_mae``: absolute difference of the apparent ages in years;
    - ``attribute_agree``: share of three pseudo-labels that stay: male, young (under 40), smiling (the likeliest
      expression is the happy one).

    All compare what a network says of two pictures, and none knows the truth: how right each is on labelled faces is
    said in :mod:`~lightning_modules.metrics.readers`. Where its network's weights are missing, or a loss of the method
    used that network, a figure is n/a.

    Args:
        loss_networks: Cards of networks that a loss of the method used.
        readers: Name in :data:`~lightning_modules.metrics.readers.READERS` → who reads; ``None`` takes those whose
            weights are on this machine.
    """

    def __init__(self, loss_networks: Collection[str] = (), readers: Mapping[str, Reader] | None = None) -> None:
        super().__init__()
        self._why = {name: missing(name) for name in READERS if readers is None}
        self._why |= {name: f"{name} is a loss network of this method" for name in READERS if name in loss_networks}
        found = {name: reader(name) for name in READERS if not self._why[name]} if readers is None else readers
        self._readers = {name: read for name, read in found.items() if not self._why.get(name)}
        self.add_state("person", [], dist_reduce_fx="cat")
        for leg, _ in LEGS:
            self.add_state(leg, [], dist_reduce_fx="cat")

    def update(self, trip: RoundTrip) -> None:
        """Read the faces of a batch in each of its pictures."""
        self.person.append(trip.identity.to(self.device))
        before = self._read(trip.original)
        for leg, images in legs_of(trip).items():
            if leg in LEGS:
                after = self._read(images)
                nothing = torch.full((len(images),), float("nan"))
                columns = [
                    compared(before, after) if self._without(needed) is None else nothing
                    for needed, compared in FIGURES.values()
                ]
                getattr(self, leg[0]).append(torch.stack(columns, 1).to(self.device))

    def measured(self) -> list[Measured]:
        """Six figures a leg."""
        person, figures = gathered(self.person), []
        for leg, key in LEGS:
            rows = gathered(getattr(self, leg))
            if rows is None or person is None:
                continue
            for column, (metric, (needed, _)) in enumerate(FIGURES.items()):
                why = self._without(needed)
                values = None if why else rows[:, column]
                figures.append(Measured(metric, leg, values, person, key=key, why=why))
        return figures

    def _read(self, images: Tensor) -> Readings:
        return {name: read(images) for name, read in self._readers.items()}

    def _without(self, needed: tuple[str, ...]) -> str | None:
        """Why a figure that needs these readers is n/a."""
        return next((self._why.get(name) or f"no {name}" for name in needed if name not in self._readers), None)


def rotation(pose: Float[Tensor, "batch 3"]) -> Float[Tensor, "batch 3 3"]:
    """Rotation matrices of yaw, pitch and roll in degrees: pitch, then minus yaw, then roll, as Ruiz et al. draw them.

    Example:
        >>> rotation(torch.tensor([[0.0, 0.0, 90.0]]))[0, :2, :2].round().int().tolist()
        [[0, -1], [1, 0]]
    """
    yaw, pitch, roll = torch.deg2rad(pose.double() * torch.tensor([-1.0, 1.0, 1.0])).unbind(1)
    one, zero = torch.ones_like(yaw), torch.zeros_like(yaw)
    about_x = [one, zero, zero, zero, pitch.cos(), -pitch.sin(), zero, pitch.sin(), pitch.cos()]
    about_y = [yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()]
    about_z = [roll.cos(), -roll.sin(), zero, roll.sin(), roll.cos(), zero, zero, zero, one]
    x, y, z = (torch.stack(entries, 1).unflatten(1, (3, 3)) for entries in (about_x, about_y, about_z))
    return x @ y @ z


def pose_angle(a: Float[Tensor, "batch 3"], b: Float[Tensor, "batch 3"]) -> Float[Tensor, " batch"]:
    r"""Angle of the rotation between two poses in degrees, :math:`2 \arcsin(\|R_a - R_b\|_F / \sqrt 8)`.

    The geodesic distance of rotations (:math:`\Phi_6` of Huynh, 2009, "Metrics for 3D Rotations").

    Args:
        a: Yaw, pitch and roll in degrees.
        b: Others.
    """
    chord = (rotation(a) - rotation(b)).flatten(1).norm(dim=1) / 8**0.5
    return torch.rad2deg(2 * chord.clamp(max=1).asin()).float()


def both_closed(eyes: Float[Tensor, "batch 2"]) -> Tensor:
    """Whether both eyes are closed, ``(B,)``, by the probability for each."""
    return (eyes > CLOSED).all(1)


def _signs(face: Readings) -> Tensor:
    """The pseudo-labels male, young and smiling, ``(B, 3)``."""
    male, age = face["faceres"].unbind(1)
    return torch.stack([male > 0.5, age < OLD, face["expression"].argmax(1) == HAPPY], 1)


FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Readings, Readings], Tensor]]] = {
    "pose_deg": (("head-pose",), lambda a, b: pose_angle(a["head-pose"], b["head-pose"])),
    "expression_agree": (
        ("expression",),
        lambda a, b: (a["expression"].argmax(1) == b["expression"].argmax(1)).float(),
    ),
    "eyes_agree": (
        ("eyes-open",),
        lambda a, b: (both_closed(a["eyes-open"]) == both_closed(b["eyes-open"])).float(),
    ),
    "gender_agree": (
        ("faceres",),
        lambda a, b: ((a["faceres"][:, 0] > 0.5) == (b["faceres"][:, 0] > 0.5)).float(),
    ),
    "age_mae": (("faceres",), lambda a, b: (a["faceres"][:, 1] - b["faceres"][:, 1]).abs()),
    "attribute_agree": (("faceres", "expression"), lambda a, b: (_signs(a) == _signs(b)).float().mean(1)),
}
"""Figure → the readers it needs, and its value for each face before and after."""

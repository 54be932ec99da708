"""Attackers without the key: what gives the right one away among guesses (ours, after protocol.md)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import FaceBatch, face_batch
from datamodules.detection import Detector
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, resize
from lightning_modules.carriers import through_file, to_pixels


class FaceLikelihood:
    """How likely a picture is among faces: a Gaussian on its principal components (Moghaddam & Pentland, 1997).

    Args:
        faces: Pictures ``(N, 3, H, W)`` to learn from, two or more.
        components: Directions with a variance of their own; the others share one.
        size: Pixels at which pictures are compared.

    Raises:
        ValueError: If there are fewer than two faces.
    """

    def __init__(self, faces: Image, components: int = 64, size: int = 32) -> None:
        if len(faces) < 2:
            raise ValueError(f"a likelihood of faces is learned from two faces at least, got {len(faces)}")
        self.size = size
        rows = self._rows(faces)
        self.mean = rows.mean(0)
        _, lengths, directions = torch.linalg.svd(rows - self.mean, full_matrices=False)
        variance = lengths.square() / (len(rows) - 1)
        kept = min(components, len(rows) - 1)
        self.directions, self.variance = directions[:kept], variance[:kept].clamp(min=1e-6)
        left = (rows - self.mean).square().sum(1).mean() - self.variance.sum()
        self.rest = (left / max(1, rows.shape[1] - kept)).clamp(min=1e-6)

    def __call__(self, image: Image) -> Float[Tensor, " batch"]:
        """Logarithm of the density, up to a constant."""
        off = self._rows(image) - self.mean
        along = off @ self.directions.mT
        beside = off.square().sum(1) - along.square().sum(1)
        return -0.5 * ((along.square() / self.variance).sum(1) + beside / self.rest)

    def _rows(self, image: Image) -> Tensor:
        return resize(image.float().cpu(), self.size).flatten(1).double()


@torch.no_grad()
def guessing_signs(
    method: ReversibleAnonymizer,
    received: FaceBatch,
    keys: Float[Tensor, "batch guesses length"],
    detector: Detector,
    likelihood: FaceLikelihood,
) -> dict[str, Float[Tensor, "batch guesses"]]:
    """What an attacker without the original sees in what each guessed key opens; more is more likely the right key.

    Args:
        method: In eval mode.
        received: Anonymized faces as they were saved, ``(B, 3, size, size)``, with the factors that everybody knows.
        keys: Guessed keys of each face.
        detector: Its score of the face.
        likelihood: Of faces.

    Returns:
        ``again``: PSNR in dB of hiding what was opened once more, to what was received; ``detector``: score in [0, 1];
        ``likelihood``: logarithm of a density.
    """
    signs: dict[str, list[Tensor]] = {"again": [], "detector": [], "likelihood": []}
    for key in keys.unbind(1):
        opened = through_file(method.recover(received, key), "png")
        again = through_file(method.anonymize(received._replace(image=opened), key), "png")
        error = (again - received.image).square().mean((1, 2, 3)).clamp(min=1e-8)
        signs["again"].append(-10 * (error / 4).log10())
        found = [detector.detect(to_pixels(image)) for image in opened]
        signs["detector"].append(torch.tensor([faces[0].score if faces else 0.0 for faces in found]))
        signs["likelihood"].append(likelihood(opened).float())
    return {name: torch.stack([column.cpu() for column in columns], 1) for name, columns in signs.items()}


def guess_auc(signs: Float[Tensor, "batch guesses"]) -> Float[Tensor, " batch"]:
    """Of each face, the share of wrong keys whose sign is below the right one's, which comes first; ties are half.

    Its mean is the area under the curve of telling right keys from wrong ones of the same face: .5 is chance.
    """
    right, wrong = signs[:, :1], signs[:, 1:]
    return ((wrong < right).float() + 0.5 * (wrong == right).float()).mean(1)


def received_faces(method: ReversibleAnonymizer, face: FaceBatch, key: Tensor) -> FaceBatch:
    """What a recipient gets of faces: the saved anonymized pictures and the attributes that are factors."""
    with torch.no_grad():
        saved = through_file(method.anonymize(face, key), "png")
    return face_batch(saved, attributes=face.attributes[:, : method.attributes])

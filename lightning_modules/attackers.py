"""Attackers without the key: what gives it away among guesses, and what pairs teach (ours, after protocol.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

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
    keys: Float[Tensor, "batch guesses ..."],
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
    """What a recipient gets of faces: the saved anonymized pictures, what is kept beside them, and known factors."""
    with torch.no_grad():
        saved, kept = through_file(method.anonymize(face, key), "png"), method.kept_beside(face, key)
    return face_batch(saved, attributes=face.attributes[:, : method.attributes], w=kept)


BLOCK = 8  # pixels of the side of the blocks that an attacker learns, as in JPEG
RIDGE = 1e-2  # of the mean variance


def learned_codes(
    hidden: Float[Tensor, "pairs dim"], shown: Float[Tensor, "pairs dim"], gallery: Float[Tensor, "n dim"]
) -> Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch dim"]]:
    """What pairs of identity codes teach about a rotation of people: hidden codes → codes of originals.

    Codes are made round by those of other people, whom everybody can get, and the rotation nearest to all pairs is
    taken (orthogonal Procrustes; Schönemann, 1966).

    Args:
        hidden: Codes read off anonymized pictures.
        shown: Codes of their originals.
        gallery: Codes of other people.
    """
    lengths, directions = torch.linalg.eigh(gallery.double().mT @ gallery.double() / len(gallery))
    kept = lengths > RIDGE * lengths.mean()
    scale, directions = lengths[kept].sqrt(), directions[:, kept]

    def rounded(codes: Tensor) -> Tensor:
        return F.normalize(codes.double() @ directions / scale, dim=1)

    left, _, right = torch.linalg.svd(rounded(hidden).mT @ rounded(shown))
    return lambda codes: F.normalize((rounded(codes) @ left @ right * scale) @ directions.mT, dim=1).to(codes)


def learned_blocks(hidden: Image, shown: Image) -> Callable[[Image], Image]:
    """What pairs of pictures teach about each block of 8 × 8 pixels: anonymized pictures → originals, linearly.

    Ridge regression about the mean of the pairs, so that one pair teaches its original and nothing else.

    Args:
        hidden: Anonymized pictures ``(N, 3, H, W)`` in [-1, 1]; sides a multiple of 8.
        shown: Their originals.
    """

    def blocks(image: Tensor) -> Tensor:  # blocks × pictures × numbers
        return F.unfold(image.double(), BLOCK, stride=BLOCK).permute(2, 0, 1)

    given, wanted = blocks(hidden), blocks(shown)
    about, mean = given.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
    given, wanted = given - about, wanted - mean
    few = given.shape[1] < given.shape[2]  # then as many equations as pairs, otherwise as numbers
    gram = given @ given.mT if few else given.mT @ given
    ridge = RIDGE * given.square().sum((1, 2))[:, None, None].clamp(min=1e-6) / min(given.shape[1:])
    gram = gram + ridge * torch.eye(gram.shape[1]).to(gram)
    weights = given.mT @ torch.linalg.solve(gram, wanted) if few else torch.linalg.solve(gram, given.mT @ wanted)

    def invert(image: Image) -> Image:
        found = (blocks(image) - about) @ weights + mean
        return F.fold(found.permute(1, 2, 0), image.shape[2:], BLOCK, stride=BLOCK).clamp(-1, 1).to(image)

    return invert


def adapted(
    hidden: Float[Tensor, "pairs dim"], shown: Float[Tensor, "pairs dim"]
) -> Callable[[Float[Tensor, "batch dim"]], Float[Tensor, "batch dim"]]:
    """What pairs teach a judge: its embeddings of anonymized faces → where their originals' would lie.

    Ridge regression of what is added to an embedding. How much the pairs are believed is what serves every fourth of
    them best when it is left out; where they teach nothing, embeddings stay as they are.

    Args:
        hidden: Embeddings of anonymized faces, four or more.
        shown: Those of their originals.

    Raises:
        ValueError: If there are fewer than four pairs.
    """
    if len(hidden) < 4:
        raise ValueError(f"a judge is adapted by four pairs at least, got {len(hidden)}")
    given, missing = hidden.double(), (shown - hidden).double()

    def fitted(doubt: float, rows: Tensor) -> Tensor:
        gram = given[rows].mT @ given[rows]
        ridge = doubt * gram.diagonal().mean().clamp(min=1e-9) * torch.eye(len(gram), dtype=gram.dtype)
        return torch.linalg.solve(gram + ridge, given[rows].mT @ missing[rows])

    left_out = torch.arange(len(given)) % 4 == 0

    def error(doubt: float) -> float:
        return float((given[left_out] @ fitted(doubt, ~left_out) - missing[left_out]).square().mean())

    doubts = [10.0**power for power in range(-3, 5)]
    weights = fitted(min(doubts, key=error), torch.ones_like(left_out))
    return lambda codes: (codes.double() + codes.double() @ weights).to(codes)


@torch.no_grad()
def codes_of(method: ReversibleAnonymizer, images: Image, batch: int = 8) -> Float[Tensor, "n dim"] | None:
    """Identity codes as a method reads them off pictures; ``None`` where it knows none."""
    if method.code_of(face_batch(images[:1])) is None:
        return None
    return torch.cat([method.code_of(face_batch(part)) for part in images.split(batch)])


@torch.no_grad()
def known_plaintext(
    method: ReversibleAnonymizer,
    shown: Float[Tensor, "pairs 3 height width"],
    hidden: Float[Tensor, "pairs 3 height width"],
    received: Image,
    people: Float[Tensor, "others dim"] | None,
    counts: Sequence[int],
    batch: int = 8,
) -> dict[int, dict[str, Image]]:
    """What an attacker makes of received pictures who knows some originals with what became of them.

    Args:
        method: In eval mode.
        shown: Originals that the attacker has.
        hidden: What became of them, as it was saved.
        received: Anonymized pictures of other faces, as they were saved.
        people: Codes (:func:`codes_of`) of faces that everybody can get; they say how people's codes lie. ``None``
            where a method knows no codes.
        counts: How many pairs the attacker has, each at most all of them.
        batch: Faces at once.

    Returns:
        By number of pairs and by attacker (``blocks``; ``codes``, where a method knows identity codes) the pictures.
    """
    found: dict[int, dict[str, Image]] = {
        count: {"blocks": learned_blocks(hidden[:count], shown[:count])(received)} for count in counts
    }
    if people is None:
        return found
    given, wanted, met = (codes_of(method, images, batch) for images in (hidden, shown, received))
    for count in counts:
        guessed = learned_codes(given[:count], wanted[:count], people)(met)
        parts = zip(received.split(batch), guessed.split(batch), strict=True)
        found[count]["codes"] = torch.cat([method.recover_from(face_batch(image), code) for image, code in parts])
    return found

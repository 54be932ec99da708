"""Any pictures: their faces found and aligned, one :class:`~datamodules.batch.FaceBatch` a face with its place."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import cv2
import lightning as L
import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch.utils.data import DataLoader, IterableDataset

from datamodules.alignment import similarity_transform, template, transform, warp
from datamodules.batch import FaceBatch, face_batch
from datamodules.detection import Detection, Detector, intersection, main_face
from datamodules.photo_files import Photo, read_photo
from datamodules.photo_search import Found

NEAR, FAR = 320, 1280  # sides to which a picture is brought for the search: for large faces, and for small ones too
SURE = 0.8  # least score of a face that lies or hangs: pictures turned show detectors more faces than there are
# Misfit of landmarks beyond which a face is only kept where no other was found: CenterFace is up to .96 sure of upright
# faces that it sees turned, and puts landmarks anywhere. Of 34 LFW faces, upright ones have .04 to .25, the same turned
# by a quarter or two .30 to .73.
ODD = 0.28


class Place(NamedTuple):
    """Where a face of a picture is.

    Attributes:
        box: Left, top, right, bottom in pixels, ``(4,)``.
        matrix: Map from picture pixels to crop pixels, ``(2, 3)`` float64.
        attributes: -1 or +1 for each attribute that is a factor beside the key.
    """

    box: ndarray
    matrix: ndarray
    attributes: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Box and matrix as plain numbers, row by row."""
        return tuple(map(float, self.box)), tuple(map(float, self.matrix.ravel()))


@dataclass
class OpenPhoto:
    """A picture while its faces are under way.

    Attributes:
        photo: The picture as it was read.
        places: Its faces that are changed.
        left: How many more faces were found and are left as they are.
        crops: Each face's crop ``(S, S, 3)`` uint8, in the order of ``places``.
        made: What the method made of each; ``None`` until it is there.
        nonces: Each face's nonce; empty until one is drawn or read.
        touched: Left, top, right, bottom of the pixels that each face's paste may change.
        similarity: Of each face to its original, as the method made it and as it will be written.
        misplaced: Numbers of the faces that are not found where they were any more.
        notes: What its job keeps with it.
    """

    photo: Photo
    places: list[Place]
    left: int = 0
    crops: list[ndarray] = field(default_factory=list)
    made: list[ndarray | None] = field(default_factory=list)
    nonces: list[bytes] = field(default_factory=list)
    touched: list[tuple[int, int, int, int]] = field(default_factory=list)
    similarity: list[tuple[float, float]] = field(default_factory=list)
    misplaced: list[int] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def row(self, index: int, sample: int) -> FaceBatch:
        """One face as a method takes it, without a batch."""
        place = self.places[index]
        pixels = torch.from_numpy(self.crops[index].transpose(2, 0, 1).copy()).float() / 127.5 - 1
        return face_batch(
            pixels,
            sample=torch.tensor(sample),
            place=torch.from_numpy(place.matrix.astype(np.float32)),
            attributes=torch.tensor(place.attributes, dtype=torch.float32),
        )


@runtime_checkable
class Job(Protocol):
    """Who decides what is done with each picture, and is told of it; ``failures`` counts those that could not be."""

    failures: int

    def wanted(self, found: Found, digest: str) -> bool:
        """Whether this picture, by the SHA-256 of its file, is still to be done; asked from several threads."""
        ...

    def look(self, photo: Photo) -> OpenPhoto:
        """The faces of a picture that are to be changed.

        Raises:
            OSError: It cannot be done; told to :meth:`failed`.
            ValueError: As above.
        """
        ...

    def done(self, opened: OpenPhoto, pixels: UInt8[ndarray, "h w 3"]) -> None:
        """All faces of a picture are done; it has these pixels now."""
        ...

    def failed(self, found: Found, digest: str, error: Exception) -> None:
        """A picture could not be done."""
        ...


class Photos(L.LightningDataModule):
    """The faces of pictures, one row each, in the order of the pictures.

    Pictures are opened one after another as their faces are asked for, so memory does not grow with their number.
    A picture without faces to change is done at once. Several processes share out the pictures.

    Args:
        found: The pictures.
        job: Who decides and is told.
        size: Pixels of the side of a crop.
        batch_size: Faces a batch.
        keep_metadata: Whether the safe part of EXIF is kept.
        workers: Threads that read pictures ahead, one each; with 0 each is read when its turn comes.

    Raises:
        ValueError: ``batch_size`` is less than one, or ``workers`` is negative.
    """

    def __init__(
        self,
        found: Sequence[Found],
        job: Job,
        size: int,
        batch_size: int = 4,
        keep_metadata: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size must be at least 1 and workers 0, got {batch_size} and {workers}")
        self.found, self.job, self.size = found, job, size
        self.batch_size, self.keep_metadata, self.workers = batch_size, keep_metadata, workers
        self.open: dict[int, tuple[OpenPhoto, int]] = {}
        """Faces under way by their running number: the picture, and the face's number in it."""

    def predict_dataloader(self) -> DataLoader:
        """Faces in this very process: whoever pastes them back needs the pictures that they came from."""
        return DataLoader(_Faces(self), batch_size=self.batch_size, num_workers=0)


class _Faces(IterableDataset):
    """The rows of :class:`Photos`."""

    def __init__(self, photos: Photos) -> None:
        self.photos = photos

    def __iter__(self) -> Iterator[FaceBatch]:
        photos, sample = self.photos, 0
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
        for found, read in _ahead(photos.found[rank::world], photos):
            opened = _open(found, read, photos)
            if opened is None:
                continue
            for index in range(len(opened.places)):
                photos.open[sample] = (opened, index)
                yield opened.row(index, sample)
                sample += 1


class Read(NamedTuple):
    """What reading a picture gave: its hash, and pixels; neither error nor pixels where it is done already."""

    digest: str = ""
    photo: Photo | None = None
    error: Exception | None = None


def _ahead(files: Sequence[Found], photos: Photos) -> Iterator[tuple[Found, Read]]:
    """Pictures in order, each read by then; no more than the threads are read ahead."""
    if not photos.workers:
        yield from ((found, _read(found, photos)) for found in files)
        return
    with ThreadPoolExecutor(photos.workers, "reading") as pool:
        waiting: deque[tuple[Found, Future[Read]]] = deque()
        for found in files:
            waiting.append((found, pool.submit(_read, found, photos)))
            if len(waiting) > photos.workers:
                first, read = waiting.popleft()
                yield first, read.result()
        for found, read in waiting:
            yield found, read.result()


def _read(found: Found, photos: Photos) -> Read:
    """A picture from its file, unless it is done already."""
    digest = ""
    try:
        data = found.read()
        digest = sha256(data).hexdigest()
        if not photos.job.wanted(found, digest):
            return Read(digest)
        return Read(digest, read_photo(found, photos.keep_metadata, data))
    except Exception as error:  # whatever is wrong with one picture, the others are done
        return Read(digest, error=error)


def _open(found: Found, read: Read, photos: Photos) -> OpenPhoto | None:
    """A picture with faces to change; ``None`` where it is done already, or at once."""
    job, photo = photos.job, read.photo
    if photo is None:
        if read.error is not None:
            job.failed(found, read.digest, read.error)
        return None
    try:
        opened = job.look(photo)
        opened.crops = [warp(photo.pixels, place.matrix, photos.size) for place in opened.places]
    except Exception as error:  # as above
        job.failed(found, read.digest, error)
        return None
    if not opened.places:
        job.done(opened, photo.pixels)
        return None
    opened.made = [None] * len(opened.places)
    opened.nonces = opened.nonces or [b""] * len(opened.places)
    return opened


def find_faces(picture: UInt8[ndarray, "h w 3"], detector: Detector) -> list[Detection]:
    """All faces of a picture of any size, the most certain first.

    A picture is searched as a whole, large ones also at a size at which small faces show, and turned by each quarter
    for faces that lie or hang; what several searches find is kept once, from the one that is surer of it and puts its
    landmarks where those of a face are.
    """
    found = _upright(picture, detector)
    for quarters in (1, 2, 3):
        turned = _upright(np.ascontiguousarray(np.rot90(picture, quarters)), detector)
        found += [_turned_back(face, quarters, picture) for face in turned if face.score >= SURE]
    if len(found) < 2:
        return found
    sides = [[*map(float, (*face.box[:2], *(face.box[2:] - face.box[:2])))] for face in found]
    worth = [1 + face.score - min(misfit(face), 1) for face in found]
    best = [found[int(i)] for i in np.asarray(cv2.dnn.NMSBoxes(sides, worth, 0.0, 0.4)).reshape(-1)]  # best first
    kept = [face for at, face in enumerate(best) if misfit(face) <= ODD or not _covered(face, best[:at])]
    return sorted(kept, key=lambda face: -face.score)


def _covered(face: Detection, others: list[Detection]) -> bool:
    """Whether more than half of a face is that of another."""
    area = float(np.prod(face.box[2:] - face.box[:2]))
    return any(intersection(face.box, other.box) > area / 2 for other in others)


def misfit(face: Detection) -> float:
    """How far five landmarks lie from those of an upright face, after the best similarity transform.

    Root of the mean squared distance, in shares of the root of the template's mean squared distance from its centre;
    infinite where all fall on one place.
    """
    upright = template("ffhq", 256)
    try:
        moved = transform(similarity_transform(face.landmarks, upright), face.landmarks)
    except ValueError:
        return math.inf
    return float(np.sqrt(((moved - upright) ** 2).sum() / ((upright - upright.mean(0)) ** 2).sum()))


def _turned_back(face: Detection, quarters: int, picture: UInt8[ndarray, "h w 3"]) -> Detection:
    """A face of ``np.rot90(picture, quarters)`` in the pixels of the picture."""
    height, width = picture.shape[:2]

    def back(points: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        for before in range(quarters - 1, -1, -1):  # the picture's width before that quarter
            x, y = points.T
            points = np.stack([(height if before % 2 else width) - 1 - y, x], 1)
        return points.astype(np.float32)

    corners = back(face.box.reshape(2, 2))
    return Detection(np.concatenate([corners.min(0), corners.max(0)]), face.score, back(face.landmarks))


def _upright(picture: UInt8[ndarray, "h w 3"], detector: Detector) -> list[Detection]:
    """What a detector finds at its own size and, of large pictures, at one at which small faces show."""
    found = detector.detect(picture)
    longest = max(picture.shape[:2])
    if longest > NEAR and isinstance(getattr(detector, "working", None), int):
        usual, detector.working = detector.working, min(FAR, longest // 32 * 32 + 32)
        try:
            found = [*found, *detector.detect(picture)]
        finally:
            detector.working = usual
    return found


def look_for_places(
    picture: UInt8[ndarray, "h w 3"], detector: Detector, size: int, which: Literal["all", "largest"]
) -> tuple[list[Place], int]:
    """Places of the faces of a picture, and how many more faces are left out.

    Args:
        picture: RGB picture.
        detector: What finds faces.
        size: Pixels of the side of a crop.
        which: ``"all"``, or ``"largest"``: the one that the picture is of.
    """
    found = find_faces(picture, detector)
    if which == "largest" and found:
        chosen = main_face(found, *picture.shape[:2])
        kept = [] if chosen is None else [chosen]
    else:
        kept = found
    places = [Place(face.box.astype(np.float64), _matrix(face.landmarks, size)) for face in kept]
    return places, len(found) - len(kept)


def _matrix(landmarks: Float[ndarray, "5 2"], size: int) -> Float[ndarray, "2 3"]:
    return similarity_transform(landmarks, template("ffhq", size))

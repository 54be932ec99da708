"""Aligned faces on disk: aligned once, then read row by row out of a memory map."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy import ndarray
from numpy.lib import format as npy
from torch.utils.data import Dataset

from datamodules import alignment
from datamodules.archives import cache_folder, fresh, progress
from datamodules.batch import FaceBatch, face_batch
from datamodules.detection import Detector, default_detector
from datamodules.sources import Face, FaceSource, Picture
from datamodules.stream import Turn

# Changes a crop and its place together: (image (s, s, 3) uint8, place (2, 3), seed) -> (image, place)
Augment = Callable[[ndarray, ndarray, int], tuple[ndarray, ndarray]]


class Faces(Dataset[FaceBatch], ABC):
    """A map-style data set of single (unbatched) faces.

    Args:
        pictures: Whose faces they are, in order.
        identities: Number of each person.
        attributes: Attributes of a picture's file as -1 / +1, ``(m,)`` float32; ``None`` gives none.
        augment: What to do to a face before it is handed out, by the seed of its turn (without one, its row); ``None``
            hands it out as it is.

    Attributes:
        name: Tells these faces at this size from all others, as in the name of a cache.
        skipped: Reason by picture for each that gave no face and is left out.
    """

    name: str
    skipped: Mapping[str, str]

    def __init__(
        self,
        pictures: Sequence[Picture],
        identities: dict[str, int] | None = None,
        attributes: dict[str, ndarray] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.pictures, self.augment = pictures, augment
        people = sorted({picture.person for picture in self.pictures})
        numbers = identities or {person: number for number, person in enumerate(people)}
        self._identity = torch.tensor([numbers[picture.person] for picture in self.pictures])
        self._sample = torch.tensor([picture.sample for picture in self.pictures])
        self._attributes = None
        if attributes is not None:
            self._attributes = torch.from_numpy(np.stack([attributes[p.file] for p in self.pictures]))

    @abstractmethod
    def face(self, row: int) -> Face:
        """One face as it was stored."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: int | Turn) -> FaceBatch:
        row, seed = at if isinstance(at, Turn) else (at, at)
        image, place, w = self.face(row)
        if self.augment is not None:
            image, place = self.augment(image, place, seed)
        # in numpy: a face is too small for torch's threads, which fight with the loader's workers
        pixels = image.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(127.5) - np.float32(1)
        return face_batch(
            torch.from_numpy(pixels),
            identity=self._identity[row],
            sample=self._sample[row],
            place=torch.from_numpy(place),
            attributes=None if self._attributes is None else self._attributes[row],
            w=torch.from_numpy(w) if w.size else None,
        )


class AlignedFaces(Faces):
    """Faces of one cache folder.

    Args:
        folder: What :func:`aligned_faces` wrote.
        identities: Number of each person.
        attributes: Attributes of a picture's file as -1 / +1, ``(m,)`` float32; ``None`` gives none.
        augment: What to do to a face before it is handed out.
    """

    def __init__(
        self,
        folder: Path,
        identities: dict[str, int] | None = None,
        attributes: dict[str, ndarray] | None = None,
        augment: Augment | None = None,
    ) -> None:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        super().__init__([Picture(*row) for row in index["pictures"]], identities, attributes, augment)
        self.folder, self.name, self.skipped = folder, folder.name, index["skipped"]
        self._layers: int = index["layers"]
        self._places = np.load(folder / "places.npy")

    def face(self, row: int) -> Face:
        """One face out of the memory map."""
        w = np.empty(0, np.float32)
        if self._codes is not None:
            w = np.broadcast_to(self._codes[row], (self._layers, self._codes.shape[-1])).copy()
        return Face(np.array(self.images[row]), self._places[row].copy(), w)

    @cached_property
    def images(self) -> UInt8[ndarray, "n h w 3"]:
        """All crops, memory-mapped."""
        return np.load(self.folder / "faces.npy", mmap_mode="r")

    @cached_property
    def _codes(self) -> ndarray | None:
        return np.load(self.folder / "w.npy", mmap_mode="r") if self._layers else None

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be pickled as all its bytes; a worker opens its own
        return {name: value for name, value in self.__dict__.items() if name not in ("images", "_codes")}


def aligned_faces(source: FaceSource, pictures: Sequence[Picture], size: int, detector: Detector | None = None) -> Path:
    """Cache folder of these pictures' faces, made if it is not there yet.

    The folder's name is a hash of all that its pixels depend on, and it appears only when it is whole.
    Pictures that cannot be read or hold no face are left out and listed with the reason.

    Args:
        source: Data set.
        pictures: Which of its pictures.
        size: Side of a crop in pixels.
        detector: What finds the faces without known landmarks; ``None`` takes
            :func:`~datamodules.detection.default_detector` when there are any.

    Raises:
        ValueError: No picture gave a face; the message counts why.
    """
    if detector is None and source.detects(pictures):
        detector = default_detector()
    finder = detector.name if detector is not None and source.detects(pictures) else "known"
    identity = f"{source.fingerprint(pictures)} {size} {alignment.VERSION} {finder}"
    target = cache_folder() / "faces" / f"{source.name}-{size}-{sha256(identity.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        with fresh(target) as folder:
            _build(folder, source, pictures, size, detector)
    return target


def _build(folder: Path, source: FaceSource, pictures: Sequence[Picture], size: int, detector: Detector | None) -> None:
    kept: list[Picture] = []
    places: list[ndarray] = []
    codes: list[ndarray] = []
    skipped: dict[str, str] = {}
    layers = 0
    with (folder / "faces.npy").open("wb") as rows, progress() as bar:
        start = _header(rows, len(pictures), size)
        faces = source.faces(pictures, size, detector)
        task = bar.add_task(f"aligning {source.name}", total=len(pictures))
        for picture, face in zip(pictures, faces, strict=True):
            bar.advance(task)
            if isinstance(face, Exception):
                skipped[picture.file] = str(face)
                continue
            rows.write(np.ascontiguousarray(face.image).tobytes())
            kept.append(picture)
            places.append(face.place)
            if face.w.size:
                layers = len(face.w)
                codes.append(face.w[:1] if (face.w == face.w[:1]).all() else face.w)
        if not pictures:
            raise ValueError(f"expected pictures of {source.name}, got none")
        if skipped:
            reason = next(iter(skipped.values()))
            counts = f"{len(skipped)} of {len(pictures)} pictures of {source.name} gave no face"
            counts += f" (the first: {reason})"
            if not kept:
                raise ValueError(f"{counts}; expected pictures of faces in {source.folder}")
            rank_zero_warn(f"{counts}; they are left out")
        rows.seek(0)
        if _header(rows, len(kept), size) != start:
            raise AssertionError("numpy pads the header of an array so that its length can change in place")
    np.save(folder / "places.npy", np.stack(places).astype(np.float32))
    if codes:
        rows = max(len(code) for code in codes)  # a code that is the same in all layers is kept once
        np.save(folder / "w.npy", np.stack([np.broadcast_to(code, (rows, code.shape[1])) for code in codes]))
    index = {"pictures": kept, "skipped": skipped, "layers": layers}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _header(file: IO[bytes], rows: int, size: int) -> int:
    """Write the head of a uint8 array of crops; return where its bytes start."""
    shape = (rows, size, size, 3)
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()

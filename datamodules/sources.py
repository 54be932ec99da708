"""What a data set of faces is before alignment: its pictures, whom they show, and how one is read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from datamodules.alignment import align
from datamodules.archives import ARCHIVES
from datamodules.contents import contents
from datamodules.detection import Detector, main_face

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}


class Picture(NamedTuple):
    """One picture of a data set: its file within the data set, whom it shows, its number."""

    file: str
    person: str
    sample: int


class Face(NamedTuple):
    """One aligned face.

    Attributes:
        image: RGB ``(size, size, 3)`` uint8.
        place: Map from picture pixels to crop pixels, ``(2, 3)`` float32.
        w: Style code of a generated face, ``(L, 512)`` float32, otherwise ``(0,)``.
    """

    image: ndarray
    place: ndarray
    w: ndarray


class NoFaceError(ValueError):
    """A picture in which no face was found."""


class FaceSource(ABC):
    """A data set before alignment.

    Attributes:
        name: What messages, caches and tables call it.
        attribute_names: Names of what :meth:`attributes` returns.
        points: Known landmarks by file, ``(5, 2)`` in pixels; a file without is searched by a detector.
        points_width: Width of the pictures that ``points`` were taken on; ``None`` means this copy's own.
    """

    name: str
    attribute_names: tuple[str, ...] = ()
    points_width: int | None = None

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the files lie.

        Raises:
            FileNotFoundError: There is no copy; the message says where was looked and how to get one.
        """

    @property
    @abstractmethod
    def pictures(self) -> list[Picture]:
        """All pictures, sorted by file."""

    @property
    def points(self) -> dict[str, ndarray]:
        """Known landmarks by file."""
        return {}

    def attributes(self, picture: Picture) -> ndarray:
        """Binary attributes of a picture as -1 / +1, ``(m,)`` float32."""
        return np.empty(0, np.float32)

    def read(self, picture: Picture) -> UInt8[ndarray, "h w 3"]:
        """RGB pixels of a picture; grey ones get three equal channels.

        Raises:
            OSError: The file is missing or is not a picture; the message names it.
        """
        return read_picture(self.folder / picture.file)

    def face(self, picture: Picture, size: int, detector: Detector | None) -> Face:
        """Read a picture and align its main face to the generator's template.

        Raises:
            OSError: The file cannot be read.
            NoFaceError: No face was found in it.
        """
        pixels = self.read(picture)
        points = self.points.get(picture.file)
        if points is not None:
            points = points * (pixels.shape[1] / self.points_width if self.points_width else 1.0)
        elif detector is not None:
            found = main_face(detector.detect(pixels), *pixels.shape[:2])
            points = None if found is None else found.landmarks
        if points is None:
            raise NoFaceError(f"no face was found in {self.folder / picture.file}")
        image, place = align(pixels, points, size)
        return Face(image, place.astype(np.float32), np.empty(0, np.float32))

    def faces(
        self, pictures: Sequence[Picture], size: int, detector: Detector | None
    ) -> Iterator[Face | OSError | ValueError]:
        """Align many pictures on all cores, in their order; what fails comes back as its error."""

        def one(picture: Picture) -> Face | OSError | ValueError:
            try:
                return self.face(picture, size, detector)
            except (OSError, ValueError) as error:
                return error

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(pictures), 64):  # a bound on the faces that wait to be written
                yield from pool.map(one, pictures[start : start + 64])

    def detects(self, pictures: Sequence[Picture]) -> bool:
        """Whether a detector is needed: some picture has no known landmarks."""
        return any(picture.file not in self.points for picture in pictures)

    def fingerprint(self, pictures: Sequence[Picture]) -> str:
        """Hash of which pictures these are: names, what the files hold, numbers and known landmarks."""
        digest = sha256(f"{self.name} {self.points_width}".encode())
        held = contents(self.folder, [picture.file for picture in pictures])
        for picture in pictures:
            digest.update(f"\n{picture} {held[picture.file]}".encode())
            if picture.file in self.points:
                digest.update(np.ascontiguousarray(self.points[picture.file], np.float64).tobytes())
        return digest.hexdigest()


def read_picture(path: Path) -> UInt8[ndarray, "h w 3"]:
    """RGB pixels of a file, turned as its EXIF says.

    Raises:
        OSError: The file is missing or is not a picture; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    data = np.fromfile(path, np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if pixels is None:
        raise OSError(f"{path} cannot be read as a picture")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def list_pictures(folder: Path, people: Literal["folder", "picture"], suffixes: set[str] = IMAGES) -> list[Picture]:
    """All pictures below a folder, numbered in the order of their paths.

    Raises:
        FileNotFoundError: There is none; the message counts the other files.
    """
    files, others = [], 0
    for top, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if Path(name).suffix.lower() in suffixes and not name.startswith("."):
                files.append(Path(top, name).relative_to(folder))
            else:
                others += 1
    if not files:
        raise FileNotFoundError(f"{folder} holds no picture ({others} other files were found)")
    named = sorted((file.as_posix(), file) for file in files)
    return [
        Picture(text, file.parent.name if people == "folder" else file.with_suffix("").as_posix(), number)
        for number, (text, file) in enumerate(named)
    ]


def find_root(label: str, root: str | None, names: tuple[str, ...], remedy: str) -> Path:
    """Folder or archive of a data set.

    Args:
        label: What the message calls it.
        root: What the user gave: the data, or a folder that holds it; ``None`` looks in the usual places.
        names: File names without suffix that the data goes by.
        remedy: How to get it, for the message.

    Raises:
        FileNotFoundError: It is in none of the places; the message names them.
    """
    usual = [os.environ.get("KEYVEIL_DATA"), "data", "../shared/data"]
    places = [Path(place).expanduser() for place in ([root] if root else usual) if place]
    for place in places:
        for name in names:
            for path in (place / f"{name}{suffix}" for suffix in ("", *ARCHIVES)):
                if path.exists():
                    return path
    if root and places[0].exists():
        return places[0]
    wanted = " or ".join(names)
    raise FileNotFoundError(
        f"{label} was not found: looked for {wanted} (a folder or an archive) in "
        f"{', '.join(str(place) for place in places)}; {remedy} and name its place by `root` or KEYVEIL_DATA"
    )

"""Aligned faces in shards: tar archives in the WebDataset layout, with an index, so that any face is read by itself."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import cv2
import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy import ndarray

from datamodules import alignment
from datamodules.archives import cache_folder, progress
from datamodules.cache import Augment, Faces
from datamodules.detection import Detector
from datamodules.files import write_whole
from datamodules.sources import Face, FaceSource, Picture, find_root

FACTS = "shards.json"  # written last: without it the shards are not all there
HEAD = 512  # bytes of a tar member's header


class Row(NamedTuple):
    """One face: its picture, whom it shows, its place in the shards, and what is known of it.

    A picture that gave no face has a row too, with the reason and no bytes.
    """

    file: str
    person: str
    sample: int
    shard: str
    start: int
    length: int
    check: int
    place: str
    attributes: str
    reason: str


class DamagedError(OSError):
    """A face whose bytes are not what they were."""


class Shards(FaceSource):
    """A data set that ``keyveil data shard`` wrote: the same people, numbers and splits, without its pictures.

    Args:
        root: The folder of the shards; ``None`` looks for a folder ``shards`` in ``KEYVEIL_DATA``, ``data`` and
            ``../shared/data``.
        attributes: Which attributes a batch carries, in this order; ``None`` means all that the shards have.
    """

    def __init__(self, root: str | None = None, attributes: list[str] | None = None) -> None:
        self.root, self.wanted = root, attributes

    @cached_property
    def folder(self) -> Path:
        """Where the shards lie."""
        return find_root("a folder of shards", self.root, ("shards",), "make one by `keyveil data shard`")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What all shards share, and the SHA-256 of each one's index by its name.

        Raises:
            FileNotFoundError: The shards are not all there.
            ValueError: They are of another keyveil, or the file is damaged.
        """
        path = self.folder / FACTS
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no {FACTS}: `keyveil data shard` did not make it, or not yet")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            known = facts["name"], facts["size"], facts["attributes"], facts["shards"], facts["alignment"]
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path) from error
        if known[-1] != alignment.VERSION:
            raise ValueError(f"the faces in {self.folder} were aligned otherwise, by another keyveil; shard them anew")
        return facts

    @property
    def name(self) -> str:
        """The data set's that was sharded, so that its people are known again."""
        return self.facts["name"]

    @cached_property
    def attribute_names(self) -> tuple[str, ...]:
        """Those of the data set that are wanted.

        Raises:
            ValueError: One is not there.
        """
        known = tuple(self.facts["attributes"])
        if missing := [name for name in self.wanted or () if name not in known]:
            raise ValueError(f"{self.folder} has no attribute {missing[0]!r}; it has {', '.join(known) or 'none'}")
        return known if self.wanted is None else tuple(self.wanted)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """All rows by their picture's file.

        Raises:
            ValueError: An index is missing or damaged: without it nobody knows whom a shard shows.
        """
        rows = []
        for shard, digest in self.facts["shards"].items():
            rows += read_index(self.folder / shard, digest)
        return {row.file: row for row in sorted(rows)}

    @cached_property
    def pictures(self) -> list[Picture]:
        """All pictures of the data set; those without a face, or with a damaged one, are in :attr:`damaged`."""
        return [Picture(row.file, row.person, row.sample) for row in self.rows.values()]

    def attributes(self, picture: Picture) -> ndarray:
        """Binary attributes as -1 / +1."""
        signs = dict(zip(self.facts["attributes"], self.rows[picture.file].attributes, strict=True))
        return np.array([1 if signs[name] == "+" else -1 for name in self.attribute_names], np.float32)

    def bytes_of(self, row: Row) -> bytes:
        """The file of one face.

        Raises:
            DamagedError: There was none, or it is missing or altered; the message names the shard.
            OSError: It cannot be read now.
        """
        if row.reason:
            raise DamagedError(row.reason)
        try:
            with (self.folder / row.shard).open("rb") as shard:
                shard.seek(row.start)
                found = shard.read(row.length)
        except FileNotFoundError as error:
            raise DamagedError(f"{self.folder / row.shard} is missing") from error
        if crc32(found) != row.check:
            raise DamagedError(f"{row.file} in {self.folder / row.shard} is damaged")
        return found

    def read(self, picture: Picture) -> UInt8[ndarray, "size size 3"]:
        """RGB pixels of a crop.

        Raises:
            OSError: It is missing or altered.
        """
        pixels = cv2.imdecode(np.frombuffer(self.bytes_of(self.rows[picture.file]), np.uint8), cv2.IMREAD_COLOR)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def face(self, picture: Picture, size: int, detector: Detector | None = None) -> Face:
        """A crop, made smaller if need be.

        Raises:
            OSError: It is missing or altered.
            ValueError: The crops are smaller than ``size``.
        """
        stored = self.facts["size"]
        if size > stored:
            raise ValueError(f"the faces in {self.folder} have {stored} pixels, so {size} cannot be had; shard anew")
        image = self.read(picture)
        place = np.array(self.rows[picture.file].place.split(), np.float32).reshape(2, 3)
        if size < stored:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            ratio = size / stored
            place = (place * ratio + [[0, 0, (ratio - 1) / 2]] * 2).astype(np.float32)  # pixels count from their middle
        return Face(image, place, np.empty(0, np.float32))

    def detects(self, pictures: Sequence[Picture]) -> bool:
        """No."""
        return False

    def fingerprint(self, pictures: Sequence[Picture]) -> str:
        """Hash of what the shards hold."""
        return sha256(repr([self.rows[picture.file] for picture in pictures]).encode()).hexdigest()

    @cached_property
    def damaged(self) -> dict[str, str]:
        """Reason by picture for each face that cannot be read.

        Every shard is read once; what came out is kept in the cache for as long as the shards stay as they are.

        Raises:
            OSError: A shard cannot be read now.
        """
        state = [self.folder.resolve().as_posix(), (self.folder / FACTS).read_text(encoding="utf-8")]
        for shard in self.facts["shards"]:
            found = self.folder / shard
            state.append(f"{found.stat().st_size} {found.stat().st_mtime_ns}" if found.is_file() else "missing")
        kept = cache_folder() / "shards" / f"{sha256(repr(state).encode()).hexdigest()[:16]}.json"
        asked = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else self.rows
        damaged = {}
        with progress() as bar:
            for file in bar.track(asked, description=f"checking {self.folder.name}"):  # what is kept, once more
                try:
                    self.bytes_of(self.rows[file])
                except DamagedError as error:
                    damaged[file] = str(error)
        if not kept.is_file():
            write_whole(kept, json.dumps(damaged))
        return damaged


class ShardFaces(Faces):
    """Faces out of shards, decoded one by one as they are asked for; damaged ones are left out.

    Args:
        source: The shards.
        pictures: Which of their pictures.
        size: Side of a face in pixels, at most that of the crops in the shards.
        identities: Number of each person.
        attributes: Attributes of a picture's file as -1 / +1.
        augment: What to do to a face before it is handed out.

    Raises:
        ValueError: The crops are smaller than ``size``, or none can be read.
    """

    def __init__(
        self,
        source: Shards,
        pictures: Sequence[Picture],
        size: int,
        identities: dict[str, int] | None = None,
        attributes: dict[str, ndarray] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.skipped = {p.file: source.damaged[p.file] for p in pictures if p.file in source.damaged}
        if self.skipped:
            rank_zero_warn(
                f"{len(self.skipped)} of {len(pictures)} faces of {source.name} are left out "
                f"(the first: {next(iter(self.skipped.values()))})"
            )
        whole = [picture for picture in pictures if picture.file not in self.skipped]
        if not whole:
            raise ValueError(f"no face in {source.folder} can be read")
        super().__init__(whole, identities, attributes, augment)
        self.source, self.size = source, size
        self.name = f"shards-{source.fingerprint(whole)}-{size}"
        source.face(whole[0], size)  # tells a size that cannot be had

    def face(self, row: int) -> Face:
        """One face.

        Raises:
            OSError: It was damaged while the run went on.
        """
        return self.source.face(self.pictures[row], self.size)


def write_shards(
    source: FaceSource,
    folder: Path,
    size: int = 256,
    faces: int = 4096,
    quality: int | None = 95,
    detector: Detector | None = None,
    pictures: Sequence[Picture] | None = None,
) -> tuple[int, dict[str, str]]:
    """Write the faces of a data set as shards; a shard that is there already, from a run that was stopped, stays.

    A shard ``000000.tar`` holds ``KEY.jpg`` (or ``.png``) and ``KEY.json`` for each face, as WebDataset reads them;
    ``000000.csv`` says where each lies.

    Args:
        source: The data set.
        folder: Where to.
        size: Side of a crop in pixels.
        faces: Pictures of a shard.
        quality: Of JPEG; ``None`` writes PNG, without loss.
        detector: What finds faces without known landmarks.
        pictures: Which of the pictures; ``None`` means all.

    Returns:
        How many faces there are, and by file the reason of those that are not.

    Raises:
        OSError: If a shard cannot be written.
        ValueError: If the folder holds shards of something else, or a number is none.
    """
    if min(faces, size) < 1:
        raise ValueError(f"faces and size must be at least 1, got {faces} and {size}")
    pictures = list(source.pictures if pictures is None else pictures)
    parts = [pictures[start : start + faces] for start in range(0, len(pictures), faces)]
    facts = {
        "name": source.name,
        "size": size,
        "alignment": alignment.VERSION,
        "attributes": list(source.attribute_names),
        "quality": quality,
        "faces": faces,
        "pictures": sha256(source.fingerprint(pictures).encode()).hexdigest(),
    }
    begun = folder / ".begun.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) != facts:
        raise ValueError(f"{folder} holds shards of other faces, or made otherwise; choose another folder")
    write_whole(begun, json.dumps(facts))
    rows: list[Row] = []
    with progress() as bar:
        task, shards = bar.add_task(f"sharding {source.name}", total=len(pictures)), {}
        for number, part in enumerate(parts):
            shard = f"{number:06d}.tar"
            index = (folder / shard).with_suffix(".csv")
            if not index.is_file():
                _write_shard(source, part, folder / shard, size, quality, detector)
            shards[shard] = sha256(index.read_bytes()).hexdigest()
            found = read_index(folder / shard, shards[shard])
            if [row.file for row in found] != [picture.file for picture in part]:
                raise _broken(index)
            rows += found
            bar.advance(task, len(part))
    skipped = {row.file: row.reason for row in rows if row.reason}
    if len(skipped) == len(rows):
        raise ValueError(f"no picture of {source.name} gave a face (the first: {next(iter(skipped.values()), 'none')})")
    write_whole(folder / FACTS, json.dumps({**facts, "shards": shards}, indent=1))
    return len(rows) - len(skipped), skipped


def read_index(shard: Path, digest: str) -> list[Row]:
    """What a shard holds, by the CSV beside it.

    Args:
        shard: The archive.
        digest: SHA-256 of the CSV.

    Raises:
        ValueError: It is missing or damaged.
    """
    path = shard.with_suffix(".csv")
    if not path.is_file() or sha256(whole := path.read_bytes()).hexdigest() != digest:
        raise _broken(path)
    found = csv.reader(io.StringIO(whole.decode(), newline=""))
    return [
        Row(file, person, int(sample), shard.name, int(start), int(length), int(check), *rest)
        for file, person, sample, start, length, check, *rest in found
    ]


def _broken(path: Path) -> ValueError:
    return ValueError(f"{path} is missing or damaged; take the shards' folder anew from where it came")


def _write_shard(
    source: FaceSource,
    pictures: Sequence[Picture],
    path: Path,
    size: int,
    quality: int | None,
    detector: Detector | None,
) -> None:
    """One shard: its faces, then its index, by which it is known to be whole."""
    suffix, how = (".png", []) if quality is None else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])
    index = io.StringIO()
    rows = csv.writer(index, lineterminator="\n")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as shard:
            for picture, face in zip(pictures, source.faces(pictures, size, detector), strict=True):
                signs = "".join("+" if sign > 0 else "-" for sign in source.attributes(picture))
                if isinstance(face, Exception):
                    rows.writerow([*picture, 0, 0, 0, "", signs, " ".join(str(face).split())])
                    continue
                data = cv2.imencode(suffix, cv2.cvtColor(face.image, cv2.COLOR_RGB2BGR), how)[1].tobytes()
                told = {**picture._asdict(), "attributes": signs, "place": face.place.tolist()}
                start = shard.offset + HEAD
                for end, content in ((suffix, data), (".json", json.dumps(told).encode())):
                    member = tarfile.TarInfo(f"{picture.sample:09d}{end}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
                place = " ".join(repr(float(number)) for number in face.place.flat)
                rows.writerow([*picture, start, len(data), crc32(data), place, signs, ""])
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    write_whole(path.with_suffix(".csv"), index.getvalue())

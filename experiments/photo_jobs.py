"""What anonymizing and recovering decide about each picture: its faces, keys, record, seals, file and manifest line."""

from __future__ import annotations

import io
import secrets
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from datamodules.alignment import warp
from datamodules.batch import FaceBatch
from datamodules.detection import Detector
from datamodules.files import write_whole
from datamodules.photo_files import SIDECAR, Found, Photo, encode_photo, peek, sidecar
from datamodules.photos import OpenPhoto, Photos, Place, look_for_places
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.keys import (
    Cost,
    FaceRecord,
    Header,
    Key,
    MasterKey,
    Record,
    Secret,
    fresh,
    seal,
    stretch,
    unseal,
)
from lightning_modules.manifest import Manifest, hash_file
from lightning_modules.trained import weights_hash

LABEL = "photo"  # whose keys these are


class SkippedError(ValueError):
    """A picture that is left out on purpose."""


class PhotoJob:
    """What both verbs share: which pictures are done already, files written whole, lines of the manifest.

    Args:
        out: Output folder.
        manifest: Its manifest.
        bar: Progress, and where a picture's failure is told.
        settings: What the run was asked for; a picture done with others is done again.
        secret: What a person holds.
    """

    verb = ""

    def __init__(
        self, out: Path, manifest: Manifest, bar: Progress, settings: dict[str, Any], secret: Secret | None
    ) -> None:
        self.out, self.manifest, self.bar, self.settings = out, manifest, bar, {"verb": self.verb, **settings}
        self.photos: Photos
        self.counts: Counter[str] = Counter()
        self._written: set[str] = set()
        self._secret = secret
        self._stretched: dict[tuple[bytes, Cost], MasterKey] = {}

    def _stretch(self, header: Header) -> MasterKey:
        """The secret stretched as a header says; once a run that wrote headers."""
        assert self._secret is not None
        if (header.salt, header.cost) not in self._stretched:
            self._stretched[header.salt, header.cost] = stretch(self._secret, header.salt, header.cost)
        return self._stretched[header.salt, header.cost]

    def wanted(self, found: Found, digest: str) -> bool:
        """Whether a picture is not yet done, as the manifest, the files and the secret say."""
        entry = self.manifest.entries.get(found.name, {})
        files = entry.get("files", {})
        same = entry.get("input") == digest and entry.get("settings") == self.settings and files
        if not same or any(not (self.out / n).is_file() or hash_file(self.out / n) != d for n, d in files.items()):
            return True
        if not self.trusts(entry, found):
            return True
        self.counts["done before"] += 1
        self._written.update(files)
        self.bar.advance(self.bar.task_ids[0])
        return False

    def trusts(self, entry: dict[str, Any], found: Found) -> bool:
        """Whether what was done before was done with this run's secret, as far as that can be told."""
        raise TypeError(f"{type(self).__name__} must define trusts(entry, found)")

    def failed(self, found: Found, digest: str, error: Exception) -> None:
        """Tell it in one line, and note it."""
        status = "skipped" if isinstance(error, SkippedError) else "failed"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if status == "failed":
            self.bar.console.print(f"{found.path}: {reason}", markup=False, highlight=False, soft_wrap=True)
        self._note(found, digest, status, reason=reason)
        self._count(status)

    def _note(self, found: Found, digest: str, status: str, **more: Any) -> None:
        entry = {"picture": found.name, "input": digest, "status": status, "settings": self.settings}
        self.manifest.add({**entry, "keyveil": version("keyveil"), **more})

    def _count(self, status: str) -> None:
        self.counts[status] += 1
        self.bar.advance(self.bar.task_ids[0])

    def write(
        self, photo: Photo, pixels: ndarray, record: str | None, status: str, where: str = "picture", **more: Any
    ) -> None:
        """Note a picture, and write it, with its record in it or beside it; a failure is told.

        The line comes first, so that a killed run knows its files again, and the record before the picture, which
        could not be recovered without.
        """
        name = photo.output
        path, beside = self.out / name, sidecar(self.out / name)
        try:
            before = self.manifest.entries.get(photo.found.name, {})
            for one in (path, beside):
                if name in self._written or (one.exists() and before.get("input") != photo.digest):
                    raise ValueError(
                        f"there is a file {one} already, and it was not made of this picture; remove it first"
                    )
            data, fits = encode_photo(photo, pixels, record if where != "sidecar" else None)
            files = {name: data}
            if record is not None and (where != "picture" or not fits):
                files = {f"{name}{SIDECAR}": record.encode(), **files}
            # what a decoy gave depends on the secret: its hash would tell a right guess from a wrong one
            decoy = more.get("mode") == "decoy"
            hashes = {one: None if decoy else sha256(content).hexdigest() for one, content in files.items()}
            self._note(photo.found, photo.digest, status, files=hashes, **more)
            for one, content in files.items():
                write_whole(self.out / one, content)
            if len(files) == 1:
                beside.unlink(missing_ok=True)  # an older run's
        except (OSError, ValueError) as error:
            self.failed(photo.found, photo.digest, error)
            return
        self._written.add(name)
        self._count(status)

    @property
    def failures(self) -> int:
        """Pictures that could not be done."""
        return self.counts["failed"]

    def close(self) -> None:
        """End the manifest, and say what was done."""
        self.manifest.add({"pictures": sum(self.counts.values()), "counts": dict(self.counts)})
        told = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        self.bar.console.print(f"{told}; see {self.manifest.path}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Hiding:
    """How pictures are anonymized; the options of the verb of the same names.

    Attributes:
        method: Name of the method.
        weights: Hash of what it has learned.
        size: Pixels of its crop.
        mode: ``verify`` or ``decoy``.
        seal: ``none``, ``code`` or ``original``.
        header: ``picture``, ``sidecar`` or ``both``.
        faces: ``all``, ``largest`` or ``except``.
        on_no_face: ``fail``, ``skip`` or ``copy``.
        keep_metadata: Whether date, camera, exposure and copyright stay.
        refine: Steps of optimisation a face; ``None`` where a method has none.
        spared: Hashes of the pictures of people who stay as they are.
    """

    method: str
    weights: str
    size: int
    mode: str
    seal: str
    header: str
    faces: str
    on_no_face: str
    keep_metadata: bool
    refine: int | None
    spared: tuple[str, ...] = ()


class Anonymizing(PhotoJob):
    """Finds faces, gives each a fresh nonce, and writes pictures with a record.

    Args:
        out: Output folder.
        manifest: Its manifest.
        bar: Progress.
        hiding: How.
        secret: What a person holds; ``None`` for a method without a key and without seals.
        detector: What finds faces.
        threshold: Of the check, for the manifest.
        code_of: Originals ``(B, 3, size, size)`` → their codes, where those are sealed.
        known: Crops → whether each is of somebody who stays as they are; ``None``: nobody does.
        attributes: How many attributes are factors beside the key; drawn for each face by chance, told in its record.
    """

    verb = "anonymize"

    def __init__(
        self,
        out: Path,
        manifest: Manifest,
        bar: Progress,
        hiding: Hiding,
        secret: Secret | None,
        detector: Detector,
        threshold: float,
        code_of: Callable[[FaceBatch], Tensor | None] = lambda face: None,
        known: Callable[[list[ndarray]], list[bool]] | None = None,
        attributes: int = 0,
    ) -> None:
        how = {**asdict(hiding), "spared": list(hiding.spared), "detector": detector.name, "threshold": threshold}
        super().__init__(out, manifest, bar, how, secret)
        self.hiding, self.detector, self.threshold = hiding, detector, threshold
        self.code_of, self.known, self.attributes = code_of, known, attributes
        self.salt, self.cost = fresh(), Cost()
        self.master = stretch(secret, self.salt, self.cost) if secret is not None else None

    def trusts(self, entry: dict[str, Any], found: Found) -> bool:
        """In verify mode the record tells whether it was this secret; in decoy mode nothing may tell."""
        if self._secret is None or self.hiding.mode == "decoy":
            return True
        try:
            path = self.out / next(name for name in entry["files"] if not name.endswith(SIDECAR))
            record = parse_record(peek(path), sidecar(path))
            record.check(self._stretch(record.header))
        except (OSError, ValueError, StopIteration):
            return False
        return True

    def look(self, photo: Photo) -> OpenPhoto:
        """Faces of a picture; one that keyveil made is refused, since its record would be lost."""
        if photo.record is not None or sidecar(photo.found.path).exists():
            raise ValueError("it was anonymized by keyveil already; anonymize the original, or recover it first")
        which = "largest" if self.hiding.faces == "largest" else "all"
        places, left = look_for_places(photo.pixels, self.detector, self.hiding.size, which)
        if self.known is not None and places:
            stay = self.known([warp(photo.pixels, place.matrix, self.hiding.size) for place in places])
            places, left = [place for place, stays in zip(places, stay, strict=True) if not stays], left + sum(stay)
            if not places:
                return OpenPhoto(photo, [], left)
        drawn = [tuple(secrets.choice((-1, 1)) for _ in range(self.attributes)) for _ in places]
        places = [place._replace(attributes=asked) for place, asked in zip(places, drawn, strict=True)]
        if not places and self.hiding.on_no_face == "fail":
            raise ValueError("no face was found in it (see --on_no_face)")
        if not places and self.hiding.on_no_face == "skip":
            raise SkippedError("no face was found in it")
        return OpenPhoto(photo, places, left)

    def key_of(self, sample: int) -> Key:
        """A new key for a face under way."""
        opened, index = self.photos.open[sample]
        opened.nonces[index] = fresh()
        master = self.master or MasterKey.from_seed(0)  # of a method that takes no numbers from it
        return master.derive(LABEL, opened.nonces[index])

    def done(self, opened: OpenPhoto, pixels: ndarray) -> None:
        """Write a finished picture."""
        photo = opened.photo
        count = len(opened.places)
        faces = {"found": count + opened.left, "changed": count, "left": opened.left}
        more: dict[str, Any] = {"faces": faces, "threshold": self.threshold}
        if self.hiding.mode == "verify":  # in decoy mode they would tell a right guess of the secret from a wrong one
            more["similarity"] = [[round(value, 4) for value in pair] for pair in opened.similarity]
        try:
            record = self._record(opened).to_json()
        except ValueError as error:  # such as more faces than a record holds
            self.failed(photo.found, photo.digest, error)
            return
        self.write(photo, pixels, record, "anonymized" if count else "copied", self.hiding.header, **more)

    def _record(self, opened: OpenPhoto) -> Record:
        nonce, keyed = fresh(), self.master is not None and self.hiding.mode == "verify"
        header = Header(
            self.hiding.method,
            self.hiding.weights,
            self.salt,
            nonce,
            self.cost,
            self.master.check_value(nonce) if self.master and keyed else None,
        )
        height, width = opened.photo.pixels.shape[:2]

        faces = [
            FaceRecord(
                opened.nonces[index],
                tuple(float(side) for side in place.box),
                tuple(float(number) for number in place.matrix.ravel()),
                place.attributes,
            )
            for index, place in enumerate(opened.places)
        ]
        record = Record(header, width, height, self.hiding.size, tuple(faces))
        if not keyed or self.master is None:
            return record
        if self.hiding.seal != "none":
            name = "code" if self.hiding.seal == "code" else "seal"
            bound = record.bound()
            sealed = [seal(self.master, face.nonce, plain, bound, name) for face, plain in self._plain(opened, faces)]
            faces = [replace(face, **{name: one}) for face, one in zip(faces, sealed, strict=True)]
            record = replace(record, faces=tuple(faces))
        return record.authenticated(self.master)

    def _plain(self, opened: OpenPhoto, faces: list[FaceRecord]) -> list[tuple[FaceRecord, bytes]]:
        """What of each face is sealed."""
        if self.hiding.seal == "original":
            plain = [_cut(opened.photo.pixels, box) for box in opened.touched]
        else:
            rows = [opened.row(index, index) for index in range(len(faces))]
            codes = [self.code_of(FaceBatch(*(value[None] for value in row))) for row in rows]
            plain = [code.half().cpu().numpy().astype("<f2").tobytes() for code in codes if code is not None]
        return list(zip(faces, plain, strict=True))


class Recovering(PhotoJob):
    """Reads records, refuses what does not open, and writes recovered pictures.

    Args:
        out: Output folder.
        manifest: Its manifest.
        bar: Progress.
        method: The method; ``None`` where every picture is sealed.
        name: What records call it.
        secret: What a person holds.
        keep_metadata: Whether date, camera, exposure and copyright stay.
    """

    verb = "recover"

    def __init__(
        self,
        out: Path,
        manifest: Manifest,
        bar: Progress,
        method: ReversibleAnonymizer | None,
        name: str,
        secret: Secret,
        keep_metadata: bool,
    ) -> None:
        self.weights = "none" if method is None else weights_hash(method)
        how = {"method": name, "weights": self.weights, "refine": getattr(method, "refine", None)}
        super().__init__(out, manifest, bar, {**how, "keep_metadata": keep_metadata}, secret)
        self.method, self.name = method, name

    def trusts(self, entry: dict[str, Any], found: Found) -> bool:
        """In verify mode the record tells whether it was this secret; in decoy mode nothing may tell."""
        try:
            record = parse_record(peek(found.path), sidecar(found.path))
            record.check(self._stretch(record.header))
        except (OSError, ValueError):
            return False
        return not record.header.decoy

    def look(self, photo: Photo) -> OpenPhoto:
        """Faces of a picture as its record says; sealed ones are put back at once."""
        record = read_record(photo)
        height, width = photo.pixels.shape[:2]
        if (width, height) != (record.width, record.height):
            raise ValueError(
                f"it has {width} by {height} pixels, but was anonymized with {record.width} by {record.height}: "
                "it was cropped, turned or resized since"
            )
        master = record.check(self._stretch(record.header))
        notes = {"master": master, "mode": "decoy" if record.header.decoy else "verify"}
        if record.faces and all(face.seal is not None for face in record.faces):
            bound = record.bound()
            photo.pixels = photo.pixels.copy()
            for face in record.faces:
                _paste(photo.pixels, unseal(master, face.nonce, face.seal or b"", bound))
            return OpenPhoto(photo, [], notes=notes)
        if record.faces:
            self._fits(record)
        codes = [
            (face, unseal(master, face.nonce, face.code, record.bound(), "code")) for face in record.faces if face.code
        ]
        notes["codes"] = {
            face.nonce: torch.from_numpy(np.frombuffer(code, "<f2").astype(np.float32)) for face, code in codes
        }
        places = [Place(np.array(f.box), np.array(f.place).reshape(2, 3), f.attributes) for f in record.faces]
        return OpenPhoto(photo, places, nonces=[face.nonce for face in record.faces], notes=notes)

    def _fits(self, record: Record) -> None:
        """Refuse what this method did not make.

        Raises:
            ValueError: Another method or other weights made it, or nothing can be undone.
        """
        header = record.header
        if self.method is None or header.method != self.name:
            raise ValueError(f"it was made by the method {header.method}: name it, or its YAML file, by --method")
        if not self.method.reversible:
            raise ValueError(f"{header.method} cannot be undone, and its original was not sealed")
        if header.weights != self.weights or record.crop != self.method.size:
            raise ValueError(f"it was made by {header.method} with other weights ({header.weights[:20]}…)")
        if any(len(face.attributes) != self.method.attributes for face in record.faces):
            raise ValueError(f"its record does not state the {self.method.attributes} attributes that were asked for")

    def key_of(self, sample: int) -> Key:
        """The key of a face under way, from its nonce."""
        opened, index = self.photos.open[sample]
        return opened.notes["master"].derive(LABEL, opened.nonces[index])

    def code_of(self, sample: int) -> Tensor | None:
        """The code of a face under way that was sealed, ``(n,)``; ``None`` where none was."""
        opened, index = self.photos.open[sample]
        return opened.notes["codes"].get(opened.nonces[index])

    def done(self, opened: OpenPhoto, pixels: ndarray) -> None:
        """Write a recovered picture."""
        self.write(opened.photo, pixels, None, "recovered", mode=opened.notes["mode"])


def read_record(photo: Photo) -> Record:
    """The record in a picture, or beside it; as :func:`parse_record`."""
    return parse_record(photo.record, sidecar(photo.found.path))


def parse_record(text: str | bytes | None, beside: Path) -> Record:
    """The record in a text, or in a file where there is none.

    Raises:
        ValueError: There is none, or it is malformed.
        OSError: The file cannot be read.
    """
    if text is None and beside.is_file():
        if beside.stat().st_size > Record.LONGEST:
            raise ValueError(f"the record beside it has more than {Record.LONGEST} bytes")
        text = beside.read_bytes()
    if text is None:
        raise ValueError(f"it holds no record, and there is no {beside.name} beside it: keyveil did not make it")
    return Record.from_json(text)


def _cut(pixels: ndarray, box: tuple[int, int, int, int]) -> bytes:
    """A rectangle of a picture without loss: its place, and a PNG."""
    left, top, right, bottom = box
    file = io.BytesIO()
    if right > left and bottom > top:
        Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right])).save(file, "PNG")
    return struct.pack(">4I", *box) + file.getvalue()


def _paste(pixels: ndarray, plain: bytes) -> None:
    """Undo :func:`_cut`, in place; the bytes are authentic."""
    left, top, right, bottom = struct.unpack(">4I", plain[:16])
    if right > left and bottom > top:
        pixels[top:bottom, left:right] = np.asarray(Image.open(io.BytesIO(plain[16:])))

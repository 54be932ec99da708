"""What anonymizing decides about each picture: its faces, their nonces, its record and seals."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numpy import ndarray
from rich.progress import Progress
from torch import Tensor

from datamodules.alignment import warp
from datamodules.batch import FaceBatch
from datamodules.detection import Detector
from datamodules.photo_files import Photo, peek, sidecar
from datamodules.photo_search import SIDECAR, Found
from datamodules.photos import OpenPhoto, look_for_places
from experiments.photo_jobs import LABEL, PhotoJob, SkippedError, cut_out, parse_record
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
)
from lightning_modules.manifest import Manifest


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
            record.check(self.stretched(record.header))
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
        places = [place._replace(attributes=self.ask()) for place in places]
        self.refuse_none(len(places))
        return OpenPhoto(photo, places, left)

    def ask(self) -> tuple[int, ...]:
        """Attributes of a face, by chance."""
        return tuple(secrets.choice((-1, 1)) for _ in range(self.attributes))

    def refuse_none(self, faces: int) -> None:
        """What becomes of a picture without a face.

        Raises:
            ValueError: It is an error.
            SkippedError: It is to be left out.
        """
        if not faces and self.hiding.on_no_face == "fail":
            raise ValueError("no face was found in it (see --on_no_face)")
        if not faces and self.hiding.on_no_face == "skip":
            raise SkippedError("no face was found in it")

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
            if opened.misplaced:
                more["faces"] = {**faces, "misplaced": len(opened.misplaced)}
        try:
            record = self._record(opened).to_json()
        except ValueError as error:  # such as more faces than a record holds
            self.failed(photo.found, photo.digest, error)
            return
        self.write(photo, pixels, record, "anonymized" if count else "copied", self.hiding.header, **more)

    def record(self, shape: tuple[int, ...], faces: list[FaceRecord]) -> Record:
        """The record of a picture or clip of this height and width, without seals, and authenticated in verify mode."""
        nonce, keyed = fresh(), self.master is not None and self.hiding.mode == "verify"
        check = self.master.check_value(nonce) if self.master and keyed else None
        header = Header(self.hiding.method, self.hiding.weights, self.salt, nonce, self.cost, check)
        made = Record(header, shape[1], shape[0], self.hiding.size, tuple(faces))
        return made.authenticated(self.master) if self.master and keyed else made

    def _record(self, opened: OpenPhoto) -> Record:
        faces = [
            FaceRecord(opened.nonces[index], *place.numbers, place.attributes)
            for index, place in enumerate(opened.places)
        ]
        record = self.record(opened.photo.pixels.shape[:2], faces)
        if self.hiding.seal == "none" or record.header.decoy or self.master is None:
            return record
        name = "code" if self.hiding.seal == "code" else "seal"
        bare = replace(record, mac=None)
        sealed = [
            replace(face, **{name: seal(self.master, face.nonce, plain, bare.bound(), name)})
            for face, plain in self._plain(opened, faces)
        ]
        return replace(bare, faces=tuple(sealed)).authenticated(self.master)

    def _plain(self, opened: OpenPhoto, faces: list[FaceRecord]) -> list[tuple[FaceRecord, bytes]]:
        """What of each face is sealed."""
        if self.hiding.seal == "original":
            plain = [cut_out(opened.photo.pixels, box) for box in opened.touched]
        else:
            rows = [opened.row(index, index) for index in range(len(faces))]
            codes = [self.code_of(FaceBatch(*(value[None] for value in row))) for row in rows]
            plain = [code.half().cpu().numpy().astype("<f2").tobytes() for code in codes if code is not None]
        return list(zip(faces, plain, strict=True))

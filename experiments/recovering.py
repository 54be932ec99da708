"""What recovering decides about each picture: whether its record opens, and what is put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from rich.progress import Progress
from torch import Tensor

from datamodules.photo_files import Photo, peek, sidecar
from datamodules.photo_search import Found
from datamodules.photos import OpenPhoto, Place
from experiments.photo_jobs import LABEL, PhotoJob, parse_record, put_back, read_record
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.keys import (
    Key,
    Record,
    Secret,
    unseal,
)
from lightning_modules.manifest import Manifest
from lightning_modules.trained import weights_hash


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
            record.check(self.stretched(record.header))
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
        master = record.check(self.stretched(record.header))
        notes = {"master": master, "mode": "decoy" if record.header.decoy else "verify"}
        if record.faces and all(face.seal is not None for face in record.faces):
            bound = record.bound()
            photo.pixels = photo.pixels.copy()
            for face in record.faces:
                put_back(photo.pixels, unseal(master, face.nonce, face.seal or b"", bound))
            return OpenPhoto(photo, [], notes=notes)
        if record.faces:
            self.refuse_others(record)
        codes = [
            (face, unseal(master, face.nonce, face.code, record.bound(), "code")) for face in record.faces if face.code
        ]
        notes["codes"] = {
            face.nonce: torch.from_numpy(np.frombuffer(code, "<f2").astype(np.float32)) for face, code in codes
        }
        return OpenPhoto(
            photo, [place_of(face) for face in record.faces], nonces=[face.nonce for face in record.faces], notes=notes
        )

    def refuse_others(self, record: Record) -> None:
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


def place_of(face: FaceRecord) -> Place:
    """Where a recorded face is."""
    return Place(np.array(face.box), np.array(face.place).reshape(2, 3), face.attributes)

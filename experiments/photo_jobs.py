"""What anonymizing and recovering share: pictures done before, files written whole, manifest lines, records, cuts."""

from __future__ import annotations

import io
import struct
from collections import Counter
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image
from rich.progress import Progress

from datamodules.files import write_whole
from datamodules.photo_files import Photo, encode_photo, sidecar
from datamodules.photo_search import SIDECAR, Found
from datamodules.photos import Photos
from lightning_modules.keys import (
    Cost,
    Header,
    MasterKey,
    Record,
    Secret,
    stretch,
)
from lightning_modules.manifest import NAME, Manifest, hash_file

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
        self._lock = Lock()  # pictures are read in threads
        self._stretched: dict[tuple[bytes, Cost], MasterKey] = {}

    def stretched(self, header: Header) -> MasterKey:
        """The secret stretched as a header says; once a run that wrote headers."""
        assert self._secret is not None
        with self._lock:
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
        with self._lock:
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
        self.note(found, digest, status, reason=reason)
        self.count(status)

    def note(self, found: Found, digest: str, status: str, **more: Any) -> None:
        """Add a picture's line to the manifest."""
        entry = {"picture": found.name, "input": digest, "status": status, "settings": self.settings}
        self.manifest.add({**entry, "keyveil": version("keyveil"), **more})

    def count(self, status: str, name: str | None = None) -> None:
        """Count a picture, and remember its output."""
        with self._lock:
            self._written.update([name] if name else [])
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
        beside = sidecar(self.out / name)
        try:
            self.claim(photo.found, photo.digest, name)
            data, fits = encode_photo(photo, pixels, record if where != "sidecar" else None)
            files = {name: data}
            if record is not None and (where != "picture" or not fits):
                files = {f"{name}{SIDECAR}": record.encode(), **files}
            # what a decoy gave depends on the secret: its hash would tell a right guess from a wrong one
            decoy = more.get("mode") == "decoy"
            hashes = {one: None if decoy else sha256(content).hexdigest() for one, content in files.items()}
            self.note(photo.found, photo.digest, status, files=hashes, **more)
            for one, content in files.items():
                write_whole(self.out / one, content)
            if len(files) == 1:
                beside.unlink(missing_ok=True)  # an older run's
        except (OSError, ValueError) as error:
            self.failed(photo.found, photo.digest, error)
            return
        self.count(status, name)

    def claim(self, found: Found, digest: str, name: str) -> None:
        """Make sure that a name in the output folder, and its record's, is free or this picture's own.

        Raises:
            ValueError: Something else lies there.
        """
        before = self.manifest.entries.get(found.name, {})
        for one in (self.out / name, sidecar(self.out / name)):
            if name in self._written or (one.exists() and before.get("input") != digest):
                raise ValueError(f"there is a file {one} already, and it was not made of this picture; remove it first")

    @property
    def failures(self) -> int:
        """Pictures that could not be done."""
        return self.counts["failed"]

    def close(self) -> None:
        """End the manifest, and say what was done."""
        self.manifest.add({"pictures": sum(self.counts.values()), "counts": dict(self.counts)})
        told = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        self.bar.console.print(
            f"{told}; see {self.manifest.path.with_name(NAME)}", markup=False, highlight=False, soft_wrap=True
        )


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


def cut_out(pixels: ndarray, box: tuple[int, int, int, int]) -> bytes:
    """A rectangle of a picture without loss: its place, and a PNG."""
    left, top, right, bottom = box
    file = io.BytesIO()
    if right > left and bottom > top:
        Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right])).save(file, "PNG")
    return struct.pack(">4I", *box) + file.getvalue()


def put_back(pixels: ndarray, plain: bytes) -> None:
    """Undo :func:`cut_out`, in place; the bytes are authentic."""
    left, top, right, bottom = struct.unpack(">4I", plain[:16])
    if right > left and bottom > top:
        pixels[top:bottom, left:right] = np.asarray(Image.open(io.BytesIO(plain[16:])))

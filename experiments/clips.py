"""Clips through both verbs: one nonce a track, so that a person keeps one surrogate; records lie beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from numpy import ndarray
from torch.utils.data import DataLoader, IterableDataset

from datamodules.alignment import warp
from datamodules.batch import FaceBatch, face_batch
from datamodules.clips import ClipWriter, follow, frames, output_name
from datamodules.files import write_whole
from datamodules.photo_files import SIDECAR, Found, Photo, sidecar
from datamodules.photos import OpenPhoto, Photos, Place
from experiments.anonymizing import Anonymizing
from experiments.photo_jobs import LABEL, PhotoJob, parse_record
from experiments.recovering import Recovering, place_of
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.callbacks.paste_back import TRIES, Gate, PasteBack, StillRecognizedError
from lightning_modules.carriers import from_pixels, to_pixels
from lightning_modules.keys import FaceRecord, MasterKey, fresh
from lightning_modules.manifest import hash_file
from lightning_modules.photo_step import PhotoStep, predict_photos

Faces = dict[int, list[tuple[Place, bytes]]]
"""Places and nonces by the number of the frame."""


@dataclass(frozen=True)
class Turning:
    """How clips are done.

    Attributes:
        network: The method.
        batch_size: Faces at once.
        accelerator: Lightning's.
        lossless: Whether every level of every frame is kept, in much larger files.
    """

    network: ReversibleAnonymizer
    batch_size: int
    accelerator: str
    lossless: bool


def anonymize_clip(found: Found, job: Anonymizing, turning: Turning, gate: Gate) -> None:
    """Anonymize a clip; what is wrong with it is told and noted.

    Args:
        found: The clip.
        job: Whose records, manifest and options they are.
        turning: How.
        gate: What must not know a person any more.
    """

    def work(digest: str) -> None:
        if job.hiding.seal != "none" or job.hiding.faces != "all":
            raise ValueError(
                "in a clip all faces are anonymized and none is sealed; --faces and --seal are for pictures"
            )
        if sidecar(found.path).exists():
            raise ValueError("it was anonymized by keyveil already; anonymize the original, or recover it first")
        tracks = follow(found.path, job.detector, job.hiding.size)
        job.refuse_none(len(tracks))
        master, faces = job.master or MasterKey.from_seed(0), Faces()
        for track in tracks:
            asked = job.ask()
            nonce = _nonce(track.crops, asked, master, turning, gate)
            for number, place in track.places.items():
                faces.setdefault(number, []).append((place._replace(attributes=asked), nonce))
        clip = _Clip(found, digest, job, turning, faces, master)

        def record() -> str:
            rows = [
                FaceRecord(nonce, *place.numbers, place.attributes, frame=number)
                for number in sorted(faces)
                for place, nonce in faces[number]
            ]
            return job.record(clip.shape, rows).to_json()

        count = {"found": len(tracks), "changed": len(tracks), "left": 0}
        clip.turn("anonymize", "anonymized" if tracks else "copied", record, faces=count, threshold=job.threshold)

    _told(found, job, work)


def recover_clip(found: Found, job: Recovering, turning: Turning) -> None:
    """Recover a clip; what is wrong with it is told and noted.

    Args:
        found: The clip; its record lies beside it.
        job: Whose manifest it is, and what fits.
        turning: How.
    """

    def work(digest: str) -> None:
        record = parse_record(None, sidecar(found.path))
        master = record.check(job.stretched(record.header))
        job.refuse_others(record)
        faces = Faces()
        for face in record.faces:
            if face.frame is None:
                raise ValueError("the record beside it is that of a picture")
            faces.setdefault(face.frame, []).append((place_of(face), face.nonce))
        clip = _Clip(found, digest, job, turning, faces, master, (record.height, record.width))
        clip.turn("recover", "recovered", None, mode="decoy" if record.header.decoy else "verify")

    _told(found, job, work)


def _told(found: Found, job: PhotoJob, work: Callable[[str], None]) -> None:
    digest = ""
    try:
        digest = hash_file(found.path)
        if job.wanted(found, digest):
            work(digest)
    except (OSError, ValueError) as error:
        job.failed(found, digest, error)


@torch.no_grad()
def _nonce(crops: list[ndarray], asked: tuple[int, ...], master: MasterKey, turning: Turning, gate: Gate) -> bytes:
    """A nonce under which nobody of a track's crops is still known.

    Raises:
        StillRecognizedError: There is none.
    """
    attributes = torch.tensor(asked, dtype=torch.float32).expand(len(crops), -1)
    face = face_batch(torch.stack([from_pixels(crop) for crop in crops]), attributes=attributes)
    face = FaceBatch(*(value.to(turning.network.device) for value in face))
    for _ in range(TRIES if turning.network.key_spec.kind != "none" else 1):
        nonce = fresh()
        key = master.derive(LABEL, nonce)
        made = PhotoStep(turning.network, "anonymize", lambda sample, key=key: key).predict_step(face)
        if max(gate.similarity(crops, [to_pixels(image) for image in made])) <= gate.threshold:
            return nonce
    raise StillRecognizedError("somebody in it is still recognized under every key tried, so the clip is not written")


class _Clip(Photos):
    """The faces of a clip, frame by frame, and who writes its frames: its own job.

    Attributes:
        shape: Height and width of its frames; none before the first is read.
    """

    failures = 0

    def __init__(
        self,
        found: Found,
        digest: str,
        job: PhotoJob,
        turning: Turning,
        faces: Faces,
        master: MasterKey,
        shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__([found], job, turning.network.size, turning.batch_size)
        self.job: Any = self  # who is told of a frame; the other is told of the clip
        self.clip, self.digest, self.owner, self.turning = found, digest, job, turning
        self.faces, self.master, self.shape = faces, master, shape
        self._made: dict[int, tuple[OpenPhoto, ndarray]] = {}
        self._writer: ClipWriter

    def turn(self, verb: Any, status: str, record: Callable[[], str] | None, **more: Any) -> None:
        """Do it, note it, write it.

        Raises:
            ValueError: It cannot be read, or is not what its record says.
            OSError: It cannot be written.
        """
        name = output_name(self.clip.name, self.turning.lossless)
        self.owner.claim(self.clip, self.digest, name)
        path = self.owner.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with ClipWriter(part, path.suffix.lower(), self.clip.path, self.turning.lossless) as self._writer:
                step = PhotoStep(self.turning.network, verb, self._key_of)
                predict_photos(step, self, PasteBack(), self.turning.accelerator, 1)
            if self.faces and max(self.faces) >= self._writer.written:
                raise ValueError("it has fewer frames than its record says: it was cut since")
            files = {name: hash_file(part)}
            if record is not None:
                text = record()
                files = {f"{name}{SIDECAR}": sha256(text.encode()).hexdigest(), **files}
            if more.get("mode") == "decoy":  # as of pictures
                files = dict.fromkeys(files)
            self.owner.note(self.clip, self.digest, status, files=files, **more)
            if record is not None:
                write_whole(sidecar(path), text)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.owner.count(status, name)

    def _key_of(self, sample: int) -> Any:
        opened, index = self.open[sample]
        return self.master.derive(LABEL, opened.nonces[index])

    def predict_dataloader(self) -> DataLoader:
        """Faces in this very process, as of :class:`Photos`."""
        return DataLoader(_FrameFaces(self), batch_size=self.batch_size, num_workers=0)

    def done(self, opened: OpenPhoto, pixels: ndarray) -> None:
        """A frame is done; it is written when those before it are."""
        self._made[opened.notes["frame"].index] = opened, pixels
        while self._writer.written in self._made:
            opened, pixels = self._made.pop(self._writer.written)
            self._writer.put(opened.notes["frame"]._replace(pixels=pixels))


class _FrameFaces(IterableDataset):
    """The rows of a clip."""

    def __init__(self, clip: _Clip) -> None:
        self.clip = clip

    def __iter__(self) -> Iterator[FaceBatch]:
        clip, sample = self.clip, 0
        for frame in frames(clip.clip.path):
            clip.shape = clip.shape or frame.pixels.shape[:2]
            if frame.pixels.shape[:2] != clip.shape:
                height, width = clip.shape
                raise ValueError(f"its frames are not all of {width} by {height} pixels")
            faces = clip.faces.get(frame.index, [])
            opened = OpenPhoto(
                Photo(clip.clip, clip.digest, frame.pixels),
                [place for place, _ in faces],
                crops=[warp(frame.pixels, place.matrix, clip.size) for place, _ in faces],
                made=[None] * len(faces),
                nonces=[nonce for _, nonce in faces],
                notes={"frame": frame},
            )
            if not faces:
                clip.done(opened, frame.pixels)
            for index in range(len(faces)):
                clip.open[sample] = (opened, index)
                yield opened.row(index, sample)
                sample += 1

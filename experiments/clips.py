"""Clips through both verbs: one nonce a track, so that a person keeps one surrogate; records lie beside them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from numpy import ndarray

from datamodules.alignment import warp
from datamodules.batch import FaceBatch, face_batch
from datamodules.clips import ClipWriter, Frame, follow, frames, output_name
from datamodules.files import write_whole
from datamodules.photo_files import Photo, sidecar
from datamodules.photo_search import SIDECAR, Found
from datamodules.photos import OpenPhoto, Place
from experiments.anonymizing import Anonymizing
from experiments.photo_jobs import LABEL, PhotoJob, parse_record
from experiments.photo_methods import Running
from experiments.recovering import Recovering, place_of
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.callbacks.paste_back import TRIES, Gate, StillRecognizedError, misplaced, put_back
from lightning_modules.carriers import from_pixels, to_pixels
from lightning_modules.keys import FaceRecord, Key, MasterKey, fresh
from lightning_modules.keys.record import MOST
from lightning_modules.manifest import hash_file
from lightning_modules.photo_step import PhotoStep

WAITING = 16  # frames that may wait for a batch of faces to fill
KNOWN = 0.05  # share of a person's frames that may still be recognized: of strangers' pairs one in a thousand is

Faces = dict[int, list[tuple[Place, bytes]]]
"""Places and nonces by the number of the frame."""


def anonymize_clip(found: Found, job: Anonymizing, network: ReversibleAnonymizer, running: Running, gate: Gate) -> None:
    """Anonymize a clip; what is wrong with it is told and noted.

    Args:
        found: The clip.
        job: Whose records, manifest and options they are.
        network: The method.
        running: On what it runs.
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
        if sum(len(track.places) for track in tracks) > MOST:
            raise ValueError(f"it has more than {MOST} faces, frame by frame; cut it into shorter clips")
        job.refuse_none(len(tracks))
        master, faces = job.master or MasterKey.from_seed(0), Faces()
        for track in tracks:
            asked = job.ask()
            nonce = _nonce(track.crops, asked, master, network, job, gate)
            for number, place in track.places.items():
                faces.setdefault(number, []).append((place._replace(attributes=asked), nonce))
        clip = _Clip(found, digest, job, network, running, faces, master)

        def record() -> str:
            rows = [
                FaceRecord(nonce, *place.numbers, place.attributes, frame=number)
                for number in sorted(faces)
                for place, nonce in faces[number]
            ]
            return job.record(clip.shape, rows).to_json()

        count = {"found": len(tracks), "changed": len(tracks), "left": 0}
        status = "anonymized" if tracks else "copied"
        spans = [[min(track.places), max(track.places)] for track in tracks]  # frames between which each was followed
        clip.turn("anonymize", status, record, gate, faces=count, threshold=job.threshold, tracks=spans)

    _told(found, job, running, work)


def recover_clip(found: Found, job: Recovering, network: ReversibleAnonymizer | None, running: Running) -> None:
    """Recover a clip; what is wrong with it is told and noted.

    Args:
        found: The clip; its record lies beside it.
        job: Whose manifest it is, and what fits.
        network: The method; ``None`` where records name none.
        running: On what it runs.
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
        clip = _Clip(found, digest, job, network, running, faces, master, (record.height, record.width))
        clip.turn("recover", "recovered", None, None, mode="decoy" if record.header.decoy else "verify")

    _told(found, job, running, work)


def _told(found: Found, job: PhotoJob, running: Running, work: Callable[[str], None]) -> None:
    digest = ""
    try:
        digest = hash_file(found.path)
        before = job.manifest.entries.get(found.name, {})
        if before.get("lossless") != running.lossless or job.wanted(found, digest):
            work(digest)
    except Exception as error:  # whatever is wrong with one clip, the others are done
        job.failed(found, digest, error)


@torch.no_grad()
def _nonce(
    crops: list[ndarray],
    asked: tuple[int, ...],
    master: MasterKey,
    network: ReversibleAnonymizer,
    job: Anonymizing,
    gate: Gate,
) -> bytes:
    """A nonce under which nobody of a track's crops is still known, and the fewest faces are no longer found.

    Raises:
        StillRecognizedError: Somebody is known under each that was tried.
    """
    attributes = torch.tensor(asked, dtype=torch.float32).expand(len(crops), -1)
    face = face_batch(torch.stack([from_pixels(crop) for crop in crops]), attributes=attributes)
    face = FaceBatch(*(value.to(network.device) for value in face))
    best: tuple[int, bytes] | None = None
    for _ in range(TRIES if network.key_spec.kind != "none" else 1):
        nonce = fresh()
        key = master.derive(LABEL, nonce)
        made = PhotoStep(network, "anonymize", lambda sample, key=key: key).predict_step(face)
        made = [to_pixels(image) for image in made]
        if not max(gate.similarity(crops, made)) <= gate.threshold:
            continue
        lost = sum(misplaced(job.detector, *pair) for pair in zip(crops, made, strict=True))
        if best is None or lost < best[0]:
            best = lost, nonce
        if not lost:
            break
    if best is None:
        raise StillRecognizedError(
            "somebody in it is still recognized under every key tried, so the clip is not written"
        )
    return best[1]


class _Clip:
    """A clip on its way through a method: frames in their order, faces in batches.

    Attributes:
        shape: Height and width of its frames; none before the first is read.
    """

    def __init__(
        self,
        found: Found,
        digest: str,
        job: PhotoJob,
        network: ReversibleAnonymizer | None,
        running: Running,
        faces: Faces,
        master: MasterKey,
        shape: tuple[int, ...] = (),
    ) -> None:
        self.found, self.digest, self.job, self.network, self.running = found, digest, job, network, running
        self.faces, self.master, self.shape = faces, master, shape
        self.keys: list[Key] = []

    def turn(self, verb: Any, status: str, record: Callable[[], str] | None, gate: Gate | None, **more: Any) -> None:
        """Do it, note it, write it.

        Raises:
            ValueError: It cannot be read, or is not what its record says.
            StillRecognizedError: The gate still knows somebody.
            OSError: It cannot be written.
        """
        name = output_name(self.found.name, self.running.lossless)
        self.job.claim(self.found, self.digest, name)
        path = self.job.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with ClipWriter(part, path.suffix.lower(), self.found.path, self.running.lossless) as writer:
                known = self._pass(verb, writer, gate)
            if self.faces and max(self.faces) >= writer.written:
                raise ValueError("it has fewer frames than its record says: it was cut since")
            if sum(1 for _ in frames(part)) != writer.written:
                raise ValueError("it was not written whole: its container cannot hold these times; try --lossless")
            if known:
                raise StillRecognizedError(f"{known} of its people are still recognized, so the clip is not written")
            files: dict[str, str | None] = {name: hash_file(part)}
            text = "" if record is None else record()
            if text:
                files = {f"{name}{SIDECAR}": sha256(text.encode()).hexdigest(), **files}
            if more.get("mode") == "decoy":  # as of pictures
                files = dict.fromkeys(files)
            self.job.note(self.found, self.digest, status, files=files, lossless=self.running.lossless, **more)
            if text:
                write_whole(sidecar(path), text)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.job.count(status, name)

    def _pass(self, verb: Any, writer: ClipWriter, gate: Gate | None) -> int:
        """Every frame through the method into the writer; how many people the gate still knows."""
        step = PhotoStep(self.network, verb, lambda sample: self.keys[sample])
        waiting: list[tuple[Frame, OpenPhoto]] = []
        seen: Counter[bytes] = Counter()
        known: Counter[bytes] = Counter()

        def flush() -> None:
            self._make([opened for _, opened in waiting], step)
            for frame, opened in waiting:
                pixels = frame.pixels.copy()
                for crop, made, place in zip(opened.crops, opened.made, opened.places, strict=True):
                    put_back(pixels, crop, made, place.matrix, verb == "anonymize" and step.method.fine)
                if gate is not None and opened.places:
                    written = [warp(pixels, place.matrix, step.method.size) for place in opened.places]
                    for nonce, value in zip(opened.nonces, gate.similarity(opened.crops, written), strict=True):
                        seen[nonce] += 1
                        known[nonce] += not value <= gate.threshold
                writer.put(frame._replace(pixels=pixels))
            waiting.clear()

        for frame in frames(self.found.path):
            self.shape = self.shape or frame.pixels.shape[:2]
            if frame.pixels.shape[:2] != self.shape:
                height, width = self.shape
                raise ValueError(f"its frames are not all of {width} by {height} pixels")
            waiting.append((frame, self._open(frame)))
            if len(waiting) >= WAITING or sum(len(o.places) for _, o in waiting) >= self.running.batch_size:
                flush()
        flush()
        return sum(known[nonce] > KNOWN * seen[nonce] for nonce in seen)

    def _open(self, frame: Frame) -> OpenPhoto:
        faces, size = self.faces.get(frame.index, []), self.network.size
        return OpenPhoto(
            Photo(self.found, self.digest, frame.pixels),
            [place for place, _ in faces],
            crops=[warp(frame.pixels, place.matrix, size) for place, _ in faces],
            nonces=[nonce for _, nonce in faces],
        )

    @torch.no_grad()
    def _make(self, opened: list[OpenPhoto], step: PhotoStep) -> None:
        """What the method makes of the faces of some frames, in batches."""
        faces = [(one, index) for one in opened for index in range(len(one.places))]
        for one in opened:
            one.made = [None] * len(one.places)
        for start in range(0, len(faces), self.running.batch_size):
            some = faces[start : start + self.running.batch_size]
            self.keys = [self.master.derive(LABEL, one.nonces[index]) for one, index in some]
            rows = [one.row(index, sample) for sample, (one, index) in enumerate(some)]
            batch = FaceBatch(*(torch.stack(values).to(self.network.device) for values in zip(*rows, strict=True)))
            for (one, index), image in zip(some, step.predict_step(batch), strict=True):
                one.made[index] = to_pixels(image)

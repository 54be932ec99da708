"""Clips: read frame by frame and upright, followed face by face, written with their own timing and sound (PyAV)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from datamodules.alignment import warp
from datamodules.detection import Detector, overlap
from datamodules.photos import Place, look_for_places

CLOSE = 0.3  # least overlap (IoU) of a face with where its track was last
GAP = 1.0  # seconds that a face may be missed before its track ends
SAMPLED = {1, 10, 100, 1000}  # of these frames of a track crops are kept, by which its key is chosen
HDR = {16, 18}  # transfer functions of ITU-T H.273: PQ and HLG
EDGE = 0.2  # seconds for which a face is held to be there before it is first found, and after it was last
SMOOTH = 2  # frames on either side over which a face's place is averaged: detectors tremble


class Frame(NamedTuple):
    """One frame of a clip.

    Attributes:
        index: Its number, from 0.
        pixels: RGB ``(h, w, 3)`` uint8, upright.
        time: When it is shown, in units of the stream's time base.
    """

    index: int
    pixels: UInt8[ndarray, "h w 3"]
    time: int


CONTAINERS = {
    ".mp4": ("mp4", "libx264"),
    ".m4v": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
"""What is written, by suffix: the container's format and its codec; of other clips a Matroska file is made."""


def output_name(name: str, lossless: bool) -> str:
    """Name of a clip to write: the input's, or with ``.mkv`` after it where its container cannot be kept."""
    suffix = Path(name).suffix.lower()
    return name if suffix == ".mkv" or (suffix in CONTAINERS and not lossless) else f"{name}.mkv"


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("clips need PyAV: pip install 'keyveil[video]'") from error
    av.logging.set_level(av.logging.PANIC)
    return av


def frames(path: Path) -> Iterator[Frame]:
    """The frames of the first video stream.

    Raises:
        ValueError: It is no clip, damaged, or of a high dynamic range, or PyAV is not installed.
    """
    av, last, index = _av(), -1, -1
    try:
        with av.open(f"file:{path}") as clip:
            if not clip.streams.video:
                raise ValueError("it has no pictures")
            step = _ticks(clip.streams.video[0])
            for index, frame in enumerate(clip.decode(video=0)):
                if frame.color_trc in HDR:
                    raise ValueError("it has a high dynamic range, which would be lost; convert it first")
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                last = max(last + (1 if index else 0), last + step if frame.pts is None else frame.pts, 0)
                yield Frame(index, np.ascontiguousarray(turned), last)
        if index < 0:
            raise ValueError("it has no pictures")
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be read as a clip ({error.strerror})") from error


def _ticks(stream: Any) -> int:
    """A frame's usual duration, in units of the time base."""
    return max(1, round(1 / (float(stream.average_rate or 25) * float(stream.time_base))))


class ClipWriter:
    """Writes frames under the times of another clip, with its sound copied and nothing else of it.

    H.264 (VP9 in WebM) at a quality that eyes take for lossless, or FFV1 without any loss. A failure leaves no file.

    Args:
        path: Where to.
        suffix: Which container, one of :data:`CONTAINERS`.
        like: The clip whose times and sound it gets.
        lossless: FFV1 in RGB: every level of every frame stays.

    Raises:
        OSError: It cannot be written.
        ValueError: ``like`` cannot be read, or PyAV is not installed.
    """

    def __init__(self, path: Path, suffix: str, like: Path, lossless: bool) -> None:
        av = _av()
        self.path, self.written = path, 0
        self._lossless, self._open = lossless, ExitStack()
        container, self._codec = CONTAINERS[suffix]
        try:
            self._source = self._open.enter_context(av.open(f"file:{like}"))
            self._made = self._open.enter_context(av.open(f"file:{path}", "w", format=container))
            self._streams()
        except av.FFmpegError as error:
            self._drop()
            raise ValueError(f"it cannot be written as a clip ({error.strerror})") from error

    def _streams(self) -> None:
        shown = self._source.streams.video[0]
        rate = shown.average_rate or shown.guessed_rate or 25
        codec = "ffv1" if self._lossless else self._codec
        quality = {"libx264": {"crf": "14"}, "libvpx-vp9": {"crf": "16", "b:v": "0"}}.get(codec, {})
        self._stream = self._made.add_stream(codec, rate=rate, options=quality)
        self._stream.codec_context.time_base = self._stream.time_base = shown.time_base
        self._sound = {}
        for sound in self._source.streams.audio:
            if sound.codec_context is None:
                raise ValueError("it has a sound track that cannot be copied; take it out, or convert it, first")
            self._sound[sound.index] = self._made.add_stream_from_template(sound)
        heard = self._source.demux(*self._source.streams.audio) if self._sound else ()
        self._packets = (packet for packet in heard if packet.dts is not None)
        self._next = next(self._packets, None)

    def put(self, frame: Frame) -> None:
        """Write the next frame; all have the size of the first.

        Raises:
            OSError: It cannot be written.
        """
        av = _av()
        height, width = frame.pixels.shape[:2]
        if not self.written:
            self._stream.width, self._stream.height = width, height
            even = height % 2 == 0 and width % 2 == 0  # colours at half the resolution need an even one
            self._stream.pix_fmt = "bgr0" if self._lossless else "yuv420p" if even else "yuv444p"
            if not self._lossless:
                self._stream.codec_context.colorspace = 6  # BT.601, by which RGB is converted, said in the file
                self._stream.codec_context.color_range = 1
        picture = av.VideoFrame.from_ndarray(frame.pixels, format="rgb24")
        picture.pts, picture.time_base = frame.time, self._stream.codec_context.time_base
        self._copy_sound(float(frame.time * picture.time_base))
        self._encode(picture)
        self.written += 1

    def _encode(self, picture: Any) -> None:
        try:
            packets = self._stream.encode(picture)
        except _av().FFmpegError as error:
            raise ValueError(f"it cannot be written as a clip ({error.strerror})") from error
        self._mux(packets)

    def _copy_sound(self, until: float) -> None:
        """Sound up to a time in seconds, so that it lies beside the frames it belongs to."""
        while self._next is not None and float(self._next.dts * self._next.time_base) <= until:
            packet = self._next
            packet.stream = self._sound[packet.stream.index]
            self._mux([packet])
            self._next = next(self._packets, None)

    def _mux(self, packets: Any) -> None:
        try:
            self._made.mux(packets)
        except _av().FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        whole = False
        try:
            if kind is None:
                self._encode(None)
                self._copy_sound(float("inf"))
                whole = True
        finally:
            self._drop(whole)

    def _drop(self, whole: bool = False) -> None:
        try:
            self._open.close()
        finally:
            if not whole:
                self.path.unlink(missing_ok=True)


@dataclass
class Track:
    """One person through a clip.

    Attributes:
        places: Where they are, by the number of the frame.
        crops: A few of their crops ``(size, size, 3)`` uint8.
    """

    places: dict[int, Place] = field(default_factory=dict)
    crops: list[ndarray] = field(default_factory=list)

    @property
    def last(self) -> int:
        """Number of the last frame in which they were found."""
        return max(self.places)


def follow(path: Path, detector: Detector, size: int) -> list[Track]:
    """The faces of a clip, each joined to the one that it overlaps most in the frames before.

    Faces that were missed for up to a second are placed between where they were found, and held for a fifth of a second
    before and after: detectors miss who comes and goes. Places are averaged over neighbouring frames.

    Args:
        path: The clip.
        detector: What finds faces.
        size: Pixels of the side of a crop.

    Raises:
        ValueError: It cannot be read.
    """
    tracks: list[Track] = []
    count, (longest, held) = 0, _spans(path)
    for frame in frames(path):
        count += 1
        found, _ = look_for_places(frame.pixels, detector, size, "all")
        alive = [track for track in tracks if frame.index - track.last <= longest]
        pairs = sorted(
            (
                (overlap(track.places[track.last].box, place.box), t, f)
                for t, track in enumerate(alive)
                for f, place in enumerate(found)
            ),
            reverse=True,
        )
        taken: set[int] = set()
        for shared, t, f in pairs:
            if shared >= CLOSE and f not in taken and frame.index not in alive[t].places:
                alive[t].places[frame.index] = found[f]
                taken.add(f)
        tracks += [Track({frame.index: place}) for f, place in enumerate(found) if f not in taken]
        for track in tracks:
            if track.last == frame.index and len(track.places) in SAMPLED:
                track.crops.append(warp(frame.pixels, track.places[frame.index].matrix, size))
    return [Track(_smooth(_held(_filled(track.places), held, count)), track.crops) for track in tracks]


def _spans(path: Path) -> tuple[int, int]:
    """``GAP`` and ``EDGE`` in frames."""
    av = _av()
    try:
        with av.open(f"file:{path}") as clip:
            rate = float(clip.streams.video[0].average_rate or 25) if clip.streams.video else 25.0
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be read as a clip ({error.strerror})") from error
    return max(1, round(GAP * rate)), max(1, round(EDGE * rate))


def _filled(places: dict[int, Place]) -> dict[int, Place]:
    numbers = sorted(places)
    filled = dict(places)
    for before, after in zip(numbers, numbers[1:], strict=False):
        for number in range(before + 1, after):
            filled[number] = _mean([places[before], places[after]], [after - number, number - before])
    return filled


def _held(places: dict[int, Place], frames: int, count: int) -> dict[int, Place]:
    first, last = min(places), max(places)
    before = {number: places[first] for number in range(max(0, first - frames), first)}
    after = {number: places[last] for number in range(last + 1, min(count, last + frames + 1))}
    return {**before, **places, **after}


def _smooth(places: dict[int, Place]) -> dict[int, Place]:
    return {
        number: _mean([places[n] for n in range(number - SMOOTH, number + SMOOTH + 1) if n in places])
        for number in sorted(places)
    }


def _mean(places: list[Place], weights: list[int] | None = None) -> Place:
    """Boxes and maps from crop to picture, averaged: averaged the other way round, sizes would not be in between."""
    backwards = [np.linalg.inv(np.vstack([place.matrix, (0, 0, 1)])) for place in places]
    matrix = np.linalg.inv(np.average(backwards, axis=0, weights=weights))[:2]
    return Place(np.average([place.box for place in places], axis=0, weights=weights), matrix, places[0].attributes)

"""Which pictures people mean: files, folders at any depth, and shards, each with its place below the output folder."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Formats that are written; a picture of any other becomes a PNG."""

PHOTOS = {*SUFFIXES, ".heic", ".heif", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".jpe", ".jfif", ".avif"}

CLIPS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}

SIDECAR = ".keyveil"  # what a record's own file is called after its picture

_MANIFEST = r"manifest(\.[\d-]+)?\.jsonl"


class Found(NamedTuple):
    """A picture that was asked for.

    Attributes:
        path: Its file; of one in a shard, the shard's path and its name there.
        name: Its name below the output folder, with ``/``.
        span: Shard, first byte and number of bytes of a picture in a shard; else ``None``.
    """

    path: Path
    name: str
    span: tuple[Path, int, int] | None = None

    def read(self) -> bytes:
        """The bytes of the picture's file.

        Raises:
            OSError: They cannot be read, or its shard has become shorter.
        """
        if self.span is None:
            return self.path.read_bytes()
        shard, start, length = self.span
        with shard.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) < length:
            raise OSError(f"the shard {shard} ends before it")
        return data


def find_photos(paths: Iterable[str | Path], out: str | Path, shards: bool = False) -> tuple[list[Found], int]:
    """Pictures among files and, recursively, folders; in the order of their names.

    A folder's pictures keep their places below it. Links are followed, each folder once; the output folder and
    names that begin with a dot are left out.

    Args:
        paths: Files, taken whatever their suffix, and folders.
        out: Folder to be written to.
        shards: Whether a ``.tar`` is a folder of pictures too, called as it is without its suffix. It is read where it
            lies, so that no face in it is written anywhere else.

    Returns:
        The pictures, and how many other files the folders hold.

    Raises:
        OSError: A path does not exist, or there is no picture at all, or a shard is damaged or would write elsewhere.
        ValueError: Two pictures would be written to one place, or one over itself.
    """
    out, others = Path(out).resolve(), 0
    found: dict[str, Found] = {}

    def add(path: Path, name: str, span: tuple[Path, int, int] | None = None) -> None:
        other = found.setdefault(name, Found(path, name, span))
        if other.path.resolve() != path.resolve():
            raise ValueError(f"{other.path} and {path} would both be written to {name}; give them apart")
        if (out / name).resolve() == path.resolve():
            raise ValueError(f"{path} would be written over itself; choose another output folder")

    def add_shard(path: Path, name: str) -> None:
        nonlocal others
        for member in _members(path):
            inner = PurePosixPath(member.name)
            if inner.is_absolute() or ".." in inner.parts:
                raise OSError(f"{path} is left alone: its member {inner} would leave the output folder")
            if inner.suffix.lower() in PHOTOS and not any(part.startswith(".") for part in inner.parts):
                span = (path, member.offset_data, member.size)
                add(path / inner, (PurePosixPath(name).with_suffix("") / inner).as_posix(), span)
            else:
                others += 1

    for path in map(Path, paths):
        if not path.is_dir():
            if not path.is_file():
                raise FileNotFoundError(f"there is no picture or folder {path}")
            if shards and path.suffix.lower() == ".tar":
                add_shard(path, path.name)
            else:
                add(path, path.name)
            continue
        seen: set[Path] = set()
        for top, folders, names in os.walk(path, followlinks=True, onerror=_unreadable):
            real = Path(top).resolve()
            if real in seen or (real == out and real != path.resolve()):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if (
                    Path(name).suffix.lower() in PHOTOS | CLIPS
                    and not name.startswith(".")
                    and Path(top, name).is_file()
                ):
                    add(Path(top, name), Path(top, name).relative_to(path).as_posix())
                elif shards and name.lower().endswith(".tar") and not name.startswith("."):
                    add_shard(Path(top, name), Path(top, name).relative_to(path).as_posix())
                elif not (name.startswith(".") or name.endswith(SIDECAR) or re.fullmatch(_MANIFEST, name)):
                    others += 1
    if not found:
        raise FileNotFoundError(f"there is no picture in {', '.join(map(str, paths))} ({others} other files)")
    return [found[name] for name in sorted(found)], others


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """Plain files of an uncompressed tar archive.

    Raises:
        OSError: It is none, or it is cut.
    """
    try:
        with tarfile.open(shard, "r:") as bundle:
            members = [member for member in bundle if member.isreg() and not member.issparse()]
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"{shard} cannot be read as a shard: an uncompressed tar archive ({error})") from error
    if members and members[-1].offset_data + members[-1].size > shard.stat().st_size:
        raise OSError(f"the shard {shard} is cut: it ends within {members[-1].name}")
    yield from members


def _unreadable(error: OSError) -> None:
    raise OSError(f"the folder {error.filename} cannot be read ({error.strerror or error})") from error

"""Archives of pictures, unpacked once into the cache, since reading them out of order would be slow."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO
from uuid import uuid4

import platformdirs
from rich.console import Console
from rich.progress import Progress

ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip", ".whl")


def cache_folder() -> Path:
    """Folder for what can be made again: ``KEYVEIL_CACHE``, or the user's cache folder."""
    root = os.environ.get("KEYVEIL_CACHE") or platformdirs.user_cache_dir("keyveil", appauthor=False)
    return Path(root).expanduser()


@contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """Write a folder as a whole: it appears under its name when all is written, or not at all.

    Where another process was faster, its folder stays and ours is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}-{uuid4().hex[:12]}"
    work.mkdir()
    try:
        yield work
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on a terminal's standard error; elsewhere nothing."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def unpacked(path: Path, suffixes: set[str] | None = None) -> Path:
    """Folder with the files of an archive; a folder is returned as it is.

    Args:
        path: A folder, a tar archive (compressed or not) or a zip archive.
        suffixes: Which files to take; ``None`` takes all.

    Raises:
        OSError: The file is no archive, or a member would leave the folder.
    """
    if path.is_dir():
        return path
    state = path.stat()
    digest = sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder() / "unpacked" / f"{path.name.split('.')[0]}-{digest}"
    if target.is_dir():
        return target
    with fresh(target) as work, progress() as bar:
        task = bar.add_task(f"unpacking {path.name}", total=None)
        for name, stream in _members(path):
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts:
                raise OSError(f"{path} was not unpacked: its member {name} would leave the folder")
            if suffixes is None or place.suffix.lower() in suffixes:
                (work / place).parent.mkdir(parents=True, exist_ok=True)
                with (work / place).open("wb") as out:
                    shutil.copyfileobj(stream, out)
                bar.advance(task)
    return target


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Plain files of an archive in the order they lie in it; links and devices are passed over."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as bundle:
                for info in bundle.infolist():
                    if not info.is_dir():
                        with bundle.open(info) as stream:
                            yield info.filename, stream
            return
        with tarfile.open(path) as bundle:
            for member in bundle:
                stream = bundle.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield member.name, stream
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"{path} cannot be read as an archive ({error})") from error

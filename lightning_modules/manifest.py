"""The manifest of an output folder: what became of each picture, a signed line each, and nothing secret."""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from platformdirs import user_config_path

from datamodules.files import write_whole
from datamodules.photo_search import CLIPS, PHOTOS, SIDECAR

NAME = "manifest.jsonl"
PATTERN = "manifest*.jsonl"  # of several processes each has its own
_LONGEST = 1 << 20  # characters of a line


def signing_key() -> Ed25519PrivateKey:
    """This user's own key for manifests (Ed25519), made at the first use; it has nothing to do with any secret.

    Raises:
        OSError: It cannot be kept.
        ValueError: Its file is damaged.
    """
    path = user_config_path("keyveil", appauthor=False) / "signing.key"
    if not path.is_file():
        made = Ed25519PrivateKey.generate()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".signing.") as file:  # only its owner may read it
            file.write(made.private_bytes_raw())
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):  # another process was first
                _link(Path(file.name), path)
    try:
        return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"the signing key {path} is damaged; remove it, and a new one is made") from error


def _link(file: Path, path: Path) -> None:
    """Put a file under another name, whole or not at all, unless that is taken.

    Raises:
        FileExistsError: It is taken.
        OSError: It cannot be written.
    """
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(file.read_bytes())


def signer(key: Ed25519PrivateKey) -> str:
    """A key's public half in hexadecimal, by which others know its signatures."""
    return key.public_key().public_bytes_raw().hex()


class Manifest:
    """A file to which a run adds a line for each picture.

    A line is ``{"entry": …, "previous": …, "signer": …, "time": …, "signature": …}``. ``previous`` is the SHA-256 of
    the line before, so that no line can be taken out; ``time`` is in seconds since 1970, by which lines of several
    processes are put in order. A finished run ends with an entry that counts its pictures. What a killed run left of a
    line is dropped.

    Args:
        path: The file; made if it is not there.
        key: What signs.

    Raises:
        OSError: It cannot be read or written.
        ValueError: It was altered, or signed by another key.
    """

    def __init__(self, path: str | Path, key: Ed25519PrivateKey) -> None:
        self.path, self.key = Path(path), key
        self._previous = ""
        self.entries: dict[str, dict[str, Any]] = {}
        """What was last written of each picture, by its name in the input; by other processes too."""
        lines = []
        for other in set(self.path.parent.glob(PATTERN)) - {self.path}:
            with suppress(FileNotFoundError):  # another process has just taken it into one
                lines += read_lines(_whole_lines(other.read_bytes()), signer(key))
        if self.path.is_file():
            whole = self.path.read_bytes()
            kept = _whole_lines(whole)
            lines += read_lines(kept, signer(key))
            if kept != whole:
                write_whole(self.path, kept)
            if kept:
                self._previous = _digest(kept.rstrip(b"\n").rsplit(b"\n", 1)[-1])
        else:
            write_whole(self.path, b"")
        self._remember([line.entry for line in sorted(lines, key=lambda line: line.time)])

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line, and have it on the disk before going on.

        Raises:
            OSError: It cannot be written.
        """
        line = _signed(Line(entry, time.time()), self._previous, self.key)
        length = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, length)  # no half of a line, on which the next would follow
            raise
        self._previous = _digest(line)
        self._remember([entry])

    def _remember(self, entries: list[dict[str, Any]]) -> None:
        self.entries.update({entry["picture"]: entry for entry in entries if entry.get("files")})


def merge(folder: Path, key: Ed25519PrivateKey) -> None:
    """Take what several processes of a run wrote into one manifest, by time and signed anew.

    What is not finished, or was altered or signed by another key, stays apart.

    Args:
        folder: Of the manifests, to which nobody writes now.
        key: What signs, and has signed.

    Raises:
        OSError: They cannot be read or written.
    """
    one, ready = folder / NAME, {}
    for path in sorted(folder.glob(PATTERN)):
        with suppress(ValueError):
            lines = read_lines(_whole_lines(path.read_bytes()), signer(key))
            if lines and "pictures" in lines[-1].entry:
                ready[path] = lines
    others = [path for path in ready if path != one]
    if not others or (one.is_file() and one.stat().st_size and one not in ready):
        return
    merged, previous, seen = [], "", set()
    for line in sorted((line for lines in ready.values() for line in lines), key=lambda line: line.time):
        mark = _compact(line._asdict())
        if mark in seen:  # taken before, by a process that was stopped before it could remove the part
            continue
        seen.add(mark)
        merged.append(_signed(line, previous, key))
        previous = _digest(merged[-1])
    write_whole(one, b"".join(line + b"\n" for line in merged))
    for path in others:
        path.unlink()


class Line(NamedTuple):
    """What a line says, and when it was written (0 where that is not known)."""

    entry: dict[str, Any]
    time: float


def read_lines(whole: bytes, expected: str) -> list[Line]:
    """The lines of a manifest, if every one is signed by the expected key and none is missing before the last.

    Args:
        whole: The file.
        expected: :func:`signer` of the key.

    Raises:
        ValueError: A line is malformed, altered, missing, or signed by another key.
    """
    lines, previous = [], ""
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found = json.loads(line) if len(line) <= _LONGEST else None
            body = {name: found[name] for name in ("entry", "previous", "signer")}
            body |= {"time": float(found["time"])} if "time" in found else {}  # older ones have none
            signature, by = bytes.fromhex(found["signature"]), str(found["signer"])
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(by))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"line {number} of the manifest is malformed") from None
        if by != expected:
            raise ValueError(
                f"line {number} of the manifest is signed by the key {by[:64]}, not by {expected}; "
                "if you trust that key, name it by --signer"
            )
        try:
            key.verify(signature, _compact(body))
        except InvalidSignature:
            raise ValueError(f"line {number} of the manifest was altered") from None
        if found["previous"] != previous or not isinstance(found["entry"], dict):
            raise ValueError(f"a line is missing before line {number} of the manifest")
        lines.append(Line(found["entry"], body.get("time", 0.0)))
        previous = _digest(line)
    return lines


def check_folder(folder: Path, expected: str) -> list[str]:
    """What is wrong with a folder, a sentence each: files against their hashes, lines against their signatures.

    Args:
        folder: Output folder of a run.
        expected: :func:`signer` of the key that is trusted.

    Raises:
        OSError: There is no manifest, or it cannot be read.
        ValueError: As :func:`read_lines`.
    """
    manifests = sorted(folder.glob(PATTERN))
    if not manifests:
        raise FileNotFoundError(f"there is no {NAME} in {folder}")
    wrong: list[str] = []
    known: dict[str, set[str]] = {}
    needed: set[str] = set()
    for manifest in manifests:
        whole = manifest.read_bytes()
        entries = [line.entry for line in read_lines(_whole_lines(whole), expected)]
        if not entries or "pictures" not in entries[-1] or not whole.endswith(b"\n"):
            wrong.append(f"{manifest.name}: its last run was not finished, so lines may be missing at its end")
        written: dict[str, dict[str, set[str]]] = {}
        for entry in entries:
            files = entry.get("files", {})
            if files:
                older = written.get(entry["picture"], {})
                written[entry["picture"]] = {name: {digest} | older.get(name, set()) for name, digest in files.items()}
                needed.update(files)
            elif entry.get("status") == "failed":  # what was written before may be there still, or not
                needed.difference_update(written.get(entry["picture"], {}))
        latest = {entry["picture"]: entry for entry in entries if "picture" in entry}
        for picture, files in written.items():
            for name, digests in files.items():
                last = latest[picture].get("files", {}).get(name)
                known.setdefault(name, set()).update({last} if last else digests)
    for name, digests in sorted(known.items()):
        if not (folder / name).is_file():
            wrong += [f"{name}: it is missing"] if name in needed else []
        elif None not in digests and hash_file(folder / name) not in digests:
            wrong.append(f"{name}: it was altered")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in {*PHOTOS, *CLIPS, SIDECAR} and path.is_file() and name not in known:
            wrong.append(f"{name}: no run wrote it")
    return wrong


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _signed(line: Line, previous: str, key: Ed25519PrivateKey) -> bytes:
    body = {"entry": line.entry, "previous": previous, "signer": signer(key)}
    body |= {"time": line.time} if line.time else {}
    return _compact(body | {"signature": key.sign(_compact(body)).hex()})


def _whole_lines(found: bytes) -> bytes:
    """Without what a killed run left of a line."""
    return found[: found.rfind(b"\n") + 1]


def _digest(line: bytes) -> str:
    return sha256(line).hexdigest()


def _compact(found: dict[str, Any]) -> bytes:
    return json.dumps(found, separators=(",", ":"), sort_keys=True).encode()

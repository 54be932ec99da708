"""``keyveil rekey``: anonymized pictures under another secret, without a pixel of them changed."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.progress import Progress

from datamodules.files import write_whole
from datamodules.photo_files import peek, sidecar, with_record
from datamodules.photo_search import SIDECAR, Found
from experiments.photo_folder import OutputFolder
from experiments.photo_jobs import PhotoJob, parse_record
from experiments.photos import _places, _progress
from lightning_modules.keys import Cost, Record, Secret, fresh, read_secret, stretch
from lightning_modules.manifest import Manifest


def rekey(
    paths: Sequence[str] = (), out: str = "", secret_file: str | None = None, new_secret_file: str | None = None
) -> int:
    """Give anonymized pictures another secret: `keyveil rekey safe/ --out safer/`. No pixel changes, no network runs.

    Both secrets are asked for, or KEYVEIL_SECRET and KEYVEIL_NEW_SECRET. In verify mode a wrong old secret is refused;
    in decoy mode nothing can tell, and the original would be out of reach: recover one picture from the new folder
    before the old one is removed. Whoever has a copy of an old file and the old secret can still recover it, and in
    decoy mode they can also test guesses of the new secret, by what it opens of a new file: choose it as hard to guess.

    Args:
        paths: Anonymized pictures and folders of them, as plain words; records beside them (NAME.keyveil) are found.
        out: Folder to write to.
        secret_file: A file that holds the old secret.
        new_secret_file: A file that holds the new one.

    Returns:
        0, or 1 if a picture could not be done.

    Raises:
        ValueError: There is no secret, or the two are one.
        OSError: A path is not there, or the output folder cannot be written.
    """
    found, folder = _places(paths, out)
    old, new = read_secret(secret_file), read_secret(new_secret_file, "KEYVEIL_NEW_SECRET", confirm=True)
    if old == new:
        raise ValueError("the new secret is the old one; nothing was done")
    with OutputFolder(folder) as manifest, _progress(len(found), "rekeying") as bar:
        job = Rekeying(folder, manifest, bar, old, new)
        for one in found:
            job.do(one)
        job.close()
        return int(job.failures > 0)


class Rekeying(PhotoJob):
    """Puts records under another secret.

    Args:
        out: Output folder.
        manifest: Its manifest.
        bar: Progress.
        secret: The old one.
        new: The new one.
    """

    verb = "rekey"

    def __init__(self, out: Path, manifest: Manifest, bar: Progress, secret: Secret, new: Secret) -> None:
        super().__init__(out, manifest, bar, {}, secret)
        self._new, self.salt, self.cost = new, fresh(), Cost()
        self.master = stretch(new, self.salt, self.cost)

    def trusts(self, entry: dict[str, Any], found: Found) -> bool:
        """Whether the new secret opens what was written; in decoy mode nothing may tell, so it is done again."""
        try:
            path = self.out / found.name
            record = parse_record(peek(path), sidecar(path))
            record.check(stretch(self._new, record.header.salt, record.header.cost))
        except (OSError, ValueError):
            return False
        return not record.header.decoy

    def do(self, found: Found) -> None:
        """One picture; a failure is told."""
        digest = ""
        try:
            data = found.path.read_bytes()
            digest = sha256(data).hexdigest()
            if not self.wanted(found, digest):
                return
            beside = sidecar(found.path)
            text = peek(found.path)
            record = parse_record(text, beside)
            inner = record.check(self.stretched(record.header))
            self._put(found, digest, data, record.rekeyed(inner, self.master, self.salt, self.cost), text, beside)
        except (OSError, ValueError) as error:
            self.failed(found, digest, error)

    def _put(self, found: Found, digest: str, data: bytes, record: Record, text: str | None, beside: Path) -> None:
        """Write the picture with its new record, in it or beside it, as the old one was."""
        made = record.to_json()
        files = {} if text is None else {found.name: with_record(data, made)}
        if text is None or beside.is_file():
            files = {f"{found.name}{SIDECAR}": made.encode(), found.name: data, **files}
        before = self.manifest.entries.get(found.name, {})
        for name in files:
            if (self.out / name).exists() and before.get("input") != digest:
                raise ValueError(f"there is a file {self.out / name} already, made of another picture; remove it first")
        hashes = {name: None if record.header.decoy else sha256(one).hexdigest() for name, one in files.items()}
        self.note(found, digest, "rekeyed", files=hashes, mode="decoy" if record.header.decoy else "verify")
        for name, one in files.items():
            write_whole(self.out / name, one)
        self.count("rekeyed")

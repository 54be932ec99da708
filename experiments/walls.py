"""Walls around the process that opens pictures: what it may not read, nor ask others to read."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datamodules.files import write_whole

ASKS_OTHERS = frozenset(
    {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"}
    | {"socket.connect", "socket.sendto", "subprocess.Popen"}
)
"""Audit events of Python (PEP 578) by which a process has others work for it."""


def began(file: Path, making: str) -> int:
    """When a method first saw faces to make certain pictures, in nanoseconds since the epoch.

    Args:
        file: Keeps it, for a run that goes on.
        making: Digest of what they are made of; where it is another one, they begin now.
    """
    if not file.is_file() or file.read_text() != making:
        write_whole(file, making)
    return file.stat().st_ctime_ns


class Walls:
    """Refuses, in this process and as long as it lives, to read what may hold an original (an audit hook; ours).

    It sees what is opened by Python, which is how pickles, arrays, pictures of Pillow and checkpoints are read. It does
    not see libraries that open files themselves (OpenCV's ``imread``, safetensors), what an earlier comparison left
    behind, or what looks like a program (``.py``, or among Python's own packages, which may change in the meantime):
    walls are for who cheats by mistake, or without much trouble.

    Args:
        closed: Files and folders that hold originals.
        since: Nanoseconds since the epoch; what was written, moved or linked from then on is refused wherever it lies.
            It goes by the time of the last change (``st_ctime``), which nobody can set back.
        own: Files and folders that are read all the same.
    """

    def __init__(self, closed: Collection[Path], since: int, own: Collection[str | Path]) -> None:
        self.closed, self.since, self.own = (*map(os.path.realpath, closed),), since, (*map(os.path.realpath, own),)
        self.alone = False
        sys.addaudithook(self._look)

    def _look(self, event: str, told: tuple[Any, ...]) -> None:
        reads = event == "open" and not told[2] & (os.O_WRONLY | os.O_TRUNC | os.O_EXCL)
        if reads or event == "sqlite3.connect":
            self._read(told[0])
        elif self.alone and event in ASKS_OTHERS:
            raise PermissionError(f"whoever opens a picture does so alone, without {event}")

    def _read(self, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # what is open already
        place = os.path.realpath(os.fsdecode(path))
        if _within(place, self.own) or place.startswith(("/proc/", "/sys/")) or place.endswith((".py", ".pyc")):
            return
        if _within(place, self.closed):
            raise PermissionError(f"{place} is not for whoever opens a picture: it may hold the original")
        try:
            about = os.stat(place)
        except OSError:
            return  # nothing to read
        if stat.S_ISREG(about.st_mode) and about.st_ctime_ns >= self.since:
            raise PermissionError(f"{place} was written after the method began to hide faces; originals may be in it")


def _within(place: str, folders: Collection[str]) -> bool:
    return any(place == folder or place.startswith(folder + os.sep) for folder in folders)

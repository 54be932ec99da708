"""An output folder of photos: one run's at a time, shared by its processes, with one manifest in the end."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from datamodules.photo_files import clear_parts
from lightning_modules import manifest as manifests

PATIENCE = 1.0  # seconds to wait for another process that puts manifests together


class OutputFolder:
    """An output folder that is this run's own, and this process's manifest, on entry; on exit manifests are merged.

    Args:
        folder: Made if it is not there.

    Raises:
        ValueError: Another run writes to it.
    """

    def __init__(self, folder: Path) -> None:
        rank = rank_of_process()
        self.folder, self.name = folder, f"manifest.{rank}.jsonl" if rank else manifests.NAME
        self.lock = self._lock(self.name)

    def __enter__(self) -> manifests.Manifest:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(
                f"another run is writing to {self.folder}; wait for it, or choose another folder"
            ) from None
        if self.name == manifests.NAME and alone():
            clear_parts(self.folder)
        return manifests.Manifest(self.folder / self.name, manifests.signing_key())

    def __exit__(self, *error: object) -> None:
        self.lock.release()
        with ExitStack() as held:
            try:
                for path in sorted({self.folder / manifests.NAME, *self.folder.glob(manifests.PATTERN)}):
                    held.enter_context(self._lock(path.name))
                manifests.merge(self.folder, manifests.signing_key())
            except (Timeout, OSError):  # who ends last does it; what stays apart is as good
                return

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f".{name}.lock", timeout=PATIENCE)


def alone() -> bool:
    """Whether no other process of this run can have begun before this one: what lies half-written is nobody's."""
    return all(os.environ.get(name) in (None, "", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def rank_of_process() -> str:
    """What tells this process from others of the same run; nothing of the first, or of the only one."""
    told = os.environ.get("RANK")  # torchrun
    if told is None and "LOCAL_RANK" not in os.environ:
        told = os.environ.get("SLURM_PROCID")
    if told is None:  # Lightning's own launcher; within a job of SLURM too
        node, local = os.environ.get("NODE_RANK") or "0", os.environ.get("LOCAL_RANK") or "0"
        told = local if node == "0" else f"{node}-{local}"
    return "" if told == "0" else told

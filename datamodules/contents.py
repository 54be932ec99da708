"""What files and networks hold, as hashes; caches are named by them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from datamodules.archives import cache_folder, progress
from datamodules.files import write_whole


def contents(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each of a folder's files by its name, or why it cannot be read.

    A file is read once, and again when its length or its time of change is another.
    """
    folder = folder.resolve()
    kept = cache_folder() / "contents" / f"{sha256(os.fsencode(folder)).hexdigest()[:16]}.json"
    known = _read(kept)

    def one(file: str) -> tuple[list[int], str]:
        try:
            found = (folder / file).stat()
            state = [found.st_size, found.st_mtime_ns]
            if file in known and known[file][:2] == state:
                return state, known[file][2]
            return state, sha256((folder / file).read_bytes()).hexdigest()
        except OSError as error:
            return [], error.strerror or type(error).__name__

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress() as bar:
        told = dict(zip(files, bar.track(pool.map(one, files), len(files), description="hashing"), strict=True))
    new = {file: [*state, digest] for file, (state, digest) in told.items() if state}
    if any(known.get(file) != entry for file, entry in new.items()):
        write_whole(kept, json.dumps(known | new))
    return {file: digest for file, (_, digest) in told.items()}


def add_tensors(digest: Any, network: nn.Module) -> None:
    """Add a network's tensors to a hash, those too that a frozen one keeps out of its ``state_dict``."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())


def _read(kept: Path) -> dict[str, list]:
    try:
        return json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged: it can be made again
        return {}

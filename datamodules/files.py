"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: Where to; missing folders are made.
        tensors: Names and tensors; moved to the CPU.
        notes: Metadata of the file.

    Raises:
        OSError: If it cannot be written.
        ValueError: If two names share a tensor.
    """
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        data = save(ready, None if notes is None else dict(notes))
    except RuntimeError as error:
        raise ValueError(f"cannot write {path}: two of its names share one tensor") from error
    write_whole(path, data)


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write beside the place first, then rename: a full disk or a stop leaves the old file, or none, and no rest.

    Args:
        path: Where to; missing folders are made.
        data: What; text is written as UTF-8.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

"""Where figures come from: the checkout, the sources and the versions that made them."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path


def commit() -> str:
    """Short hash of the checkout that runs, ``+`` where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Hash of the package's own sources, so that a changed line is measured again."""
    root = Path(__file__).resolve().parent.parent
    rooms = ("experiments", "lightning_modules", "datamodules", "flows")
    files = sorted(file for room in rooms for file in (root / room).rglob("*.py"))
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("keyveil", "torch", "lightning", "torchmetrics", "FrEIA", "onnxruntime")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}

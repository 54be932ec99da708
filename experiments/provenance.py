"""Where figures come from: the checkout, the sources and the versions that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_modules.calibration import Calibration
from lightning_modules.judges import Judge


def commit() -> str:
    """Short hash of the checkout that runs, ``+`` where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def when(started: float) -> dict[str, Any]:
    """Commit, beginning and seconds of a run that began at this time and ends now."""
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    return {"commit": commit(), "started": begun, "seconds": round(time.time() - started, 1)}


def about(config: Path, seed: int, size: int, judges: Iterable[tuple[Judge, Calibration]]) -> dict[str, Any]:
    """What ``run.json`` says of how figures came about, beside what was run (:func:`when`, its command).

    Args:
        config: The comparison's file.
        seed: Where keys come from.
        size: Pixels at which pictures are compared.
        judges: Each judge with its threshold.
    """
    return {
        "name": config.stem,
        "config": config.as_posix(),
        "config_text": config.read_text(),
        "seed": seed,
        "size": size,
        "versions": versions(),
        "judges": [
            {"name": judge.name, "weights": judge.weights, **dataclasses.asdict(threshold)}
            for judge, threshold in judges
        ],
    }


ROOMS = ("experiments", "lightning_modules", "datamodules", "flows")
# Of experiments/ these alone make pictures, and of lightning_modules/ all but those.
MAKING = ("experiments/build.py", "experiments/exchange.py", "experiments/opening.py")
JUDGING = ("metrics/", "callbacks/", "judges.py", "calibration.py", "attackers.py", "inverter.py", "protocol.py")


@lru_cache(maxsize=2)
def code_digest(making: bool = False) -> str:
    """Hash of the package's own sources, so that a changed line is measured again.

    Args:
        making: Only of those that can change a picture; a changed metric alone needs no picture anew.
    """
    root = Path(__file__).resolve().parent.parent
    files = sorted(file for room in ROOMS for file in (root / room).rglob("*.py"))
    if making:
        files = [file for file in files if _makes(file.relative_to(root).as_posix())]
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


def _makes(file: str) -> bool:
    room, _, inside = file.partition("/")
    if room == "experiments":
        return file in MAKING
    return room != "lightning_modules" or not inside.startswith(JUDGING)


def own_sources(words: Iterable[str]) -> dict[str, str]:
    """Hashes of the files of classes that are not of this package, by their modules.

    Args:
        words: Whatever stands in a configuration; what is no ``class_path`` is passed over. What such a file imports in
            turn is not looked at.
    """
    found = {}
    for word in words:
        module, _, name = word.rpartition(".")
        if not all(part.isidentifier() for part in (*module.split("."), name)) or module.partition(".")[0] in ROOMS:
            continue
        with suppress(ImportError, ValueError):
            spec = find_spec(module)
            if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
                found[module] = file_digest(Path(spec.origin))
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("keyveil", "torch", "lightning", "torchmetrics", "FrEIA", "onnxruntime")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}

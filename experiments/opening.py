"""Opens anonymized files in a process of its own, so that nothing that hiding left in memory can help."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from safetensors.torch import load_file

from datamodules.archives import cache_folder
from datamodules.files import write_tensors
from experiments.build import build, one_sentence
from experiments.exchange import Speed, comparison_secret, recover_from
from experiments.walls import Walls
from lightning_modules.anonymizer import ReversibleAnonymizer

# The current folder comes last, as for the verbs: what lies there hides nothing.
START = "import sys; sys.path[:] = filter(None, sys.path); from experiments.opening import main; sys.exit(main())"


def recover_elsewhere(
    folder: Path,
    spec: dict[str, Any],
    method: ReversibleAnonymizer,
    seed: int,
    wrong_keys: int = 1,
    since: int = sys.maxsize,
    tell: Callable[[int], None] = lambda done: None,
    sensitivity: bool = False,
    batch_size: int = 8,
) -> Speed:
    """As :func:`~experiments.exchange.recover_from`, by another process.

    It builds the method anew from its configuration and gets the tensors of its ``state_dict``, the folder, and the
    seed of the comparison's secret. Nothing else crosses in memory, and originals on the disk, or what the method wrote
    there while it hid faces, are behind :class:`~experiments.walls.Walls`.

    Args:
        folder: What was hidden, and where to put what is opened.
        spec: ``class_path`` and ``init_args`` of the method.
        method: The method, whose tensors hiding must have left as they were; they go along.
        seed: Of the comparison.
        wrong_keys: As of :func:`~experiments.exchange.recover_from`.
        since: Nanoseconds since the epoch; what was written from then on is not read.
        tell: Hears every second how many faces were recovered.
        sensitivity: As of :func:`~experiments.exchange.recover_from`.
        batch_size: Faces at a time.

    Raises:
        RuntimeError: If the method cannot open the files so, with the last that the process said.
    """
    with tempfile.TemporaryDirectory() as place:
        state = Path(place) / "state.safetensors"
        write_tensors(state, {name: value.detach().cpu() for name, value in method.state_dict().items()})
        order = {
            "class_path": spec["class_path"],
            "init_args": spec["init_args"],
            "state": str(state),
            "folder": str(folder.resolve()),
            "seed": seed,
            "wrong_keys": wrong_keys,
            "sensitivity": sensitivity,
            "batch_size": batch_size,
            "since": since,
            "parent": os.getpid(),
        }
        with subprocess.Popen(
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        ) as process:
            try:
                told, errors = _talk(process, json.dumps(order), lambda: tell(_recovered(folder)))
            except BaseException:  # also Ctrl-C: it does not go on alone
                process.kill()
                raise
    if process.returncode:
        said = [line for line in errors.splitlines() if line.strip()]
        raise RuntimeError(f"a process that has files and key alone cannot recover: {said[-1] if said else 'it died'}")
    return Speed(**json.loads(told.splitlines()[-1]))


def _talk(process: subprocess.Popen[str], order: str, meanwhile: Callable[[], None]) -> tuple[str, str]:
    """Give an order, and wait for what is said on standard output and standard error."""
    given: str | None = order
    while True:
        try:
            return process.communicate(given, timeout=1)
        except subprocess.TimeoutExpired:
            given = None  # it was given
            meanwhile()


def _recovered(folder: Path) -> int:
    """How many faces were recovered so far."""
    return len(list((folder / "recovered").glob("[0-9]*")))


def main() -> int:
    """Take an order from standard input, and write faces and seconds on standard output."""
    order = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(order["parent"],), daemon=True).start()
    L.seed_everything(order["seed"], workers=True, verbose=False)
    folder, state = Path(order["folder"]), Path(order["state"])
    own = [state, *(folder / name for name in ("anonymized", "header.json", "opening.json"))]
    closed = [folder.parents[2], *(cache_folder() / name for name in ("faces", "unpacked"))]
    closed += [Path(data)] if (data := os.environ.get("KEYVEIL_DATA")) else []
    walls = Walls(closed, order["since"], [*own, sys.prefix, sys.base_prefix])
    try:
        method = build(ReversibleAnonymizer, order, "method").eval()
        method.load_state_dict(load_file(state))
        walls.alone = True
        secret = comparison_secret(order["seed"])
        tries = {name: order[name] for name in ("wrong_keys", "sensitivity", "batch_size")}
        speed = recover_from(folder, method, secret, **tries)
    except Exception as error:  # told by the one who asked
        print(f"{type(error).__name__}: {one_sentence(error)}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(speed)))
    return 0


def _end_with(parent: int) -> None:
    """End when whoever gave the order was killed: nobody would read what is opened."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

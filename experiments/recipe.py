"""``keyveil recipe``: trainings in a row under one file, such as phase 1 → phase 2, or the arms of an ablation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from datamodules.files import write_whole
from experiments.build import read_yaml
from lightning_modules.trained import export, read_notes


@dataclass(frozen=True)
class Stage:
    """One training of a recipe.

    Attributes:
        name: Its folder below the recipe's.
        config: Files for ``keyveil fit``, in order.
        set: What to change in them, nested as they are.
        export: Where its weights go as safetensors, if anywhere.
        note: How it was made, noted in that file.
    """

    name: str
    config: list[str]
    set: dict[str, Any] = field(default_factory=dict)
    export: str | None = None
    note: str = ""

    def overlay(self, folder: Path) -> dict[str, Any]:
        """The last file of the run: the recipe's own changes, and its folder."""
        return _merged(self.set, {"trainer": {"default_root_dir": folder.as_posix()}})


def read_recipe(path: Path) -> tuple[Path, list[Stage]]:
    """Folder and stages of a recipe.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no recipe: ``out``, ``stages`` by name, and perhaps ``common`` to all of them.
    """
    found = read_yaml(path)
    if odd := set(found) - {"out", "common", "stages"}:
        raise ValueError(f"{path} has an unknown entry {sorted(odd)[0]!r}; a recipe has out, common and stages")
    if not isinstance(found.get("stages"), dict) or not found["stages"] or "out" not in found:
        raise ValueError(f"{path} must name a folder `out` and at least one of `stages`")
    common = found.get("common") or {}
    stages = []
    for name, told in found["stages"].items():
        told = told or {}
        if odd := (set(told) | set(common)) - {"config", "set", "export", "note"}:
            raise ValueError(f"{path}, stage {name}: unknown entry {sorted(odd)[0]!r}")
        config = [*(common.get("config") or []), *(told.get("config") or [])]
        if missing := [file for file in config if not Path(file).is_file()]:
            raise FileNotFoundError(f"{path}, stage {name}: no configuration at {missing[0]}")
        changes = _merged(common.get("set") or {}, told.get("set") or {})
        stages.append(Stage(name, config, changes, told.get("export"), told.get("note", "")))
    return Path(found["out"]), stages


def recipe(file: Path, only: str | None = None, dry_run: bool = False) -> int:
    """Train the stages of a recipe one after another; what is finished is kept, what was cut off goes on.

    Args:
        file: The recipe: `out`, the folder; `common` and `stages`, each with `config` (files), `set` (changes),
            `export` (a .safetensors to write).
        only: Names of the stages to run, with commas between them; the others are left as they are.
        dry_run: Say what would run, and run nothing.

    Returns:
        0, or the exit code of the training that failed.

    Raises:
        ValueError: If the recipe is not one or has no such stage.
    """
    out, stages = read_recipe(file)
    chosen = [name.strip() for name in (only or "").split(",") if name.strip()]
    if unknown := set(chosen) - {stage.name for stage in stages}:
        raise ValueError(f"{file} has no stage {sorted(unknown)[0]!r}; it has {', '.join(s.name for s in stages)}")
    console = Console(stderr=True)
    for stage in stages:
        if chosen and stage.name not in chosen:
            continue
        folder = out / stage.name
        last, done = folder / "checkpoints" / "last.ckpt", folder / "finished.json"
        told = _fingerprint(stage, folder)
        if done.is_file() and json.loads(done.read_text())["fingerprint"] == told:
            console.print(f"[green]finished[/] {stage.name}")
            continue
        overlay = folder / "recipe.yaml"
        command = [sys.executable, "-m", "experiments.cli", "fit"]
        command += [word for path in [*stage.config, overlay.as_posix()] for word in ("--config", path)]
        begun = folder / "begun.json"
        known = begun.is_file() and json.loads(begun.read_text())["fingerprint"] == told
        # a checkpoint from before the beginning is another recipe's
        goes_on = known and last.is_file() and last.stat().st_mtime_ns >= begun.stat().st_mtime_ns
        if goes_on:
            command += ["--ckpt_path", last.as_posix()]
        console.print(f"[bold]{stage.name}[/] {' '.join(command[3:])}", soft_wrap=True)
        if dry_run:
            print(OmegaConf.to_yaml(stage.overlay(folder)))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(stage.overlay(folder)), overlay)
        if not goes_on:
            done.unlink(missing_ok=True)
            write_whole(begun, json.dumps({"fingerprint": told}))
        started = time.monotonic()
        if code := run_training(command):
            console.print(f"[bold red]failed[/] {stage.name}; the stages after it were not begun")
            return code
        seconds = round(time.monotonic() - started, 1)
        if stage.export:
            export(last, Path(stage.export), f"{stage.note} recipe {file.as_posix()}, stage {stage.name}".strip())
            console.print(f"wrote {stage.export} after {read_notes(last).get('steps')} steps")
        write_whole(done, json.dumps({"fingerprint": told, "seconds": seconds}))
    return 0


def run_training(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command and return its exit code; a request to stop is handed on, and waited for, so that it can save.

    Raises:
        SystemExit: With 143, after a request to stop.
    """
    asked = []
    with subprocess.Popen(command, env=os.environ | (environment or {})) as child:

        def hand_on(*_: Any) -> None:
            asked.append(True)
            child.terminate()

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            code = child.wait()
        except KeyboardInterrupt:  # the terminal told the child too
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if asked:
        raise SystemExit(143)
    return 128 - code if code < 0 else code


def _fingerprint(stage: Stage, folder: Path) -> str:
    """Hash of all that the stage says and of its files."""
    files = {path: sha256(Path(path).read_bytes()).hexdigest() for path in stage.config}
    return sha256(json.dumps([files, stage.overlay(folder)], sort_keys=True).encode()).hexdigest()


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(first), OmegaConf.create(second)), resolve=False)

"""``keyveil sweep``: the trials of a Weights & Biases sweep file, by W&B's agent or offline, one after another."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from datamodules.files import write_whole
from experiments.build import configuration, read_yaml
from experiments.recipe import run_training


def sweep(
    file: Path,
    offline: bool = False,
    out: Path | None = None,
    only: list[str] | None = None,
    project: str = "keyveil",
    dry_run: bool = False,
) -> int:
    """Run every trial of a sweep file: paired trainings that differ in what the file says.

    Args:
        file: A sweep file of Weights & Biases, under configs/sweep/.
        offline: Run the trials here, one after another, without an account or a network (a grid only); a finished
            one is kept. Otherwise create the sweep at W&B and work on it as an agent.
        out: Where finished trials are noted; by default runs/sweep/NAME.
        only: Names of the trials to run offline; the others are left as they are.
        project: Project at W&B.
        dry_run: Say which commands would run, and run nothing.

    Returns:
        0, or the exit code of the last trial that failed; the others run all the same.

    Raises:
        ValueError: If the file is no sweep, has no such trial, or is no grid and to be run offline.
    """
    file = configuration(str(file))
    plan = read_yaml(file, resolve=False)  # ${…} are W&B's macros
    if not offline and not dry_run:
        return _agent(plan, project)
    commands = {name: expand(plan, trial) for name, trial in trials(plan, file)}
    if unknown := set(only or ()) - set(commands):
        raise ValueError(f"{file} has no trial {sorted(unknown)[0]!r}; it has {', '.join(commands)}")
    out, console, failed = out or Path("runs/sweep") / file.stem, Console(stderr=True), 0
    for name, command in commands.items():
        if only and name not in only:
            continue
        done, told = out / name / "finished.json", _fingerprint(command)
        if done.is_file() and json.loads(done.read_text())["fingerprint"] == told:
            console.print(f"[green]finished[/] {name}")
            continue
        console.print(f"[bold]{name}[/] {' '.join(command)}", soft_wrap=True)
        if dry_run:
            continue
        started = time.monotonic()
        if code := run_training(command, {"WANDB_MODE": "offline"}):
            console.print(f"[bold red]failed[/] {name}", soft_wrap=True)
            failed = code
            continue
        write_whole(done, json.dumps({"fingerprint": told, "seconds": round(time.monotonic() - started, 1)}))
    return failed


def trials(plan: dict[str, Any], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and values of the trials of a grid.

    Raises:
        ValueError: If this is no grid, or a parameter has neither a value nor values.
    """
    if plan.get("method") != "grid":
        raise ValueError(f"{file}: offline only a grid can be run, method is {plan.get('method')!r}")
    choices: dict[str, list[Any]] = {}
    for name, told in (plan.get("parameters") or {}).items():
        if not isinstance(told, dict) or not {"value", "values"} & set(told):
            raise ValueError(f"{file}: the parameter {name} needs a value, or values")
        choices[name] = told["values"] if "values" in told else [told["value"]]
    if not choices:
        raise ValueError(f"{file} has no parameters")
    for chosen in itertools.product(*choices.values()):
        trial = dict(zip(choices, chosen, strict=True))
        told = [Path(str(trial[name])).stem for name, values in choices.items() if len(values) > 1]
        yield "-".join(told) or "trial", trial


def expand(plan: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """The command of a trial, its macros filled in as W&B's agent does it."""
    known: dict[str, list[str]] = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [str(plan.get("program", "keyveil"))],
    }
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    known |= {f"${{{name}}}": value for name, value in flags.items() if isinstance(value, list)}
    words = create_sweep_command(list(plan["command"]) if plan.get("command") else None)
    return [word for chunk in words for word in known.get(str(chunk), [str(chunk)])]


def _agent(plan: dict[str, Any], project: str) -> int:
    import wandb

    name = wandb.sweep(plan, project=project)
    return subprocess.run([sys.executable, "-m", "wandb", "agent", "--project", project, name], check=False).returncode


def _fingerprint(command: list[str]) -> str:
    """Hash of the command and of the files that it names."""
    files = [word.partition("=")[2] for word in command if word.startswith("--config=")]
    hashes = {path: sha256(Path(path).read_bytes()).hexdigest() for path in files if os.path.isfile(path)}
    return sha256(json.dumps([command, hashes], sort_keys=True).encode()).hexdigest()

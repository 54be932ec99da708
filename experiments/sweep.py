"""``keyveil sweep``: the trials of a Weights & Biases sweep file, by W&B's agent or offline, one after another."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.files import write_whole
from experiments.build import configuration, read_yaml
from experiments.recipe import run_training


def sweep(
    file: Path,
    offline: bool = False,
    out: Path | None = None,
    only: list[str] | None = None,
    project: str | None = None,
    dry_run: bool = False,
) -> int:
    """Run every trial of a sweep file: paired trainings that differ in what the file says.

    Args:
        file: A sweep file of Weights & Biases, under configs/sweep/.
        offline: Run the trials here, one after another, without an account or a network (a grid only); a finished
            one is kept. Otherwise create the sweep at W&B and work on it as an agent.
        out: Where finished trials are noted; by default runs/sweep/NAME.
        only: Names of the trials to run offline; the others are left as they are.
        project: Project at W&B; by default the file's, or keyveil.
        dry_run: Say which commands would run, and run nothing.

    Returns:
        Offline 0, or the exit code of the last trial that failed (the others run all the same); online the agent's.

    Raises:
        ValueError: If the file is no sweep, has no such trial, or W&B refuses it.
    """
    file = configuration(str(file))
    plan = read_yaml(file, resolve=False)  # ${…} are W&B's macros
    if not isinstance(plan.get("parameters"), dict) or not isinstance(plan.get("command"), list):
        raise ValueError(f"{file} is no sweep: it needs `parameters` by name and `command` as a list of words")
    if not offline and not dry_run:
        return _agent(plan, project or plan.get("project", "keyveil"))
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
        wandb = {"WANDB_MODE": "offline", "WANDB_NAME": name, "WANDB_RUN_GROUP": file.stem}
        if code := run_training(command, wandb):
            console.print(f"[bold red]failed[/] {name}", soft_wrap=True)
            failed = code
            continue
        write_whole(done, json.dumps({"fingerprint": told, "seconds": round(time.monotonic() - started, 1)}))
    return failed


def trials(plan: dict[str, Any], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and values of the trials of a grid; a name is made of what differs, of a YAML file its stem.

    Raises:
        ValueError: If this is no grid, a parameter has neither a value nor values, or two trials share a name.
    """
    if plan.get("method") != "grid":
        raise ValueError(f"{file}: offline only a grid can be run, method is {plan.get('method')!r}")
    choices: dict[str, list[Any]] = {}
    for name, told in plan["parameters"].items():
        values = told.get("values", [told["value"]] if "value" in told else None) if isinstance(told, dict) else None
        if not isinstance(values, list) or not values:
            raise ValueError(f"{file}: the parameter {name} needs a value, or values")
        choices[name] = values
    seen: set[str] = set()
    for chosen in itertools.product(*choices.values()):
        trial = dict(zip(choices, chosen, strict=True))
        name = "-".join(_short(trial[key]) for key, values in choices.items() if len(values) > 1) or "trial"
        if name in seen:
            raise ValueError(f"{file}: two trials would be called {name}; give their files names apart")
        seen.add(name)
        yield name, trial


def _short(value: Any) -> str:
    text = str(value)
    return Path(text).stem if text.endswith((".yaml", ".yml")) else text.replace("/", "_")


def expand(plan: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """The command of a trial with the macros of a W&B agent: env, interpreter (this one), program, args, envvar:NAME.

    Raises:
        ValueError: If the command has another macro.
    """
    known = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [str(plan.get("program", ""))],
        "${args}": [f"--{name}={value}" for name, value in trial.items()],
    }
    words: list[str] = []
    for chunk in map(str, plan["command"]):
        chunk = re.sub(r"\$\{envvar:(\w+)\}", lambda found: os.environ.get(found[1], found[1]), chunk)
        if chunk not in known and "${" in chunk:
            raise ValueError(f"the sweep's command has the macro {chunk}; offline only {', '.join(known)} are known")
        words += known.get(chunk, [chunk])
    return words


def _agent(plan: dict[str, Any], project: str) -> int:
    import wandb

    try:
        name = wandb.sweep(plan, project=project)
    except wandb.Error as error:
        raise ValueError(f"W&B: {' '.join(str(error).split())}; --offline needs no account") from error
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ${interpreter} is `python` there
    return run_training([sys.executable, "-m", "wandb", "agent", "--project", project, name], {"PATH": here})


def _fingerprint(command: list[str]) -> str:
    """Hash of the command and of the files that it names."""
    parts = {part for word in command[1:] for part in (word, word.partition("=")[2])}
    hashes = {part: sha256(Path(part).read_bytes()).hexdigest() for part in parts if part and Path(part).is_file()}
    return sha256(json.dumps([command, hashes], sort_keys=True).encode()).hexdigest()

"""Turns a few lines of YAML (``class_path``, ``init_args``) into an object, such as a trained method."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.trained import load_trained, read_notes

T = TypeVar("T")


def read_yaml(path: Path, resolve: bool = True) -> dict[str, Any]:
    """A YAML file as plain Python values, interpolations resolved unless they are somebody else's.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a YAML mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=resolve)
    except (OmegaConfBaseException, Exception) as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold named entries, got {type(found).__name__}")
    return found


def build(kind: type[T], spec: dict[str, Any], what: str) -> T:
    """An instance of a subclass of ``kind``.

    Args:
        kind: The base class.
        spec: ``class_path`` and ``init_args``, as in a configuration file.
        what: What it is, for the error.

    Raises:
        ValueError: If the class is unknown or an argument does not fit it.
    """
    made = _class(spec.get("class_path"), what)
    if not issubclass(made, kind):
        raise ValueError(f"{what}: {made.__name__} is not a {kind.__name__}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(made, "it")
    try:
        parsed = parser.parse_object({"it": spec.get("init_args") or {}})
        return parser.instantiate_classes(parsed).it
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{what}: {one_sentence(error)}") from error


def method_spec(entry: dict[str, Any]) -> dict[str, Any]:
    """A row's entry as ``class_path``, ``init_args`` and ``weights``; ``config`` names a file to start from.

    Raises:
        ValueError: If a key is unknown.
    """
    known = ("config", "class_path", "init_args", "weights", "note", "published", "knob")
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"unknown key {unknown[0]!r} of a method; it knows {', '.join(known)}")
    spec = dict(read_yaml(configuration(entry["config"]))["model"]) if "config" in entry else {}
    spec.setdefault("class_path", entry.get("class_path"))
    spec["init_args"] = {**spec.get("init_args", {}), **entry.get("init_args", {})}
    return {**spec, "weights": entry.get("weights")}


def configuration(name: str) -> Path:
    """A configuration file, or the one that came with the package, where ``configs/…`` is not here."""
    if Path(name).is_file():
        return Path(name)
    here = Path(__file__).resolve().parent
    return next((folder / name for folder in (here, here.parent) if (folder / name).is_file()), Path(name))


def load_method(spec: dict[str, Any]) -> tuple[ReversibleAnonymizer, dict[str, Any]]:
    """The method in eval mode with its trained weights, and notes on how they were made (steps, seconds)."""
    method = build(ReversibleAnonymizer, {k: spec[k] for k in ("class_path", "init_args")}, "method")
    notes: dict[str, Any] = {}
    if spec.get("weights"):
        load_trained(method, spec["weights"])
        notes = read_notes(spec["weights"])
    return method.eval(), notes


def _class(path: Any, what: str) -> type:
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what}: there is no class {path!r}") from error


def one_sentence(error: Exception) -> str:
    """A parser's indented message as one line: where, then what; values and alternatives left out."""
    parts: list[str] = []
    for line in str(error).splitlines():
        line = line.strip().removeprefix("- ").rstrip(":")
        if line.startswith("Given value"):
            break
        if line and not line.startswith(_NOISE) and line not in parts:
            parts.append(line)
    return ": ".join(parts) or type(error).__name__


_NOISE = ("Does not validate against", "Subtypes", "Errors", "Expected a <class 'NoneType'>")

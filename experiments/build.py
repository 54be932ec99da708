"""Turns a few lines of YAML (``class_path``, ``init_args``) into an object, with jsonargparse's checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain Python values, interpolations resolved.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a YAML mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
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
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "it", required=True)
    try:
        parsed = parser.parse_object({"it": spec})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{what}: {one_sentence(error)}") from error
    built: Namespace = (
        parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
    )
    return built.it


def one_sentence(error: Exception) -> str:
    """The telling line of a parser's long message."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "not expected" in line or "not accepted" in line or "Expected" in line]
    return (telling or lines or [type(error).__name__])[-1]

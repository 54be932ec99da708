"""What a method has learned, as a file: reads checkpoints and safetensors, writes safetensors, hashes both alike."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from datamodules.files import write_tensors
from lightning_modules.weights import cards, locate


def read_state(source: str | Path) -> dict[str, Tensor]:
    """Tensors of a Lightning checkpoint (``.ckpt``), a ``.safetensors`` file, or a card's name. No pickle is run.

    Raises:
        FileNotFoundError: If there is no such file or card.
        ValueError: If the file is damaged or holds more than tensors and plain values.
    """
    path = locate(str(source)) if str(source) in cards() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: train them with `keyveil fit`, or give another path or card name"
        )
    try:
        if path.suffix == ".safetensors":
            return {
                name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()
            }
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable checkpoint (damaged, or it holds more than tensors)") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no named tensors, so it is not a checkpoint")
    return state


def load_trained(module: nn.Module, source: str | Path, prefix: str = "") -> None:
    """Load what a method has learned into it.

    Args:
        module: The method.
        source: Checkpoint, safetensors file or card name.
        prefix: Take only what lies under this prefix, and leave the rest of the method as it is.

    Raises:
        ValueError: If names or shapes do not match, or it was trained against other frozen networks.
    """
    found = read_state(source)  # first: it tells a missing or damaged file in one sentence
    notes = all_notes(source)
    check_cards(json.loads(notes.get("cards", "{}")), card_hashes(module))
    state = {name: value for name, value in found.items() if name.startswith(prefix)}
    wanted = {name for name in module.state_dict() if name.startswith(prefix)}
    if odd := sorted(wanted ^ set(state)):
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {len(odd)} entries without a partner, such as {odd[0]!r}; "
            "was it trained with another width, key length or method?"
        )
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise ValueError(f"{source} does not fit {type(module).__name__}: {line}") from error
    before = getattr(module, "trained_on", frozenset())
    noted = frozenset(json.loads(notes["people"])) if "people" in notes else None
    module.trained_on = None if before is None or noted is None else before | noted


def card_hashes(module: nn.Module) -> dict[str, str]:
    """Card name → hash of every frozen network inside a module."""
    found: dict[str, str] = {}
    for part in module.modules():
        found.update(getattr(part, "card_hashes", {}))
    return found


def save_trained(module: nn.Module, path: Path, notes: dict[str, str]) -> None:
    """Write what a method has learned as fp16 safetensors, with notes on how it was made (config, steps, data)."""
    _write(module.state_dict(), path, notes)


HALVED = 1 << 17  # smaller tensors stay fp32: they cost little, and a transform's directions want every bit


def _write(state: dict[str, Tensor], path: Path, notes: dict[str, str]) -> None:
    state = {name: v.half() if v.is_floating_point() and v.numel() >= HALVED else v for name, v in state.items()}
    write_tensors(path, state, notes)


def weights_hash(module: nn.Module) -> str:
    """``sha256:…`` over names and values of what a method has learned; ``none`` where there is nothing."""
    state = module.state_dict()
    if not state:
        return "none"
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def read_notes(source: str | Path) -> dict[str, int | float]:
    """Training steps and seconds of a checkpoint or a safetensors file; empty where nothing is noted."""
    notes = all_notes(source)
    return {name: kind(notes[name]) for name, kind in (("steps", int), ("seconds", float)) if name in notes}


def all_notes(source: str | Path) -> dict[str, str]:
    """All notes as text: class, steps, seconds, and the cards and the marks of people it was trained with (JSON)."""
    path = locate(str(source)) if str(source) in cards() else Path(source)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if "global_step" not in loaded:
        return {}
    people = loaded.get("trained_on")
    return {
        "steps": str(loaded["global_step"]),
        "seconds": f"{loaded.get('training_seconds', 0.0):.1f}",
        "cards": json.dumps(loaded.get("cards", {})),
        **({"method": str(loaded["method"])} if "method" in loaded else {}),
        **({} if people is None else {"people": json.dumps(people)}),
    }


def check_cards(noted: dict[str, str], here: dict[str, str]) -> None:
    """Refuse what was trained against other frozen networks.

    Args:
        noted: Card name → hash, as noted when it was trained.
        here: Card name → hash of the networks that are in use.

    Raises:
        ValueError: If a network is another one.
    """
    for name, digest in noted.items():
        if name in here and here[name] != digest:
            raise ValueError(
                f"these weights were trained against another {name!r} ({digest[:20]}…, here {here[name][:20]}…); "
                "use the network they were trained with, or train again"
            )


def export(checkpoint: Path, out: Path, note: str = "") -> None:
    """Turn a training checkpoint into fp16 safetensors, with its steps, seconds and a note on how it was made."""
    state, notes = read_state(checkpoint), all_notes(checkpoint)
    _write(state, out, {**notes, "note": note})

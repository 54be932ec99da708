"""The methods that the photo verbs know by name, and on what a verb runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from datamodules.photo_files import peek, sidecar
from datamodules.photo_search import Found
from experiments.build import configuration, load_method, method_spec, read_yaml
from experiments.photo_jobs import parse_record
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.trained import weights_hash
from lightning_modules.weights import cards

METHODS: dict[str, dict[str, Any]] = {
    "ifadit": {
        "config": "configs/method/ifadit-transform.yaml",
        "init_args": {
            "generator": {
                "class_path": "lightning_modules.networks.stylegan.MobileStyleGAN",
                "init_args": {"half_previews": True},
            },
            "mask": {"class_path": "lightning_modules.paste.FaceMask"},
            "landmarks": {"class_path": "lightning_modules.networks.landmarks.Landmarks68"},
            "polish": 40,
        },
        "weights": "ifadit",
    },
    "sdn": {
        "config": "configs/method/sdn.yaml",
        "init_args": {"size": 64, "width": 24, "discriminator_width": 48, "attributes": 3, "identities": 8400},
        "weights": "sdn",
    },
    "blur": {"config": "configs/method/blur.yaml"},
    "pixelate": {"config": "configs/method/pixelate.yaml"},
    "blackbox": {"config": "configs/method/blackbox.yaml"},
}
"""Methods by name; any other is a YAML file of ``configs/method``."""

REFINE = {"cpu": 10, "other": 20}  # steps a face, where --refine says nothing: a CPU takes about half a second each


def load_photo_method(
    chosen: str, weights: str | None, refine: int | None, accelerator: str
) -> tuple[ReversibleAnonymizer, str]:
    """The method with its weights, and the name that records call it by.

    Raises:
        ValueError: There is no such method, or it has learned nothing.
    """
    if chosen not in METHODS and not Path(chosen).suffix:
        raise ValueError(f"expected a method of {', '.join(METHODS)} or a YAML file, got {chosen!r}")
    entry = dict(METHODS.get(chosen, {"config": chosen}))
    if weights:
        entry["weights"] = weights
    if entry.get("weights") == chosen and chosen not in cards():
        raise ValueError(f"there are no weights of {chosen} yet: train it, and name them by --weights")
    if refine is None and chosen == "ifadit":
        refine = REFINE["cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "other"]
    if refine is not None:
        entry["init_args"] = {**entry.get("init_args", {}), "refine": refine}
    network, _ = load_method(method_spec(entry))
    if not entry.get("weights") and weights_hash(network) != "none":
        raise ValueError(f"{chosen} has to be trained first: name what it has learned by --weights")
    return network, chosen if chosen in METHODS else Path(chosen).stem


def method_of(found: list[Found]) -> str | None:
    """The method that pictures need to be recovered; ``None`` where all are sealed or cannot be read."""
    for one in found:
        try:
            record = parse_record(peek(one.path), sidecar(one.path))
        except (OSError, ValueError):
            continue  # told when its turn comes
        if record.faces and any(face.seal is None for face in record.faces):
            return record.header.method if record.header.method in METHODS else None
    return None


@dataclass(frozen=True)
class Running:
    """On what a verb runs, and what it shows meanwhile.

    Attributes:
        batch_size: Faces at once: more for a GPU; on a CPU they take memory alone.
        workers: Pictures read ahead, each in a thread of its own.
        accelerator: Lightning's.
        devices: Lightning's.
        lossless: Whether clips are written without any loss.
        bar: Progress; ``None`` draws one on the terminal.
        num_nodes: Lightning's.
        strategy: Lightning's.
    """

    batch_size: int = 4
    accelerator: str = "auto"
    devices: int | str = 1
    lossless: bool = False
    workers: int = 0
    bar: Progress | None = None
    num_nodes: int = 1
    strategy: str = "auto"

    @property
    def trainer(self) -> dict[str, Any]:
        """What Lightning's trainer is told of the machines."""
        return {name: getattr(self, name) for name in ("accelerator", "devices", "num_nodes", "strategy")}

    @property
    def device(self) -> str:
        """Where a network runs that is not under Lightning."""
        return "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    def on(self, trainer: str | None) -> Running:
        """The same on the machines that a YAML names for training; how training counts and logs is not taken over.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it has no ``trainer``.
        """
        if trainer is None:
            return self
        told = read_yaml(configuration(trainer), resolve=False).get("trainer")
        if not isinstance(told, dict):
            raise ValueError(f"{trainer} has no trainer: name a YAML of configs/trainer")
        return replace(self, **{name: told[name] for name in self.trainer if name in told})

"""Trains an attacker without the key on pairs that it makes itself: the inverter's figures of ``keyveil attack``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from datamodules.batch import FaceBatch
from datamodules.files import write_tensors
from datamodules.pairs import PairDataModule, Pairs
from experiments.attack_pairs import Target
from experiments.build import method_spec
from experiments.chosen import by_chance, in_batches
from experiments.provenance import code_digest, file_digest, versions
from experiments.report_pictures import folder_name
from lightning_modules import attackers
from lightning_modules import inverter as learning
from lightning_modules.anonymizer import Image, resize
from lightning_modules.attackers import learned_blocks, received_faces
from lightning_modules.callbacks import TrainingCheckpoint
from lightning_modules.inverter import Inverter, linear_guesses
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.measured import Measured
from lightning_modules.networks import unet
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.trained import weights_hash
from lightning_modules.weights import WeightsError

CHUNK = 64  # pairs in a file
BATCH = 16


class Budget(NamedTuple):
    """What an inverter may spend.

    Attributes:
        steps: Training steps, of 16 pairs each; 0 leaves it out.
        size: Pixels at which it works, at most the method's.
        pairs: Most pairs, one of each training person; ``None``: as many as there are training people.
        keys: Keys that each original is hidden under; each epoch trains on the next ones.
    """

    steps: int
    size: int
    pairs: int | None
    keys: int


def by_inverter(target: Target, budget: Budget, folder: Path) -> list[Measured]:
    """Train an inverter, let it open what was saved of the test faces, and ask the judges.

    `inverter_tar` is that of the network or of the linear guess it starts from, whichever is accepted more often.
    Beside it stands what is accepted of the anonymized pictures themselves, in the same units.

    Args:
        target: Whom to attack.
        budget: What it may spend.
        folder: Where pairs and checkpoints are kept, so that a run that was stopped goes on.
    """
    invert = trained_inverter(target, budget, folder / f"{target.data}--{folder_name(target.name)}")
    opened = invert(resize(target.received, min(budget.size, target.method.size)))
    figures = []
    for judge in target.judges:
        plain = target.accepted("tar@far=1e-3", "anonymized", judge, "right", [target.received])
        figures += [plain, target.accepted("inverter_tar", "attacked", judge, "none", opened)]
    return figures


def trained_inverter(target: Target, budget: Budget, folder: Path) -> Callable[[Image], list[Image]]:
    """What makes originals of anonymized pictures, by the network and by its linear beginning alone.

    The network is trained or, as far as it was before, read back.
    """
    size = min(budget.size, target.method.size)
    recognizer = _recognizer(target)
    told = {
        "weights": weights_hash(target.method),
        "method": method_spec(target.plan.methods[target.name]),
        "data": target.plan.data[target.data],
        "hidden by": [file_digest(Path(room.__file__)) for room in (attackers, sys.modules[__name__])],
        "versions": versions(),
        "seed": target.seed,
        "size": size,
        "pairs": budget.pairs,
        "code": code_digest(making=True),
    }
    hidden, shown = _pairs(target, budget, size, folder / _digest(told))
    pairs = Pairs(hidden, linear_guesses(hidden, shown), shown)
    told |= {"steps": budget.steps, "keys": budget.keys, "recognizer": recognizer is not None}
    told["learning"] = [file_digest(Path(room.__file__)) for room in (attackers, learning, unet)]
    L.seed_everything(target.seed, workers=True, verbose=False)
    inverter = Inverter(recognizer)
    folder = folder / f"training-{_digest(told)}"
    trainer = L.Trainer(
        max_steps=budget.steps,
        max_epochs=1,
        devices=1,
        logger=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[TrainingCheckpoint(50, folder), RichProgressBar(console_kwargs={"stderr": True})],
    )
    target.console.print(
        f"{target.data}: {target.name}: an inverter learns from {len(pairs.shown)} pairs at {size} px, "
        f"{budget.steps} steps of {BATCH}{'' if recognizer else ', by pixels alone'}",
        soft_wrap=True,
    )
    before = folder / "last.ckpt"
    module = PairDataModule(pairs, budget.steps, BATCH, target.seed)
    trainer.fit(inverter, module, ckpt_path=before if before.is_file() else None)
    inverter.cpu().eval()
    linear = learned_blocks(hidden, shown.repeat(len(hidden) // len(shown), 1, 1, 1))

    @torch.no_grad()
    def invert(received: Image) -> list[Image]:
        guess = linear(received)
        parts = zip(received.split(BATCH), guess.split(BATCH), strict=True)
        return [torch.cat([inverter(*part) for part in parts]), guess]

    return invert


def _recognizer(target: Target) -> nn.Module | None:
    """The network of identity codes, unless it is a judge or is missing."""
    if any(MobileFaceNet.name in judge.networks for judge, _ in target.judges.values()):
        return None
    try:
        return MobileFaceNet()
    except WeightsError as error:
        target.console.print(f"the inverter learns by pixels alone: {error}", soft_wrap=True)
        return None


def _pairs(target: Target, budget: Budget, size: int, folder: Path) -> tuple[Image, Image]:
    """What became of one face of each training person, round after round under keys that the attacker draws; the faces.

    Each chunk is kept in a file.
    """
    rounds = budget.keys if target.keyed else 1
    people = getattr(target.datamodule, "num_identities", None)
    total = people if budget.pairs is None else min(budget.pairs, people or budget.pairs)
    shown, hidden = [], []
    for turn in range(rounds):
        chunks = _chunks(target.datamodule, budget.pairs)
        told = f"{target.data}: {target.name}, hiding pairs for the inverter, {turn + 1} of {rounds}"
        steps = None if total is None else -(-total // CHUNK)
        for at, faces in enumerate(track(chunks, told, total=steps, console=target.console, transient=True)):
            path = folder / f"{turn:03d}-{at:05d}.safetensors"
            if not path.is_file():
                images = {"shown": faces.image, "hidden": _by_attacker(target, faces, turn)}
                write_tensors(path, {name: _levels(resize(image, size)) for name, image in images.items()})
            kept = {name: levels.float() / 127.5 - 1 for name, levels in load_file(path).items()}
            hidden.append(kept["hidden"])
            shown += [kept["shown"]] if turn == 0 else []
    return torch.cat(hidden), torch.cat(shown)


def _by_attacker(target: Target, faces: FaceBatch, turn: int) -> Image:
    """As they are saved, under keys of the attacker's, not of the owner's."""
    ring, method = KeyRing.from_seed(target.seed, "inverter"), target.method
    parts = []
    faces = by_chance(faces, method.attributes, target.plan.seed)
    for batch in in_batches(method.fit_size(faces), target.plan.batch_size):
        keys = torch.stack([method.key_spec.numbers(ring.other(int(sample), turn)) for sample in batch.sample])
        parts.append(received_faces(method, batch, keys).image)
    return torch.cat(parts)


def _chunks(datamodule: L.LightningDataModule, most: int | None) -> Iterator[FaceBatch]:
    """The first face of each training person, in chunks, and so many people at most."""
    seen: set[int] = set()
    kept: list[FaceBatch] = []

    def whole() -> FaceBatch:
        return FaceBatch(*(torch.stack(fields) for fields in zip(*kept, strict=True)))

    for batch in datamodule.gallery_dataloader():
        for row, person in enumerate(batch.identity.tolist()):
            if person in seen:
                continue
            seen.add(person)
            kept.append(FaceBatch(*(field[row] for field in batch)))
            if len(kept) == CHUNK:
                yield whole()
                kept.clear()
            if len(seen) == most:
                break
        if len(seen) == most:
            break
    if kept:
        yield whole()


def _levels(image: Image) -> Tensor:
    """Grey levels 0…255 of pictures in [-1, 1]."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]

"""``keyveil attack``: how far somebody without the key gets, as figures beside those of a comparison."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datamodules.batch import FaceBatch
from datamodules.detection import default_detector
from datamodules.files import write_whole
from experiments.build import configuration, load_method, method_spec
from experiments.compare import Comparison, in_batches, test_faces
from experiments.provenance import commit
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.attackers import FaceLikelihood, guess_auc, guessing_signs, received_faces
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.measured import Measured
from lightning_modules.protocol import Figure, cell
from lightning_modules.trained import weights_hash

GALLERY = 1000  # training faces from which an attacker learns what faces look like


def attack(
    table: Path,
    out: Path | None = None,
    faces: int = 64,
    guesses: int = 8,
    seed: int = 0,
    dry_run: bool = False,
) -> None:
    """Guess keys without the original, for each method and data set of a comparison, into attacks.jsonl.

    Each face is opened with the right key and with wrong ones, and three signs are looked at in what opens: whether
    hiding it again gives the same anonymized picture, how sure a detector is of the face, and how likely the picture is
    among training faces. `key_guess_auc` is the area under the curve of the sign that gives the right key away most:
    0.5 is chance, 1 means that a guess can be tested. In verify mode a guess can be tested by the record anyway.

    Args:
        table: A file under configs/compare/.
        out: Folder to write into; by default the comparison's, runs/compare/NAME.
        faces: Test faces of each data set.
        guesses: Wrong keys a face.
        seed: Where the keys come from.
        dry_run: Say what would run, and stop.

    Raises:
        ValueError: If there is no face or no guess.
    """
    if min(faces, guesses) < 1:
        raise ValueError(f"attack takes one face and one guess at least, got {faces} and {guesses}")
    console = Console(stderr=True)
    table = configuration(str(table))
    plan = Comparison.read(table)
    out = out or Path("runs/compare") / table.stem
    found: list[Figure] = []
    for data, spec in plan.data.items():
        if dry_run:
            console.print(f"{data}: {', '.join(plan.methods)}; {faces} faces, {guesses} wrong keys each")
            continue
        datamodule, whole = test_faces(data, spec, faces)
        likelihood = FaceLikelihood(_gallery(datamodule))
        for name, told in plan.methods.items():
            method, notes = load_method(method_spec(told))
            if not method.reversible or method.key_spec.kind == "none":
                console.print(f"{data}: {name} has no key to guess")
                continue
            with torch.no_grad():
                method.prepare(datamodule)
            batches = track(in_batches(whole, plan.batch_size), f"{data}: {name}", console=console)
            known = [_told_apart(method, batch, KeyRing.from_seed(seed), guesses, likelihood) for batch in batches]
            by_sign = {sign: torch.cat([part[sign] for part in known]) for sign in known[0]}
            worst = max(by_sign.values(), key=lambda values: float(values.mean()))
            figure = dataclasses.replace(
                Measured("key_guess_auc", "attacked", worst, whole.identity).figure(),
                method=name,
                data=data,
                config=table.as_posix(),
                commit=commit(),
                weights=weights_hash(method),
                seed=seed,
                steps=notes.get("steps"),
                size=method.size,
            )
            found.append(figure)
            signs = ", ".join(f"{sign} {float(values.mean()):.3f}" for sign, values in by_sign.items())
            console.print(f"{data}: {name}: key_guess_auc {cell(figure)}; {signs}", soft_wrap=True)
            write_whole(out / "attacks.jsonl", "".join(line.to_json() + "\n" for line in found).encode())


def _told_apart(
    method: ReversibleAnonymizer, batch: FaceBatch, ring: KeyRing, guesses: int, likelihood: FaceLikelihood
) -> dict[str, Tensor]:
    """By each sign, the area under the curve of each face of a batch."""
    face, spec = method.fit_size(batch), method.key_spec
    draws = [ring.right, *(partial(ring.wrong, index=index) for index in range(guesses))]
    keys = torch.stack([torch.stack([spec.numbers(draw(int(s))) for draw in draws]) for s in face.sample])
    received = received_faces(method, face, keys[:, 0])
    signs = guessing_signs(method, received, keys, default_detector(), likelihood)
    return {sign: guess_auc(values) for sign, values in signs.items()}


def _gallery(datamodule: L.LightningDataModule) -> Tensor:
    """Training faces, as many as are asked for or there are."""
    pictures, count = [], 0
    for batch in datamodule.gallery_dataloader():
        pictures.append(batch.image)
        count += len(batch.image)
        if count >= GALLERY:
            break
    return torch.cat(pictures)[:GALLERY]

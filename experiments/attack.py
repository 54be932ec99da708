"""``keyveil attack``: how far somebody without the key gets, as figures beside those of a comparison."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datamodules.batch import FaceBatch
from datamodules.detection import default_detector
from datamodules.files import write_whole
from experiments.build import build, configuration, load_method, method_spec
from experiments.chosen import ChosenFaces, chosen_faces
from experiments.compare import Comparison
from experiments.guards import Guard, check_judges
from experiments.provenance import commit
from lightning_modules.anonymizer import ReversibleAnonymizer, resize
from lightning_modules.attackers import (
    FaceLikelihood,
    adapted,
    guess_auc,
    guessing_signs,
    known_plaintext,
    received_faces,
)
from lightning_modules.calibration import load_calibration
from lightning_modules.judges import Judge
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.identity import FAR
from lightning_modules.metrics.measured import Measured
from lightning_modules.protocol import Figure, cell, read_results
from lightning_modules.trained import weights_hash

GALLERY = 1000  # training faces from which an attacker learns what faces look like
PAIRS = [1, 10, 100, 512]


def attack(
    table: Path,
    out: Path | None = None,
    faces: int = 64,
    guesses: int = 8,
    pairs: list[int] = PAIRS,
    seed: int = 0,
    dry_run: bool = False,
) -> None:
    """Attack each method of a comparison without the key, on each data set, into attacks.jsonl.

    Guessing keys:
    Each face is opened with the right key and with wrong ones, and three signs are looked at in what opens: whether
    hiding it again gives the same anonymized picture, how sure a detector is of the face, and how likely the picture is
    among training faces. `key_guess_auc` is the area under the curve of the sign that gives the right key away most:
    0.5 is chance, 1 means that a guess can be tested. In verify mode a guess can be tested by the record anyway.

    Known plaintext: the attacker has some training faces with what became of them, and opens the test faces by what
    that teaches, of blocks of pixels and of identity codes. `known_plaintext@N` is the share that a judge accepts as
    the original, of the attacker who does better: once with a key of its own for each picture, as `keyveil anonymize`
    gives them, and once under one key for all (`fixed`), as if a nonce came twice. By pairs with keys of their own a
    judge is adapted too: `adaptive_tar` is the share of anonymized faces that it then accepts, at one false acceptance
    in a thousand among the test people.

    Args:
        table: A file under configs/compare/.
        out: Folder to write into; by default the comparison's, runs/compare/NAME.
        faces: Test faces of each data set.
        guesses: Wrong keys a face; 0 leaves guessing out.
        pairs: How many known originals the attackers have, one of each person before the second of anybody, of the
            first thousand training faces; numbers beyond these are left out, and an empty list leaves all out.
        seed: Where the keys come from.
        dry_run: Say what would run, and stop.

    Raises:
        ValueError: If there is no face, a number is negative, or a method or a judge is not admitted to comparisons.
    """
    if faces < 1 or guesses < 0 or min(pairs, default=1) < 1:
        told = f"got {faces}, {guesses} and {pairs}"
        raise ValueError(f"attack takes faces from 1, guesses from 0 and pairs from 1, {told}")
    console = Console(stderr=True)
    table = configuration(str(table))
    plan = Comparison.read(table)
    out = out or Path("runs/compare") / table.stem
    judges = {name: build(object, spec, f"judge {name!r}") for name, spec in plan.judges.items()} if pairs else {}
    found: list[Figure] = []
    for data, spec in plan.data.items():
        if dry_run:
            console.print(f"{data}: {', '.join(plan.methods)}; {faces} faces, {guesses} wrong keys each, pairs {pairs}")
            continue
        tested = chosen_faces(data, spec, faces, plan.batch_size)
        gallery = _one_each(_gallery(tested.datamodule), seed)
        likelihood = FaceLikelihood(gallery.image) if guesses else None
        counts = sorted(count for count in pairs if count <= len(gallery.image))
        if left := sorted(set(pairs) - set(counts)):
            console.print(f"{data} has {len(gallery.image)} training faces: without {left} pairs", soft_wrap=True)
        for name, told in plan.methods.items():
            method, notes = load_method(method_spec(told))
            if not method.reversible or method.key_spec.kind == "none":
                console.print(f"{data}: {name} has no key to guess")
                continue
            if not plan.allow_loss_judges:
                check_judges(method, judges)
            with torch.no_grad():
                method.prepare(tested.datamodule)
            Guard(method).on_strangers(tested.people)
            common = {
                "method": name,
                "data": data,
                "config": table.as_posix(),
                "commit": commit(),
                "weights": weights_hash(method),
                "seed": seed,
                "steps": notes.get("steps"),
                "size": method.size,
            }
            ring, measured = KeyRing.from_seed(seed), []
            if likelihood is not None:
                batches = track(tested, f"{data}: {name}, guessing", console=console)
                known = [_told_apart(method, batch, ring, guesses, likelihood) for batch in batches]
                by_sign = {sign: torch.cat([part[sign] for part in known]) for sign in known[0]}
                worst = max(by_sign.values(), key=lambda values: float(values.mean()))
                measured.append(Measured("key_guess_auc", "attacked", worst, tested.identity))
                signs = ", ".join(f"{sign} {float(values.mean()):.3f}" for sign, values in by_sign.items())
                console.print(f"{data}: {name}: {signs}", soft_wrap=True)
            for fixed in (False, True) if counts else ():
                measured += _by_pairs(method, gallery, tested, ring, counts, fixed, judges, plan, console)
            for part in measured:
                figure = dataclasses.replace(part.figure(), **common)
                found.append(figure)
                by = f" by {figure.judge}, key {figure.key}" if figure.judge else ""
                console.print(f"{data}: {name}: {figure.metric}{by}: {cell(figure)}", soft_wrap=True)
            _merge(out / "attacks.jsonl", found)


def _by_pairs(
    method: ReversibleAnonymizer,
    gallery: FaceBatch,
    tested: ChosenFaces,
    ring: KeyRing,
    counts: list[int],
    fixed: bool,
    judges: dict[str, Judge],
    plan: Comparison,
    console: Console,
) -> list[Measured]:
    """What known originals teach: a figure for each number of pairs and each judge, of the better attacker."""
    one = method.key_spec.numbers(ring.right(0))

    def hidden(face: FaceBatch) -> Tensor:
        """As they are saved. Samples are numbered within a data set, so no two faces share a key of their own."""
        own = [one if fixed else method.key_spec.numbers(ring.right(int(s))) for s in face.sample]
        return received_faces(method, face, torch.stack(own)).image

    size, keys = plan.batch_size, "one key" if fixed else "keys of their own"
    pairs = FaceBatch(*(field[: counts[-1]] for field in method.fit_size(gallery)))
    parts = [FaceBatch(*fields) for fields in zip(*(field.split(size) for field in pairs), strict=True)]
    known = torch.cat([hidden(part) for part in track(parts, f"hiding pairs under {keys}", console=console)])
    opened = known_plaintext(method, pairs.image, known, method.fit_size(gallery).image, counts, size)

    def embedded(judge: Judge, images: Tensor) -> Tensor:
        return judge.embed(resize(images, plan.size))

    codes: dict[tuple[str, int, str], list[Tensor]] = defaultdict(list)
    for batch in track(tested, f"attacking faces under {keys}", console=console):
        received = hidden(method.fit_size(batch))
        found = {0: {"shown": batch.image, "received": received}, **opened(received)}
        for name, judge in judges.items():
            for count, pictures in found.items():
                for whose, images in pictures.items():
                    codes[name, count, whose].append(embedded(judge, images))
    seen = {what: torch.cat(parts) for what, parts in codes.items()}
    figures = []
    for name, judge in judges.items():
        wanted, threshold = seen[name, 0, "shown"], load_calibration(judge).threshold
        told = {
            "person": tested.identity,
            "reference": "same-image",
            "key": "fixed" if fixed else "none",
            "judge": name,
            "judge_weights": judge.weights,
        }
        for count in counts:
            accepted = [
                (judge.similarity(made, wanted).diagonal() > threshold).float()
                for (of, pairs_known, _), made in seen.items()
                if (of, pairs_known) == (name, count)
            ]
            best = max(accepted, key=lambda values: float(values.mean()))
            figures.append(Measured(f"known_plaintext@{count}", "attacked", best, threshold=threshold, **told))
        if not fixed and counts[-1] >= 4:
            moved = adapted(embedded(judge, known), embedded(judge, pairs.image))(seen[name, 0, "received"])
            figures.append(_adaptive(judge.similarity(moved, wanted), told))
    return figures


def _adaptive(similarity: Tensor, told: dict[str, Any]) -> Measured:
    """Share of faces that an adapted judge accepts, at its own threshold among these strangers."""
    apart = told["person"][:, None] != told["person"]
    strangers = similarity[apart]
    if len(strangers) < 1 / FAR:
        return Measured("adaptive_tar", "attacked", None, why="fewer than a thousand pairs of strangers", **told)
    threshold = float(strangers.topk(int(len(strangers) * FAR) + 1).values[-1])
    accepted = (similarity.diagonal() > threshold).float()
    return Measured("adaptive_tar", "attacked", accepted, threshold=threshold, **told)


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


def _one_each(faces: FaceBatch, seed: int) -> FaceBatch:
    """In an order by chance, one picture of each person before the second of anybody."""
    order = torch.randperm(len(faces.identity), generator=torch.Generator().manual_seed(seed))
    person = faces.identity[order]
    before = torch.stack([(person[:at] == person[at]).sum() for at in range(len(person))])
    order = order[before.argsort(stable=True)]
    return FaceBatch(*(field[order] for field in faces))


def _merge(path: Path, found: list[Figure]) -> None:
    """Put figures into a file in place of older ones of the same question; the others stay."""

    def question(figure: Figure) -> tuple[str | None, ...]:
        return figure.method, figure.data, figure.metric, figure.key, figure.judge

    asked = {question(figure) for figure in found}
    kept = [figure for figure in read_results(path) if question(figure) not in asked] if path.is_file() else []
    write_whole(path, "".join(line.to_json() + "\n" for line in [*kept, *found]).encode())


def _gallery(datamodule: L.LightningDataModule) -> FaceBatch:
    """Training faces, as many as are asked for or there are."""
    found, count = [], 0
    for batch in datamodule.gallery_dataloader():
        found.append(batch)
        count += len(batch.image)
        if count >= GALLERY:
            break
    return FaceBatch(*(torch.cat(fields)[:GALLERY] for fields in zip(*found, strict=True)))

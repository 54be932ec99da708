"""``keyveil attack``: how far somebody without the key gets, as figures beside those of a comparison."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track

from datamodules.batch import FaceBatch
from datamodules.detection import default_detector
from datamodules.files import write_whole
from experiments.attack_inverter import Budget, by_inverter
from experiments.attack_pairs import Target, by_pairs
from experiments.build import build, configuration, load_method, method_spec
from experiments.chosen import ChosenFaces, by_chance, chosen_faces, in_batches
from experiments.comparison import Comparison
from experiments.guards import Guard, check_judges
from experiments.provenance import about, commit, when
from experiments.report import write_report
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.attackers import FaceLikelihood, guess_auc, guessing_signs, received_faces
from lightning_modules.calibration import Calibration, load_calibration
from lightning_modules.inverter import FEWEST
from lightning_modules.judges import Judge
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.measured import Measured
from lightning_modules.protocol import Figure, cell, read_results
from lightning_modules.trained import weights_hash

GALLERY = 1000  # training faces from which an attacker learns what faces look like
PAIRS = [1, 10, 100, 512]


def attack(
    table: Path,
    out: Path | None = None,
    only: str | None = None,
    faces: int = 64,
    guesses: int = 8,
    pairs: list[int] = PAIRS,
    inverter_steps: int = 600,
    inverter_size: int = 64,
    inverter_pairs: int | None = None,
    inverter_keys: int = 1,
    judge_steps: int = 120,
    seed: int = 0,
    dry_run: bool = False,
) -> int:
    """Attack each method of a comparison without the key, on each data set, into attacks.jsonl and the report.

    Guessing keys:
    Each face is opened with the right key and with wrong ones, and three signs are looked at in what opens: whether
    hiding it again gives the same anonymized picture, how sure a detector is of the face, and how likely the picture is
    among training faces. `key_guess_auc` is the area under the curve of the sign that gives the right key away most:
    0.5 is chance, 1 means that a guess can be tested. In verify mode a guess can be tested by the record anyway.

    Known plaintext: the attacker has some training faces with what became of them, and opens the test faces by what
    that teaches, of blocks of pixels and of identity codes. `known_plaintext@N` is the share that a judge accepts as
    the original, of the attacker who does better: with a key of its own for each picture, as `keyveil anonymize`
    gives them; under one key for all (`fixed`), as if a nonce came twice; and under one key for all pictures of a
    person (`shared`), as along a clip's track, where up to ten other pictures of that very person are known.
    `known_person` is what the last one has anyway: the share accepted of such another picture as it is. By pairs with
    keys of their own a judge is adapted too, its embeddings linearly and, where it has a network that can learn, that
    network: `adaptive_tar` is the share of anonymized faces that the better of both then accepts, at one false
    acceptance in a thousand among the test people.

    The inverter: a network learns the way back from a face of each training person, which it hides itself with the
    method's weights under keys that it draws. `inverter_tar` is the share of what it, or the linear guess it starts
    from, makes of test faces that a judge accepts as the original; the share of the anonymized faces themselves stands
    beside it.

    Methods without a key are attacked by pairs, by the adapted judge and by the inverter.

    Args:
        table: A file under configs/compare/.
        out: Folder to write into; by default the comparison's, runs/compare/NAME.
        only: Names of the methods to attack, with commas between them; by default all.
        faces: Test faces of each data set.
        guesses: Wrong keys a face; 0 leaves guessing out.
        pairs: How many known originals the attackers have, one of each person before the second of anybody, of the
            first thousand training faces; numbers beyond these are left out, and an empty list leaves all out.
        inverter_steps: Training steps of the inverter, of 16 pairs each; 0 leaves it out. One that was stopped goes on.
        inverter_size: Pixels at which it works, a multiple of 16, at most the method's.
        inverter_pairs: Most pairs that it learns from; by default one of each training person.
        inverter_keys: Keys that each of its pairs is hidden under, another each epoch; more where the method is fast.
        judge_steps: Training steps of a judge's network, of 16 of the pairs each; 0 leaves its network alone.
        seed: Where the keys come from.
        dry_run: Say what would run, and stop.

    Returns:
        The exit code: 1 if a method could not be attacked (figures of the others are written all the same).

    Raises:
        ValueError: If there is no face, a number is negative, or a method is unknown.
    """
    if faces < 1 or guesses < 0 or min(pairs, default=1) < 1:
        told = f"got {faces}, {guesses} and {pairs}"
        raise ValueError(f"attack takes faces from 1, guesses from 0 and pairs from 1, {told}")
    if inverter_steps < 0 or judge_steps < 0 or inverter_size < 16 or inverter_size % 16 or inverter_keys < 1:
        told = f"got {inverter_steps} and {judge_steps} steps, size {inverter_size} and {inverter_keys} keys"
        raise ValueError(f"inverters and judges take steps from 0, inverters a size in sixteens, keys from 1, {told}")
    if inverter_pairs is not None and inverter_pairs < FEWEST:
        raise ValueError(f"an inverter takes {FEWEST} pairs at least, got {inverter_pairs}")
    console = Console(stderr=True)
    table = configuration(str(table))
    plan = Comparison.read(table)
    chosen = plan.chosen(only)
    out = out or Path("runs/compare") / table.stem
    budget = Budget(inverter_steps, inverter_size, inverter_pairs, inverter_keys)
    if dry_run:
        for data in plan.data:
            told = f"{faces} faces, {guesses} wrong keys each, pairs {pairs}, inverter {inverter_steps} steps"
            console.print(f"{data}: {', '.join(chosen)}; {told}", soft_wrap=True)
        return 0
    judges = {name: build(object, spec, f"judge {name!r}") for name, spec in plan.judges.items()}
    judges = {name: (judge, load_calibration(judge)) for name, judge in judges.items()} if pairs or budget.steps else {}
    started, found, failures = time.time(), list[Figure](), 0
    for data, spec in plan.data.items():
        tested = chosen_faces(data, spec, faces, plan.batch_size)
        whole = tested.whole()
        gallery = _one_each(_gallery(tested.datamodule), seed) if guesses or pairs else None
        likelihood = FaceLikelihood(gallery.image) if guesses else None
        if left := sorted(count for count in set(pairs) if count > len(gallery.image)):
            console.print(f"{data} has {len(gallery.image)} training faces: without {left} pairs", soft_wrap=True)
        for name in chosen:
            try:
                target, common = _target(name, data, tested, whole, plan, judges, seed, console)
                common["config"] = table.as_posix()
                measured: list[Callable[[], list[Measured]]] = []
                if not target.keyed or not target.method.reversible:
                    console.print(f"{data}: {name} has no key to guess")
                elif likelihood is not None:
                    measured.append(partial(_by_guessing, target, guesses, likelihood))
                if budget.steps and judges:
                    measured.append(partial(by_inverter, target, budget, out / "parts" / "inverter"))
                if pairs and judges:
                    known = by_chance(gallery, target.method.attributes, plan.seed)
                    measured.append(partial(by_pairs, target, known, sorted(pairs), judge_steps))
                for attacker in measured:  # told and written at once: an attack may take long, and may be stopped
                    figures = [dataclasses.replace(part.figure(), **common) for part in attacker()]
                    for figure in figures:
                        by = f" by {figure.judge}, key {figure.key}" if figure.judge else ""
                        told = f"{data}: {name}: {figure.leg}: {figure.metric}{by}: {cell(figure)}"
                        console.print(told, soft_wrap=True)
                    found += figures
                    _merge(out / "attacks.jsonl", figures)
            except Exception as error:  # one method is lost, the others are not
                if os.environ.get("KEYVEIL_DEBUG"):
                    raise
                failures += 1
                why = " ".join(str(error).split()) or type(error).__name__
                console.print(f"[bold red]failed[/] {name} on {data}: {why}", soft_wrap=True)
    if found:
        asked = {"faces": faces, "guesses": guesses, "pairs": pairs, "judge_steps": judge_steps}
        asked |= {"seed": seed, "only": only}
        asked |= {f"inverter_{word}": value for word, value in budget._asdict().items()}
        _about(table, plan, out, judges, asked, started)
        write_report(out)
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)
    return int(failures > 0)


def _target(
    name: str,
    data: str,
    tested: ChosenFaces,
    whole: FaceBatch,
    plan: Comparison,
    judges: dict[str, tuple[Judge, Calibration]],
    seed: int,
    console: Console,
) -> tuple[Target, dict[str, Any]]:
    """Whom to attack, as the guards of comparisons admit it, and what all its figures say of it."""
    method, notes = load_method(method_spec(plan.methods[name]))
    if not plan.allow_loss_judges:
        check_judges(method, {name: judge for name, (judge, _) in judges.items()})
    with torch.no_grad():
        method.prepare(tested.datamodule)
    Guard(method).on_strangers(tested.people)
    common = {
        "method": name,
        "data": data,
        "commit": commit(),
        "weights": weights_hash(method),
        "seed": seed,
        "steps": notes.get("steps"),
        "size": method.size,
    }
    asked = by_chance(whole, method.attributes, plan.seed)
    return Target(name, data, method, tested.datamodule, asked, plan, judges, seed, console), common


def _by_guessing(target: Target, guesses: int, likelihood: FaceLikelihood) -> list[Measured]:
    """The figure of the sign that tells the right key best."""
    batches = in_batches(target.whole, target.plan.batch_size)
    batches = track(batches, f"{target.data}: {target.name}, guessing", console=target.console, transient=True)
    known = [_told_apart(target.method, batch, target.ring, guesses, likelihood) for batch in batches]
    by_sign = {sign: torch.cat([part[sign] for part in known]) for sign in known[0]}
    signs = ", ".join(f"{sign} {float(values.mean()):.3f}" for sign, values in by_sign.items())
    target.console.print(f"{target.data}: {target.name}: {signs}", soft_wrap=True)
    # a sign that is less for the right key tells it as well; the best of three is a little above chance by chance
    told = [values if values.mean() >= 0.5 else 1 - values for values in by_sign.values()]
    worst = max(told, key=lambda values: float(values.mean()))
    return [Measured("key_guess_auc", "attacked", worst, target.whole.identity)]


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
        return figure.method, figure.data, figure.metric, figure.leg, figure.key, figure.judge

    asked = {question(figure) for figure in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # others may attack other methods into the same folder
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


def _about(
    table: Path,
    plan: Comparison,
    out: Path,
    judges: dict[str, tuple[Judge, Calibration]],
    asked: dict[str, Any],
    started: float,
) -> None:
    """Say how it was attacked, and, where no comparison has said so, where the figures come from."""
    file = out / "run.json"
    options = "".join(f" --{word} {shlex.quote(str(value))}" for word, value in asked.items() if value is not None)
    attacked = {"command": f"keyveil attack {table.as_posix()} --out {out.as_posix()}{options}", **when(started)}
    if file.is_file():
        told = json.loads(file.read_text())
    else:
        told = about(table, asked["seed"], plan.size, judges.values()) | attacked
    told["attacks"] = [*told.get("attacks", []), attacked]
    write_whole(file, json.dumps(told, indent=1).encode())

"""``keyveil compare``: every method on every data set, from saved files alone, into one table.

The run folder holds ``faces/DATA/METHOD/LEG/SAMPLE.png`` (what was saved, and what was recovered from it), one file
of figures for each finished pair under ``parts/``, and from those ``results.jsonl``, ``table.md``, ``report.html`` and
``grid.png``. A run that is started again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress

from datamodules.detection import default_detector
from datamodules.files import write_whole
from experiments.build import build, configuration, load_method, method_spec
from experiments.chosen import ChosenFaces, chosen_faces
from experiments.comparison import Comparison
from experiments.embeddings import Remembering
from experiments.exchange import (
    Speed,
    comparison_secret,
    hide_into,
    is_made_by,
    keep_if,
    kept_bytes,
    nearby_trips,
    read_trip,
)
from experiments.guards import Guard, check_judges, training_people
from experiments.opening import recover_elsewhere
from experiments.provenance import about, code_digest, commit, file_digest, own_sources, versions, when
from experiments.report import write_report
from experiments.report_pictures import folder_name
from experiments.walls import began
from lightning_modules.anonymizer import resize
from lightning_modules.calibration import load_calibration
from lightning_modules.carriers import encode
from lightning_modules.metrics.attributes import FaceAttributes
from lightning_modules.metrics.fairness import Groups
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.measured import RoundTripMetric
from lightning_modules.metrics.perceptual import NETWORKS as PERCEPTUAL
from lightning_modules.metrics.pollution import Pollution
from lightning_modules.metrics.realism import Realism
from lightning_modules.metrics.recovery import PictureQuality
from lightning_modules.metrics.scores import Histogram
from lightning_modules.metrics.utility import FacesDetected
from lightning_modules.protocol import Figure
from lightning_modules.trained import weights_hash
from lightning_modules.weights import WeightsError, card, cards, find

EXTRAS = ("torch_fidelity",)  # packages that some figures need


def compare(
    table: Path, out: Path | None = None, only: str | None = None, fresh: bool = False, dry_run: bool = False
) -> int:
    """Run every method on every data set and write one table.

    Args:
        table: A file under configs/compare/.
        out: Run folder; by default runs/compare/NAME.
        only: Names of the methods to run, with commas between them; by default all. Runs of different methods may work
            in one folder at the same time, and a last one of all makes their table.
        fresh: Start over instead of going on where an earlier run stopped; with `only`, these methods alone.
        dry_run: Say what would run, and stop.

    Returns:
        The exit code: 1 if a method failed (the others are in the table all the same).
    """
    console = Console(stderr=True)
    table = configuration(str(table))
    plan = Comparison.read(table)
    plan = dataclasses.replace(plan, methods={name: plan.methods[name] for name in plan.chosen(only)})
    out = out or Path("runs/compare") / table.stem
    if dry_run:
        for data in plan.data:
            for name in plan.methods:
                console.print(
                    f"{data}: {name}, {plan.faces} faces at {plan.size} px, carriers {', '.join(plan.carriers)}"
                )
        return 0
    if fresh and only:
        for name in plan.methods:
            for kept in (
                *out.glob(f"parts/*--{folder_name(name)}.json"),
                *out.glob(f"faces/*/{folder_name(name)}"),
                *out.glob(f"faces/*/{folder_name(name)}@*"),
            ):
                shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    elif fresh and out.exists():
        if not (out / "parts").is_dir():
            raise ValueError(
                f"{out} is not the folder of a comparison (it has no parts/), so --fresh does not empty it"
            )
        shutil.rmtree(out)
    run = _Run(plan, table, out, console, only)
    run.all_pairs()
    run.finish()
    return 1 if run.failures else 0


class _Run:
    """One comparison under way."""

    def __init__(self, plan: Comparison, config: Path, out: Path, console: Console, only: str | None = None) -> None:
        self.plan, self.config, self.out, self.console = plan, config, out, console
        self.command = f"keyveil compare {config.as_posix()} --out {out.as_posix()}"
        self.command += f" --only {shlex.quote(only)}" if only else ""
        self.started = time.time()
        (out / "parts").mkdir(parents=True, exist_ok=True)
        self.judges = {
            name: Remembering(
                build(object, spec, f"judge {name!r}"),
                out / "parts" / "embeddings.sqlite",
                json.dumps([spec, versions(), code_digest()], sort_keys=True, default=str),
            )
            for name, spec in plan.judges.items()
        }
        self.thresholds = {name: load_calibration(judge) for name, judge in self.judges.items()}
        # figures that were n/a are measured once their weights or packages come; methods of ours measure nothing
        measuring = [name for name, found in cards().items() if all(source.kind != "own" for source in found.sources)]
        self.present = [*filter(find, measuring), *filter(find_spec, EXTRAS)]
        self.rows: list[dict[str, Any]] = []
        self.faces: dict[str, dict[str, Any]] = {}
        self.failures: list[dict[str, str]] = []
        self.left_out: list[str] = []

    def all_pairs(self) -> None:
        """Walk data sets and methods; a failure ends one pair, not the run."""
        plan = self.plan
        with Progress(console=self.console) as progress:
            self.progress = progress
            task = progress.add_task("compare", total=len(plan.data) * len(plan.methods))
            for data, spec in plan.data.items():
                try:
                    faces = self._faces(data, spec)
                except (OSError, ValueError, WeightsError) as error:
                    self._without(data, error, optional=bool(spec.get("optional")))
                    progress.advance(task, len(plan.methods))
                    continue
                for name in plan.methods:
                    progress.update(task, description=f"{data} · {name}")
                    try:
                        self._pair(data, name, faces)
                    except Exception as error:  # one row is lost, the others are not
                        if os.environ.get("KEYVEIL_DEBUG"):
                            raise
                        why = " ".join(str(error).split()) or type(error).__name__
                        self.failures.append({"method": name, "data": data, "why": why})
                        self.console.print(f"[bold red]failed[/] {name} on {data}: {why}", soft_wrap=True)
                    progress.advance(task)

    def _without(self, data: str, error: Exception, optional: bool) -> None:
        """Go on without a data set: left out where it may be missing and is, otherwise a failure of every method."""
        why = " ".join(str(error).split())
        if optional and isinstance(error, FileNotFoundError):
            self.left_out.append(f"{data}: {why}")
            self.console.print(f"[yellow]left out[/] {data}: {why}", soft_wrap=True)
            return
        self.failures += [{"method": name, "data": data, "why": why} for name in self.plan.methods]
        self.console.print(f"[bold red]failed[/] {data}: {why}", soft_wrap=True)

    def _faces(self, data: str, spec: dict[str, Any]) -> ChosenFaces:
        """The test faces; originals are written out at the comparison's size."""
        faces, size = chosen_faces(data, spec, self.plan.faces, self.plan.batch_size), self.plan.size
        self.faces[data] = faces.told()
        folder = self.out / "faces" / data / "original"
        keep_if(folder, f"{faces.digest} {size} {code_digest(making=True)}")
        for batch in faces:
            for image, sample in zip(batch.image, batch.sample, strict=True):
                file = folder / f"{int(sample):06d}.png"
                if not file.is_file():
                    write_whole(file, encode(resize(image[None], size)[0]))
        return faces

    def _pair(self, data: str, name: str, faces: ChosenFaces) -> None:
        spec = method_spec(self.plan.methods[name])
        making, fingerprint = self._fingerprints(data, name, spec, faces)
        part = self.out / "parts" / f"{data}--{folder_name(name)}.json"
        if part.is_file() and (done := json.loads(part.read_text()))["fingerprint"] == fingerprint:
            self.rows.append(done["row"])
            return
        L.seed_everything(self.plan.seed, workers=True, verbose=False)
        method, notes = load_method(spec)
        if not self.plan.allow_loss_judges:
            check_judges(method, self.judges)
        faces = faces.asked(method.attributes, self.plan.seed)
        since = began(part.with_suffix(".began"), making)
        with torch.no_grad():
            method.prepare(faces.datamodule)
        guard = Guard(method)
        guard.on_strangers(faces.people)
        guard.alone_or_in_company(next(iter(faces)))
        row = {
            "method": name,
            "data": data,
            "weights": weights_hash(method),
            "steps": notes.get("steps"),
            "seconds": notes.get("seconds"),
            "size": method.size,
            "faces": faces.count,
            **{word: self.plan.methods[name].get(word) for word in ("note", "published", "knob")},
            "training_people": training_people(method, faces.people),
            "spent": 0.0,
        }
        common = {
            "method": name,
            "data": data,
            "config": self.config.as_posix(),
            "commit": commit(),
            "weights": row["weights"],
            "seed": self.plan.seed,
            "steps": row["steps"],
            "seconds": row["seconds"],
            "size": method.size,
            "faces": row["faces"],
        }
        figures, scores = [], []
        for carrier in self.plan.carriers:
            measured, counted, spent = self._measure(data, name, spec, guard, faces, carrier, making, since)
            row["spent"] += spent
            figures += measured
            scores += [json.loads(dataclasses.replace(found, method=name, data=data).to_json()) for found in counted]
        if beside := kept_bytes(self._folder(data, name)):
            row["note"] = "; ".join(
                [*filter(None, [row["note"]]), f"{beside:,} bytes a face are kept beside its picture"]
            )
        figures = [dataclasses.replace(figure, **common) for figure in figures]
        self.rows.append(row)
        lines = [json.loads(figure.to_json()) for figure in figures]
        done = {"fingerprint": fingerprint, "row": row, "figures": lines, "scores": scores}
        write_whole(part, json.dumps(done).encode())

    def _measure(
        self,
        data: str,
        name: str,
        spec: dict[str, Any],
        guard: Guard,
        faces: ChosenFaces,
        carrier: str,
        making: str,
        since: int,
    ) -> tuple[list[Figure], list[Histogram], float]:
        """Hide the faces into files, open the files with header and secret alone, and judge what is in the files.

        Scores are counted for PNG alone. The last is the seconds that the two verbs took, over all runs of it, and
        the last judging.

        Files of an earlier run that was stopped are taken as they are, if it was to do the same to the same faces with
        the same tensors and the same code; that of judges and metrics does not count.
        """
        method, plan = guard.method, self.plan
        png = self._folder(data, name)
        folder = png if carrier == "png" else png.with_name(f"{png.name}@{carrier}")
        made_by = f"{making} {guard.tensors} {faces.digest}"
        keep_if(folder, made_by)
        known = png if carrier != "png" and is_made_by(png, made_by) else None
        others, tries = (plan.other_keys, plan.wrong_keys) if carrier == "png" else (1, 1)
        curve = plan.sensitivity and carrier == "png"
        with self._bar(f"hiding, {carrier}", faces.count) as tell:
            secret = comparison_secret(plan.seed)
            hiding = hide_into(folder, method, faces, secret, plan.seed, carrier, others, tell, known, plan.opened)
        guard.unchanged()
        opening = None
        if method.reversible and plan.opened:
            with self._bar(f"opening, {carrier}", faces.count) as tell:
                opening = recover_elsewhere(folder, spec, method, plan.seed, tries, since, tell, curve, plan.batch_size)
        near = "cosine-0.9" if method.key_spec.kind == "normal" else "one-bit"
        metrics: list[RoundTripMetric] = [PictureQuality(tuple(PERCEPTUAL), near)]
        groups = Groups() if carrier == "png" else None
        judged = self._judged(near, groups)
        metrics += judged
        metrics += [build(RoundTripMetric, found, f"metric {n!r}") for n, found in plan.metrics.items()]
        if carrier == "png":
            used = () if plan.allow_loss_judges else method.loss_networks
            metrics += [FacesDetected(default_detector(), groups), Pollution(), FaceAttributes(used), Realism()]
        nearby: dict[str, list[IdentityScores]] = {}
        guard.judge(read_trip(folder, batch, plan.size) for batch in faces)
        judging = Speed()
        with self._bar(f"judging, {carrier}", faces.count) as tell:
            for batch in faces:
                trip = read_trip(folder, batch, plan.size)
                near_trips = nearby_trips(folder, batch, plan.size) if curve else {}
                with judging.timed(len(batch.image)):
                    for metric in metrics:
                        metric.update(trip)
                    for key, opened in near_trips.items():
                        for metric in nearby.setdefault(key, self._judged(key)):
                            metric.update(opened)
                tell(judging.faces)
        with judging.timed():
            figures = [figure for metric in sum(nearby.values(), metrics) for figure in metric.figures()]
        judging.keep(folder / "judging.json")
        first = carrier == plan.carriers[0]  # originals are the same in every file
        figures = [
            dataclasses.replace(f, carrier=None if f.leg == "original" else carrier)
            for f in figures
            if first or f.leg != "original"
        ]
        if carrier == "png":
            for leg, speed in (("anonymized", hiding), ("recovered", opening)):
                if speed is not None and speed.seconds:
                    figures.append(
                        Figure(metric="images_per_s", value=speed.faces / speed.seconds, leg=leg, n=speed.faces)
                    )
            params = sum(p.numel() for p in method.parameters())
            figures.append(Figure(metric="params", value=float(params), n=1, carrier=None, key=None))
        scores = [found for metric in judged for found in metric.histograms()] if carrier == "png" else []
        spent = hiding.seconds + judging.seconds + (opening.seconds if opening else 0)
        return figures, scores, spent

    def _folder(self, data: str, name: str) -> Path:
        return self.out / "faces" / data / folder_name(name)

    def _judged(self, near_key: str, groups: Groups | None = None) -> list[IdentityScores]:
        """A metric for each judge."""
        return [IdentityScores(j, self.thresholds[n].threshold, near_key, groups) for n, j in self.judges.items()]

    @contextmanager
    def _bar(self, what: str, faces: int) -> Iterator[Callable[[int], None]]:
        """A bar below that of the pairs; hands out what moves it to a number of faces."""
        task = self.progress.add_task(f"  {what}", total=faces)
        try:
            yield lambda done: self.progress.update(task, completed=done)
        finally:
            self.progress.remove_task(task)

    def _fingerprints(self, data: str, name: str, spec: dict[str, Any], faces: ChosenFaces) -> tuple[str, str]:
        """What the pictures of a method depend on, and what their figures depend on."""
        plan = dataclasses.asdict(self.plan)
        made = [spec, plan["data"][data]]
        told = {
            **{key: plan[key] for key in ("faces", "other_keys", "wrong_keys", "opened", "seed")},
            "data": plan["data"][data],
            "pixels": faces.digest,
            "method": spec,
            "files": {word: file_digest(Path(word)) for word in _words(made) if Path(word).is_file()},
            "sources": own_sources(_words(made)),
            "cards": {word: card(word).digest for word in _words([spec]) if word in cards()},
            "versions": versions(),
            "code": code_digest(making=True),
        }
        judged = {
            **told,
            **{key: plan[key] for key in ("size", "carriers", "judges", "metrics", "allow_loss_judges", "sensitivity")},
            "thresholds": {key: dataclasses.asdict(value) for key, value in self.thresholds.items()},
            "judging sources": own_sources(_words([plan["judges"], plan["metrics"]])),
            "measured with": self.present,
            "code": code_digest(),
        }
        told, judged = (json.dumps(what, sort_keys=True, default=str).encode() for what in (told, judged))
        return hashlib.sha256(told).hexdigest(), hashlib.sha256(judged).hexdigest()

    def finish(self) -> None:
        """Put the parts together and write the report."""
        results = scores = ""
        for row in self.rows:
            part = self.out / "parts" / f"{row['data']}--{folder_name(row['method'])}.json"
            done = json.loads(part.read_text())
            results += "".join(Figure(**line).to_json() + "\n" for line in done["figures"])
            scores += "".join(json.dumps(found) + "\n" for found in done["scores"])
        for name, text in (("results.jsonl", results), ("scores.jsonl", scores)):
            if text:
                write_whole(self.out / name, text.encode())
            else:
                (self.out / name).unlink(missing_ok=True)
        judges = [(judge, self.thresholds[name]) for name, judge in self.judges.items()]
        told = about(self.config, self.plan.seed, self.plan.size, judges) | when(self.started)
        told |= {"command": self.command, "rows": self.rows, "faces": self.faces}
        told |= {"unshown": self.plan.unshown, "left_out": self.left_out, "failures": self.failures}
        write_whole(self.out / "run.json", json.dumps(told, indent=1).encode())
        if self.rows or self.failures:
            write_report(self.out)
            self.console.print((self.out / "table.md").read_text(), markup=False, soft_wrap=True)
            self.console.print(f"report: {self.out / 'report.html'}", soft_wrap=True)


def _words(value: Any) -> Iterator[str]:
    """All strings inside a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _words(part)

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
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from datamodules.batch import FaceBatch
from datamodules.detection import default_detector
from datamodules.files import write_whole
from experiments.build import build, configuration, load_method, method_spec, read_yaml
from experiments.embeddings import Remembering
from experiments.exchange import comparison_secret, hide_into, read_trip
from experiments.guards import Guard, check_judges
from experiments.opening import recover_elsewhere
from experiments.provenance import code_digest, commit, file_digest, versions
from experiments.report import write_report
from experiments.report_pictures import folder_name
from lightning_modules.anonymizer import ReversibleAnonymizer, resize
from lightning_modules.calibration import load_calibration
from lightning_modules.carriers import encode
from lightning_modules.metrics.attributes import FaceAttributes
from lightning_modules.metrics.fairness import Groups
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.measured import RoundTripMetric
from lightning_modules.metrics.pollution import Pollution
from lightning_modules.metrics.recovery import PictureQuality
from lightning_modules.metrics.utility import FacesDetected
from lightning_modules.protocol import Figure, append_results
from lightning_modules.trained import weights_hash
from lightning_modules.weights import WeightsError, card, cards


@dataclasses.dataclass
class Comparison:
    """What one table compares; the keys of a file under ``configs/compare/``.

    Attributes:
        methods: Row name → ``class_path`` and ``init_args``, or ``config`` (a file under ``configs/method/``) with
            ``init_args`` over it; and ``weights`` (checkpoint, safetensors or card) for what was trained.
        data: Data set name → datamodule; with ``optional: true`` it is left out, and said, where it cannot be found.
        judges: Judge name → class. None may be a loss network of a method.
        size: Pixels at which pictures are compared.
        faces: Test faces of each data set.
        carriers: File formats between the two verbs.
        other_keys: Unrelated keys that each face is also hidden under in a PNG, for diversity; one in other formats.
        wrong_keys: Random wrong keys that each face's PNG is opened with, and as many nearly right ones; other
            formats are with one.
        metrics: Name → class of a :class:`~lightning_modules.metrics.measured.RoundTripMetric` to measure beside the
            others.
        batch_size: Faces at a time.
        seed: Where keys and wrong keys come from.
        allow_loss_judges: Accept a judge that is a loss network of a method.
    """

    methods: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]
    judges: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    size: int = 128
    faces: int = 64
    carriers: list[str] = dataclasses.field(default_factory=lambda: ["png"])
    other_keys: int = 1
    wrong_keys: int = 8
    batch_size: int = 8
    seed: int = 0
    allow_loss_judges: bool = False

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read a file.

        Raises:
            ValueError: If a key is unknown or missing.
        """
        found, known = read_yaml(path), [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(found) - set(known)):
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; a comparison knows {', '.join(known)}")
        if missing := sorted({"methods", "data", "judges"} - set(found)):
            raise ValueError(f"{path}: the key {missing[0]!r} is missing")
        names = [folder_name(name) for name in found["methods"]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path}: two methods would share the folder {twice[0]!r}; give them names apart")
        return cls(**found)


def compare(table: Path, out: Path | None = None, fresh: bool = False, dry_run: bool = False) -> int:
    """Run every method on every data set and write one table.

    Args:
        table: A file under configs/compare/.
        out: Run folder; by default runs/compare/NAME.
        fresh: Start over instead of going on where an earlier run stopped.
        dry_run: Say what would run, and stop.

    Returns:
        The exit code: 1 if a method failed (the others are in the table all the same).
    """
    console = Console(stderr=True)
    table = configuration(str(table))
    plan = Comparison.read(table)
    out = out or Path("runs/compare") / table.stem
    if dry_run:
        for data in plan.data:
            for name in plan.methods:
                console.print(
                    f"{data}: {name}, {plan.faces} faces at {plan.size} px, carriers {', '.join(plan.carriers)}"
                )
        return 0
    if fresh and out.exists():
        if not (out / "parts").is_dir():
            raise ValueError(
                f"{out} is not the folder of a comparison (it has no parts/), so --fresh does not empty it"
            )
        shutil.rmtree(out)
    run = _Run(plan, table, out, console)
    run.all_pairs()
    run.finish()
    return 1 if run.failures else 0


class _Run:
    """One comparison under way."""

    def __init__(self, plan: Comparison, config: Path, out: Path, console: Console) -> None:
        self.plan, self.config, self.out, self.console = plan, config, out, console
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
        self.rows: list[dict[str, Any]] = []
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
                    datamodule, batches = self._faces(data, dict(spec))
                except (OSError, ValueError, WeightsError) as error:
                    self._without(data, error, optional=bool(spec.get("optional")))
                    progress.advance(task, len(plan.methods))
                    continue
                for name in plan.methods:
                    progress.update(task, description=f"{data} · {name}")
                    try:
                        self._pair(data, name, datamodule, batches)
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

    def _faces(self, data: str, spec: dict[str, Any]) -> tuple[L.LightningDataModule, list[FaceBatch]]:
        """The test faces in batches, as large as they come; originals are written out at the comparison's size."""
        datamodule, whole = test_faces(data, spec, self.plan.faces)
        folder = self.out / "faces" / data / "original"
        for image, sample in zip(whole.image, whole.sample, strict=True):
            write_whole(folder / f"{int(sample):06d}.png", encode(resize(image[None], self.plan.size)[0]))
        return datamodule, in_batches(whole, self.plan.batch_size)

    def _pair(self, data: str, name: str, datamodule: L.LightningDataModule, batches: list[FaceBatch]) -> None:
        spec = method_spec(self.plan.methods[name])
        making, fingerprint = self._fingerprints(data, name, spec)
        part = self.out / "parts" / f"{data}--{folder_name(name)}.json"
        if part.is_file() and (done := json.loads(part.read_text()))["fingerprint"] == fingerprint:
            self.rows.append(done["row"])
            return
        L.seed_everything(self.plan.seed, workers=True, verbose=False)
        method, notes = load_method(spec)
        if not self.plan.allow_loss_judges:
            check_judges(method, self.judges)
        with torch.no_grad():
            method.prepare(datamodule)
        guard = Guard(method)
        guard.on_strangers(tested := people_of(datamodule, batches))
        guard.alone_or_in_company(batches[0])
        row = {
            "method": name,
            "data": data,
            "weights": weights_hash(method),
            "steps": notes.get("steps"),
            "seconds": notes.get("seconds"),
            "size": method.size,
            "faces": sum(len(b.image) for b in batches),
            "note": self.plan.methods[name].get("note", ""),
            "training_people": _told(method, tested),
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
        figures = []
        for carrier in self.plan.carriers:
            figures += self._measure(data, name, spec, guard, batches, carrier, making)
        figures = [dataclasses.replace(figure, **common) for figure in figures]
        self.rows.append(row)
        lines = [json.loads(figure.to_json()) for figure in figures]
        write_whole(part, json.dumps({"fingerprint": fingerprint, "row": row, "figures": lines}).encode())

    def _measure(
        self,
        data: str,
        name: str,
        spec: dict[str, Any],
        guard: Guard,
        batches: list[FaceBatch],
        carrier: str,
        making: str,
    ) -> list[Figure]:
        """Hide the faces into files, open the files with header and secret alone, and judge what is in the files.

        Files of an earlier run that was stopped are taken as they are, if it was to do the same to the same faces with
        the same tensors and the same code; that of judges and metrics does not count.
        """
        method = guard.method
        folder = (
            self.out / "faces" / data / (folder_name(name) if carrier == "png" else f"{folder_name(name)}@{carrier}")
        )
        mark, made_by = folder / "made-by", _digest(making, guard.tensors, batches)
        if not mark.is_file() or mark.read_text() != made_by:
            if folder.exists():
                shutil.rmtree(folder)
            write_whole(mark, made_by)
        others, tries = (self.plan.other_keys, self.plan.wrong_keys) if carrier == "png" else (1, 1)
        faces, seed = sum(len(batch.image) for batch in batches), self.plan.seed
        with self._bar(f"hiding, {carrier}", faces) as tell:
            hiding = hide_into(folder, method, batches, comparison_secret(seed), seed, carrier, others, tell)
        guard.unchanged()
        opening = None
        if method.reversible:
            with self._bar(f"opening, {carrier}", faces) as tell:
                opening = recover_elsewhere(folder, spec, method, seed, tries, tell)
        near = "cosine-0.9" if method.key_spec.kind == "normal" else "one-bit"
        metrics: list[RoundTripMetric] = [PictureQuality(lpips=True, near_key=near)]
        groups = Groups() if carrier == "png" else None
        metrics += [IdentityScores(j, self.thresholds[n].threshold, near, groups) for n, j in self.judges.items()]
        metrics += [build(RoundTripMetric, found, f"metric {n!r}") for n, found in self.plan.metrics.items()]
        if carrier == "png":
            used = () if self.plan.allow_loss_judges else method.loss_networks
            metrics += [FacesDetected(default_detector(), groups), Pollution(), FaceAttributes(used)]
        guard.judge(read_trip(folder, batch, self.plan.size) for batch in batches)
        with self._bar(f"judging, {carrier}", faces) as tell:
            for number, batch in enumerate(batches, start=1):
                trip = read_trip(folder, batch, self.plan.size)
                for metric in metrics:
                    metric.update(trip)
                tell(round(faces * number / len(batches)))
        figures = [figure for metric in metrics for figure in metric.figures()]
        figures = [dataclasses.replace(f, carrier=carrier) for f in figures]
        if carrier == "png":
            for leg, speed in (("anonymized", hiding), ("recovered", opening)):
                if speed is not None and speed.seconds:
                    figures.append(
                        Figure(metric="images_per_s", value=speed.faces / speed.seconds, leg=leg, n=speed.faces)
                    )
            params = sum(p.numel() for p in method.parameters())
            figures.append(Figure(metric="params", value=float(params), n=1, carrier=None, key=None))
        return figures

    @contextmanager
    def _bar(self, what: str, faces: int) -> Iterator[Callable[[int], None]]:
        """A bar below that of the pairs; hands out what moves it to a number of faces."""
        task = self.progress.add_task(f"  {what}", total=faces)
        try:
            yield lambda done: self.progress.update(task, completed=done)
        finally:
            self.progress.remove_task(task)

    def _fingerprints(self, data: str, name: str, spec: dict[str, Any]) -> tuple[str, str]:
        """What the pictures of a method depend on, and what their figures depend on."""
        plan = dataclasses.asdict(self.plan)
        told = {
            **{key: plan[key] for key in ("faces", "other_keys", "wrong_keys", "seed")},
            "data": plan["data"][data],
            "method": spec,
            "files": {
                word: file_digest(Path(word)) for word in _words([spec, plan["data"][data]]) if Path(word).is_file()
            },
            "cards": {word: card(word).digest for word in _words([spec]) if word in cards()},
            "versions": versions(),
            "code": code_digest(making=True),
        }
        judged = {
            **told,
            **{key: plan[key] for key in ("size", "carriers", "judges", "metrics", "allow_loss_judges")},
            "thresholds": {key: dataclasses.asdict(value) for key, value in self.thresholds.items()},
            "code": code_digest(),
        }
        made, measured = (json.dumps(what, sort_keys=True, default=str).encode() for what in (told, judged))
        return hashlib.sha256(made).hexdigest(), hashlib.sha256(measured).hexdigest()

    def finish(self) -> None:
        """Put the parts together and write the report."""
        results = self.out / "results.jsonl"
        beside = results.with_name("results.jsonl.part")
        beside.unlink(missing_ok=True)
        for row in self.rows:
            part = self.out / "parts" / f"{row['data']}--{folder_name(row['method'])}.json"
            append_results(beside, [Figure(**line) for line in json.loads(part.read_text())["figures"]])
        results.unlink(missing_ok=True)
        if self.rows:
            os.replace(beside, results)
        judges = [
            {"name": judge.name, "weights": judge.weights, **dataclasses.asdict(self.thresholds[name])}
            for name, judge in self.judges.items()
        ]
        about = {
            "name": self.config.stem,
            "config": self.config.as_posix(),
            "config_text": self.config.read_text(),
            "commit": commit(),
            "seed": self.plan.seed,
            "size": self.plan.size,
            "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "command": f"keyveil compare {self.config.as_posix()} --out {self.out.as_posix()}",
            "versions": versions(),
            "rows": self.rows,
            "judges": judges,
            "left_out": self.left_out,
            "failures": self.failures,
        }
        write_whole(self.out / "run.json", json.dumps(about, indent=1).encode())
        if self.rows or self.failures:
            write_report(self.out)
            self.console.print((self.out / "table.md").read_text(), markup=False, soft_wrap=True)
            self.console.print(f"report: {self.out / 'report.html'}", soft_wrap=True)


def _digest(making: str, tensors: str, batches: list[FaceBatch]) -> str:
    """Hash of what makes pictures: the plan, the method's tensors, and the faces as they are batched."""
    digest = hashlib.sha256(f"{making} {tensors}".encode())
    for batch in batches:
        for field in (batch.image, batch.sample, batch.attributes):
            digest.update(f"{tuple(field.shape)}".encode() + field.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def people_of(datamodule: L.LightningDataModule, batches: list[FaceBatch]) -> frozenset[str]:
    """Marks of the people of these test faces; empty where the data module does not know them."""
    marks = datamodule.people("test") if hasattr(datamodule, "people") else {}
    numbers = {int(number) for batch in batches for number in batch.identity}
    return frozenset(marks[number] for number in numbers if number in marks)


def _told(method: ReversibleAnonymizer, tested: frozenset[str]) -> str:
    """What is known of the people who trained a method."""
    if not method.state_dict():
        return "nobody"
    people = getattr(method, "trained_on", None)
    if people is None or not tested:
        return "not known"
    count = Counter(mark.partition(":")[0] for mark in people)
    met = {mark.partition(":")[0] for mark in tested}
    said = [f"{n:,} of {name}" + (", none of those tested" if name in met else "") for name, n in sorted(count.items())]
    return "; ".join(said) or "nobody"


def test_faces(data: str, spec: dict[str, Any], count: int) -> tuple[L.LightningDataModule, FaceBatch]:
    """A data set of a comparison, ready for its test, and ``count`` of its test faces, as large as they come."""
    datamodule = build(L.LightningDataModule, {k: v for k, v in spec.items() if k != "optional"}, f"data {data!r}")
    datamodule.prepare_data()
    datamodule.setup("test")
    loader = datamodule.test_dataloader()
    chosen = choose_faces(torch.cat([batch.identity for batch in loader]), count)
    kept, start = [], 0
    for batch in loader:
        here = chosen[(chosen >= start) & (chosen < start + len(batch.image))] - start
        kept.append(FaceBatch(*(field[here] for field in batch)))
        start += len(batch.image)
    return datamodule, FaceBatch(*(torch.cat(fields) for fields in zip(*kept, strict=True)))


def in_batches(whole: FaceBatch, size: int) -> list[FaceBatch]:
    """Faces in batches of at most ``size``."""
    return [FaceBatch(*fields) for fields in zip(*(field.split(size) for field in whole), strict=True)]


def choose_faces(identity: Tensor, count: int) -> Tensor:
    """Positions of ``count`` faces, in order: as many people as can be had with two pictures each, or more.

    A person with two pictures can be compared with itself; sixteen pictures of one person say little.
    """
    people = identity.unique()
    each = max(2, -(-count // len(people)))
    rank = torch.stack([(identity[:i] == person).sum() for i, person in enumerate(identity)])
    several = torch.stack([(identity == person).sum() >= 2 for person in identity])
    # first those with company, up to `each` a person; then whatever is left
    order = sorted(range(len(identity)), key=lambda i: (not (several[i] and rank[i] < each), int(rank[i]) // each, i))
    return torch.tensor(sorted(order[:count]))


def _words(value: Any) -> Iterator[str]:
    """All strings inside a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _words(part)

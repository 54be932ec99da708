"""What pairs of original and anonymized picture teach: the known-plaintext figures of ``keyveil attack``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from datamodules.batch import FaceBatch
from experiments.chosen import by_chance, in_batches
from experiments.comparison import Comparison
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, resize
from lightning_modules.attackers import adapted, codes_of, known_plaintext, received_faces
from lightning_modules.calibration import Calibration
from lightning_modules.judges import Judge
from lightning_modules.keys import Key, KeyRing
from lightning_modules.metrics.identity import FAR
from lightning_modules.metrics.measured import Measured
from lightning_modules.tuned_judge import TunedJudge, tunable

TUNED_AT_ONCE = 16  # pairs of a training step of a judge
TRACK = 10  # most other pictures of a person that are known under a shared key


@dataclass
class Target:
    """Who is attacked, and on whom.

    Attributes:
        name, data: Of the method and the data set, as in the comparison's file.
        method: In eval mode.
        datamodule: The data set.
        whole: The test faces.
        plan: The comparison.
        judges: By name, each with its calibration.
        seed: Where keys come from.
        console: Where progress is told.
    """

    name: str
    data: str
    method: ReversibleAnonymizer
    datamodule: L.LightningDataModule
    whole: FaceBatch
    plan: Comparison
    judges: dict[str, tuple[Judge, Calibration]]
    seed: int
    console: Console

    @property
    def keyed(self) -> bool:
        """Whether it has a key at all."""
        return self.method.key_spec.kind != "none"

    @property
    def ring(self) -> KeyRing:
        """Its owner's keys."""
        return KeyRing.from_seed(self.seed)

    def hidden(self, faces: FaceBatch, keys: list[Key], word: str) -> Image:
        """Faces as they are saved, at the method's size; one key a face."""
        numbers = torch.stack([self.method.key_spec.numbers(key) for key in keys])
        parts = list(zip(in_batches(faces, self.plan.batch_size), numbers.split(self.plan.batch_size), strict=True))
        told = f"{self.data}: {self.name}, hiding {len(keys)} faces {word}".rstrip()
        parts = track(parts, told, console=self.console, transient=True)
        return torch.cat([received_faces(self.method, self.method.fit_size(face), some).image for face, some in parts])

    @cached_property
    def received(self) -> Image:
        """What is saved of the test faces, each under a key of its own. Samples are numbered within a data set."""
        return self.hidden(self.whole, [self.ring.right(int(s)) for s in self.whole.sample], "to attack")

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """Embeddings of the originals, by judge."""
        return {name: self.embedded(name, self.whole.image) for name in self.judges}

    def embedded(self, judge: str, images: Image) -> Tensor:
        """Embeddings of pictures at the comparison's size."""
        return self.judges[judge][0].embed(resize(images, self.plan.size))

    def words(self, judge: str, key: str) -> dict[str, Any]:
        """What a judge's figures have in common."""
        words = {"person": self.whole.identity, "reference": "same-image", "key": key, "judge": judge}
        return words | {"judge_weights": self.judges[judge][0].weights}

    def taken(self, judge: str, images: Image, rows: Tensor | None = None) -> Tensor:
        """1 where a judge accepts a picture as the original of the test face (of those in ``rows``), otherwise 0."""
        wanted = self.wanted[judge] if rows is None else self.wanted[judge][rows]
        similarity = self.judges[judge][0].similarity(self.embedded(judge, images), wanted).diagonal()
        return (similarity > self.judges[judge][1].threshold).float()

    def accepted(
        self, metric: str, leg: str, judge: str, key: str, pictures: list[Image], rows: Tensor | None = None
    ) -> Measured:
        """The figure of the attacker, of several, whose pictures are accepted most often."""
        best = max((self.taken(judge, images, rows) for images in pictures), key=lambda values: float(values.mean()))
        words = self.words(judge, key)
        if rows is not None:
            words["person"] = words["person"][rows]
        return Measured(metric, leg, best, threshold=self.judges[judge][1].threshold, **words)


def by_pairs(target: Target, gallery: FaceBatch, counts: list[int], judge_steps: int = 0) -> list[Measured]:
    """What known originals teach: of training people under their own keys and under one, and of the very person.

    Args:
        target: Whom to attack.
        gallery: Training faces, of as many people as there are.
        counts: Numbers of pairs, in order; those beyond the gallery, or a person's other pictures, are left out.
        judge_steps: Training steps of a judge's network, where it has one that can learn.
    """
    method, ring = target.method, target.ring
    counts = [count for count in counts if count <= len(gallery.image)]
    if not counts:
        return []
    pairs = FaceBatch(*(field[: counts[-1]] for field in gallery))
    shown = method.fit_size(pairs).image
    people = codes_of(method, method.fit_size(gallery).image, target.plan.batch_size)
    own = [ring.right(int(sample)) for sample in pairs.sample]
    known = target.hidden(pairs, own, "under keys of their own")
    figures = _opened(target, shown, known, target.received, people, counts, "none")
    if counts[-1] >= 4:
        figures += [_by_adapted_judge(target, name, known, shown, judge_steps) for name in target.judges]
    if target.keyed:
        known, received = (
            target.hidden(faces, [ring.right(0)] * len(faces.image), "under one key") for faces in (pairs, target.whole)
        )
        figures += _opened(target, shown, known, received, people, counts, "fixed")
        figures += _of_a_person(target, people, [count for count in counts if count <= TRACK])
    return figures


def _opened(
    target: Target, shown: Image, known: Image, received: Image, people: Tensor | None, counts: list[int], key: str
) -> list[Measured]:
    opened = known_plaintext(target.method, shown, known, received, people, counts, target.plan.batch_size)
    return [
        target.accepted(f"known_plaintext@{count}", "attacked", judge, key, list(opened[count].values()))
        for judge in target.judges
        for count in counts
    ]


def _of_a_person(target: Target, people: Tensor | None, counts: list[int]) -> list[Measured]:
    """As along a clip's track: pictures of one person share a key, and the attacker knows some of the others.

    `known_person` is what such an attacker has without undoing anything: a known picture as it is.
    """
    figures: list[Measured] = []
    if not counts:
        return figures
    method, batch = target.method, target.plan.batch_size
    frames = _frames(target, counts[-1] + 1)
    whole = target.whole
    first = {int(person): int(s) for person, s in zip(whole.identity, whole.sample, strict=True)}

    def hidden(faces: FaceBatch) -> Image:
        return target.hidden(
            faces, [target.ring.right(first[int(p)]) for p in faces.identity], "under one key a person"
        )

    received, known, shown = hidden(whole), hidden(frames), method.fit_size(frames).image
    others = [
        ((frames.identity == person) & (frames.sample != sample)).nonzero().flatten()
        for person, sample in zip(whole.identity, whole.sample, strict=True)
    ]
    for count in counts:
        rows = torch.tensor([row for row, found in enumerate(others) if len(found) >= count], dtype=torch.int64)
        if not len(rows):
            continue
        opened = []
        for row in rows.tolist():
            some, one = others[row][:count], received[row : row + 1]
            opened.append(known_plaintext(method, shown[some], known[some], one, people, [count], batch)[count])
        pictures = [torch.cat([found[attacker] for found in opened]) for attacker in opened[0]]
        told = [(f"known_plaintext@{count}", pictures)]
        if count == counts[0]:
            told.append(("known_person", [frames.image[torch.stack([others[row][0] for row in rows.tolist()])]]))
        figures += [
            target.accepted(metric, "attacked", judge, "shared", found, rows)
            for judge in target.judges
            for metric, found in told
        ]
    return figures


def _frames(target: Target, count: int) -> FaceBatch:
    """Of each test person at most so many pictures of the data set, the first ones."""
    wanted, seen, kept = set(target.whole.identity.tolist()), {}, []
    for batch in target.datamodule.test_dataloader():
        rows = []
        for row, person in enumerate(batch.identity.tolist()):
            if person in wanted and seen.setdefault(person, 0) < count:
                seen[person] += 1
                rows.append(row)
        if rows:
            kept.append(FaceBatch(*(field[rows] for field in batch)))
    frames = FaceBatch(*(torch.cat(fields) for fields in zip(*kept, strict=True)))
    return by_chance(frames, target.method.attributes, target.plan.seed)


def _by_adapted_judge(target: Target, name: str, known: Image, shown: Image, steps: int) -> Measured:
    """The figure of the adapted judge that accepts more: its embeddings moved, or its network trained."""
    judge, originals = target.judges[name][0], target.embedded(name, shown)
    teach = adapted(target.embedded(name, known), originals)
    found = [teach(target.embedded(name, target.received))]
    if steps and tunable(judge):
        told = f"{target.data}: {target.name}: {name} learns from {len(known)} pairs, {steps} steps of {TUNED_AT_ONCE}"
        target.console.print(told, soft_wrap=True)
        found.append(
            _tuned(judge, resize(known, target.plan.size), originals, steps, target.seed)(
                resize(target.received, target.plan.size)
            )
        )
    words = target.words(name, "none")
    figures = [_adaptive(judge.similarity(embeddings, target.wanted[name]), words) for embeddings in found]
    return max(figures, key=lambda figure: -1.0 if figure.values is None else float(figure.values.mean()))


def _tuned(judge: Judge, known: Image, originals: Tensor, steps: int, seed: int) -> Callable[[Image], Tensor]:
    """What embeds as a judge does whose network was trained on pairs."""
    L.seed_everything(seed, workers=True, verbose=False)
    tuned = TunedJudge(judge, originals)
    trainer = L.Trainer(
        accelerator=(device := torch.device(judge.device)).type,
        devices=1 if device.index is None else [device.index],
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar(console_kwargs={"stderr": True})],
    )
    pairs = TensorDataset(known, torch.arange(len(known)))
    trainer.fit(tuned, DataLoader(pairs, TUNED_AT_ONCE, shuffle=True))
    return tuned.to(device).eval().embed  # Lightning leaves networks on the CPU


def _adaptive(similarity: Tensor, told: dict[str, Any]) -> Measured:
    """Share of faces that an adapted judge accepts, at its own threshold among these strangers."""
    apart = told["person"][:, None] != told["person"]
    strangers = similarity[apart]
    if len(strangers) < 1 / FAR:
        return Measured("adaptive_tar", "attacked", None, why="fewer than a thousand pairs of strangers", **told)
    threshold = float(strangers.topk(int(len(strangers) * FAR) + 1).values[-1])
    accepted = (similarity.diagonal() > threshold).float()
    return Measured("adaptive_tar", "attacked", accepted, threshold=threshold, **told)

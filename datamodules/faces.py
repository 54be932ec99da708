"""The data module: who is in which split, and loaders of aligned faces."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from numpy import ndarray
from torch.utils.data import DataLoader

from datamodules.batch import FaceBatch
from datamodules.cache import AlignedFaces, Augment, Faces, aligned_faces
from datamodules.detection import Detector
from datamodules.shards import ShardFaces, Shards
from datamodules.sources import FaceSource, Picture
from datamodules.splits import SPLITS, Split, split_of
from datamodules.stream import Stream, StreamingDataModule

NEEDED: dict[TrainerFn, tuple[Split, ...]] = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: ("test",),
}


class FaceDataModule(StreamingDataModule):
    """Aligned faces of one data set, split by person (:func:`~datamodules.splits.split_of`).

    A split is aligned the first time it is needed and read from the cache after that. People of the training
    split are numbered from 0 without a gap, then those of validation and test. What comes next in
    training depends on the run's seed and on how many faces came before alone: with ``batch_size`` halved, two
    processes see together what one does, and a resumed run goes on where it was.

    Args:
        faces: Data set, such as :class:`datamodules.datasets.LFW`.
        size: Side of a face in pixels.
        batch_size: Faces in a batch, on each process.
        num_workers: Processes that read faces beside the one that trains.
        augment: Whether training faces get light changes of colour and compression.
        flip: Whether half of the training faces are mirrored; ``place`` follows.
        limit: Most pictures of a split, for quick runs; people stay whole but for the last. ``None``: all.
        min_pictures: Fewest pictures of a person to take part; comparing a person with itself needs 2.
        without: CSV of ``keyveil data overlap``; the people in its column ``person`` do not train, and a list
            that names nobody of this data set is refused.
        labels: CSV of ``keyveil data label``; its columns of -1 and 1 become the attributes, in place of the
            data set's own. ``None`` keeps those.
        attributes: Which columns of ``labels``, in this order; ``None`` means all of -1 and 1.
        detector: What finds faces without known landmarks; ``None`` takes
            :func:`~datamodules.detection.default_detector`.
        skip_share: Largest share of a split's pictures that may be damaged or show no face; they are left out.
    """

    def __init__(
        self,
        faces: FaceSource,
        size: int = 128,
        batch_size: int = 16,
        num_workers: int = 2,
        augment: bool = False,
        flip: bool = False,
        limit: int | None = None,
        min_pictures: int = 1,
        without: str | None = None,
        labels: str | None = None,
        attributes: list[str] | None = None,
        detector: Detector | None = None,
        skip_share: float = 0.1,
    ) -> None:
        super().__init__()
        if attributes and not labels:
            raise ValueError("expected `labels` beside `attributes`; a data set's own are chosen in `faces`")
        self.faces, self.size, self.batch_size, self.num_workers = faces, size, batch_size, num_workers
        self.augment, self.flip, self.limit, self.min_pictures = augment, flip, limit, min_pictures
        self.without, self.skip_share = without, skip_share
        self.labels, self.wanted, self.detector = labels, attributes, detector
        self._sets: dict[Split, Faces] = {}

    @cached_property
    def chosen(self) -> dict[Split, list[Picture]]:
        """Pictures of each split after ``without``, ``min_pictures`` and ``limit``, in the order of their numbers."""
        count = Counter(picture.person for picture in self.faces.pictures)
        chosen: dict[Split, list[Picture]] = {split: [] for split in SPLITS}
        absent = read_people(Path(self.without)) if self.without else frozenset()
        if absent and absent.isdisjoint(count):
            raise ValueError(
                f"{self.without} names {len(absent)} people, none of whom is in {self.faces.name}; "
                "it was made for another data set"
            )
        for picture in self.faces.pictures:
            split = split_of(picture.person)
            if count[picture.person] >= self.min_pictures and not (split == "train" and picture.person in absent):
                chosen[split].append(picture)
        if self.limit is not None:
            # by a hash of the name: the first in the alphabet are no fair sample, and this one never changes
            for split, pictures in chosen.items():
                pictures.sort(key=lambda p: (sha256(f"limit {p.person}".encode()).digest(), p.sample))
                chosen[split] = sorted(pictures[: self.limit], key=lambda p: p.sample)
        return chosen

    @cached_property
    def identities(self) -> dict[str, int]:
        """Number of each person, the training people first."""
        people = (sorted({picture.person for picture in self.chosen[split]}) for split in SPLITS)
        return {person: number for number, person in enumerate(name for names in people for name in names)}

    def people(self, split: Split) -> dict[int, str]:
        """Number → mark of each person of a split: data set, colon, and 12 hexadecimal digits of the name's SHA-256.

        By marks a method's training people are told from those it is tested on, within one data set. They are no
        secret: who has a list of names finds out who is in it. Who may be in two data sets is for ``keyveil data
        overlap`` to find.
        """
        names = {picture.person for picture in self.chosen[split]}
        digest = {name: sha256(f"person {self.faces.name} {name}".encode()).hexdigest()[:12] for name in names}
        return {self.identities[name]: f"{self.faces.name}:{mark}" for name, mark in digest.items()}

    @property
    def num_identities(self) -> int:
        """Number of training people: the classes of a classifier of identities."""
        return len({picture.person for picture in self.chosen["train"]})

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of a batch's attributes."""
        return self._labels[0] if self.labels else self.faces.attribute_names

    def dataset(self, split: Split) -> Faces:
        """Aligned faces of a split, made on first use.

        Raises:
            ValueError: The split is empty, too many of its pictures are of no use, or one has no labels.
        """
        if split not in self._sets:
            pictures = self.chosen[split]
            if not pictures:
                counts = ", ".join(f"{name} {len(self.chosen[name])}" for name in SPLITS)
                raise ValueError(
                    f"{self.faces.name} has nobody in the {split} split: of its {len(self.faces.pictures)} pictures, "
                    f"those of people with at least {self.min_pictures} fall into {counts}"
                )
            change = augmentation(self.augment, self.flip) if split == "train" else None
            faces = self._faces(split, change)
            if change is not None and faces.face(0).w.size:
                raise ValueError(
                    f"expected augment and flip off for {self.faces.name}: a changed face is not its style code's"
                )
            if (lost := len(faces.skipped)) > self.skip_share * len(pictures):
                raise ValueError(
                    f"{lost} of {len(pictures)} pictures of the {split} split of {self.faces.name} are of no use (the "
                    f"first: {next(iter(faces.skipped.values()))}), more than the share "
                    f"data.init_args.skip_share={self.skip_share:g}"
                )
            self._sets[split] = faces
        return self._sets[split]

    def _faces(self, split: Split, change: Augment | None = None) -> Faces:
        pictures, known = self.chosen[split], (self.identities, self._attributes(split), change)
        if isinstance(self.faces, Shards):
            return ShardFaces(self.faces, pictures, self.size, *known)
        return AlignedFaces(aligned_faces(self.faces, pictures, self.size, self.detector), *known)

    def prepare_data(self) -> None:
        """Align what the trainer is about to need, on one process; without a trainer, wait for first use."""
        for split in NEEDED[self.trainer.state.fn] if self.trainer is not None else ():
            if self.chosen[split]:
                self.dataset(split)

    def train_dataloader(self) -> Stream:
        """Shuffled training faces without an end, in batches that are all full: losses compare within one."""
        return self._streamed(self.dataset("train"), self.batch_size, **self._reading)

    def gallery_dataloader(self) -> DataLoader[FaceBatch]:
        """All training faces in order and as they are, on every process: what a method fits or looks up."""
        self.dataset("train")  # tells what is wrong with it
        return self._loader(self._faces("train"))

    def val_dataloader(self) -> DataLoader[FaceBatch] | list[Any]:
        """Validation faces in order; none where nobody is in that split: Lightning then skips validation."""
        return self._ordered("val") if self.chosen["val"] else []

    def test_dataloader(self) -> DataLoader[FaceBatch]:
        """Test faces in order."""
        return self._ordered("test")

    def predict_dataloader(self) -> DataLoader[FaceBatch]:
        """Test faces in order."""
        return self._ordered("test")

    @cached_property
    def _labels(self) -> tuple[tuple[str, ...], dict[str, ndarray]]:
        return read_labels(Path(self.labels), self.wanted)

    def _attributes(self, split: Split) -> dict[str, ndarray] | None:
        pictures = self.chosen[split]
        if self.labels:
            labels = self._labels[1]
            if unknown := [picture.file for picture in pictures if picture.file not in labels]:
                raise ValueError(f"{self.labels} has no labels for {len(unknown)} files, as {unknown[0]}")
            return labels
        if self.faces.attribute_names:
            return {picture.file: self.faces.attributes(picture) for picture in pictures}
        return None

    def _ordered(self, split: Split) -> DataLoader[FaceBatch]:
        faces, (processes, rank) = self.dataset(split), self._processes
        if processes == 1:
            return self._loader(faces)
        # the usual distributed sampler pads with repeated faces, which counts them twice
        sampler = UnrepeatedDistributedSampler(faces, processes, rank, shuffle=False)
        return self._loader(faces, sampler=sampler, batch_size=even(len(faces), processes, self.batch_size))

    def _loader(self, faces: Faces, **how: Any) -> DataLoader[FaceBatch]:
        return DataLoader(faces, **{"batch_size": self.batch_size, **how}, **self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        """How every loader reads."""
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }


def even(faces: int, processes: int, batch_size: int) -> int:
    """Smallest batch size from ``batch_size`` up that gives every process the same number of batches.

    Without repeats some processes hold one face more than others; a batch more would leave them waiting for
    the others in a step that gathers.

    Example:
        >>> even(33, processes=2, batch_size=16)  # 17 and 16 faces: one batch each
        17
    """
    least = faces // processes
    while faces % processes and least and least % batch_size == 0:
        batch_size += 1
    return batch_size


def augmentation(colour: bool, flip: bool) -> Augment | None:
    """Change of a training face and its place, drawn from a seed; ``None`` where nothing is asked for.

    Light enough that the person and the apparent attributes stay: colour jitter by a tenth, hue by 2 %, and
    sometimes JPEG at 60-95.
    """
    if not (colour or flip):
        return None
    tenth = (0.9, 1.1)
    steps = [
        A.ColorJitter(brightness=tenth, contrast=tenth, saturation=tenth, hue=(-0.02, 0.02), p=0.8),
        A.ImageCompression(quality_range=(60, 95), p=0.2),
    ]
    change = A.Compose(steps if colour else [])

    def augment(image: ndarray, place: ndarray, seed: int) -> tuple[ndarray, ndarray]:
        change.set_random_seed(seed)
        image = change(image=image)["image"]
        if flip and seed % 2:
            image = np.ascontiguousarray(image[:, ::-1])
            mirror = np.array([[-1, 0, image.shape[1] - 1], [0, 1, 0], [0, 0, 1]], np.float32)
            place = (mirror @ np.vstack([place, [0, 0, 1]]))[:2].astype(np.float32)
        return image, place

    return augment


def read_labels(path: Path, wanted: list[str] | None = None) -> tuple[tuple[str, ...], dict[str, ndarray]]:
    """Read a CSV of labels: comment lines with ``#``, a header with ``file``, a picture a line.

    Args:
        path: The CSV.
        wanted: Columns of -1 and 1, in this order; ``None`` means all such columns.

    Returns:
        The columns' names and, by file, their values ``(m,)`` float32.

    Raises:
        ValueError: A wanted column is missing or holds something else.
    """
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not rows or "file" not in rows[0]:
        raise ValueError(f"{path} holds no labels: expected a header with `file` and a picture a line")
    signs = [name for name in rows[0] if all(row[name] in ("-1", "1") for row in rows)]
    if missing := [name for name in wanted or () if name not in signs]:
        raise ValueError(f"{path} has no column {missing[0]!r} of -1 and 1; it has {', '.join(signs) or 'none'}")
    names = tuple(signs if wanted is None else wanted)
    return names, {row["file"]: np.array([int(row[name]) for name in names], np.float32) for row in rows}


def read_people(path: Path) -> frozenset[str]:
    """People of a CSV with a column ``person``; comment lines with ``#`` may stand before the header.

    Raises:
        ValueError: There is no such column.
    """
    with path.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(itertools.dropwhile(lambda line: line.startswith("#"), lines))
        if "person" not in (rows.fieldnames or ()):
            raise ValueError(f"{path} names nobody: expected a header with `person` and a person a line")
        return frozenset(row["person"] for row in rows)

"""Which test faces of a data set are measured: chosen once, and read batch by batch as often as asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler, Subset

from datamodules.batch import FaceBatch
from experiments.build import build
from lightning_modules.carriers import to_pixels


class ChosenFaces:
    """Some test faces of a data module, as large as they come; one batch at a time is in memory.

    Each pass reads them anew, the same faces in the same batches.

    Args:
        datamodule: Ready for its test.
        count: How many (:func:`choose_faces`).
        batch_size: Faces of a batch.

    Attributes:
        identity: Number of the person of each face, ``(N,)`` int64.

    Raises:
        ValueError: If the test loader does not go through a data set in its order.
    """

    def __init__(self, datamodule: L.LightningDataModule, count: int, batch_size: int) -> None:
        loader = datamodule.test_dataloader()
        if not isinstance(getattr(loader, "sampler", None), SequentialSampler):
            raise ValueError(f"expected {type(datamodule).__name__}.test_dataloader() to hand out faces in order")
        identity = torch.cat([batch.identity for batch in loader])
        chosen = choose_faces(identity, count)
        self.datamodule, self.identity = datamodule, identity[chosen]
        self._loader = DataLoader(
            Subset(loader.dataset, chosen.tolist()), batch_size=batch_size, collate_fn=loader.collate_fn
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    @property
    def count(self) -> int:
        """Number of faces."""
        return len(self.identity)

    def __iter__(self) -> Iterator[FaceBatch]:
        return iter(self._loader)

    @cached_property
    def digest(self) -> str:
        """Hash of all faces and of how they are batched."""
        digest = hashlib.sha256()
        for batch in self:
            for field in (batch.image, batch.sample, batch.attributes):
                digest.update(f"{tuple(field.shape)}".encode() + field.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def whole(self) -> FaceBatch:
        """All faces at once, for what needs few."""
        return FaceBatch(*(torch.cat(fields) for fields in zip(*self, strict=True)))

    def told(self) -> dict[str, Any]:
        """What provenance says: how many faces, of how many people, and a hash of their 8-bit pixels, in order.

        Labels do not count, so that anybody can compare pictures alone.
        """
        digest = hashlib.sha256()
        for batch in self:
            for image in batch.image:
                pixels = to_pixels(image)
                digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
        people = len(self.identity.unique())
        return {"faces": self.count, "people": people, "pixels": f"sha256:{digest.hexdigest()}"}

    @property
    def people(self) -> frozenset[str]:
        """Marks of their people; empty where the data module does not know them."""
        marks = self.datamodule.people("test") if hasattr(self.datamodule, "people") else {}
        return frozenset(marks[number] for number in self.identity.tolist() if number in marks)


def chosen_faces(data: str, spec: dict[str, Any], count: int, batch_size: int) -> ChosenFaces:
    """``count`` test faces of a data set of a comparison; ``optional`` in its ``spec`` is for others."""
    datamodule = build(L.LightningDataModule, {k: v for k, v in spec.items() if k != "optional"}, f"data {data!r}")
    datamodule.prepare_data()
    datamodule.setup("test")
    return ChosenFaces(datamodule, count, batch_size)


def in_batches(whole: FaceBatch, size: int) -> list[FaceBatch]:
    """Faces in batches of at most ``size``."""
    return [FaceBatch(*fields) for fields in zip(*(field.split(size) for field in whole), strict=True)]


def choose_faces(identity: Int[Tensor, " n"], count: int) -> Int[Tensor, " chosen"]:
    """Positions of ``count`` faces, in order: as many people as can be had with two pictures each, or more.

    A person with two pictures can be compared with itself; sixteen pictures of one person say little.
    """
    people, met, rank = identity.tolist(), Counter[int](), []
    for person in people:
        rank.append(met[person])
        met[person] += 1
    each = max(2, -(-count // len(met)))
    # first those with company, up to `each` a person; then whatever is left
    order = sorted(range(len(people)), key=lambda i: (met[people[i]] < 2 or rank[i] >= each, rank[i] // each, i))
    return torch.tensor(sorted(order[:count]))

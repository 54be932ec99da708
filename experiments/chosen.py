"""Which test faces of a data set are measured: chosen once, and read batch by batch as often as asked."""

from __future__ import annotations

import copy
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
from lightning_modules.keys import KeyRing, KeySpec


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
        self._asked, self._seed = 0, 0
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
        return (by_chance(batch, self._asked, self._seed) for batch in self._loader)

    def asked(self, attributes: int, seed: int) -> ChosenFaces:
        """These faces, under attributes by chance (:func:`by_chance`) if they are not labelled."""
        faces = copy.copy(self)
        faces._asked, faces._seed = attributes, seed
        faces.__dict__.pop("digest", None)
        return faces

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


def by_chance(face: FaceBatch, attributes: int, seed: int) -> FaceBatch:
    """Faces without labels under attributes drawn by chance, the same for a face in any batch; others as they are.

    Attributes are factors, which the holder of the key knows: `keyveil anonymize` draws them so, too.
    """
    if not attributes or face.attributes.shape[1]:
        return face
    spec, ring = KeySpec("bits", attributes), KeyRing.from_seed(seed + 1)
    return face._replace(attributes=torch.stack([spec.numbers(ring.right(int(sample))) for sample in face.sample]))


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

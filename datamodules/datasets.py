"""Data sets of faces in their public layouts, and faces from a generator."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from torch import nn

from datamodules.archives import unpacked
from datamodules.contents import add_tensors
from datamodules.detection import Detector
from datamodules.sources import IMAGES, Face, FaceSource, Picture, find_root, list_pictures
from lightning_modules.weights import locate


class LFW(FaceSource):
    """Labeled Faces in the Wild, deep-funneled (Huang et al., 2012): 13,233 pictures of 5,749 people.

    Args:
        root: The folder ``lfw-deepfunneled`` (``NAME/NAME_0001.jpg``), its archive, or a folder that holds
            either; ``None`` looks in ``KEYVEIL_DATA``, ``data`` and ``../shared/data``.
        landmarks: CSV of ``file`` and ten coordinates; ``None`` takes ``lfw-landmarks5.csv`` beside the data
            where it is, and otherwise the detector finds the faces.
    """

    name = "lfw"

    def __init__(self, root: str | None = None, landmarks: str | None = None) -> None:
        self.root, self.landmarks = root, landmarks

    @cached_property
    def _found(self) -> Path:
        return find_root(
            "LFW",
            self.root,
            ("lfw-deepfunneled",),
            "download lfw-deepfunneled.tgz (vis-www.cs.umass.edu/lfw)",
        )

    @cached_property
    def folder(self) -> Path:
        """Where the people's folders lie."""
        folder = unpacked(self._found)
        return folder / "lfw-deepfunneled" if (folder / "lfw-deepfunneled").is_dir() else folder

    @cached_property
    def pictures(self) -> list[Picture]:
        """All pictures; a person is a folder."""
        return list_pictures(self.folder, "folder")

    @cached_property
    def points(self) -> dict[str, ndarray]:
        """Landmarks of the CSV, by file."""
        path = Path(self.landmarks) if self.landmarks else self._found.parent / "lfw-landmarks5.csv"
        if not self.landmarks and not path.is_file():
            return {}
        with path.open(newline="") as lines:
            rows = [(row.pop("file"), list(row.values())) for row in csv.DictReader(lines)]
        # NAME_0001.jpg lies in the folder NAME
        return {f"{f.rsplit('_', 1)[0]}/{f}": np.array(xy, np.float64).reshape(5, 2) for f, xy in rows}


class ORL(FaceSource):
    """ORL / AT&T faces (Samaria and Harter, 1994): 40 people, 10 grey pictures of 92 x 112 each.

    Args:
        root: A folder of ``sN/K.pgm`` or an archive that holds them; ``None`` fetches the package of the card
            ``orl``, in which they come.
    """

    name = "orl"

    def __init__(self, root: str | None = None) -> None:
        self.root = root

    @cached_property
    def folder(self) -> Path:
        """Where the folders ``s1`` to ``s40`` lie."""
        found = find_root("ORL", self.root, ("ORL_faces",), "leave root empty") if self.root else locate("orl")
        folder = unpacked(found, suffixes={".pgm"})
        return next((one.parent for one in sorted(folder.glob("**/s1"))), folder)

    @cached_property
    def pictures(self) -> list[Picture]:
        """All pictures; a person is a folder."""
        return list_pictures(self.folder, "folder", suffixes={".pgm"})


class CelebA(FaceSource):
    """CelebA, aligned and cropped (Liu et al., 2015): identities and 40 binary attributes.

    A picture's sample number is the number in its file name, so that a part of the set counts like the whole.

    Args:
        root: A folder with ``img_align_celeba``, ``list_attr_celeba.txt`` and ``identity_CelebA.txt`` (the
            latter two also in ``Anno``), its archive, or a folder that holds either; ``None`` looks in
            ``KEYVEIL_DATA``, ``data`` and ``../shared/data``.
        attributes: Which attributes a batch carries, in this order; ``None`` means all 40.
    """

    name = "celeba"
    points_width = 178  # of the public pictures; smaller copies are common

    def __init__(self, root: str | None = None, attributes: list[str] | None = None) -> None:
        self.root, self.wanted = root, attributes

    @cached_property
    def _top(self) -> Path:
        found = find_root(
            "CelebA",
            self.root,
            ("celeba", "CelebA", "celeba-8k"),
            "download it (mmlab.ie.cuhk.edu.hk/projects/CelebA.html)",
        )
        return unpacked(found, suffixes=IMAGES | {".txt"})

    @cached_property
    def folder(self) -> Path:
        """Where the pictures lie."""
        inner = self._file("img_align_celeba")
        return inner / "img_align_celeba" if (inner / "img_align_celeba").is_dir() else inner

    @cached_property
    def pictures(self) -> list[Picture]:
        """All pictures that have an identity."""
        rows = (line.split() for line in self._file("identity_CelebA.txt").read_text().splitlines() if line.strip())
        there = set(os.listdir(self.folder))
        return sorted(Picture(file, person, int(Path(file).stem)) for file, person in rows if file in there)

    @cached_property
    def points(self) -> dict[str, ndarray]:
        """The public landmarks, where their file is beside the pictures."""
        try:
            rows = self._table("list_landmarks_align_celeba.txt")[1]
        except FileNotFoundError:
            return {}
        return {file: values.reshape(5, 2) for file, values in rows.items()}

    @cached_property
    def _attributes(self) -> tuple[tuple[str, ...], dict[str, ndarray]]:
        names, rows = self._table("list_attr_celeba.txt")
        wanted = list(names) if self.wanted is None else self.wanted
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(f"CelebA has no attribute {unknown[0]!r}; it has {', '.join(names)}")
        columns = [names.index(name) for name in wanted]
        return tuple(wanted), {file: values[columns].astype(np.float32) for file, values in rows.items()}

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attributes that a batch carries."""
        return self._attributes[0]

    def attributes(self, picture: Picture) -> ndarray:
        """Labels of a picture as -1 / +1, ``(m,)`` float32."""
        return self._attributes[1][picture.file]

    def _table(self, name: str) -> tuple[list[str], dict[str, ndarray]]:
        """Read the public table format: a count, the column names, then a file and its numbers a line."""
        _, header, *lines = self._file(name).read_text().splitlines()
        rows = (line.split() for line in lines if line.strip())
        return header.split(), {row[0]: np.array(row[1:], np.float64) for row in rows}

    def _file(self, name: str) -> Path:
        for pattern in (name, f"Anno/{name}", f"*/{name}", f"*/Anno/{name}"):
            for path in sorted(self._top.glob(pattern)):
                return path
        raise FileNotFoundError(f"CelebA needs {name}, and {self._top} holds none")


class ImageFolderFaces(FaceSource):
    """Folders of pictures: CASIA-WebFace, VGGFace2, FaceScrub (a folder a person), FFHQ (a picture a person).

    Args:
        root: The folder, at any depth above the pictures, or its archive; ``None`` looks for ``name`` in
            ``KEYVEIL_DATA``, ``data`` and ``../shared/data``.
        name: What caches and tables call the set.
        people: ``"folder"``: the folder right above a picture is the person; ``"picture"``: each picture
            shows another person.
    """

    def __init__(
        self, root: str | None = None, name: str = "faces", people: Literal["folder", "picture"] = "folder"
    ) -> None:
        self.root, self.name, self.people = root, name, people

    @cached_property
    def folder(self) -> Path:
        """Where the pictures lie, at any depth."""
        return unpacked(find_root(self.name, self.root, (self.name,), "put its pictures there"))

    @cached_property
    def pictures(self) -> list[Picture]:
        """All pictures below the folder."""
        return list_pictures(self.folder, self.people)


class GeneratedFaces(FaceSource):
    """Faces of a generator, each with its exact style code; every face is its own person and no real one.

    Face ``i`` depends on ``seed`` and ``i`` alone, so more faces or another order change none.

    Args:
        generator: A frozen generator: ``sample_w(z, truncation)`` maps ``(B, 512)`` normal numbers to codes
            ``(B, L, 512)``, and ``generator(w, size=size)`` renders them, ``(B, 3, size, size)`` in [-1, 1].
        count: Number of faces in all splits together.
        seed: Which faces.
        truncation: 1 samples the generator's own distribution, 0 gives its mean face. Faces at 0.7 look
            alike: their mean identity cosine is 0.15, that of strangers 0.01.
        preview: Whether to render by the generator's preview head, about ten times cheaper and less sharp.
        batch: Faces rendered at once.
    """

    name = "generated"

    def __init__(
        self,
        generator: nn.Module,
        count: int = 1000,
        seed: int = 0,
        truncation: float = 0.9,
        preview: bool = False,
        batch: int = 8,
    ) -> None:
        self.generator = generator.eval().requires_grad_(False)
        self.count, self.seed, self.truncation, self.batch = count, seed, truncation, batch
        self.how = {"preview": True} if preview else {}

    @property
    def folder(self) -> Path:
        """Nowhere: these faces have no files."""
        return Path("generated")

    @cached_property
    def pictures(self) -> list[Picture]:
        """All faces; a person is named by seed and number."""
        names = (f"generated-{self.seed}-{number:07d}" for number in range(self.count))
        return [Picture(name, name, number) for number, name in enumerate(names)]

    @torch.inference_mode()
    def faces(
        self, pictures: Sequence[Picture], size: int, detector: Detector | None
    ) -> Iterator[Face | OSError | ValueError]:
        """Render faces, on the GPU where there is one; they lie on the template as they come."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator.to(device)
        for start in range(0, len(pictures), self.batch):
            z = torch.stack([self._z(picture.sample) for picture in pictures[start : start + self.batch]])
            w = self.generator.sample_w(z.to(device), self.truncation)
            images = ((self.generator(w, size=size, **self.how).clamp(-1, 1) + 1) * 127.5).round().byte()
            for image, code in zip(images.permute(0, 2, 3, 1).cpu().numpy(), w.cpu().numpy(), strict=True):
                yield Face(image, np.eye(2, 3, dtype=np.float32), code)
        self.generator.cpu()

    def detects(self, pictures: Sequence[Picture]) -> bool:
        """Never: generated faces lie on the template."""
        return False

    def fingerprint(self, pictures: Sequence[Picture]) -> str:
        """Hash of the generator's weights, seed, truncation and the numbers."""
        digest = sha256(f"{type(self.generator).__qualname__} {self.seed} {self.truncation} {self.how}".encode())
        add_tensors(digest, self.generator)
        digest.update(" ".join(str(picture.sample) for picture in pictures).encode())
        return digest.hexdigest()

    def _z(self, number: int) -> torch.Tensor:
        """Normal numbers of one face, drawn on the CPU, whose generator is the same everywhere."""
        seed = int.from_bytes(sha256(f"{self.seed} {number}".encode()).digest()[:8], "big") >> 1
        return torch.randn(512, generator=torch.Generator().manual_seed(seed))

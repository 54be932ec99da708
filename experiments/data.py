"""``keyveil data``: shards of a data set; its pseudo-labels, and who of it may be in another, as CSVs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import onnxruntime
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from rich.console import Console
from rich.progress import Progress, track
from torch.utils.data import DataLoader

from datamodules.cache import AlignedFaces, aligned_faces
from datamodules.datasets import LFW, ORL, CelebA, ImageFolderFaces
from datamodules.detection import default_detector
from datamodules.faces import FaceDataModule
from datamodules.files import write_whole
from datamodules.latent import gallery_codes
from datamodules.shards import write_shards
from datamodules.sources import FaceSource
from experiments.provenance import commit
from lightning_modules.judges import FaceRes
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.weights import card, locate

SIZE = 256
# Signs out of guesses, set on 1,007 CelebA faces against their true labels: agreement with Male 98.8 %; with Young
# 89 % (84 % balanced; best cut 36.5 balanced and 43 plain); with Mouth_Slightly_Open 88 % (area under ROC .94).
OLD, OPEN = 40.0, 0.013


class Landmarks68:
    """68 points of aligned faces (the iBUG order), by the network of the card ``landmarks68``."""

    # Left, top, right, bottom as shares of the crop: of six boxes the one whose points told open mouths best.
    box = (60 / 256, 70 / 256, 197 / 256, 234 / 256)

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(locate("landmarks68")), options)

    def __call__(self, image: UInt8[ndarray, "size size 3"]) -> Float[ndarray, "68 2"]:
        """Points of one RGB crop as shares of its side."""
        left, top, right, bottom = (round(share * len(image)) for share in self.box)
        grey = cv2.cvtColor(np.ascontiguousarray(image[top:bottom, left:right]), cv2.COLOR_RGB2GRAY)
        # what it was trained on: 64 pixels of the squeezed box, in [0, 1)
        pixels = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32) / 256
        points = self._session.run(None, {"input": pixels[None, None]})[0].reshape(68, 2)
        return (points * [right - left, bottom - top] + [left, top]) / len(image)


def mouth_gap(points: Float[ndarray, "68 2"]) -> float:
    """Mean distance of the inner lips at their three middle pairs, as a share of the crop's side."""
    return float(np.linalg.norm(points[61:64] - points[[67, 66, 65]], axis=1).mean())


def label(
    data: Literal["lfw", "orl", "celeba", "folder", "pictures"] = "lfw",
    out: str = "labels.csv",
    root: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> None:
    """Write pseudo-labels of a data set: apparent gender and age, and whether the mouth is open.

    The CSV starts with a comment that names the networks and their hashes. ``pseudo_…`` columns hold -1 and 1 and
    serve as attributes (`data.init_args.labels`); the others hold the guesses they come from.

    Args:
        data: Data set; ``folder`` for a folder a person, ``pictures`` for a picture a person.
        out: The CSV to write.
        root: Where the data lies; by default the usual places.
        limit: Label only the first pictures; by default all.
        device: Where the gender and age network runs.
    """
    faces = source_of(data, root)
    pictures = faces.pictures[:limit]
    aligned = AlignedFaces(aligned_faces(faces, pictures, SIZE))
    names = ["pseudo_male", "pseudo_young", "pseudo_mouth_open", "male_probability", "age", "mouth_gap"]
    part = Path(f"{out}.part")  # a CSV under its own name is whole
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", newline="", encoding="utf-8") as file:
        made_by = ", ".join(f"{name} {card(name).digest}" for name in ("faceres", "landmarks68"))
        file.write(f"# pseudo-labels of {faces.name}, guessed by {made_by}\n")
        writer = csv.writer(file)
        writer.writerow(["file", "person", "sample", *names])
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"labelling {faces.name}", total=len(aligned))
            for picture, guess in zip(aligned.pictures, _guesses(aligned, device), strict=True):
                male, age, gap = guess
                signs = [1 if yes else -1 for yes in (male > 0.5, age < OLD, gap > OPEN)]
                writer.writerow([*picture, *signs, f"{male:.4f}", f"{age:.1f}", f"{gap:.4f}"])
                bar.advance(task)
    os.replace(part, out)
    skipped = f"; {len(aligned.skipped)} without a face were left out" if aligned.skipped else ""
    Console().print(f"{len(aligned)} faces labelled in {out}{skipped}", soft_wrap=True)


def overlap(
    data: Literal["lfw", "orl", "celeba", "folder", "pictures"] = "celeba",
    against: Literal["lfw", "orl", "celeba", "folder", "pictures"] = "lfw",
    out: Path = Path("overlap.csv"),
    root: str | None = None,
    against_root: str | None = None,
    threshold: float = 0.4,
    device: str = "cpu",
) -> None:
    """List training people of a data set who may be test people of another, by the identity network's codes.

    A person is listed if one of their pictures is as similar to one of a test person as the threshold says. The CSV
    serves as `data.init_args.without`; it holds for the pictures it was made from, and names nobody of the other data
    set. It is neither complete nor free of strangers: of two pictures of one person, 99 % (LFW's test people) and 70 %
    (a half-size CelebA) are as similar as 0.4, and of two people's one pair in 8,000, so that the more pictures are
    compared, the more people are listed by chance.

    Args:
        data: Data set that trains.
        against: Data set whose test people must not have trained.
        out: The CSV to write.
        root: Where the first lies; by default the usual places.
        against_root: Where the other lies.
        threshold: Least cosine of two codes.
        device: Where the identity network runs.
    """
    network = MobileFaceNet().to(device)
    train, test = (FaceDataModule(source_of(*told), SIZE, 32, 0) for told in ((data, root), (against, against_root)))
    codes, identity = gallery_codes(train, network)
    batches = track(test.test_dataloader(), f"test faces of {against}")
    with torch.inference_mode():
        tested = torch.cat([network(batch.image.to(device)).cpu() for batch in batches])
    similarity = torch.cat([(part @ tested.mT).amax(1) for part in codes.split(1024)])
    names = {number: person for person, number in train.identities.items()}
    closest: dict[str, float] = {}
    for number, value in zip(identity.tolist(), similarity.tolist(), strict=True):
        closest[names[number]] = max(value, closest.get(names[number], -1.0))
    listed = sorted((person for person, value in closest.items() if value >= threshold), key=closest.get, reverse=True)
    compared = f"{len(listed)} of {len(closest)} training people of {data} ({len(codes)} faces)"
    text = io.StringIO()
    text.write(
        f"# {compared} have a cosine of {threshold} or more to one of {len(tested)} test faces of {against}, by "
        f"mobilefacenet {card('mobilefacenet').digest}, at {commit()}\n"
    )
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["person", "similarity"])
    table.writerows((person, f"{closest[person]:.4f}") for person in listed)
    write_whole(out, text.getvalue())
    Console().print(f"{compared} listed in {out}", soft_wrap=True)


def shard(
    out: Path,
    data: Literal["lfw", "orl", "celeba", "folder", "pictures"] = "folder",
    root: str | None = None,
    size: int = 256,
    faces: int = 4096,
    quality: int = 95,
    lossless: bool = False,
    limit: int | None = None,
) -> None:
    """Align a data set once and write it as shards (tar archives in the WebDataset layout, with an index).

    Train on them with `configs/data/shards.yaml`: people, splits and numbers are those of the data set. Shards that
    a stopped run has written stay.

    Args:
        out: Folder of the shards.
        data: Data set; ``folder`` for a folder a person, ``pictures`` for a picture a person.
        root: Where the data lies; by default the usual places.
        size: Pixels of a face's side; training may ask for fewer.
        faces: Pictures of a shard.
        quality: Of JPEG.
        lossless: Write PNG instead, three to five times as large.
        limit: Shard only the first pictures; by default all.
    """
    source = source_of(data, root)
    pictures = source.pictures[:limit]
    detector = default_detector() if source.detects(pictures) else None
    count, skipped = write_shards(source, out, size, faces, None if lossless else quality, detector, pictures)
    left = f"; {len(skipped)} gave none (the first: {next(iter(skipped.values()))})" if skipped else ""
    Console().print(f"{count} faces of {source.name} in {out}{left}", soft_wrap=True)


def source_of(data: str, root: str | None) -> FaceSource:
    """A data set by its name on the command line.

    Raises:
        ValueError: There is no such name.
        FileNotFoundError: There is no copy of it.
    """
    sources = {
        "lfw": lambda: LFW(root),
        "orl": lambda: ORL(root),
        "celeba": lambda: CelebA(root),
        "folder": lambda: ImageFolderFaces(root),
        "pictures": lambda: ImageFolderFaces(root, people="picture"),
    }
    if data not in sources:
        raise ValueError(f"expected a data set of {', '.join(sources)}, got {data!r}")
    return sources[data]()


def _guesses(faces: AlignedFaces, device: str) -> Iterator[tuple[float, float, float]]:
    """Probability of an apparently male face, apparent age in years and the gap of the lips, a face each."""
    network, landmarks, row = FaceRes(device), Landmarks68(), 0
    for batch in DataLoader(faces, batch_size=16):
        with torch.inference_mode():
            guess = network.attributes(batch.image)
        for male, age in zip(guess.male.tolist(), guess.age.tolist(), strict=True):
            yield male, age, mouth_gap(landmarks(np.array(faces.images[row])))
            row += 1

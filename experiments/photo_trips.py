"""``keyveil judges photos``: whole pictures of a data set's test people through the photo verbs, and judged afresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from datamodules.alignment import warp
from datamodules.batch import face_batch
from datamodules.detection import Detector, default_detector
from datamodules.files import write_whole
from datamodules.photo_files import Found, read_photo
from datamodules.photos import Place, look_for_places
from datamodules.splits import split_of
from experiments.anonymizing import Hiding
from experiments.data import source_of
from experiments.exchange import comparison_secret
from experiments.judges import make_judge
from experiments.photos import Running, anonymize_files, load_photo_method, needs_secret, recover_files
from experiments.provenance import commit
from lightning_modules.anonymizer import ReversibleAnonymizer, RoundTrip, resize
from lightning_modules.calibration import load_calibration
from lightning_modules.carriers import encode, from_pixels, through_file
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.protocol import cell
from lightning_modules.trained import weights_hash

SIZE = 256  # of the crops that are judged, in pixels


class Faces(NamedTuple):
    """The same face before, between and after, aligned afresh in each picture, ``(3, 256, 256)`` in [-1, 1]."""

    original: Tensor
    anonymized: Tensor
    recovered: Tensor


def photos(
    out: Path,
    method: str = "ifadit",
    data: str = "lfw",
    faces: int = 200,
    aligned: bool = True,
    judges: Sequence[str] = ("dlib", "faceres"),
    root: str | None = None,
    weights: str | None = None,
    refine: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    workers: int = 2,
    accelerator: str = "auto",
) -> int:
    """Measure recovery by whole pictures: `keyveil anonymize`, `keyveil recover`, and faces aligned afresh in each.

    One picture of each test person is written to OUT/original as PNG, anonymized into OUT/anonymized and recovered into
    OUT/recovered by what the two verbs call; recovery has these files and the secret alone. A judge's pictures are
    aligned by what a detector finds in each of them. Beside it the same faces as aligned crops, from PNG files of the
    method's size, so that what cutting, pasting and cutting again cost can be told. A run that was stopped goes on.

    Args:
        out: Folder to write into, with results.jsonl.
        method: As of `keyveil anonymize`.
        data: lfw, orl, celeba, folder or pictures.
        faces: How many people.
        aligned: Measure aligned crops too.
        judges: As of `keyveil judges calibrate`.
        root: Where the data lies; by default the usual places.
        weights: As of `keyveil anonymize`.
        refine: As of `keyveil anonymize`.
        seed: Where the keys of aligned crops come from.
        batch_size: Faces at once.
        workers: Pictures read ahead.
        accelerator: Lightning's.

    Returns:
        0, or 1 if a picture could not be done; it counts as neither anonymized nor recovered, and is told.

    Raises:
        ValueError: The method cannot recover, or there is no test person.
        OSError: The data set is not there, or the folder cannot be written.
    """
    console = Console(stderr=True)
    network, name = load_photo_method(method, weights, refine, accelerator)
    if not network.reversible:
        raise ValueError(f"{method} cannot recover, so there is nothing to measure")
    asked = [make_judge(word) for word in judges]
    pictures = originals(out / "original", data, root, faces)
    steps = getattr(network, "refine", None)
    hiding = Hiding(
        name, weights_hash(network), network.size, "verify", "none", "picture", "largest", "fail", False, steps
    )
    secret = comparison_secret(seed) if needs_secret(network, hiding) else None
    running = Running(batch_size, accelerator, 1, False, workers)
    code = anonymize_files(pictures, out / "anonymized", network, hiding, secret, running)
    hidden = [one for one in _in(pictures, out / "anonymized") if one.path.is_file()]
    code |= recover_files(hidden, out / "recovered", network, name, comparison_secret(seed), running)
    detector, lost = default_detector(), list[str]()
    trips: dict[str, list[Faces]] = {"photo": [], **({"png": []} if aligned else {})}
    with Progress(console=console) as bar:
        for picture in bar.track(pictures, description="aligning"):
            after = out / "recovered" / picture.name
            place = _place(picture.path, detector, SIZE)
            if place is None or not after.is_file():
                lost.append(picture.name)
                continue
            legs = (picture.path, out / "anonymized" / picture.name, after)
            trips["photo"].append(Faces(*(_face(path, detector, place) for path in legs)))
            if aligned:
                own = trips["photo"][-1].original
                trips["png"].append(_as_crop(network, picture, detector, own, seed, len(trips["png"])))
    if lost:
        console.print(f"{len(lost)} of {len(pictures)} pictures could not be done: {', '.join(lost[:5])}", markup=False)
    if not trips["photo"]:
        raise ValueError("no picture could be done")
    common = {"method": name, "data": data, "commit": commit(), "weights": weights_hash(network), "seed": seed}
    figures = []
    for carrier, found in trips.items():
        trip = RoundTrip.of(
            torch.stack([face.original for face in found]),
            anonymized=torch.stack([face.anonymized for face in found]),
            recovered=torch.stack([face.recovered for face in found]),
            identity=torch.arange(len(found)),
            sample=torch.arange(len(found)),
        )
        for judge in asked:
            metric = IdentityScores(judge, load_calibration(judge).threshold)
            for start in range(0, len(found), 16):
                metric.update(RoundTrip(*(field[start : start + 16] for field in trip)))
            measured = [figure for figure in metric.figures() if figure.value is not None and figure.leg != "original"]
            figures += [dataclasses.replace(figure, carrier=carrier, **common) for figure in measured]
    write_whole(out / "results.jsonl", "".join(figure.to_json() + "\n" for figure in figures))
    for figure in figures:
        if figure.metric == "tar@far=1e-3":
            how = "whole pictures" if figure.carrier == "photo" else "aligned crops"
            console.print(f"{how}: {figure.leg}, accepted by {figure.judge}: {cell(figure)} of {figure.n}")
    return code


def originals(folder: Path, data: str, root: str | None, faces: int) -> list[Found]:
    """The first picture of each of some test people, as PNG files."""
    source = source_of(data, root)
    first = {picture.person: picture for picture in reversed(source.pictures) if split_of(picture.person) == "test"}
    if not first:
        raise ValueError(f"{data} has no test person")
    found = []
    for person in sorted(first)[:faces]:
        name = f"{first[person].sample:06d}.png"
        if not (folder / name).is_file():
            write_whole(folder / name, encode(from_pixels(source.read(first[person]))))
        found.append(Found(folder / name, name))
    return found


def _in(pictures: list[Found], folder: Path) -> list[Found]:
    return [Found(folder / picture.name, picture.name) for picture in pictures]


def _pixels(path: Path) -> ndarray:
    return read_photo(Found(path, path.name)).pixels


def _place(path: Path, detector: Detector, size: int) -> Place | None:
    places, _ = look_for_places(_pixels(path), detector, size, "largest")
    return places[0] if places else None


def _face(path: Path, detector: Detector, otherwise: Place) -> Tensor:
    """The face of a picture where it is found now; where none is, what lies where the original's was."""
    place = _place(path, detector, SIZE) or otherwise
    return from_pixels(warp(_pixels(path), place.matrix, SIZE))


@torch.no_grad()
def _as_crop(
    network: ReversibleAnonymizer, picture: Found, detector: Detector, original: Tensor, seed: int, sample: int
) -> Faces:
    """The same face without any picture around it: hidden and recovered as a PNG file of the method's size."""
    place = _place(picture.path, detector, network.size)
    assert place is not None  # found a moment ago
    crop = from_pixels(warp(_pixels(picture.path), place.matrix, network.size))[None].to(network.device)
    key = network.key_spec.numbers(KeyRing.from_seed(seed).right(sample))[None].to(crop)
    signs = np.random.default_rng((seed, sample)).choice([-1.0, 1.0], (1, network.attributes))
    face = face_batch(crop, attributes=torch.from_numpy(signs).to(crop))
    hidden = through_file(network.anonymize(face, key))
    back = through_file(network.recover(face._replace(image=hidden), key))
    return Faces(original, *(resize(image.cpu(), SIZE)[0] for image in (hidden, back)))

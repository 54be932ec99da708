"""``keyveil judges photos``: whole pictures of a data set's test people through the photo verbs, and judged afresh."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from datamodules.alignment import warp
from datamodules.batch import face_batch
from datamodules.detection import Detector, default_detector, overlap
from datamodules.files import write_whole
from datamodules.photo_files import read_photo
from datamodules.photo_search import Found
from datamodules.photos import Place, look_for_places
from datamodules.splits import split_of
from experiments.anonymizing import Hiding
from experiments.data import source_of
from experiments.exchange import comparison_secret
from experiments.guards import check_judges
from experiments.judges import make_judge
from experiments.photo_methods import Running, load_photo_method
from experiments.photos import anonymize_files, needs_secret, recover_files
from experiments.provenance import commit
from lightning_modules.anonymizer import ReversibleAnonymizer, RoundTrip, resize
from lightning_modules.calibration import load_calibration
from lightning_modules.callbacks.paste_back import OVERLAP
from lightning_modules.carriers import encode, from_pixels, through_file
from lightning_modules.keys import KeyRing
from lightning_modules.manifest import NAME, Manifest, signing_key
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
    aligned by what a detector finds in each of them, nearest to where the original's face was. One that was not
    recovered counts as it was anonymized; one that was not anonymized is told and left out. Beside it the same faces as
    aligned crops, from PNG files of the method's size, so that what cutting, pasting and cutting again cost can be told
    from recovered faces; anonymized whole pictures have passed the verb's check, as crops have not. A run that was
    stopped goes on.

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
        0, or 1 if a picture could not be done.

    Raises:
        ValueError: The method cannot recover, a judge is one of its loss networks, there is no test person, or the
            folder is of another method or data set.
        OSError: The data set is not there, or the folder cannot be written.
    """
    console = Console(stderr=True)
    network, name = load_photo_method(method, weights, refine, accelerator)
    if not network.reversible:
        raise ValueError(f"{method} cannot recover, so there is nothing to measure")
    asked = [make_judge(word) for word in judges]
    check_judges(network, {judge.name: judge for judge in asked})
    steps, hash_ = getattr(network, "refine", None), weights_hash(network)
    _same(out, {"data": data, "root": root, "method": name, "weights": hash_, "refine": steps, "seed": seed})
    pictures = originals(out / "original", data, root, faces)
    hiding = Hiding(name, hash_, network.size, "verify", "none", "picture", "largest", "fail", False, steps)
    secret = comparison_secret(seed) if needs_secret(network, hiding) else None
    running = Running(batch_size, accelerator, 1, False, workers)
    code = anonymize_files(pictures, out / "anonymized", network, hiding, secret, running)
    hidden = _done(out / "anonymized")
    found = [Found(out / "anonymized" / one.name, one.name) for one in pictures if one.name in hidden]
    code |= recover_files(found, out / "recovered", network, name, comparison_secret(seed), running)
    detector, lost, back = default_detector(), list[str](), _done(out / "recovered")
    trips: dict[str, list[Faces]] = {"photo": [], **({"png": []} if aligned else {})}
    with Progress(console=console) as bar:
        for picture in bar.track(pictures, description="aligning"):
            place = _place(picture.path, detector, SIZE)
            if place is None or picture.name not in hidden:
                lost.append(picture.name)
                continue
            after = "recovered" if picture.name in back else "anonymized"  # that is all one has then
            legs = (picture.path, out / "anonymized" / picture.name, out / after / picture.name)
            trips["photo"].append(Faces(*(_face(path, detector, place) for path in legs)))
            if aligned:
                own = trips["photo"][-1].original
                trips["png"].append(_as_crop(network, picture, detector, own, seed, len(trips["png"])))
    if lost:
        told = f"{len(lost)} of {len(pictures)} pictures were not anonymized: {', '.join(lost[:5])}"
        console.print(told, markup=False, soft_wrap=True)
    if not trips["photo"]:
        raise ValueError("no picture could be anonymized")
    common = {"method": name, "data": data, "commit": commit(), "weights": hash_, "seed": seed}
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


def _done(folder: Path) -> set[str]:
    """Names of the pictures that the last run through a folder's manifest did."""
    entries = Manifest(folder / NAME, signing_key()).entries.values()
    return {entry["picture"] for entry in entries if entry["status"] in ("anonymized", "recovered")}


def _same(out: Path, told: dict[str, Any]) -> None:
    """Say in a folder of what it is.

    Raises:
        ValueError: It is of something else.
    """
    mark, text = out / "of.json", json.dumps(told, indent=1)
    if mark.is_file() and mark.read_text() != text:
        raise ValueError(f"{out} holds pictures of another data set, method, weights or seed: give another folder")
    write_whole(mark, text)


def _pixels(path: Path) -> ndarray:
    return read_photo(Found(path, path.name)).pixels


def _place(path: Path, detector: Detector, size: int) -> Place | None:
    places, _ = look_for_places(_pixels(path), detector, size, "largest")
    return places[0] if places else None


def _face(path: Path, detector: Detector, otherwise: Place) -> Tensor:
    """The face of a picture that is found nearest to where the original's was; what lies there, where none is."""
    pixels = _pixels(path)
    found, _ = look_for_places(pixels, detector, SIZE, "all")
    nearest = max(found, key=lambda place: overlap(place.box, otherwise.box), default=otherwise)
    place = nearest if overlap(nearest.box, otherwise.box) >= OVERLAP else otherwise
    return from_pixels(warp(pixels, place.matrix, SIZE))


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

"""``keyveil export``: a comparison's pictures as predictions that somebody else's scorer reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jaxtyping import Float
from omegaconf import OmegaConf
from rich.progress import track
from torch import Tensor

from datamodules.files import write_whole
from experiments.build import build
from experiments.report_pictures import folder_name
from experiments.report_run import Run
from lightning_modules.anonymizer import resize
from lightning_modules.carriers import decode
from lightning_modules.judges import FaceRes, Judge
from lightning_modules.networks.landmarks import Landmarks68
from lightning_modules.weights import find

BATCH = 32
NOT_HELD = (
    "recovered, wrongly opened and inverted faces, keys, files but PNG: hifd knows originals and anonymized ones",
    "figures of pairs and sets (PSNR, SSIM, LPIPS, FID …), intervals and thresholds: hifd scores predictions",
    "ethnicity, expressions, gaze and pulse: nothing here predicts them, and hifd leaves out what is missing",
    "NIQE: hifd 0.1.0 takes it, which is lower for better pictures, for a quality that is higher",
)
"""What the schema cannot hold or is not given, as the export says it."""


class Estimator(NamedTuple):
    """What predicts one thing of faces.

    Attributes:
        task: hifd's word.
        name: Whose prediction it is.
        predict: Pictures in [-1, 1] → a payload each, as hifd's schema has it.
        classes: Names of the classes of a categorical task.
    """

    task: str
    name: str
    predict: Callable[[Float[Tensor, "batch 3 height width"]], list[dict[str, Any]]]
    classes: tuple[str, ...] = ()


def export(run: Path, out: Path, to: Literal["hifd"] = "hifd") -> None:
    """Write what networks say of a comparison's originals and anonymized faces, for another scorer to score.

    hifd (`pip install hifd`) weighs privacy against what is kept of a face in one number. It gets, for each data set, a
    folder with `methods.yaml`, `estimators.yaml` and predictions in its schema 1.0: embeddings by the run's judges, and
    age, gender and 68 landmarks where the weights are. What it cannot hold is left out, and `methods.yaml` says so.
    In such a folder, `hifd run-all --methods methods.yaml --estimators estimators.yaml --data-dir . --out scores`.

    Args:
        run: Run folder of `keyveil compare`, with its pictures.
        out: Folder to write into, one folder a data set.
        to: Whose form.

    Raises:
        OSError: If there is no such run, or its pictures are gone.
    """
    found = Run(run)
    judges = OmegaConf.to_container(OmegaConf.create(found.info.get("config_text", "{}")), resolve=True)
    known = estimators([build(object, spec, f"judge {name!r}") for name, spec in judges.get("judges", {}).items()])
    for data in found.data_sets:
        folders = {name: run / "faces" / data / folder_name(name) / "anonymized" for name in found.methods_of(data)}
        there = {name: folder for name, folder in folders.items() if any(folder.glob("*.png"))}
        originals = run / "faces" / data / "original"
        if not there or not any(originals.glob("*.png")):
            raise FileNotFoundError(f"{run} holds no pictures of {data}; `keyveil compare` makes them anew")
        into = out / folder_name(data)
        sources = {"original": originals} | {f"methods/{folder_name(name)}": there[name] for name in there}
        for base, folder in track(sources.items(), f"predicting, {data}", transient=True):
            for path, page in _pages(folder, "deid" if base != "original" else base, known, found.info.get("size")):
                write_whole(into / base / path, json.dumps(page).encode())
        lost = [f"{name}: its pictures are not in the run" for name in folders if name not in there]
        methods = {
            "original": {"base_path": "original"},
            "methods": [{"name": name, "base_path": f"methods/{folder_name(name)}"} for name in there],
            "run": {word: found.info.get(word) for word in ("name", "commit", "seed", "size", "started")},
            "left_out": [*lost, *NOT_HELD],
        }
        tasks: dict[str, dict[str, list]] = {}
        for one in known:
            file = _file(one)
            entry = {"name": one.name, "orig_json": file, "deid_json": file}
            tasks.setdefault(one.task, {"estimators": []})["estimators"].append(entry)
        for name, page in (("methods", methods), ("estimators", {"tasks": tasks})):
            write_whole(into / f"{name}.yaml", yaml.safe_dump(page, sort_keys=False, allow_unicode=True).encode())
        print(f"{into}: {len(there)} methods, {', '.join(f'{one.task} by {one.name}' for one in known)}")
        print("left out:\n" + "\n".join(f"- {text}" for text in methods["left_out"]))


def estimators(judges: list[Judge]) -> list[Estimator]:
    """The judges, and what else here names things of hifd's and has its weights on this machine."""
    known = [Estimator("face_embedding", judge.name, _embeddings(judge)) for judge in judges]
    if find("faceres") and find("faceres-graph"):
        guess = FaceRes()
        known.append(
            Estimator("age", "faceres", lambda images: [{"value": a} for a in guess.attributes(images).age.tolist()])
        )
        known.append(Estimator("gender", "faceres", lambda images: _genders(guess, images), ("female", "male")))
    if find("landmarks68"):
        network = Landmarks68()
        known.append(Estimator("landmark", "landmarks68", lambda images: _landmarks(network, images)))
    return known


def _embeddings(judge: Judge) -> Callable[[Tensor], list[dict[str, Any]]]:
    return lambda images: [{"embedding": row} for row in judge.embed(images).tolist()]


def _genders(network: FaceRes, images: Tensor) -> list[dict[str, Any]]:
    return [{"probs": [1 - male, male]} for male in network.attributes(images).male.tolist()]


@torch.no_grad()
def _landmarks(network: Landmarks68, images: Tensor) -> list[dict[str, Any]]:
    """In pixels; left and right are the person's own."""
    points = network(images) * images.shape[-1]
    columns = {
        "points": points,
        "left_eye_center": points[:, 42:48].mean(1),
        "right_eye_center": points[:, 36:42].mean(1),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def _pages(folder: Path, source: str, known: list[Estimator], size: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and page of each estimator on the pictures of a folder."""
    files = sorted(folder.glob("*.png"))
    found: list[dict[str, Any]] = [{} for _ in known]
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        pictures = [decode(file.read_bytes())[None] for file in part]
        images = torch.cat([picture if size is None else resize(picture, size) for picture in pictures])
        for one, predictions in zip(known, found, strict=True):
            predictions |= dict(zip((file.stem for file in part), one.predict(images), strict=True))
    for one, predictions in zip(known, found, strict=True):
        page = {"task": one.task, "source": source, "estimator": one.name, "schema_version": "1.0"}
        page |= {"class_names": list(one.classes)} if one.classes else {}
        yield _file(one), page | {"predictions": predictions}


def _file(one: Estimator) -> str:
    return f"{one.task}/{folder_name(one.name)}.json"

"""``keyveil limits``: where along iFADIT's way there and back an identity gets lost, and how training moved that."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from datamodules.batch import FaceBatch
from datamodules.files import write_whole
from experiments.build import build, configuration, load_method, method_spec, read_yaml
from experiments.grids import some_faces
from experiments.provenance import commit
from flows.conjugate import Conjugate
from lightning_modules.carriers import through_file
from lightning_modules.ifadit import IFADITTransform
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.trained import load_trained, read_notes, weights_hash

STAGES = {
    "transform": "hidden and opened, no picture between",
    "inverted": "rendered, nothing hidden",
    "true code": "the true code with the anonymized picture's attributes",
    "opened": "code read from the anonymized picture, compensated, opened",
    "recovered": "the recovered picture",
    "asked": "anonymized picture against the code asked for",
    "compensated": "the same after the compensation",
    "anonymized": "anonymized picture against the original",
}


def limits(
    method: Path,
    out: Path,
    weights: str = "ifadit",
    phase1: list[str] | None = None,
    data: list[Path] | None = None,
    faces: int = 64,
    batch: int = 8,
    seed: int = 0,
    changes: dict | None = None,
) -> None:
    """Measure each station of iFADIT's round trip by itself, into limits.jsonl and limits.png.

    Cosines of identity codes, by the method's own identity network: they say where a code is lost, not whom a judge
    takes a picture for (`keyveil compare` does). Of the original and: what comes back without any picture
    (`transform`), the inversion (`inverted`), the true code with attributes read from the anonymized picture (`true
    code`), what is opened (`opened`), the recovered picture (`recovered`), the anonymized one (`anonymized`). Of the
    code asked for and what is read from the anonymized picture, before (`asked`) and after the compensation
    (`compensated`). `linkage`: how well an anonymized picture is told to be of somebody by what keys in bands leave
    (0.5: not at all). Pictures go through PNG.

    Args:
        method: YAML file of the method.
        out: Folder to write into.
        weights: Trained weights: a checkpoint, safetensors or a card.
        phase1: More checkpoints whose phase 1 takes the place of that one's, in the order of their training: one
            point of the curves each, before that of `weights`. The compensation stays, though it was trained for
            `weights`.
        data: YAML files of data sets; their test faces are measured. Generated faces and LFW, if not given.
        faces: Faces of each data set.
        batch: Faces at once.
        seed: Where the keys come from.
        changes: Other `init_args` of the method.

    Raises:
        ValueError: If the method is no iFADIT, or there are fewer than two faces.
        FileNotFoundError: If a checkpoint is missing.
    """
    if faces < 2:
        raise ValueError(f"limits takes two faces at least, got {faces}")
    if missing := [source for source in phase1 or [] if not Path(source).is_file()]:
        raise FileNotFoundError(f"there is no checkpoint {missing[0]}")
    made, _ = load_method(method_spec({"config": str(method), "weights": weights, "init_args": changes or {}}))
    if not isinstance(made, IFADITTransform):
        raise ValueError(f"limits follows identity codes through iFADIT; {type(made).__name__} has none")
    sets = data or [configuration(f"configs/data/{name}.yaml") for name in ("faces-generated", "lfw")]
    lines: list[dict[str, Any]] = []
    for path in sets:
        datamodule = build(L.LightningDataModule, read_yaml(path)["data"], f"data {path}")
        datamodule.prepare_data()
        chosen = made.fit_size(some_faces(datamodule, faces))
        for source, prefix in [*((source, "disentangler.") for source in phase1 or []), (weights, "")]:
            load_trained(made, source, prefix=prefix)
            found = measure(made, chosen, KeyRing.from_seed(seed), batch, f"{path.stem}, {_label(source)}")
            lines.append({
                "data": path.stem, "weights": _label(source), "faces": len(chosen.image),
                "refine": made.refine, **found, "seed": seed, "changes": changes or {}, "hash": weights_hash(made),
                "commit": commit(),
            })  # fmt: skip
            print(json.dumps(lines[-1]))
    figure = io.BytesIO()
    draw(lines).savefig(figure, format="png", dpi=110)
    write_whole(out / "limits.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_whole(out / "limits.png", figure.getvalue())


def _label(source: str) -> str:
    path = Path(source)
    return f"{path.parent.parent.name} {read_notes(path)['steps']}" if path.suffix == ".ckpt" else path.stem


@torch.no_grad()
def measure(method: IFADITTransform, face: FaceBatch, ring: KeyRing, batch: int, told: str) -> dict[str, Any]:
    """Mean cosine of each station; of a ``conjugate`` transform more.

    ``carried`` is the correlation of codes asked for and read, by eighths of the directions from the widest to the
    narrowest; ``linkage`` what an attacker without the key makes of the bands (:func:`linkage`).

    Args:
        method: In eval mode.
        face: Faces of the method's size.
        ring: Where the keys come from.
        batch: Faces at once.
        told: What the progress bar says.
    """
    met: dict[str, list[Tensor]] = {name: [] for name in STAGES}
    asked, read, original = [], [], []
    numbers = torch.stack([method.key_spec.numbers(ring.right(int(s))) for s in face.sample])
    parts = list(zip(face.image.split(batch), numbers.to(face.image).split(batch), strict=True))
    for image, key in track(parts, told, transient=True):

        def compare(name: str, one: Tensor, other: Tensor) -> None:
            met[name].append(F.cosine_similarity(one, other))

        def seen(code: Tensor, attributes: Tensor, picture: Tensor) -> Tensor:
            return through_file(method.compose(code, attributes, picture), "png")

        z, attributes = method.identity(image), method.attributes_of(image)
        hidden, _ = method.transform(z, key)
        compare("transform", z, method.transform.inverse(hidden, key)[0])
        compare("inverted", z, method.identity(seen(z, attributes, image)))
        picture = through_file(method.anonymize(face._replace(image=image), key), "png")
        found, attributes = method.identity(picture), method.attributes_of(picture)
        compensated = method.compensate(found, key)
        opened = method.open(compensated, key)
        compare("asked", hidden, found)
        compare("compensated", hidden, compensated)
        compare("anonymized", z, found)
        compare("opened", z, opened)
        compare("true code", z, method.identity(seen(z, attributes, picture)))
        compare("recovered", z, method.identity(seen(opened, attributes, picture)))
        original.append(z)
        asked.append(hidden)
        read.append(found)
    figures: dict[str, Any] = {name: round(float(torch.cat(values).mean()), 4) for name, values in met.items()}
    if isinstance(method.transform, Conjugate):
        a, b = (torch.cat(codes) @ method.transform.directions.mT for codes in (asked, read))
        correlation = ((a - a.mean(0)) * (b - b.mean(0))).mean(0) / (a.std(0, False) * b.std(0, False))
        figures["carried"] = [round(float(part.mean()), 3) for part in correlation.chunk(8)]
        rounds = (method.transform.round_codes(torch.cat(codes)) for codes in (read, original))
        figures["linkage"] = round(linkage(*rounds, method.key_spec), 4)
    return figures


def linkage(read: Tensor, original: Tensor, spec: KeySpec) -> float:
    """Area under the curve of telling, without the key, whose anonymized picture it is by what no key hides.

    A rotation in bands keeps the length of a code's share of each band: the attacker compares logarithms of these.

    Args:
        read: Round codes ``(n, d)`` as read from anonymized pictures.
        original: Round codes of the originals, in the same order.
        spec: How many bands there are.

    Returns:
        0.5 for guessing, 1 for certainty.
    """
    lengths = [F.normalize(code, dim=1).unflatten(1, (spec.bands, -1)).norm(dim=2).log() for code in (read, original)]
    distance = torch.cdist(*lengths)
    others = ~torch.eye(len(read), dtype=torch.bool)
    closer = (distance.diagonal()[:, None] < distance).float() + 0.5 * (
        distance.diagonal()[:, None] == distance
    ).float()
    return float(closer[others].mean())


def draw(lines: list[dict[str, Any]]) -> Figure:
    """Curves of every station along the training, one panel a data set."""
    sets = list(dict.fromkeys(line["data"] for line in lines))
    figure = Figure(figsize=(6 * len(sets), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True):
        shown = [line for line in lines if line["data"] == name]
        for stage, meaning in STAGES.items():
            axes.plot([line[stage] for line in shown], marker="o", label=f"{stage}: {meaning}")
        axes.set_xticks(range(len(shown)), [line["weights"] for line in shown], fontsize=8)
        axes.set(title=f"{name}, {shown[-1]['faces']} faces", xlabel="stage and step of phase 1", ylim=(-0.1, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("cosine of identity codes, own network")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure

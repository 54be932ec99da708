"""``keyveil grid``: pictures to look at: round trips, the way from one key to another, identities with attributes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import FaceBatch, face_batch
from datamodules.files import write_whole
from experiments.build import build, load_method, method_spec, read_yaml
from experiments.chosen import ChosenFaces, by_chance
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.callbacks.round_trip_grid import grid_picture, sheet
from lightning_modules.carriers import through_file
from lightning_modules.keys import KeyRing

Kind = Literal["round-trip", "keys", "swap", "attributes", "factors"]


def grid(
    method: Path,
    out: Path,
    weights: str | None = None,
    data: Path = Path("configs/data/faces-generated.yaml"),
    kind: Kind = "round-trip",
    faces: int = 6,
    steps: int = 7,
    tile: int = 160,
    seed: int = 0,
    changes: dict | None = None,
) -> None:
    """Draw a method's test faces into a PNG.

    `round-trip`: original, anonymized under two keys, recovered, opened with a wrong key and a nearly right one, all
    through saved 8-bit pictures. `keys`: from the original's key to a random one in equal steps. `swap` (iFADIT): the
    identity of each column's face with the attributes of each row's. Of methods whose factors are a password and
    attributes (SDN): `attributes`: anonymized with the face's own attributes, and with each of them turned round;
    `factors`: anonymized under two passwords, recovered with the right factors, and opened with four kinds of wrong
    ones: another password, one bit off, another combination of attributes, both wrong. Faces without labels get
    attributes by chance.

    Args:
        method: YAML file of the method.
        out: The PNG to write.
        weights: Trained weights: a checkpoint, safetensors or a card.
        data: YAML file of the data; its test faces are drawn.
        kind: Which picture.
        faces: Rows.
        steps: Columns of `keys`.
        tile: Pixels of a face.
        seed: Where the keys come from.
        changes: Other `init_args` of the method.

    Raises:
        ValueError: If the method cannot be drawn in that way.
    """
    made, _ = load_method(method_spec({"config": str(method), "weights": weights, "init_args": changes or {}}))
    datamodule = build(L.LightningDataModule, read_yaml(data)["data"], f"data {data}")
    datamodule.prepare_data()
    with torch.no_grad():
        made.prepare(datamodule)
        face, ring = some_faces(datamodule, faces), KeyRing.from_seed(seed)
        if made.attributes and not face.attributes.shape[1]:
            face, names = (
                by_chance(face, made.attributes, seed),
                [f"attribute {at + 1}" for at in range(made.attributes)],
            )
        else:
            names = getattr(datamodule, "attribute_names", ())
        if kind in CONDITIONED:
            picture = CONDITIONED[kind](made, face, ring, names, tile)
        else:
            picture = DRAWN[kind](made, face, ring, steps, tile)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    write_whole(out, file.getvalue())
    print(out)


def some_faces(datamodule: L.LightningDataModule, count: int) -> FaceBatch:
    """That many test faces, of different people first, the same on every machine."""
    return next(iter(ChosenFaces(datamodule, count, batch_size=count)))


def _round_trip(method: ReversibleAnonymizer, face: FaceBatch, keys: KeyRing, _: int, tile: int) -> Image.Image:
    return grid_picture(method.round_trip(face, keys), tile=tile)


def _keys(method: ReversibleAnonymizer, face: FaceBatch, keys: KeyRing, steps: int, tile: int) -> Image.Image:
    face = method.fit_size(face)
    spec = method.key_spec
    right, other = (torch.stack([spec.numbers(draw(int(s))) for s in face.sample]) for draw in (keys.right, keys.other))
    columns = [("original", face.image)]
    for i in range(steps):
        share = i / max(steps - 1, 1)
        columns.append((f"{share:.2f}", method.anonymize(face, between(right, other, spec.kind, share))))
    return sheet(columns, tile)


def between(first: Tensor, second: Tensor, kind: str, share: float) -> Tensor:
    """A key between two: at 0 the first, at 1 the second.

    Rotations: from none at all (the face itself) to the second, ``Q^share``, along the geodesic; normal vectors: on
    the arc between both, so that the length stays what the method expects.

    Raises:
        ValueError: If there is nothing between two keys of that kind.
    """
    if kind == "rotation":
        values, vectors = torch.linalg.eig(second.double())  # normal: its eigenvectors are orthogonal
        turned = torch.polar(torch.ones_like(values.real), share * values.angle())
        return ((vectors * turned[:, None]) @ vectors.mH).real.to(second)
    if kind == "normal":
        angle = torch.tensor(share * torch.pi / 2)
        return angle.cos() * first + angle.sin() * second
    raise ValueError(f"there is nothing between two keys of kind {kind}; draw a method with rotations or vectors")


def _swap(method: ReversibleAnonymizer, face: FaceBatch, keys: KeyRing, _: int, tile: int) -> Image.Image:
    if not hasattr(method, "compose"):
        raise ValueError(f"{type(method).__name__} does not split a face into identity and attributes; iFADIT does")
    face = method.fit_size(face)
    columns = [("attributes of", face.image)]
    for i, z in enumerate(method.identity(face.image)):
        code = z.expand(len(face.image), -1)
        columns.append((f"identity {i + 1}", method.compose(code, method.attributes_of(face.image), face.image)))
    return sheet(columns, tile)


def _turned(face: FaceBatch, *which: int) -> FaceBatch:
    """The faces with some of their attributes turned round."""
    attributes = face.attributes.clone()
    attributes[:, list(which)] *= -1
    return face._replace(attributes=attributes)


def _attributes(
    method: ReversibleAnonymizer, face: FaceBatch, keys: KeyRing, names: Sequence[str], tile: int
) -> Image.Image:
    _check_attributes(method, face)
    face = method.fit_size(face)
    right = torch.stack([method.key_spec.numbers(keys.right(int(s))) for s in face.sample])
    columns = [("original", face.image), ("its own", method.anonymize(face, right))]
    for at in range(method.attributes):
        columns.append((f"other {names[at]}", method.anonymize(_turned(face, at), right)))
    return sheet(columns, tile)


def _factors(
    method: ReversibleAnonymizer, face: FaceBatch, keys: KeyRing, names: Sequence[str], tile: int
) -> Image.Image:
    _check_attributes(method, face)
    face = method.fit_size(face)
    spec = method.key_spec
    right, other, wrong = (
        torch.stack([spec.numbers(draw(int(s))) for s in face.sample]) for draw in (keys.right, keys.other, keys.wrong)
    )
    saved = through_file(method.anonymize(face, right), "png")
    received = face_batch(saved, attributes=face.attributes)  # a recipient has no more than this
    asked = _turned(received, *range(method.attributes))
    openings = {
        "recovered": (received, right),
        "other password": (received, wrong),
        "one bit off": (received, spec.one_off(right)),
        "other attributes": (asked, right),
        "both wrong": (asked, wrong),
    }
    columns = [
        ("original", face.image),
        ("anonymized", saved),
        ("second password", method.anonymize(face, other)),
        *((title, method.recover(*told)) for title, told in openings.items() if told[1] is not None),
    ]
    return sheet(columns, tile)


def _check_attributes(method: ReversibleAnonymizer, face: FaceBatch) -> None:
    if not method.attributes:
        raise ValueError(f"{type(method).__name__} was built without attributes; SDN takes them as factors")
    if face.attributes.shape[1] < method.attributes:
        raise ValueError(f"expected {method.attributes} attributes a face; give the data set labels")


DRAWN = {"round-trip": _round_trip, "keys": _keys, "swap": _swap}
CONDITIONED = {"attributes": _attributes, "factors": _factors}

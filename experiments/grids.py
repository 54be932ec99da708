"""``keyveil grid``: pictures to look at: round trips, the way from one key to another, identities with attributes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import FaceBatch
from datamodules.files import write_whole
from experiments.build import build, load_method, method_spec, read_yaml
from experiments.compare import choose_faces
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.callbacks.round_trip_grid import grid_picture, sheet
from lightning_modules.keys import KeyRing

Kind = Literal["round-trip", "keys", "swap"]


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
    identity of each column's face with the attributes of each row's.

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
        picture = DRAWN[kind](made, some_faces(datamodule, faces), KeyRing.from_seed(seed), steps, tile)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    write_whole(out, file.getvalue())
    print(out)


def some_faces(datamodule: L.LightningDataModule, count: int) -> FaceBatch:
    """That many test faces, of different people first, the same on every machine."""
    batches = list(datamodule.test_dataloader())
    whole = FaceBatch(*(torch.cat(fields) for fields in zip(*batches, strict=True)))
    chosen = choose_faces(whole.identity, count)
    return FaceBatch(*(field[chosen] for field in whole))


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


DRAWN = {"round-trip": _round_trip, "keys": _keys, "swap": _swap}

"""``keyveil edit``: what the directions of SDN's styles do to anonymized faces, as a table and as pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from datamodules.batch import FaceBatch
from datamodules.files import write_whole
from experiments.build import build, load_method, method_spec, read_yaml
from experiments.chosen import by_chance
from experiments.grids import some_faces
from experiments.provenance import commit
from lightning_modules.appearance import Appearance
from lightning_modules.callbacks.round_trip_grid import sheet
from lightning_modules.carriers import through_file
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.perceptual import lpips_network
from lightning_modules.metrics.realism import frechet
from lightning_modules.metrics.recovery import ssim
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.sdn import SDN
from lightning_modules.trained import weights_hash
from lightning_modules.weights import WeightsError


def edit(
    method: Path,
    out: Path,
    weights: str | None = None,
    data: Path = Path("configs/data/lfw.yaml"),
    directions: int = 5,
    degrees: int = 2,
    faces: int = 64,
    shown: int = 1,
    batch: int = 16,
    tile: int = 128,
    seed: int = 0,
    changes: dict | None = None,
) -> None:
    """Edit SDN's anonymized faces along SeFa's directions, into edits.jsonl, edits.md and edits.png.

    One degree is as far as the styles of random passwords spread along a direction. Each direction bears the name of
    the trait that it moves most from the lowest degree to the highest, in standard deviations of the trait over the
    original faces: apparent gender and age, mouth open, smile, eyes open, turn of the head, moustache, brightness.
    Against degree 0, per degree: SSIM, LPIPS where its weights are, and `fd_face`, a Fréchet distance of features of
    the identity network, which stands in for FID and compares only at one number of faces. Pictures go through PNG.
    Faces without labels get attributes by chance.

    Args:
        method: YAML file of the method.
        out: Folder to write into.
        weights: Trained weights: a checkpoint, safetensors or a card.
        data: YAML file of the data; its test faces are edited.
        directions: How many directions, the strongest first.
        degrees: Largest degree either way.
        faces: Faces of the table.
        shown: Faces of the picture, a row a direction each.
        batch: Faces at once.
        tile: Pixels of a face in the picture.
        seed: Where the passwords come from.
        changes: Other `init_args` of the method.

    Raises:
        ValueError: If the method is no SDN, a number is too small, or there are too few faces.
    """
    if min(degrees, shown, batch) < 1:
        raise ValueError(f"degrees, shown and batch must be 1 or more, got {degrees}, {shown} and {batch}")
    made, _ = load_method(method_spec({"config": str(method), "weights": weights, "init_args": changes or {}}))
    if not isinstance(made, SDN):
        raise ValueError(f"edit moves the styles of SDN; {type(made).__name__} has none")
    datamodule = build(L.LightningDataModule, read_yaml(data)["data"], f"data {data}")
    datamodule.prepare_data()
    face = made.fit_size(some_faces(datamodule, faces))
    if len(face.image) < max(2, shown):
        raise ValueError(f"expected {max(2, shown)} test faces at least, found {len(face.image)} in {data}")
    if made.attributes and not face.attributes.shape[1]:
        face = by_chance(face, made.attributes, seed)
    found = Edits.measure(made, face, KeyRing.from_seed(seed), directions, degrees, batch)
    told = {"method": method.stem, "data": data.stem, "n": len(face.image), "size": made.size, "seed": seed}
    told |= {"changes": changes or {}, "weights": weights_hash(made), "commit": commit()}
    lines = [told | line for line in found.lines]
    drawing = io.BytesIO()
    found.drawing(face, shown, tile).save(drawing, "PNG", optimize=True)
    write_whole(out / "edits.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_whole(out / "edits.md", table(lines))
    write_whole(out / "edits.png", drawing.getvalue())
    print(table(lines))


class Edits:
    """Edited faces and what was measured on them.

    Attributes:
        lines: One entry a direction and degree.
        pictures: ``(directions, degrees, faces, 3, size, size)`` in [-1, 1].
        degrees: From the lowest to the highest.
    """

    def __init__(self, lines: list[dict[str, Any]], pictures: Tensor, degrees: list[int]) -> None:
        self.lines, self.pictures, self.degrees = lines, pictures, degrees

    @classmethod
    @torch.no_grad()
    def measure(cls, method: SDN, face: FaceBatch, ring: KeyRing, directions: int, degrees: int, batch: int) -> Edits:
        """Edit every face along every direction, one password a face."""
        key = torch.stack([method.key_spec.numbers(ring.right(int(s))) for s in face.sample]).to(method.device)
        shifts, steps = method.edit_directions(directions), list(range(-degrees, degrees + 1))
        parts = [slice(i, i + batch) for i in range(0, len(face.image), batch)]

        def edited(shift: Tensor) -> Tensor:
            made = [
                method.edit(type(face)(*(f[part].to(method.device) for f in face)), key[part], shift) for part in parts
            ]
            return through_file(torch.cat(made), "png").cpu()

        plain, appearance = edited(torch.zeros_like(shifts[0])), Appearance()
        spread = appearance(face.image).std(0).clamp(min=1e-6)
        usual, network = appearance(plain), MobileFaceNet()
        lines, pictures = [], []
        for number, shift in enumerate(track(shifts, "directions", transient=True), 1):
            row = [plain if degree == 0 else edited(degree * shift) for degree in steps]
            traits = [appearance(images) for images in row]
            name = named((traits[-1] - traits[0]).mean(0) / spread, appearance.names)
            pictures.append(torch.stack(row))
            for degree, images, trait in zip(steps, row, traits, strict=True):
                moved = dict(zip(appearance.names, ((trait - usual).mean(0)).tolist(), strict=True))
                lines.append(
                    {"direction": number, "name": name, "degree": degree, **_distances(images, plain, network)}
                    | {"moved": {trait: round(value, 4) for trait, value in moved.items()}}
                )
        return cls(lines, torch.stack(pictures), steps)

    def drawing(self, face: FaceBatch, shown: int, tile: int) -> Any:
        """A row a direction for each of some faces, a column a degree, the original before them."""
        names = [line["name"] for line in self.lines[:: len(self.degrees)]]
        rows = [(index, person) for person in range(shown) for index in range(len(names))]
        columns = [("original", torch.stack([face.image[person] for _, person in rows]))]
        for at, degree in enumerate(self.degrees):
            made = torch.stack([self.pictures[index, at, person] for index, person in rows])
            columns.append((f"{degree:+d}" if degree else "0", made))
        return sheet(columns, tile, [names[index] for index, _ in rows])


def named(moved: Float[Tensor, " traits"], names: tuple[str, ...]) -> str:
    """The trait that moved furthest, with the way it went: ``more smile``."""
    at = int(moved.abs().argmax())
    return f"{'more' if moved[at] > 0 else 'less'} {names[at]}"


def _distances(images: Tensor, plain: Tensor, network: MobileFaceNet) -> dict[str, Any]:
    """How far edited pictures are from the unedited ones."""
    found: dict[str, Any] = {"ssim": round(float(ssim(images / 2 + 0.5, plain / 2 + 0.5).mean()), 4)}
    try:
        found["lpips"] = round(float(lpips_network()(images, plain).mean()), 4)
    except WeightsError as error:
        found |= {"lpips": None, "why": str(error).partition(";")[0]}
    return found | {"fd_face": round(frechet(network, images, plain), 4)}


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown: what was edited, then one row a direction and figure, one column a degree."""
    told = lines[0]
    text = f"{told['method']} ({told['weights'] or 'untrained'}) on {told['n']} faces of {told['data']} at "
    text += f"{told['size']} px, seed {told['seed']}, commit {told['commit']}. "
    text += "One degree: the spread of random passwords' styles.\n\n"
    degrees = sorted({line["degree"] for line in lines})
    head = ["direction", "figure", *(f"{degree:+d}" if degree else "0" for degree in degrees)]
    rows = [head, ["---", "---", *["--:"] * len(degrees)]]
    for number in sorted({line["direction"] for line in lines}):
        found = {line["degree"]: line for line in lines if line["direction"] == number}
        name = found[0]["name"]
        trait = name.split(" ", 1)[1]
        for title, value in (
            ("fd_face ↓", lambda line: line["fd_face"]),
            ("SSIM ↑", lambda line: line["ssim"]),
            ("LPIPS ↓", lambda line: line["lpips"]),
            (f"change of {trait}", lambda line, trait=trait: line["moved"][trait]),
        ):
            cells = ["n/a" if value(found[d]) is None else f"{value(found[d]):.3f}" for d in degrees]
            rows.append([f"{number}: {name}", title, *cells])
    missing = sorted({line["why"] for line in lines if "why" in line})
    text += "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    return text + "".join(f"\nn/a: {why}\n" for why in missing)

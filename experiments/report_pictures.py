"""Pictures of a comparison: faces as thumbnails, and ``grid.png``."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from experiments.report_charts import uri
from experiments.report_run import Run
from lightning_modules.callbacks.round_trip_grid import GAP, HEAD, TITLES

SHOWN = ("anonymized", "recovered", "wrongly_recovered")
FACES = 6  # rows of faces in the page
THUMBNAIL = 128  # pixels
BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow says of a picture that a killed run left half


class Face(NamedTuple):
    """One tile of the page; ``uri`` is empty where the file is missing or broken."""

    title: str
    uri: str


class FaceRows(NamedTuple):
    """Faces of a data set: the original first, then the legs of each method that has any."""

    groups: list[tuple[str, list[str]]]
    rows: list[list[Face]]


def folder_name(method: str) -> str:
    """Folder of a method's pictures, the name that ``keyveil compare`` gave it."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in method)


def picture(run: Run, data: str, method: str, leg: str, sample: str) -> Image.Image | None:
    """A picture of the run in RGB; ``None`` where it is missing or broken."""
    folder = run.out / "faces" / data
    folder = folder / "original" if leg == "original" else folder / folder_name(method) / leg
    for file in sorted(folder.glob(f"{sample}.*")):
        try:
            return Image.open(file).convert("RGB")
        except BROKEN:
            continue
    return None


def samples(run: Run, data: str) -> list[str]:
    """Numbers of the faces, as in the names of the originals' files; none of a data set that is not to be shown."""
    if data in run.info.get("unshown", []):
        return []
    return sorted(file.stem for file in (run.out / "faces" / data / "original").glob("[0-9]*.*"))


def spread(names: list[str], count: int) -> list[str]:
    """At most ``count`` names, evenly over the list: neighbours are often one person.

    Example:
        >>> spread(["a1", "a2", "b1", "b2"], 2)
        ['a1', 'b1']
    """
    return [names[i * len(names) // min(count, len(names))] for i in range(min(count, len(names)))]


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return uri(buffer.getvalue(), "image/jpeg")


def _methods_with_faces(run: Run, data: str) -> dict[str, list[str]]:
    """Method → legs with pictures, of those that have any."""
    folder = run.out / "faces" / data
    legs = {
        method: [leg for leg in TITLES if any((folder / folder_name(method) / leg).glob("[0-9]*.*"))]
        for method in run.methods_of(data)
    }
    return {method: found for method, found in legs.items() if found}


def face_rows(run: Run, data: str) -> FaceRows | None:
    """The first faces of a data set with what each method made of them; ``None`` where there are none."""
    methods = _methods_with_faces(run, data)
    columns = [("", "original")] + [(m, leg) for m, legs in methods.items() for leg in SHOWN if leg in legs]
    rows = []
    for sample in spread(samples(run, data), FACES):
        row = []
        for method, leg in columns:
            image = picture(run, data, method, leg, sample)
            row.append(Face(f"{TITLES[leg]} {method} {sample}".strip(), _thumbnail(image) if image else ""))
        rows.append(row)
    if not rows:
        return None
    groups = [("", [TITLES["original"]])]
    groups += [(m, [TITLES[leg] for leg in SHOWN if leg in legs]) for m, legs in methods.items()]
    return FaceRows([group for group in groups if group[1]], rows)


def grid(run: Run, tile: int = 112) -> bytes | None:
    """``grid.png``: a block for each of two to six faces, in it a row a method and a column a leg.

    The more methods, the fewer faces: spread over the first data set that has any, and in two columns.
    """
    data = next((name for name in run.data_sets if samples(run, name) and _methods_with_faces(run, name)), None)
    if data is None:
        return None
    methods = _methods_with_faces(run, data)
    legs = [
        leg for leg in TITLES if leg != "inverted" and (leg == "original" or any(leg in of for of in methods.values()))
    ]
    shown = spread(samples(run, data), 6 if len(methods) <= 3 else 4 if len(methods) <= 8 else 2)
    font, small = ImageFont.load_default(13), ImageFont.load_default(12)
    label = 12 + int(max(font.getlength(method) for method in methods))
    width, height = label + len(legs) * (tile + GAP), HEAD + len(methods) * (tile + GAP) + 3 * GAP
    across = 2 if len(shown) > 1 else 1
    canvas = Image.new("RGB", (across * width + (across - 1) * 12, -(-len(shown) // across) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, sample in enumerate(shown):
        left, top = number % across * (width + 12), number // across * height
        draw.text((left + 4, top + HEAD // 2), data, "#5b646d", small, anchor="lm")
        for column, leg in enumerate(legs):
            x = left + label + column * (tile + GAP)
            draw.text((x + tile // 2, top + HEAD // 2), TITLES[leg], "black", font, anchor="mm")
            for row, method in enumerate(methods):
                y = top + HEAD + row * (tile + GAP)
                if column == 0:
                    draw.text((left + 4, y + tile // 2), method, "black", font, anchor="lm")
                image = picture(run, data, method, leg, sample)
                if image is None:
                    draw.rectangle((x, y, x + tile - 1, y + tile - 1), "#eef0f2")
                    draw.line((x + tile // 2 - 5, y + tile // 2, x + tile // 2 + 5, y + tile // 2), "#5b646d")
                else:
                    canvas.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

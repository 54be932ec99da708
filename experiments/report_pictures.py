"""Pictures of a comparison: charts as SVG, faces as thumbnails, and ``grid.png``."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from PIL import Image, ImageDraw, ImageFont

from experiments.report_run import Run
from lightning_modules.callbacks.round_trip_grid import GAP, HEAD, TITLES
from lightning_modules.protocol import CARRIERS, Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart; without yellow, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*"  # seven shapes and six colours: 42 methods before a pair comes twice
LEG_COLOURS = {"anonymized": "#D55E00", "recovered": "#0072B2", "wrongly_recovered": "#999999"}
LEG_NAMES = {"anonymized": "anonymized ↓", "recovered": "recovered ↑", "wrongly_recovered": "wrong key ↓"}
THEMES = {"light": ("#1b1f23", "#d8dde2"), "dark": ("#e6e9ec", "#3b434b")}  # ink, rules
SHOWN = ("anonymized", "recovered", "wrongly_recovered")
FACES = 6  # rows of faces in the page
THUMBNAIL = 128  # pixels
BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow says of a picture that a killed run left half


class Chart(NamedTuple):
    """A figure of the page.

    Attributes:
        title, text: Its head, and what it says to somebody who cannot see it.
        light, dark: The drawing as a data URI, for either colour scheme.
    """

    title: str
    text: str
    light: str
    dark: str


class Face(NamedTuple):
    """One tile of the page; ``uri`` is empty where the file is missing or broken."""

    title: str
    uri: str


class FaceRows(NamedTuple):
    """Faces of a data set: the original first, then the legs of each method that has any."""

    groups: list[tuple[str, list[str]]]
    rows: list[list[Face]]


def charts(run: Run, data: str) -> list[Chart]:
    """Trade-off and acceptance for each judge, then PSNR, and the carriers where there is more than PNG."""
    found = [_trade_off(run, data, judge) for judge in run.judges]
    found += [_acceptance(run, data, judge) for judge in run.judges]
    found += [_psnr(run, data), _carriers(run, data)]
    return [chart for chart in found if chart]


def _drawn(title: str, text: str, draw: Callable[[Axes], None], width: float, height: float) -> Chart:
    """Draw once for each colour scheme; the same run gives the same bytes."""
    uris = {}
    for theme, (ink, rule) in THEMES.items():
        style = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
            **{
                "axes.edgecolor": rule,
                "grid.color": rule,
                "axes.facecolor": "none",
                "figure.facecolor": "none",
            },
            **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
            **{
                "svg.hashsalt": "keyveil",
                "legend.frameon": False,
                "xtick.major.size": 0,
                "ytick.major.size": 0,
            },
        }
        with mpl.rc_context(style):
            canvas = Canvas(figsize=(width, height), layout="constrained")
            axes = canvas.add_subplot()
            draw(axes)
            buffer = io.BytesIO()
            canvas.savefig(buffer, format="svg", metadata={"Date": None})
        uris[theme] = _uri(buffer.getvalue(), "image/svg+xml")
    return Chart(title, text, **uris)


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _mark(run: Run, method: str) -> dict[str, str]:
    place = run.methods.index(method)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _reach(figures: Sequence[Figure], scale: float = 1) -> np.ndarray:
    """Distances from the value to both ends of its interval, ``(2, N)``; 0 where there is none."""
    ends = [
        (f.value - (f.value if f.low is None else f.low), (f.value if f.high is None else f.high) - f.value)
        for f in figures
    ]
    return scale * np.clip(np.array(ends, dtype=float).reshape(-1, 2).T, 0, None)


def _trade_off(run: Run, data: str, judge: str) -> Chart | None:
    points = []
    for method in run.methods_of(data):
        hidden, back = (run.worst(method, data, leg, judge=judge) for leg in ("anonymized", "recovered"))
        if hidden and back:
            points.append((method, hidden, back))
    if not points:
        return None
    most = max(100 * (hidden.high or hidden.value) for _, hidden, _ in points)
    right = next(edge for edge in (10, 20, 50, 100) if most <= edge or edge == 100)

    def draw(axes: Axes) -> None:
        for method, hidden, back in points:
            mark = _mark(run, method)
            axes.errorbar(
                *([100 * hidden.value], [100 * back.value], _reach([back], 100), _reach([hidden], 100)),
                **{
                    "fmt": mark["marker"],
                    "color": mark["color"],
                    "markersize": 7,
                    "elinewidth": 1,
                    "label": method,
                },
                clip_on=False,
            )
        axes.set_xlim(0, right)
        axes.set_ylim(0, 100)
        axes.set_xlabel("anonymized: accepted as the original, % (lower is better)")
        axes.set_ylabel("recovered: accepted, % (higher is better)")
        axes.grid(linewidth=0.6)
        place = {"xy": (0.02, 0.98), "xytext": (0.16, 0.86), "textcoords": "axes fraction"}
        arrow = {"arrowstyle": "->", "color": "#808890"}
        axes.annotate("better", xycoords="axes fraction", arrowprops=arrow, color="#808890", **place)
        axes.figure.legend(loc="outside lower center", ncols=2 if len(points) > 1 else 1, handletextpad=0.3)

    said = "; ".join(f"{m}: {100 * h.value:.1f} % and {100 * b.value:.1f} %" for m, h, b in points)
    text = f"Share accepted by {judge} of anonymized and of recovered faces. {said}"
    return _drawn(
        f"Anonymity against recovery, judged by {judge}",
        text,
        draw,
        4.2,
        4.3 + 0.2 * ((len(points) + 1) // 2),
    )


def _bars(
    axes: Axes,
    methods: Sequence[str],
    series: dict[str, tuple[str, list[Figure | None]]],
    scale: float,
    digits: int,
) -> None:
    """Horizontal bars with intervals: a group for each method, a bar for each series (colour, figures)."""
    thick = 0.8 / len(series)
    for number, (label, (colour, figures)) in enumerate(series.items()):
        known = [(place, figure) for place, figure in enumerate(figures) if figure]
        if not known:
            continue
        places = np.array([place for place, _ in known]) + (number - (len(series) - 1) / 2) * thick
        values = scale * np.array([figure.value for _, figure in known])
        reach = _reach([figure for _, figure in known], scale)
        axes.barh(places, values, 0.9 * thick, color=colour, label=label)
        grey = mpl.rcParams["text.color"]
        axes.errorbar(values, places, xerr=reach, fmt="none", ecolor=grey, elinewidth=0.9, capsize=1.5)
        for place, value, end in zip(places, values, reach[1], strict=True):
            axes.annotate(
                f"{value:.{digits}f}",
                (value + end, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.6)


def _acceptance(run: Run, data: str, judge: str) -> Chart | None:
    worst = {leg: [run.worst(m, data, leg, judge=judge) for m in run.methods_of(data)] for leg in LEG_NAMES}
    # A method without any figure would be an empty line.
    methods = [m for place, m in enumerate(run.methods_of(data)) if any(column[place] for column in worst.values())]
    if not methods:
        return None
    series = {
        LEG_NAMES[leg]: (LEG_COLOURS[leg], [run.worst(m, data, leg, judge=judge) for m in methods])
        for leg, column in worst.items()
        if any(column)
    }

    def draw(axes: Axes) -> None:
        _bars(axes, methods, series, 100, 1)
        axes.set(xlim=(0, 112), xticks=range(0, 101, 20), xlabel="accepted as the original person, %")
        axes.figure.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2)

    text = f"Share of faces that {judge} accepts as the original person, with 95 % intervals."
    height = 0.9 + len(methods) * (0.16 * len(series) + 0.16)
    return _drawn(f"Accepted as the original person by {judge}", text, draw, 4.2, height)


def _psnr(run: Run, data: str) -> Chart | None:
    found = {method: run.pick(method, data, "recovered", "psnr") for method in run.methods_of(data)}
    found = {method: figures[0] for method, figures in found.items() if figures}
    if not found:
        return None

    def draw(axes: Axes) -> None:
        _bars(axes, list(found), {"recovered": (LEG_COLOURS["recovered"], list(found.values()))}, 1, 1)
        axes.set_xlabel("PSNR, dB (higher is better)")
        axes.margins(x=0.12)

    text = "PSNR of recovered faces with 95 % intervals; the table has the numbers."
    return _drawn("Recovered picture against the original", text, draw, 4.2, 0.9 + 0.32 * len(found))


def _carriers(run: Run, data: str) -> Chart | None:
    """Recovery after the anonymized picture was saved in other ways; steganography of pixels dies here."""
    curves = {}
    for method in run.methods_of(data):
        found = {c: run.pick(method, data, "recovered", "psnr", carrier=c) for c in CARRIERS}
        curves[method] = {carrier: figures[0] for carrier, figures in found.items() if figures}
    curves = {method: curve for method, curve in curves.items() if curve}
    carriers = [carrier for carrier in CARRIERS if any(carrier in curve for curve in curves.values())]
    if len(carriers) < 2:
        return None

    def draw(axes: Axes) -> None:
        for method, curve in curves.items():
            places, figures = [carriers.index(carrier) for carrier in curve], list(curve.values())
            line = {
                "linewidth": 1.2,
                "markersize": 5,
                "elinewidth": 0.9,
                "label": method,
                **_mark(run, method),
            }
            axes.errorbar(places, [figure.value for figure in figures], _reach(figures), **line)
        axes.set_xticks(range(len(carriers)), carriers)
        axes.set_ylabel("PSNR, dB (higher is better)")
        axes.grid(axis="y", linewidth=0.6)
        axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)

    text = "PSNR of recovered faces by the file format of the anonymized picture; the table has the numbers."
    return _drawn("Recovery by how the picture travelled", text, draw, 4.2, 2.9 + 0.2 * ((len(curves) + 1) // 2))


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
    """Numbers of the faces, as in the names of the originals' files."""
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
    return _uri(buffer.getvalue(), "image/jpeg")


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
    """``grid.png``: a block for each of four to six faces, in it a row a method and a column a leg.

    The faces are spread over the first data set that has any; blocks stand in two columns.
    """
    data = next((name for name in run.data_sets if samples(run, name) and _methods_with_faces(run, name)), None)
    if data is None:
        return None
    methods = _methods_with_faces(run, data)
    legs = [
        leg for leg in TITLES if leg != "inverted" and (leg == "original" or any(leg in of for of in methods.values()))
    ]
    shown = spread(samples(run, data), 6 if len(methods) <= 3 else 4)
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

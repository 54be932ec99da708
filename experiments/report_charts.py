"""Charts of a comparison's figures as SVG: trade-off, acceptance, PSNR, and what became of pictures that travelled."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from experiments.report_run import TAR, Run
from lightning_modules.protocol import CARRIERS, Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart; without yellow, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*"  # seven shapes and six colours: 42 methods before a pair comes twice
LEG_COLOURS = {"anonymized": "#D55E00", "recovered": "#0072B2", "wrongly_recovered": "#CC79A7"}
LEG_NAMES = {"anonymized": "anonymized ↓", "recovered": "recovered ↑", "wrongly_recovered": "wrong key ↓"}
THEMES = {"light": ("#1b1f23", "#d8dde2"), "dark": ("#e6e9ec", "#3b434b")}  # ink, rules


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


def charts(run: Run, data: str) -> list[Chart]:
    """Trade-off and acceptance for each judge, then PSNR; and both of recovery by carrier where there are several."""
    found = [_trade_off(run, data, judge) for judge in run.judges]
    found += [_acceptance(run, data, judge) for judge in run.judges]
    found += [_psnr(run, data), _carriers(run, data, None), *(_carriers(run, data, judge) for judge in run.judges)]
    return [chart for chart in found if chart]


def drawn(
    title: str, text: str, draw: Callable[..., None], height: float, width: float = 4.2, panels: int = 1
) -> Chart:
    """Draw a chart for either colour scheme; the same run gives the same bytes.

    Args:
        title: Of the chart.
        text: Of the chart.
        draw: Called with the axes of each panel, from top to bottom.
        height: In inches.
        width: In inches.
        panels: One above the other, with one x axis.
    """
    (ink, rule), dark = THEMES["light"], THEMES["dark"]
    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), rule),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
        **{"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.axisbelow": True},
        "svg.hashsalt": "keyveil",
    }
    with mpl.rc_context(style):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(*canvas.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    other = svg.replace(ink.encode(), dark[0].encode()).replace(rule.encode(), dark[1].encode())
    return Chart(title, text, uri(svg, "image/svg+xml"), uri(other, "image/svg+xml"))


def uri(content: bytes, kind: str) -> str:
    """A file as an address that holds all of it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def mark(run: Run, method: str) -> dict[str, str]:
    """Colour and marker of a method, the same in every chart."""
    place = run.methods.index(method)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def reach(figures: Sequence[Figure], scale: float = 1) -> np.ndarray:
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
            dot = mark(run, method)
            axes.errorbar(
                *([100 * hidden.value], [100 * back.value], reach([back], 100), reach([hidden], 100)),
                **{
                    "fmt": dot["marker"],
                    "color": dot["color"],
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
    return drawn(
        f"Anonymity against recovery, judged by {judge}",
        text,
        draw,
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
        ends = reach([figure for _, figure in known], scale)
        axes.barh(places, values, 0.9 * thick, color=colour, label=label)
        grey = mpl.rcParams["text.color"]
        axes.errorbar(values, places, xerr=ends, fmt="none", ecolor=grey, elinewidth=0.9, capsize=1.5)
        for place, value, end in zip(places, values, ends[1], strict=True):
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
    return drawn(f"Accepted as the original person by {judge}", text, draw, height)


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
    return drawn("Recovered picture against the original", text, draw, 0.9 + 0.32 * len(found))


def _carriers(run: Run, data: str, judge: str | None) -> Chart | None:
    """Recovery after the anonymized picture was saved in other ways; steganography of pixels dies here.

    Its PSNR, or its acceptance by a judge.
    """
    scale, words = (1, {"metric": "psnr"}) if judge is None else (100, {"metric": TAR, "judge": judge})
    curves = {}
    for method in run.methods_of(data):
        found = {c: run.pick(method, data, "recovered", carrier=c, **words) for c in CARRIERS}
        curves[method] = {c: min(figures, key=lambda f: f.value) for c, figures in found.items() if figures}
    curves = {method: curve for method, curve in curves.items() if curve}
    carriers = [carrier for carrier in CARRIERS if any(carrier in curve for curve in curves.values())]
    if len(carriers) < 2:
        return None

    def draw(axes: Axes) -> None:
        for method, curve in curves.items():
            line(axes, run, method, [carriers.index(c) for c in curve], list(curve.values()), scale)
        axes.set_xticks(range(len(carriers)), carriers)
        axes.set_ylabel("PSNR, dB (higher is better)" if judge is None else "accepted, % (higher is better)")
        if judge:
            axes.set_ylim(0, 104)
        axes.grid(axis="y", linewidth=0.6)
        axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)

    told = "PSNR of recovered faces" if judge is None else f"Share of recovered faces that {judge} accepts"
    title = "Recovery by how the picture travelled" + (f", judged by {judge}" if judge else "")
    text = f"{told}, by the file format of the anonymized picture; the table has the numbers."
    return drawn(title, text, draw, 2.9 + 0.2 * ((len(curves) + 1) // 2))


def line(axes: Axes, run: Run, method: str, places: list[int], figures: list[Figure], scale: float) -> None:
    """A method's curve with its intervals."""
    style = {"linewidth": 1.2, "markersize": 5, "elinewidth": 0.9, "label": method, **mark(run, method)}
    axes.errorbar(places, [scale * figure.value for figure in figures], reach(figures, scale), clip_on=False, **style)

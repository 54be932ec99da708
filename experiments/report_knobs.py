"""What a method's knob does: rows of a comparison that differ in one number, as curves."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from experiments.report_charts import COLOURS, MARKERS, Chart, drawn, reach
from experiments.report_run import Run


def charts(run: Run, data: str) -> list[Chart]:
    """A chart for each knob that was turned."""
    found = [_knob(run, data, of) for of in dict.fromkeys(knob["of"] for knob in _knobs(run, data).values())]
    return [chart for chart in found if chart]


def _knobs(run: Run, data: str) -> dict[str, dict[str, Any]]:
    """The knob of each row that has one."""
    found = {method: run.rows.get((method, data), {}).get("knob") for method in run.methods_of(data)}
    return {method: knob for method, knob in found.items() if knob}


def _knob(run: Run, data: str, of: str) -> Chart | None:
    """Acceptance by each judge, and likeness to the original's picture, as one knob of a method is turned."""
    knobs = {method: knob for method, knob in _knobs(run, data).items() if knob["of"] == of}
    rows = sorted(knobs, key=lambda method: knobs[method]["value"])
    curves = {
        judge: [(knobs[m]["value"], f) for m in rows if (f := run.worst(m, data, "anonymized", judge=judge))]
        for judge in run.judges
    }
    alike = [(knobs[m]["value"], f) for m in rows for f in run.pick(m, data, "anonymized", "ssim")]
    if max(map(len, curves.values()), default=0) < 2:
        return None
    name = knobs[rows[0]]["name"]

    def draw(above: Axes, below: Axes) -> None:
        for place, (judge, points) in enumerate([*curves.items(), ("SSIM", alike)]):
            axes, scale = (below, 1) if judge == "SSIM" else (above, 100)
            dot = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            figures = [figure for _, figure in points]
            style = {"linewidth": 1.2, "markersize": 5, "elinewidth": 0.9, "label": judge, "clip_on": False, **dot}
            axes.errorbar([x for x, _ in points], [scale * f.value for f in figures], reach(figures, scale), **style)
            axes.grid(axis="y", linewidth=0.6)
        above.set_ylim(bottom=0)
        above.set_ylabel("accepted, % (lower is better)")
        above.legend(handletextpad=0.3)
        below.set_ylabel("SSIM to the original")
        below.set_xticks([knobs[method]["value"] for method in rows])
        below.set_xlabel(name)

    said = "; ".join(
        f"{judge}: " + ", ".join(f"{100 * f.value:.1f} % at {x:g}" for x, f in points)
        for judge, points in curves.items()
    )
    text = f"Share of anonymized faces that each judge accepts, by {name}. {said}"
    return drawn(f"{of}: {name}", text, draw, 4.2, panels=2)

"""Charts of what lies behind the shares: scores of each judge, D(s), and how near a wrong key may come."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes

from experiments.report_charts import LEG_COLOURS, Chart, drawn, line
from experiments.report_run import TAR, Run
from lightning_modules.metrics.diversity import local_linkability
from lightning_modules.metrics.scores import Histogram
from lightning_modules.protocol import Figure

STRANGERS, SAME, LINKED = "#808890", "#009E73", "#0072B2"
LEGS = {"anonymized": "anonymized", "recovered": "recovered", "wrongly_recovered": "wrong key"}


class Axis(NamedTuple):
    """How far keys are off: the protocol's words from the right key to an unrelated one, and their ticks."""

    label: str
    ticks: dict[str, str]


BITS = Axis(
    "bits of the key that are wrong",
    {"right": "0", "one-bit": "1"} | {f"bits-{n}": f"{n}" for n in (2, 4, 8, 16, 32)} | {"random": "random"},
)
COSINES = Axis(
    "cosine between the key and the right one",
    {"right": "1", "cosine-0.99": ".99", "cosine-0.9": ".9", "cosine-0.5": ".5", "random": "random"},
)


def charts(run: Run, data: str) -> list[Chart]:
    """Scores, D(s) and sensitivity to the key, each for every judge that has any."""
    found = [_scores(run, data, judge) for judge in run.judges]
    found += [_linkability(run, data, judge) for judge in run.judges]
    found += [_sensitivity(run, data, judge, axis) for axis in (BITS, COSINES) for judge in run.judges]
    return [chart for chart in found if chart]


def _of_methods(run: Run, data: str, judge: str, needed: str) -> dict[str, dict[str, Histogram]]:
    found = {method: run.scores.get((method, data, judge), {}) for method in run.methods_of(data)}
    return {method: scores for method, scores in found.items() if needed in scores}


def _steps(axes: Axes, scores: Histogram, **style: Any) -> None:
    """Share of the scores in each bin, in percent, from the first bin that has any to the last."""
    if not scores.n:
        return
    counts, edges = np.array(scores.counts), np.array(scores.edges)
    first, last = np.flatnonzero(counts)[[0, -1]]
    axes.stairs(100 * counts[first : last + 1] / scores.n, edges[first : last + 2], **style)


def _scores(run: Run, data: str, judge: str) -> Chart | None:
    """A panel a method: its faces against their originals, before the scores of originals."""
    found = _of_methods(run, data, judge, "anonymized")
    if not found:
        return None
    everything = [scores for of_method in found.values() for name, scores in of_method.items() if "mated" not in name]
    filled = [s.edges[place] for s in everything for place in np.flatnonzero(s.counts)] or [0.0]
    threshold = everything[0].threshold

    def draw(*panels: Axes) -> None:
        for axes, (method, scores) in zip(panels, found.items(), strict=True):
            for name, label, colour in (("impostor", "strangers", STRANGERS), ("genuine", "same person", SAME)):
                if name in scores:
                    style = {"fill": True, "alpha": 0.3, "linewidth": 0, "color": colour, "label": label}
                    _steps(axes, scores[name], **style)
            for name, label in LEGS.items():
                if name in scores:
                    style = {"color": LEG_COLOURS[name], "linewidth": 1.4, "label": label}
                    _steps(axes, scores[name], **style)
            if threshold is not None:
                axes.axvline(
                    threshold, color=mpl.rcParams["text.color"], linewidth=0.9, linestyle=":", label="threshold"
                )
            axes.set(title=method, ylabel="%")
            axes.set_ylim(0)
        step = everything[0].edges[1] - everything[0].edges[0]
        axes.set_xlim(min(filled) - step, max(filled) + 2 * step)
        axes.set_xlabel(f"similarity by {judge}: on the right of the threshold it accepts")
        _legend(panels)

    n = "; ".join(f"{method}: {scores['anonymized'].n} anonymized faces" for method, scores in found.items())
    text = f"Share of scores in bins of similarity by {judge}, a panel a method. {n}."
    return drawn(f"Scores of {judge}", text, draw, 1.0 + 1.05 * len(found), panels=len(found))


def _legend(panels: tuple[Axes, ...]) -> None:
    """One legend for all panels, of whatever any of them shows."""
    named: dict[str, object] = {}
    for axes in panels:
        named |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    where = {"loc": "outside upper left", "ncols": 3, "handlelength": 1.2, "columnspacing": 1.2}
    panels[0].figure.legend(named.values(), named.keys(), **where)


def _linkability(run: Run, data: str, judge: str) -> Chart | None:
    """A panel a method: scores across two keys, and D(s) over them."""
    found = {m: s for m, s in _of_methods(run, data, judge, "mated").items() if "non-mated" in s}
    if not found:
        return None

    def draw(*panels: Axes) -> None:
        for axes, (method, scores) in zip(panels, found.items(), strict=True):
            for name, label, colour in (("non-mated", "two people", STRANGERS), ("mated", "one person", SAME)):
                style = {"fill": True, "alpha": 0.3, "linewidth": 0, "color": colour, "label": label}
                _steps(axes, scores[name], **style)
            local = local_linkability(*(torch.tensor(scores[name].counts).float() for name in ("mated", "non-mated")))
            right = axes.twinx()
            right.stairs(local.numpy(), scores["mated"].edges, color=LINKED, linewidth=1.4)
            right.set(ylim=(0, 1.04), yticks=(0, 0.5, 1), ylabel="D(s)")
            axes.plot([], [], color=LINKED, linewidth=1.4, label="D(s)")  # for the legend
            whole = run.pick(method, data, "anonymized", "unlinkability_dsys", judge=judge)
            axes.set(title=method + (f": D_sys {whole[0].value:.3f}" if whole else ""), ylabel="%")
            axes.set_ylim(0)
        axes.set_xlabel(f"similarity by {judge} of pictures under two keys")
        _legend(panels)

    text = (
        f"Share of scores of {judge} across two keys, and how far each links them: D(s) from 0 to 1, a panel a method."
    )
    return drawn(
        f"Linkability under two keys, judged by {judge}", text, draw, 1.0 + 1.15 * len(found), panels=len(found)
    )


def _sensitivity(run: Run, data: str, judge: str, axis: Axis) -> Chart | None:
    """What is opened, by how near the key is to the right one; a cross for the worst of the single bits."""

    def curve(method: str, metric: str) -> dict[str, Figure]:
        words = {"metric": metric, "judge": judge, "reference": "same-image"}
        found = {"right": run.pick(method, data, "recovered", **words)}
        for key in list(axis.ticks)[1:]:
            found[key] = run.pick(method, data, "wrongly_recovered", key=key, **words)
        return {key: figures[0] for key, figures in found.items() if figures}

    def near(method: str) -> bool:
        return any(key not in ("right", "random") for key in curve(method, TAR))

    methods = [method for method in run.methods_of(data) if near(method)]
    if not methods:
        return None
    keys = [key for key in axis.ticks if any(key in curve(method, TAR) for method in methods)]

    def draw(accepted: Axes, similar: Axes) -> None:
        cross = {"color": mpl.rcParams["text.color"], "zorder": 3, "clip_on": False, "label": "worst single bit"}
        for method in methods:
            for axes, metric, scale in ((accepted, TAR, 100), (similar, "similarity", 1)):
                found = curve(method, metric)
                line(axes, run, method, [keys.index(key) for key in found], list(found.values()), scale)
            words = {"judge": judge, "reference": "same-image", "key": "one-bit"}
            for worst in run.pick(method, data, "wrongly_recovered", "tar_worst_bit", **words):
                accepted.plot(keys.index("one-bit"), 100 * worst.value, "x", **cross)
                cross["label"] = None  # once in the legend
        accepted.set(ylim=(0, 104), ylabel="accepted, %")
        similar.set(ylabel="similarity", xlabel=axis.label)
        similar.set_xticks(range(len(keys)), [axis.ticks[key] for key in keys])
        for axes in (accepted, similar):
            axes.grid(axis="y", linewidth=0.6)
        handles, labels = accepted.get_legend_handles_labels()
        accepted.figure.legend(handles, labels, loc="outside lower center", ncols=2, handletextpad=0.3)

    text = (
        f"Share that {judge} accepts as the very original of what keys open, and its similarity, by how far they are "
        "from the right one; the table has the numbers."
    )
    title = f"Sensitivity to the key, judged by {judge}"
    return drawn(title, text, draw, 4.2 + 0.2 * ((len(methods) + 1) // 2), panels=2)

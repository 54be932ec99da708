"""The tables of the SDN paper with our measurements of every row, its own figures beside them."""

from __future__ import annotations

from typing import NamedTuple

from experiments.glossary import entry
from experiments.published import ANONYMIZED, RECOVERED, Published
from experiments.report_run import Run
from experiments.report_table import NOTHING, Line, Notes, line_of
from lightning_modules.protocol import Figure, arrow

STAND_INS = {"lpips": ("lpips_squeeze_caffe",), "fid": ("fd_efflite0",)}
"""What is measured too, since the weights of the published metric may be missing; never under its name."""

POLLUTION = ("background_shift", "seam", "eye_shift", "hair_shift")
"""Its third table says in words what a method spoils beside the face; here it is measured."""


class Beside(NamedTuple):
    """A table whose columns are ours or published.

    Attributes:
        title: What it is about.
        head: Name of each column but the first, and whether its figures are ours.
        rows: Method, and a cell a column.
        notes: Footnotes.
    """

    title: str
    head: list[tuple[str, bool]]
    rows: list[tuple[str, list[Line]]]
    notes: list[str]


def beside(run: Run, data: str) -> list[Beside]:
    """The paper's two tables and its third, measured; nothing where no row has a published counterpart."""
    if not any(run.rows.get((method, data), {}).get("published") for method in run.methods_of(data)):
        return []
    both = [
        _both(run, data, published, leg) for published, leg in ((ANONYMIZED, "anonymized"), (RECOVERED, "recovered"))
    ]
    return [*both, _pollution(run, data)]


def _both(run: Run, data: str, published: Published, leg: str) -> Beside:
    notes, theirs = Notes(), {row[0]: row[1:] for row in published.rows}
    columns: list[tuple[str, bool, str | int]] = []  # name, ours, metric or number of the published column
    for place, name in enumerate(published.head[1:]):
        metric = _metric(name)
        columns += [(_head(found, leg), True, found) for found in (metric, *STAND_INS.get(metric, ()))]
        columns.append((name, False, place))
    rows = []
    for method in _methods(run, data, leg):
        found = theirs.get(run.rows.get((method, data), {}).get("published", ""), ())
        cells = [
            _measured(run, method, data, leg, what, notes)
            if isinstance(what, str)
            else Line(found[what] if found else NOTHING)
            for _, _, what in columns
        ]
        rows.append((method, cells))
    return Beside(published.title, [(name, ours) for name, ours, _ in columns], rows, notes.texts)


def _pollution(run: Run, data: str) -> Beside:
    notes = Notes()
    rows = [
        (method, [_measured(run, method, data, "anonymized", metric, notes) for metric in POLLUTION])
        for method in _methods(run, data, "anonymized")
    ]
    return Beside("Pollution", [(_head(metric, "anonymized"), True) for metric in POLLUTION], rows, notes.texts)


def _methods(run: Run, data: str, leg: str) -> list[str]:
    """Those with any figure of this leg."""
    return [method for method in run.methods_of(data) if any(figure.leg == leg for figure in run.of(method, data))]


def _head(metric: str, leg: str) -> str:
    return f"{entry(metric).title} {arrow(metric, leg, None)}".rstrip()


def _metric(name: str) -> str:
    """The metric of a published column's name, such as ``PSNR (dB) ↑``."""
    return name.split()[0].lower()


def _measured(run: Run, method: str, data: str, leg: str, metric: str, notes: Notes) -> Line:
    words = {"metric": metric, "leg": leg, "region": None, "group": None, "judge": None, "carrier": "png"}

    def fits(figure: Figure) -> bool:
        return all(getattr(figure, name) == word for name, word in words.items())

    return line_of(next(filter(fits, run.of(method, data)), None), notes)

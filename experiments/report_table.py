"""A comparison as tables of text: its figures, what they say in plain words, and where they come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from experiments.glossary import GLOSSARY, LEGS, entry, metric_word
from experiments.report_run import TAR, Run, slot
from lightning_modules.protocol import CARRIERS, GAPS, GROUPS, KEYS, Figure, arrow, cell

NOTHING = "—"
BOTH = ("same-image", "other-image")
NEAR = ("one-bit", "cosine-0.9")
NEAR_NOTE = "key at cosine 0.9 from the right one: a key of normal numbers has no bit to flip"


class Column(NamedTuple):
    """One column of the main table: which figures it holds.

    Attributes:
        group: Head over several columns.
        title: Its own head: the judge's name, or that of the metric.
        metric, leg, keys, references, judge: Words of the protocol; one line of a cell for each reference.
    """

    group: str
    title: str
    metric: str
    leg: str
    keys: tuple[str, ...] = ("right",)
    references: tuple[str | None, ...] = (None,)
    judge: str | None = None

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return arrow(self.metric, self.leg, self.references[0])

    def takes(self, figure: Figure) -> bool:
        """Whether this column shows a figure."""
        asked = (self.metric, self.leg, self.judge, "png", None, None)
        found = (figure.metric, figure.leg, figure.judge, figure.carrier or "png", figure.region, figure.group)
        in_key = (figure.key or "right") in self.keys
        return found == asked and in_key and figure.reference in self.references


def columns(judges: Iterable[str], attacked: Collection[str] = ()) -> list[Column]:
    """Columns of the main table, those of a judge for each of them, and those of attackers who were there.

    Args:
        judges: Names of judges.
        attacked: Metrics of the figures at hand; of attackers only these have a column.
    """
    judges = list(judges)

    def judged(
        group: str,
        metric: str,
        leg: str,
        keys: tuple[str, ...] = ("right",),
        references: tuple[str, ...] = BOTH,
    ) -> list[Column]:
        return [Column(group, judge, metric, leg, keys, references, judge) for judge in judges]

    def plain(group: str, metric: str, leg: str) -> Column:
        return Column(group, entry(metric).title, metric, leg)

    return [
        *judged("anonymized: accepted", TAR, "anonymized"),
        *judged("anonymized: rank-1", "rank1", "anonymized"),
        *judged("anonymized: similarity", "similarity", "anonymized"),
        *judged("recovered: accepted", TAR, "recovered"),
        *(plain("recovered", metric, "recovered") for metric in ("psnr", "ssim", "ms_ssim", "lpips")),
        *judged("wrong key: accepted", TAR, "wrongly_recovered", ("random",)),
        *judged("one bit off: accepted", TAR, "wrongly_recovered", NEAR),
        *judged("diversity", "diversity", "anonymized", references=("other-key",)),
        plain("anonymized", "detected", "anonymized"),
        *(plain("attacked", metric, "attacked") for metric in ("key_guess_auc",) if metric in attacked),
        *(
            column
            for metric in ("inverter_tar", "adaptive_tar")
            if metric in attacked
            for column in judged(f"attacked: {entry(metric).title}", metric, "attacked", ("none",), BOTH[:1])
        ),
    ]


class Line(NamedTuple):
    """One figure in a cell: the number, its interval, and the number of its footnote."""

    value: str = NOTHING
    interval: str = ""
    note: int | None = None


@dataclass
class Notes:
    """Footnotes of a table; a reason that comes twice has one number."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        """Number of a footnote, from 1."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


@dataclass
class Row:
    """One method: its cells (each of one or more lines), and what was spent on it."""

    method: str
    cells: list[list[Line]]
    cost: list[str]
    failed: str | None = None
    note: int | None = None


@dataclass
class Table:
    """All figures of one data set: the main table, and every other figure with a column a method."""

    data: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    others: list[tuple[str, str, list[list[Line]]]]  # section, title, a cell for each row of the main table


COST = ("trained: steps", "trained: time", "own size (px)", "faces n")


def table_of(run: Run, data: str) -> Table:
    """All figures of one data set as text."""
    methods, notes, heads = run.methods_of(data), Notes(), columns(run.judges, {f.metric for f in run.lines})
    rows, shown = [], set()
    for method in methods:
        figures, cells = run.of(method, data), []
        for column in heads:
            taken = [figure for figure in figures if column.takes(figure)]
            shown.update((method, slot(figure)) for figure in taken)
            by_reference = {figure.reference: figure for figure in taken}
            lines = [line_of(by_reference.get(reference), notes) for reference in column.references]
            # "n/a" twice for one reason, or twice nothing, is said once.
            said_twice = lines[0].value in (NOTHING, "n/a") and len(set(lines)) == 1
            cells.append(lines[:1] if said_twice else lines)
        row = run.rows.get((method, data), {})
        remark = row.get("note")
        cost = _cost(row, figures)
        failed = run.failures.get((method, data))
        rows.append(Row(method, cells, cost, failed, notes.number(remark) if remark else None))
    # What the main table has no column for: a row a figure, a column a method; of groups of people, only the gaps.
    rest: dict[tuple, dict[str, Figure]] = {}
    for method in methods:
        for figure in run.of(method, data):
            if (method, slot(figure)) not in shown and figure.group in (None, *GROUPS):
                rest.setdefault(slot(figure), {})[method] = figure
    others = []
    for found in sorted(rest.values(), key=lambda found: _order(next(iter(found.values())))):
        section, title = _title(next(iter(found.values())))
        others.append((section, title, [[line_of(found.get(method), notes)] for method in methods]))
    return Table(data, heads, rows, notes.texts, others)


def line_of(figure: Figure | None, notes: Notes) -> Line:
    """A figure in a cell; what is not there, or has no value, says so."""
    if figure is None:
        return Line()
    if figure.value is None:
        return Line("n/a", note=notes.number(figure.why or "no reason given"))
    value, whole = cell(figure, interval=False), cell(figure)
    return Line(value, whole[len(value) :].strip(), notes.number(NEAR_NOTE) if figure.key == "cosine-0.9" else None)


def _order(figure: Figure) -> tuple[bool | int, ...]:
    """Figures of the PNG file first, leg by leg, then those of each other carrier; the method's own last."""
    carriers, legs, metrics = list(CARRIERS), list(LEGS), list(GLOSSARY)
    return (
        figure.leg is None,
        carriers.index(figure.carrier or "png"),
        legs.index(figure.leg) if figure.leg else 0,
        KEYS.index(figure.key or "right"),
        metrics.index(word) if (word := metric_word(figure.metric)) in metrics else len(metrics),
    )


_KEY = {"random": "random key", "one-bit": "one bit off", "fixed": "one key for all", "shared": "one key a person"}
_KEY |= {key: f"{key.removeprefix('bits-')} bits off" for key in KEYS if key.startswith("bits-")}
_KEY |= {key: f"key at {key.replace('-', ' ')}" for key in KEYS if key.startswith("cosine-")}
_KEY |= {"attribute": "one attribute wrong"}


def _title(figure: Figure) -> tuple[str, str]:
    """Section and name of a figure that has no column of its own."""
    leg = LEGS[figure.leg] if figure.leg else "the method"
    by_file = figure.carrier not in (None, "png")
    section = f"{leg}, through {figure.carrier}" if by_file else leg
    key = figure.key if figure.leg == "wrongly_recovered" or figure.key in ("fixed", "shared") else None
    words = [figure.judge, figure.reference, _KEY.get(key, key)]
    words += ["inside the face mask"] if figure.region == "face" else []
    words += [f"by apparent {figure.group}"] if figure.group else []
    head = f"{entry(figure.metric).title} {arrow(figure.metric, figure.leg, figure.reference)}".rstrip()
    return section, ", ".join(word for word in (head, *words) if word)


def duration(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3.2 h``."""
    if seconds is None:
        return NOTHING
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cost(row: dict[str, Any], figures: list[Figure]) -> list[str]:
    """Training steps, training time, the method's picture size, and faces measured."""
    first = figures[0] if figures else None
    told = {name: row.get(name, getattr(first, name, None)) for name in ("steps", "seconds", "size")}
    # Scores of unlinkability, what speed was taken on and the single count of parameters are no faces.
    others = ("unlinkability_dsys", "images_per_s", "params", "flops")
    faces = row.get("faces") or max((f.n for f in figures if f.metric not in others), default=None)
    steps, size = (NOTHING if told[name] is None else f"{told[name]:,}" for name in ("steps", "size"))
    return [steps, duration(told["seconds"]), size, NOTHING if faces is None else f"{faces:,}"]


UNFAIR = {
    ("anonymized", TAR): "Still accepted when anonymized",
    ("recovered", TAR): "Accepted when recovered",
    ("anonymized", "detected"): "Still detected when anonymized",
    ("recovered", "detected"): "Still detected when recovered",
}
"""Shares that are compared between groups of people, and how a sentence about them begins."""


class Sentence(NamedTuple):
    """What a row of the table says in plain words."""

    method: str
    text: str
    failed: bool = False


def summary(run: Run, data: str) -> list[Sentence]:
    """One sentence a method, each share that of the judge and reference that speaks most against it."""
    return [_sentence(run, method, data) for method in run.methods_of(data)]


def strangers(run: Run, data: str) -> str:
    """How often each judge takes two people of this data set for one; empty where that was not measured."""
    found = {
        f.judge: f for method in run.methods_of(data) for f in run.pick(method, data, "original", "fmr", carrier=None)
    }
    told = ", ".join(f"{_share(figure)} by {judge}" for judge, figure in sorted(found.items()))
    return f"Two different people of this data set are taken for one in {told}." if told else ""


def _sentence(run: Run, method: str, data: str) -> Sentence:
    if why := run.failures.get((method, data)):
        return Sentence(method, f"failed: {why}", failed=True)
    hidden = run.worst(method, data, "anonymized")
    back = run.worst(method, data, "recovered")
    wrong = run.worst(method, data, "wrongly_recovered")
    if hidden is None:
        missing = [f.why for f in run.of(method, data) if f.metric == TAR and f.why]
        return Sentence(method, f"no acceptance was measured{f' ({missing[0]})' if missing else ''}.")
    text = f"{_share(hidden)} of anonymized faces are still accepted as the original person ({_by(hidden)}); "
    if back is None:
        return Sentence(method, text + "no recovery was measured." + _unfairness(run, method, data))
    text += f"{_share(back)} come back with the right key ({_by(back)})"
    text += f", {_share(wrong)} with a wrong one ({_by(wrong)}, {_KEY.get(wrong.key, wrong.key)})." if wrong else "."
    return Sentence(method, text + _unfairness(run, method, data))


def _unfairness(run: Run, method: str, data: str) -> str:
    """For each share, between which groups of people it differs most; only where even their intervals are apart."""
    told = ""
    for (leg, metric), words in UNFAIR.items():
        widest = None
        for gap in (gap for group in GROUPS for gap in run.pick(method, data, leg, GAPS[metric], group=group)):
            found = [run.pick(method, data, leg, metric, group=g, judge=gap.judge) for g in GROUPS[gap.group]]
            low, *_, high = sorted((figure for figures in found for figure in figures), key=lambda f: f.value)
            if low.high < high.low and (widest is None or gap.value > widest[0].value):
                widest = gap, high, low
        if widest is None:
            continue
        gap, high, low = widest
        judged = f", {gap.judge}" if gap.judge else ""
        told += (
            f" {words}, by apparent {gap.group}{judged}: {_share(high)} ({high.group}), {_share(low)} ({low.group})."
        )
    return told


def _share(figure: Figure) -> str:
    return cell(figure, interval=False)


def _by(figure: Figure) -> str:
    return f"{figure.judge}, {(figure.reference or '').replace('-', ' ')}"


def judge_rows(run: Run) -> list[dict[str, str]]:
    """What the table of judges says; a second line where a data set had its own threshold."""
    rows = []
    for judge in run.info["judges"]:
        low, high = judge.get("low"), judge.get("high")
        rows.append(
            {
                "name": judge["name"],
                "threshold": _decimals(judge.get("threshold")),
                "interval": f"[{low:.4f}, {high:.4f}]" if low is not None and high is not None else NOTHING,
                "far": f"{100 * judge['far']:g} %" if judge.get("far") else NOTHING,
                "pairs": f"{judge['pairs']:,}" if judge.get("pairs") else NOTHING,
                "weights": judge.get("weights") or NOTHING,
            }
        )
    known = {(row["name"], row["threshold"]) for row in rows}
    for figure in run.lines:
        place = (figure.judge, _decimals(figure.threshold))
        own = figure.metric == "adaptive_tar"  # of embeddings that it moved
        if figure.judge and figure.threshold is not None and place not in known and not own:
            known.add(place)
            rows.append(
                {
                    "name": figure.judge,
                    "threshold": f"{place[1]} (on {figure.data})",
                    **{"interval": NOTHING, "far": "0.1 %", "pairs": NOTHING},
                    "weights": figure.judge_weights or NOTHING,
                }
            )
    return rows


def _decimals(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.4f}"


def provenance(run: Run) -> list[tuple[str, str]]:
    """Where the figures come from, as pairs of a name and a text; what the run does not say is left out."""
    info, first = run.info, run.lines[0] if run.lines else None
    seconds, size = info.get("seconds"), info.get("size")
    spent = sum(row.get("spent") or 0 for row in info["rows"])
    told = {
        "run": info.get("name"),
        "command": info.get("command"),
        "config": info.get("config") or getattr(first, "config", None),
        "commit": info.get("commit") or getattr(first, "commit", None),
        "seed": info.get("seed", getattr(first, "seed", None)),
        "compared at": f"{size} × {size} pixels" if size else None,
        "started": info.get("started"),
        "took": None if seconds is None else duration(seconds),
        "hiding and opening over all runs (without inversion), and the last judging": duration(spent)
        if spent
        else None,
        "versions": ", ".join(f"{name} {word}" for name, word in info.get("versions", {}).items()),
    }
    lines = [(name, str(word)) for name, word in told.items() if word not in (None, "")]
    lines += [("attacked by", f"{attack['command']} ({attack['commit']})") for attack in info.get("attacks", [])]
    lines += [
        (f"test faces of {data}", f"{found['faces']:,} of {found['people']:,} people, pixels {found['pixels']}")
        for data, found in info["faces"].items()
    ]
    weights = {}
    for figure in run.lines:
        if figure.weights:
            weights.setdefault((figure.method, figure.weights), None)
    for row in run.info["rows"]:
        if row.get("weights"):
            weights.setdefault((row["method"], row["weights"]), None)
    lines += [(f"weights of {method}", text) for method, text in weights]
    trained = [
        (row["method"], row["data"], row["training_people"]) for row in run.info["rows"] if "training_people" in row
    ]
    return lines + [(f"who trained {method}, tested on {data}", text) for method, data, text in trained]

"""What a comparison shows: tables, a page and a grid of faces, made from its run folder alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from datamodules.files import write_whole
from experiments import report_charts, report_knobs, report_scores
from experiments import report_pictures as pictures
from experiments.glossary import GLOSSARY, REFERENCES, entry, metric_word
from experiments.published import PAPER, PUBLISHED, WARNING
from experiments.report_beside import beside
from experiments.report_run import Run
from experiments.report_table import (
    COST,
    NOTHING,
    Column,
    Line,
    Row,
    Table,
    judge_rows,
    provenance,
    strangers,
    summary,
    table_of,
)

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    for letter, safe in (
        ("\\", "\\\\"),
        ("|", "\\|"),
        ("<", "&lt;"),
        ("*", "\\*"),
        ("_", "\\_"),
        ("`", "\\`"),
    ):
        text = text.replace(letter, safe)
    return " ".join(text.split())


def _md_cell(lines: list[Line]) -> str:
    def one(line: Line) -> str:
        note = "" if line.note is None else " " + str(line.note).translate(_RAISED)
        return f"{line.value} {line.interval}".rstrip() + note

    return " / ".join(one(line) for line in lines)


def _md_table(head: Iterable[str], rows: Iterable[Iterable[str]], right: bool = True) -> list[str]:
    head = list(head)
    rule = ["---"] + ["--:" if right else "---"] * (len(head) - 1)
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *map(list, rows))] + [""]


def _md_notes(notes: list[str]) -> list[str]:
    return [f"{str(n).translate(_RAISED)} {_md(text)}  " for n, text in enumerate(notes, start=1)] + [""]


def _head(column: Column) -> str:
    return f"{column.group}{' ' if column.judge else ': '}{column.title} {column.arrow}".rstrip()


def markdown(run: Run, tables: list[Table]) -> str:
    """``table.md``."""
    lines = [f"# {_md(run.info.get('name') or 'comparison')}", ""]
    if not tables:
        lines += ["No figure was measured.", ""]
    else:
        lines += [
            "Bootstrap 95 % intervals in brackets; ↑ higher is better, ↓ lower. Two figures in a cell:",
            "against the very picture (same-image) / against other pictures of that person (other-image). "
            f"{NOTHING} was not measured.",
            "",
        ]
    for table in tables:
        lines += [f"## {_md(table.data)}", ""]
        for sentence in summary(run, table.data):
            lines.append(f"- **{_md(sentence.method)}**: {_md(sentence.text)}")
        lines += [
            "",
            "Each share above is that of the judge and the reference that speak most against the method.",
            *filter(None, [_md(strangers(run, table.data))]),
            "",
        ]
        head = ["method", *(_md(_head(column)) for column in table.columns), *COST]
        lines += _md_table(
            head,
            ([_md_name(row), *(_md_cell(lines) for lines in row.cells), *row.cost] for row in table.rows),
        )
        lines += _md_notes(table.notes)
        for found in beside(run, table.data):
            lines += [f"### {_md(table.data)}: {_md(found.title.lower())}, as in the tables of {_md(PAPER)}", ""]
            head = ["method", *(f"{_md(name)}, {'measured' if ours else 'published'}" for name, ours in found.head)]
            lines += _md_table(head, ([_md(name), *(_md_cell([line]) for line in cells)] for name, cells in found.rows))
            lines += _md_notes(found.notes)
        if table.others:
            lines += [f"### {_md(table.data)}: all other figures", ""]
            lines += _md_table(
                ["of", "figure", *(_md(row.method) for row in table.rows)],
                ([section, _md(title), *map(_md_cell, cells)] for section, title, cells in table.others),
            )
    lines += [f"## Published elsewhere ({WARNING})", ""]
    for published in PUBLISHED:
        lines += [f"{_md(published.title)}, from the tables of {_md(published.source)}:", ""]
        lines += _md_table(published.head, (map(_md, row) for row in published.rows))
    if run.info["failures"]:
        lines += ["## Failed", ""]
        lines += [f"- **{_md(f['method'])}** on {_md(f['data'])}: {_md(f['why'])}" for f in run.info["failures"]] + [""]
    if run.info["left_out"]:
        lines += ["## Left out", "", *(f"- {_md(reason)}" for reason in run.info["left_out"]), ""]
    if judges := judge_rows(run):
        lines += ["## Judges", ""]
        lines += _md_table(judges[0], ([_md(word) for word in row.values()] for row in judges), right=False)
    lines += ["## Provenance", "", *(f"- {_md(name)}: {_md(text)}" for name, text in provenance(run)), ""]
    return "\n".join(lines)


def _md_name(row: Row) -> str:
    note = "" if row.note is None else " " + str(row.note).translate(_RAISED)
    return f"{_md(row.method)}{' (failed)' if row.failed else ''}{note}"


_TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"↑": r"$\uparrow$", "↓": r"$\downarrow$", "—": "---", "°": r"$^\circ$"},
}


def latex(tables: list[Table]) -> str:
    """``table.tex``: the main tables without intervals, for ``booktabs``."""

    def tex(text: str) -> str:
        return "".join(_TEX.get(letter, letter) for letter in text)

    lines = []
    for table in tables:
        lines += [
            f"% {table.data}",
            r"\begin{tabular}{l" + "r" * (len(table.columns) + len(COST)) + "}",
            r"\toprule",
        ]
        lines.append(" & ".join(map(tex, ("method", *map(_head, table.columns), *COST))) + r" \\")
        lines.append(r"\midrule")
        for row in table.rows:
            cells = (" / ".join(line.value for line in lines_) for lines_ in row.cells)
            lines.append(" & ".join(map(tex, (row.method, *cells, *row.cost))) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def page(run: Run, tables: list[Table]) -> str:
    """``report.html``: one file that asks nobody for anything, with its style, figures and faces inside."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = {metric_word(figure.metric) for figure in run.lines}
    sections = [
        {
            "table": table,
            "summary": summary(run, table.data),
            "strangers": strangers(run, table.data),
            "groups": _groups(table.columns),
            "beside": beside(run, table.data),
            "charts": [
                chart for room in (report_charts, report_knobs, report_scores) for chart in room.charts(run, table.data)
            ],
            "faces": pictures.face_rows(run, table.data),
        }
        for table in tables
    ]
    return templates.get_template("report.html.j2").render(
        info=run.info,
        title=run.info.get("name") or "comparison",
        sections=sections,
        cost=COST,
        published=PUBLISHED,
        warning=WARNING,
        paper=PAPER,
        judges=judge_rows(run),
        provenance=provenance(run),
        glossary=[entry(word) for word in [*GLOSSARY, *sorted(words - set(GLOSSARY))] if word in words],
        references=REFERENCES,
    )


def _groups(heads: list[Column]) -> list[tuple[str, str, int]]:
    """Neighbouring columns of one group: name, arrow if all share it, number."""
    groups: list[tuple[str, str, int]] = []
    for column in heads:
        arrow_ = column.arrow if column.judge else ""
        if groups and groups[-1][:2] == (column.group, arrow_):
            groups[-1] = (column.group, arrow_, groups[-1][2] + 1)
        else:
            groups.append((column.group, arrow_, 1))
    return groups


def write_report(out: Path) -> None:
    """Write ``table.md``, ``table.tex``, ``report.html`` and (where there are faces) ``grid.png``.

    Only the run folder is read, so every number can be traced to a line of ``results.jsonl``. Each file is
    written beside and then put in its place. A run that is unfinished, or failed in parts, shows what it has.

    Args:
        out: Run folder of ``keyveil compare``.

    Raises:
        OSError: If there is no such folder, or it cannot be written.
        ValueError: If a file in it is not what the comparison writes.
    """
    out = Path(out)
    run = Run(out)
    tables = [table_of(run, data) for data in run.data_sets]
    files = {
        "table.md": markdown(run, tables).encode(),
        "table.tex": latex(tables).encode(),
        "report.html": page(run, tables).encode(),
    }
    if grid := pictures.grid(run):
        files["grid.png"] = grid
    for name, content in files.items():
        write_whole(out / name, content)

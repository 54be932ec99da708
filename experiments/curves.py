"""``keyveil curves``: what a training logged, against its steps; stages in a row, resumed ones put together."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from datamodules.files import write_whole

PANELS = 3  # in a row


class Stage(NamedTuple):
    """What one training logged.

    Attributes:
        name: Of its folder.
        points: Logged name → step → value.
    """

    name: str
    points: dict[str, dict[int, float]]

    @property
    def last(self) -> int:
        """Its last step."""
        return max(step for values in self.points.values() for step in values)


def curves(runs: Sequence[Path] = (), out: Path = Path("curves.png"), of: list[str] | None = None) -> None:
    """Draw what trainings logged: `keyveil curves runs/a runs/b --out curves.png`, and a CSV of the same.

    Args:
        runs: Folders of trainings, as plain words, in the order in which they followed one another (the stages of a
            recipe): each with the metrics.csv of Lightning's CSVLogger somewhere below. Of several, as of a run that
            went on, a later one counts from where it begins.
        out: The .png file to write.
        of: Logged names, as train/reconstruct; by default all that more than one step logged.

    Raises:
        FileNotFoundError: If a folder holds no log.
        ValueError: If there is no folder, a log is none, a name was not logged, or `out` is no .png file or its CSV may
            be a log.
    """
    if out.suffix != ".png":
        raise ValueError(f"curves are drawn into a .png file, got {out}")
    if not runs:
        raise ValueError("curves takes the folders of one training or more: keyveil curves runs/NAME --out curves.png")
    if out.with_suffix(".csv").exists() and out.stem == "metrics":
        raise ValueError(f"{out.with_suffix('.csv')} is there already, and may be a training's log: give another name")
    folders = [Path(run).resolve() for run in runs]
    several = len({folder.name for folder in folders}) < len(folders)
    stages = [
        read_stage(folder, f"{folder.parent.name}/{folder.name}" if several else folder.name) for folder in folders
    ]
    logged = sorted({name for stage in stages for name, values in stage.points.items() if len(values) > 1})
    if not logged:
        raise ValueError("nothing was logged at more than one step, so there is no curve")
    if missing := [name for name in of or [] if name not in logged]:
        raise ValueError(f"{missing[0]!r} was not logged; there are {', '.join(logged)}")
    lines = rows(stages, of or logged)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("stage", "figure", "step", "step of all", "value"), *lines])
    picture = io.BytesIO()
    draw(lines).savefig(picture, format="png", dpi=110)
    write_whole(out.with_suffix(".csv"), table.getvalue())
    write_whole(out, picture.getvalue())
    print(out)


def read_stage(run: Path, name: str) -> Stage:
    """Every log below a folder, put together, under a name.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are those of several stages, a file is not what Lightning's CSVLogger writes, or there is
            no number.
    """
    files = sorted(run.rglob("metrics.csv"), key=lambda file: (file.stat().st_mtime_ns, file))
    if not files:
        raise FileNotFoundError(f"{run} holds no metrics.csv: give the folder of a training")
    if len({file.parents[1] for file in files}) > 1:
        raise ValueError(f"{run} holds several trainings: name their folders one by one, in their order")
    points: dict[str, dict[int, float]] = {}
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                found = list(csv.DictReader(lines))
            if not found:
                continue
            begins = min(int(line["step"]) for line in found)
            for values in points.values():  # what a run that went on did again
                for step in [step for step in values if step >= begins]:
                    del values[step]
            for line in found:
                for column, word in line.items():
                    if column not in ("step", "epoch") and word and math.isfinite(value := float(word)):
                        points.setdefault(column, {})[int(line["step"])] = value
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{file} is not what Lightning's CSVLogger writes ({error})") from error
    if not any(points.values()):
        raise ValueError(f"{run} logged no number")
    return Stage(name, points)


def rows(stages: list[Stage], names: list[str]) -> list[tuple[str, str, int, int, float]]:
    """Stage, figure, step of the stage, step since the first stage began, and value."""
    found, before = [], 0
    for stage in stages:
        for name in names:
            values = sorted(stage.points.get(name, {}).items())
            found += [(stage.name, name, step, before + step, value) for step, value in values]
        before += stage.last + 1
    return found


def draw(lines: list[tuple[str, str, int, int, float]]) -> Figure:
    """A panel a figure, a colour a stage."""
    names = list(dict.fromkeys(line[1] for line in lines))
    stages = list(dict.fromkeys(line[0] for line in lines))
    across = min(PANELS, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(4.2 * across, 2.8 * down + 0.4), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for at, stage in enumerate(stages):
            shown = [line for line in lines if line[:2] == (stage, name)]
            axes.plot([line[3] for line in shown], [line[4] for line in shown], color=f"C{at}", label=stage, lw=1.2)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_xlabel("step", fontsize=8)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(stages), fontsize=8)
    return figure

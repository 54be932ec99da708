"""A run folder as a comparison leaves it, finished or not: its rows, its figures, its failures."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_modules.metrics.scores import Histogram, read_scores
from lightning_modules.protocol import Figure, direction, read_results

TAR = "tar@far=1e-3"


class Run:
    """A run folder, finished or not.

    Args:
        out: The folder; only what is in it is read.

    Raises:
        OSError: If there is no such folder.
        ValueError: If a file in it is not what the comparison writes.
    """

    def __init__(self, out: Path) -> None:
        if not out.is_dir():
            raise FileNotFoundError(f"no run folder {out}; keyveil compare makes one")
        self.out = out
        self.info = _read_info(out / "run.json")
        files = (out / "results.jsonl", out / "attacks.jsonl")
        results, attacks = (read_results(file) if file.is_file() else [] for file in files)
        self.lines = [*results, *attacks]
        self.figures: dict[tuple[str, str], dict[tuple, Figure]] = {}
        # A figure that was measured again replaces the first; a comparison has more faces than an attack on it.
        for figure in (*attacks, *results):
            self.figures.setdefault((figure.method, figure.data), {})[slot(figure)] = figure
        scores = out / "scores.jsonl"
        self.scores: dict[tuple[str, str, str], dict[str, Histogram]] = {}
        for found in read_scores(scores) if scores.is_file() else ():
            self.scores.setdefault((found.method, found.data, found.judge), {})[found.name] = found
        self.rows = {(row["method"], row["data"]): row for row in self.info["rows"]}
        self.failures = {(row["method"], row["data"]): row["why"] for row in self.info["failures"]}

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """(method, data) that ran, failed, or left figures; in the order of the run."""
        return list(dict.fromkeys([*self.rows, *self.failures, *self.figures]))

    @cached_property
    def methods(self) -> list[str]:
        """All methods, in the order of the run."""
        return list(dict.fromkeys(method for method, _ in self.pairs))

    @cached_property
    def data_sets(self) -> list[str]:
        """All data sets, in the order of the run."""
        return list(dict.fromkeys(data for _, data in self.pairs))

    @cached_property
    def judges(self) -> list[str]:
        """Names of judges, those of the run first."""
        named = [judge["name"] for judge in self.info["judges"]]
        return list(dict.fromkeys([*named, *(figure.judge for figure in self.lines if figure.judge)]))

    def methods_of(self, data: str) -> list[str]:
        """Methods that ran, or failed, on a data set."""
        return [method for method in self.methods if (method, data) in self.pairs]

    def of(self, method: str, data: str) -> list[Figure]:
        """All figures of one row."""
        return list(self.figures.get((method, data), {}).values())

    def pick(self, method: str, data: str, leg: str, metric: str, **words: Any) -> list[Figure]:
        """Figures of the whole picture and of all faces that have a value; through a PNG file unless told otherwise."""
        words = {"leg": leg, "metric": metric, "region": None, "group": None, "carrier": "png", **words}
        return [
            figure
            for figure in self.of(method, data)
            if figure.value is not None and all(getattr(figure, name) == word for name, word in words.items())
        ]

    def worst(self, method: str, data: str, leg: str, **words: Any) -> Figure | None:
        """The acceptance that speaks most against the method, over judges (or one) and references."""
        found = self.pick(method, data, leg, TAR, **words)
        return min(found, key=lambda f: direction(f.metric, f.leg, f.reference) * f.value, default=None)


def _read_info(path: Path) -> dict[str, Any]:
    info: dict[str, Any] = {"rows": [], "judges": [], "left_out": [], "failures": [], "faces": {}}
    if path.is_file():
        try:
            info.update(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not what a comparison writes: {error}") from error
    return info


def slot(figure: Figure) -> tuple:
    """What makes two figures of a method the same figure."""
    place = ("metric", "leg", "reference", "carrier", "key", "region", "group", "judge")
    return tuple(getattr(figure, name) for name in place)

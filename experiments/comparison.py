"""What one comparison asks: the keys of a file under ``configs/compare/``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.build import read_yaml
from experiments.published import ANONYMIZED
from experiments.report_pictures import folder_name

PAPER_ROWS = tuple(row[0] for row in ANONYMIZED.rows)


@dataclasses.dataclass
class Comparison:
    """What one table compares; the keys of a file under ``configs/compare/``.

    Attributes:
        methods: Row name → ``class_path`` and ``init_args``, or ``config`` (a file under ``configs/method/``) with
            ``init_args`` over it; and ``weights`` (checkpoint, safetensors or card) for what was trained. ``note`` is a
            footnote; ``published`` names its row in the tables of the SDN paper, whose figures then stand beside;
            ``knob`` (``of``, ``name``, ``value``) makes a curve of the rows that have the same ``of``.
        data: Data set name → datamodule; with ``optional: true`` it is left out, and said, where it cannot be found.
        judges: Judge name → class. None may be a loss network of a method.
        size: Pixels at which pictures are compared.
        faces: Test faces of each data set.
        carriers: File formats between the two verbs.
        other_keys: Unrelated keys that each face is also hidden under in a PNG, for diversity; one in other formats.
        wrong_keys: Random wrong keys that each face's PNG is opened with, and as many nearly right ones; other
            formats are with one.
        sensitivity: Open each face's PNG also with keys at several distances from the right one, for a curve.
        opened: Recover too, and invert. Without, anonymized faces alone are measured, which is less work where a method
            takes long.
        metrics: Name → class of a :class:`~lightning_modules.metrics.measured.RoundTripMetric` to measure beside the
            others.
        batch_size: Faces at a time.
        seed: Where keys and wrong keys come from.
        unshown: Data sets whose faces stay out of report and grid, as those of people that may not be passed on.
        allow_loss_judges: Accept a judge that is a loss network of a method.
    """

    methods: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]
    judges: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    size: int = 128
    faces: int = 64
    carriers: list[str] = dataclasses.field(default_factory=lambda: ["png"])
    other_keys: int = 1
    wrong_keys: int = 8
    sensitivity: bool = False
    opened: bool = True
    batch_size: int = 8
    seed: int = 0
    unshown: list[str] = dataclasses.field(default_factory=list)
    allow_loss_judges: bool = False

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read a file.

        Raises:
            ValueError: If a key is unknown or missing.
        """
        found, known = read_yaml(path), [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(found) - set(known)):
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; a comparison knows {', '.join(known)}")
        if missing := sorted({"methods", "data", "judges"} - set(found)):
            raise ValueError(f"{path}: the key {missing[0]!r} is missing")
        if strange := sorted(set(found.get("unshown") or []) - set(found["data"])):
            raise ValueError(f"{path}: there is no data set {strange[0]!r} to leave unshown")
        for name, method in found["methods"].items():
            if "," in name:
                raise ValueError(f"{path}: {name!r} could not be asked for by --only; give it a name without a comma")
            if method.get("published", PAPER_ROWS[0]) not in PAPER_ROWS:
                raise ValueError(f"{path}: `published` of {name!r} must be one of {', '.join(PAPER_ROWS)}")
            knob = method.get("knob", {"of": "", "name": "", "value": 0})
            if set(knob) != {"of", "name", "value"} or not isinstance(knob["value"], int | float):
                raise ValueError(f"{path}: the knob of {name!r} must have of, name and value, a number")
        names = [folder_name(name) for name in found["methods"]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path}: two methods would share the folder {twice[0]!r}; give them names apart")
        return cls(**found)

    def chosen(self, only: str | None) -> list[str]:
        """Names of the methods that ``only`` asks for, with commas between them; all, where it asks for none.

        Raises:
            ValueError: If there is no such method.
        """
        names = [name.strip() for name in (only or "").split(",") if name.strip()] or list(self.methods)
        if unknown := [name for name in names if name not in self.methods]:
            raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(self.methods)}")
        return names

"""The words of the protocol, and :class:`Figure`, one line of ``results.jsonl``: all that a table reads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

METRICS = (
    *("tar@far=1e-3", "fmr", "tar_worst_bit", "similarity", "rank1", "id_distance"),
    *(
        "psnr",
        "ssim",
        "ms_ssim",
        "lpips",
        "pieapp",
        "fid",
        "kid",
        "fd_face",
        "fd_efflite0",
        "lpips_squeeze_caffe",
    ),
    *(
        "bit_exact",
        "diversity",
        "diversity_distance",
        "unlinkability_dsys",
        "detected",
        "box_shift",
        "landmark_shift",
        "pose_deg",
    ),
    *("expression_agree", "eyes_agree", "gender_agree", "age_mae", "attribute_agree"),
    *("background_shift", "seam", "eye_shift", "hair_shift"),
    *("known_plaintext@N", "known_person", "key_guess_auc", "inverter_tar", "adaptive_tar"),
    *("tar_gap", "detected_gap"),
    *("flops", "params", "images_per_s", "peak_memory", "overhead"),
    *("peak_share", "plain_share", "data_wait", "scaling", "memory_growth"),
)
"""Names of figures; ``known_plaintext@N`` is written with its number of pairs: ``known_plaintext@10``."""

OWN = "x_"
"""Begins the name of a figure that is not of the protocol, of somebody's own metric."""

LEGS = ("original", "anonymized", "recovered", "wrongly_recovered", "inverted", "attacked")
"""Which picture is measured."""

REFERENCES = ("same-image", "other-image", "other-key")
"""What it is compared with: the very picture that was anonymized, another picture of that person, or
(diversity) the same picture anonymized under another key."""

CARRIERS = ("png", "jpeg95", "jpeg75", "jpeg50", "webp80", "half", "noise1", "photo", "latent", "sealed")
"""How the anonymized picture travelled to the one who recovers it."""

KEYS = (
    *("right", "random", "one-bit", "bits-2", "bits-4", "bits-8", "bits-16", "bits-32", "attribute"),
    *("cosine-0.5", "cosine-0.9", "cosine-0.99", "fixed", "shared", "none"),
)
"""The key of a leg; ``bits-4`` is four bits off, ``random`` about half of them. A key of normal numbers has no
bit to flip and is tried at a cosine instead. Attackers have none: ``fixed`` where all pictures share one, as after a
nonce that came twice; ``shared`` where those of a person do, as along a clip's track."""

REGIONS = ("picture", "face")
"""Where a figure of a picture is taken: everywhere, or inside the face mask."""

GROUPS = {"gender": ("women", "men"), "age": ("under 40", "40 and older")}
"""Groups of faces by what the original appears to be, for fairness."""

GAPS = {"tar@far=1e-3": "tar_gap", "detected": "detected_gap"}
"""Share that is told group by group → the difference between the groups with the most and the least of it."""

IDENTITY_METRICS = frozenset({"tar@far=1e-3", "tar_worst_bit", "similarity", "rank1", "id_distance", "tar_gap"})
"""Figures that mean nothing without a judge and a reference."""

SHARES = frozenset(
    {"tar@far=1e-3", "fmr", "tar_worst_bit", "rank1", "bit_exact", "diversity", "detected", "tar_gap", "detected_gap"}
    | {"known_plaintext@N", "known_person", "inverter_tar", "adaptive_tar"}
    | {"expression_agree", "eyes_agree", "gender_agree", "attribute_agree"}
)
"""Figures that are shares of faces, shown in percent."""

_ALIKE = frozenset({"tar@far=1e-3", "similarity", "rank1"})
_HIGHER = frozenset(
    {"psnr", "ssim", "ms_ssim", "bit_exact", "diversity", "detected", "images_per_s"}
    | {"peak_share", "plain_share", "scaling"}
    | {"expression_agree", "eyes_agree", "gender_agree", "attribute_agree"}
)
_PERCEPTUAL = frozenset({"psnr", "ssim", "ms_ssim", "lpips", "pieapp", "lpips_squeeze_caffe"})


def _metric_word(metric: str) -> str:
    """``known_plaintext@10`` → ``known_plaintext@N``; every other name as it is."""
    return re.sub(r"^known_plaintext@[1-9]\d*$", "known_plaintext@N", metric)


def is_share(metric: str) -> bool:
    """Whether a figure is a share of faces."""
    return _metric_word(metric) in SHARES


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number with all that is needed to trace it.

    Args:
        method, data, config, commit, weights, seed: Filled in by whoever runs the comparison
            (``dataclasses.replace``); ``weights`` is the method's, as ``"sha256:…"``.
        judge: Name of the network that judged; ``None`` where none is asked.
        leg, reference, carrier, key: Words of this module; ``None`` where the figure has none (``params``).
        metric: One of :data:`METRICS`, or a name of one's own that begins with ``x_``.
        value: The figure; ``None`` where it is not available, and then ``why`` says so.
        low, high: Bootstrap 95 % interval.
        n: Number of faces (of scores, for ``unlinkability_dsys``).
        threshold: Accepting similarity of the judge, where the figure uses one.
        why: Reason of a missing value.
        region: ``"face"`` for a figure taken inside the mask.
        group: Of whose faces it is, a word of :data:`GROUPS`; for a gap, between whose: ``"gender"`` or ``"age"``.
        judge_weights, steps, seconds, faces, size: Judge's hash; and of the run: training steps, seconds of
            training, training faces, picture size in pixels. Left out of the line where they are ``None``.

    Raises:
        ValueError: If a word is not of the protocol, a number is not finite, or a value misses without a
            reason.

    Example:
        >>> Figure(metric="psnr", value=28.9, leg="recovered", n=100).carrier
        'png'
    """

    method: str = ""
    data: str = ""
    judge: str | None = None
    leg: str | None = None
    reference: str | None = None
    carrier: str | None = "png"
    key: str | None = "right"
    metric: str
    value: float | int | None
    low: float | int | None = None
    high: float | int | None = None
    n: int
    threshold: float | int | None = None
    config: str = ""
    commit: str = ""
    weights: str | None = None
    seed: int = 0
    why: str | None = None
    region: str | None = None
    group: str | None = None
    judge_weights: str | None = None
    steps: int | None = None
    seconds: float | int | None = None
    faces: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        known = _metric_word(self.metric) in METRICS and self.metric != "known_plaintext@N"
        if not known and not self.metric.startswith(OWN):
            told = f"the protocol has {', '.join(METRICS)}; a name of your own begins with {OWN}"
            raise ValueError(f"unknown metric {self.metric!r}; {told}")
        for name, words in (
            ("leg", LEGS),
            ("reference", REFERENCES),
            ("carrier", CARRIERS),
            ("key", KEYS),
            ("region", REGIONS),
            ("group", (*GROUPS, *(word for group in GROUPS.values() for word in group))),
        ):
            word = getattr(self, name)
            if word is not None and word not in words:
                raise ValueError(f"unknown {name} {word!r}; the protocol has {', '.join(words)}")
        if self.metric in IDENTITY_METRICS and not (self.judge and self.reference):
            raise ValueError(
                f"{self.metric!r} needs a judge and a reference, got {self.judge!r} and {self.reference!r}"
            )
        for name in ("value", "low", "high", "threshold", "seconds"):
            number = getattr(self, name)
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{name} of {self.metric!r} must be a number, got {number!r}")
            if not math.isfinite(number):
                raise ValueError(f"{name} of {self.metric!r} is {number}; write null with a reason in 'why'")
        if (self.value is None) != (self.why is not None):
            raise ValueError(
                f"{self.metric!r}: a missing value needs a reason in 'why', and only a missing value has one"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"interval of {self.metric!r} is upside down: low {self.low} > high {self.high}")
        if self.n < 0:
            raise ValueError(f"n of {self.metric!r} must be 0 or more, got {self.n}")

    def to_json(self) -> str:
        """One line of ``results.jsonl``, without its line end."""
        line = {name: value for name, value in asdict(self).items() if value is not None or name not in _OPTIONAL}
        return json.dumps(line, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Figure:
        """Read one line.

        Raises:
            ValueError: If the line is not JSON, a field is missing or unknown, or a word is not of the
                protocol.
        """
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object with a figure, got {type(row).__name__}")
        if unknown := row.keys() - _FIELDS.keys():
            raise ValueError(f"unknown field {', '.join(sorted(unknown))}; a figure has {', '.join(_FIELDS)}")
        if missing := [name for name, field in _FIELDS.items() if field.default is MISSING and name not in row]:
            raise ValueError(f"a figure needs the field {', '.join(missing)}")
        return cls(**row)


_FIELDS = {field.name: field for field in fields(Figure)}
_OPTIONAL = frozenset({"why", "region", "group", "judge_weights", "steps", "seconds", "faces", "size"})


def read_results(path: str | Path) -> list[Figure]:
    """Read ``results.jsonl``; a last line cut short by a killed run is dropped.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a whole line is not a figure, naming the file and the line.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    figures = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            figures.append(Figure.from_json(line))
        except ValueError as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
    return figures


def append_results(path: str | Path, figures: Iterable[Figure]) -> None:
    """Append figures in one write, so that two runs may share a file.

    A half line left by a killed run is removed.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(figure.to_json() + "\n" for figure in figures).encode()
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        tail = file.read(size).rpartition(b"\n")[2]
        if tail:
            try:
                json.loads(tail)
                text = b"\n" + text
            except ValueError:
                file.truncate(size - len(tail))
        file.write(text)
        file.flush()


def direction(metric: str, leg: str | None = None, reference: str | None = None) -> int:
    """Which way is better: +1 higher, -1 lower, 0 neither.

    An anonymized or wrongly recovered face should be unlike the original to a judge, a recovered one like it;
    two anonymizations of a face under two keys should be unlike each other. Nothing is known of a metric that is not
    of the protocol.
    """
    if metric.startswith(OWN) or metric == "fmr":  # of the data set, not of a method
        return 0
    if metric in _ALIKE or metric == "id_distance":
        like = leg in ("recovered", "inverted") and reference != "other-key"
        return (1 if like else -1) * (-1 if metric == "id_distance" else 1)
    if metric in _PERCEPTUAL and leg in ("wrongly_recovered", "attacked"):
        return 0
    return 1 if metric in _HIGHER else -1


def arrow(metric: str, leg: str | None = None, reference: str | None = None) -> str:
    """``"↑"``, ``"↓"`` or ``""`` for the head of a column."""
    return {1: "↑", -1: "↓", 0: ""}[direction(metric, leg, reference)]


def _number(metric: str, value: float | int) -> str:
    if is_share(metric):
        return f"{100 * value:.1f}"
    if metric in ("flops", "params", "peak_memory", "memory_growth"):
        for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= scale:
                return f"{value / scale:.1f} {letter}"
        return f"{value:.0f}"
    if metric in ("psnr", "fid", "pose_deg", "age_mae", "images_per_s"):
        return f"{value:.2f}"
    return f"{value:.3f}"


def cell(figure: Figure, interval: bool = True) -> str:
    """The figure as a table shows it: shares in percent, interval in brackets, missing values with a reason.

    Example:
        >>> cell(Figure(metric="psnr", value=28.913, low=28.5, high=29.25, leg="recovered", n=10))
        '28.91 [28.50, 29.25]'
    """
    if figure.value is None:
        return f"n/a ({figure.why})"
    text = _number(figure.metric, figure.value)
    if is_share(figure.metric):
        text += " %"
    if interval and figure.low is not None and figure.high is not None:
        text += f" [{_number(figure.metric, figure.low)}, {_number(figure.metric, figure.high)}]"
    return text

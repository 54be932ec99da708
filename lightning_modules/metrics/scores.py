"""Histograms of a judge's similarities: the distributions behind shares, a threshold and D(s)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.metrics.diversity import FEWEST, linkability, two_keys
from lightning_modules.metrics.identity import BLOCK, Embeddings, strangers_of

NAMES = ("genuine", "impostor", "anonymized", "recovered", "wrongly_recovered", "mated", "non-mated")
"""What is compared: two originals of one person; of two people; the picture of a leg (of all random wrong keys) with
the very original it was made from; anonymized pictures across two keys, of one person and of two."""

BINS, SPAN = 80, 2.0  # unit vectors: cosines lie in [-1, 1], distances in [0, 2]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Scores of one judge, counted; one line of ``scores.jsonl``.

    Args:
        method, data: Filled in by whoever runs the comparison (``dataclasses.replace``).
        judge: Whose similarities they are.
        name: One of :data:`NAMES`.
        edges: Of the bins, rising; one more than there are counts.
        counts: Scores in each bin; the outer bins also hold what lies beyond them.
        threshold: Accepting similarity of the judge, if it has one.

    Raises:
        ValueError: If the name is not known, or edges and counts do not fit.
    """

    method: str = ""
    data: str = ""
    judge: str
    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown scores {self.name!r}; there are {', '.join(NAMES)}")
        rising = all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False))
        if len(self.edges) != len(self.counts) + 1 or not self.counts or not rising:
            raise ValueError(f"{self.name!r} has {len(self.counts)} counts and needs that many rising edges and one")
        if not all(map(math.isfinite, self.edges)) or min(self.counts) < 0:
            raise ValueError(f"{self.name!r} needs finite edges, and counts of 0 or more")

    @property
    def n(self) -> int:
        """Number of scores."""
        return sum(self.counts)

    def to_json(self) -> str:
        """One line of ``scores.jsonl``, without its line end."""
        return json.dumps({**asdict(self), "n": self.n}, ensure_ascii=False, allow_nan=False)


def read_scores(path: str | Path) -> list[Histogram]:
    """Read ``scores.jsonl``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line is not a histogram, naming the file and the line.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row = {field.name: row[field.name] for field in fields(Histogram)}
            found.append(Histogram(**{**row, "edges": tuple(row["edges"]), "counts": tuple(row["counts"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a histogram of scores ({error})") from error
    return found


def histograms(faces: Embeddings) -> list[Histogram]:
    """All scores of :data:`NAMES` that there are, counted.

    The edges are the same for every method: 80 bins over the similarities that unit vectors can have, up to that of a
    picture with itself (1 for a cosine, 0 for a distance). Those across two keys have the bins of
    :func:`~lightning_modules.metrics.diversity.linkability` instead, and are left out where that figure is.
    """
    top = float(faces.paired("original", "original").max().round() + 0.0)  # + 0: of a distance it would be -0
    edges = torch.linspace(top - SPAN, top, BINS + 1, dtype=torch.float64)
    scores = {
        "genuine": _genuine(faces),
        "impostor": strangers_of(faces.judge, faces.pictures["original"], faces.person),
        **{leg: faces.paired(leg, "original") for leg in ("anonymized", "recovered") if leg in faces.pictures},
    }
    if wrong := faces.tries("wrongly_recovered"):
        scores["wrongly_recovered"] = torch.cat([faces.paired(name, "original") for name in wrong])
    counted = {name: (edges, _count(found, edges)) for name, found in scores.items() if len(found)}
    mated, strangers = two_keys(faces)
    if min(len(mated), len(strangers)) >= FEWEST:
        linked = linkability(mated, strangers)
        counted |= {"mated": (linked.edges, linked.mated), "non-mated": (linked.edges, linked.strangers)}
    return [
        Histogram(
            **{"judge": faces.judge.name, "name": name, "threshold": faces.threshold},
            edges=tuple(round(edge, 6) for edge in bins.tolist()),
            counts=tuple(int(count) for count in counts),
        )
        for name, (bins, counts) in counted.items()
    ]


def _genuine(faces: Embeddings) -> Tensor:
    """Similarities of all pairs of originals of one person."""
    originals, person, scores = faces.pictures["original"], faces.person, []
    for block in torch.arange(len(person)).split(BLOCK):
        pairs = (person[block][:, None] == person) & (block[:, None] < torch.arange(len(person)))
        scores.append(faces.judge.similarity(originals[block], originals)[pairs])
    return torch.cat(scores)


def _count(scores: Tensor, edges: Tensor) -> Tensor:
    inner = edges[1:-1].contiguous()
    return torch.bincount(torch.bucketize(scores.double(), inner, right=True), minlength=len(edges) - 1)

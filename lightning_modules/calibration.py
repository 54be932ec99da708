"""From which similarity on a judge says "the same person": calibrated once at a stated false-accept rate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from datamodules.files import write_whole
from lightning_modules.judges import Judge

CALIBRATION = Path(__file__).parent / "weights" / "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A judge's threshold: it accepts two faces as one person when their similarity is above it.

    Attributes:
        threshold: Accepting similarity, in the judge's own measure.
        far: Share of impostor pairs above it, the false-accept rate asked for.
        pairs: Number of impostor pairs it was taken from.
        low: Lower end of its bootstrap 95 % interval.
        high: Upper end.
    """

    threshold: float
    far: float
    pairs: int
    low: float
    high: float


def calibrate(
    scores: Float[ndarray, " pairs"],
    far: float = 1e-3,
    people: Int[ndarray, "pairs 2"] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Calibration:
    r"""Threshold that at most a share ``far`` of impostor pairs exceeds.

    The threshold is the :math:`(\lfloor far \cdot n \rfloor + 1)`-th highest score. Its interval comes from
    drawing *people* with replacement, since the pairs of one person are not independent: a pair counts as
    often as its people were drawn.

    Args:
        scores: Similarities of pairs of different people.
        far: False-accept rate in (0, 1).
        people: Numbers of the two people of each pair; ``None`` takes every pair as independent.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are fewer than ``1 / far`` pairs, a score is not a number, or ``far`` is no rate.

    Example:
        >>> calibrate(np.arange(10_000) / 10_000, far=0.01).threshold
        0.9899
    """
    scores = np.asarray(scores, np.float64)
    if not 0 < far < 1:
        raise ValueError(f"expected a false-accept rate between 0 and 1, got {far}")
    if len(scores) * far < 1:
        raise ValueError(f"a rate of {far:g} needs at least {1 / far:.0f} impostor pairs, got {len(scores)}")
    if not np.isfinite(scores).all():
        raise ValueError("expected similarities that are numbers, got NaN or infinity among them")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    threshold = float(ranked[int(far * len(scores))])

    draw = np.random.default_rng(seed)
    if people is None:
        # Drawing n of n pairs with replacement takes each of them about Poisson(1) times.
        top = order[: min(len(order), int(far * len(scores) * 3) + 100)]
        found = [_weighted(ranked, draw.poisson(1.0, len(top)), far * draw.poisson(len(scores))) for _ in range(draws)]
    else:
        people = np.unique(people, return_inverse=True)[1].reshape(-1, 2)
        count = people.max() + 1
        pairs_of = np.zeros((count, count))
        np.add.at(pairs_of, (people[:, 0], people[:, 1]), 1)
        top = people[order[: min(len(order), int(far * len(scores) * 10) + 100)]]
        found = []
        for _ in range(draws):
            times = np.bincount(draw.integers(count, size=count), minlength=count)
            found.append(_weighted(ranked, times[top[:, 0]] * times[top[:, 1]], far * (times @ pairs_of @ times)))
    low, high = np.quantile(found, [0.025, 0.975])
    return Calibration(threshold, far, len(scores), float(low), float(high))


def _weighted(ranked: Float[ndarray, " pairs"], weights: Int[ndarray, " top"], allowed: float) -> float:
    """Highest score at which the pairs above it weigh no more than ``allowed``."""
    above = np.searchsorted(np.cumsum(weights), allowed, side="right")
    return float(ranked[min(above, len(weights) - 1)])


def impostor_pairs(
    similarity: Float[ndarray, "faces faces"], identity: Int[ndarray, " faces"]
) -> tuple[Float[ndarray, " pairs"], Int[ndarray, "pairs 2"]]:
    """All pairs of faces of different people: their similarities and their two people."""
    a, b = np.triu_indices(len(identity), k=1)
    differ = identity[a] != identity[b]
    a, b = a[differ], b[differ]
    return similarity[a, b], np.stack([identity[a], identity[b]], axis=1)


def load_calibration(judge: Judge, path: str | Path = CALIBRATION) -> Calibration:
    """The committed calibration of a judge.

    Args:
        judge: Judge with the weights at hand.
        path: File of :func:`save_calibration`.

    Raises:
        ValueError: If the judge was not calibrated, or with other weights.
        OSError: If the file cannot be read.
    """
    entry = _read(Path(path)).get(judge.name)
    if entry is None:
        raise ValueError(f"the judge {judge.name!r} has no threshold yet; calibrate it on LFW test people")
    if entry["weights"] != judge.weights:
        raise ValueError(
            f"the threshold of {judge.name!r} was calibrated with other weights "
            f"({entry['weights'][:20]}…, here {judge.weights[:20]}…); calibrate it again"
        )
    return Calibration(**{name: entry[name] for name in ("threshold", "far", "pairs", "low", "high")})


def save_calibration(
    judge: Judge, calibration: Calibration, data: str, command: str, path: str | Path = CALIBRATION
) -> None:
    """Write a judge's calibration into the file, in the place of an older one of its name.

    Args:
        judge: Judge that was calibrated.
        calibration: What came out.
        data: Name of the faces it was taken from, ``"lfw-test"``.
        command: Command that made it.
        path: File; made if it is not there.
    """
    path = Path(path)
    entries = _read(path) if path.is_file() else {}
    entries[judge.name] = {
        "judge": judge.name,
        "weights": judge.weights,
        "data": data,
        "pairs": calibration.pairs,
        "far": calibration.far,
        "threshold": round(calibration.threshold, 6),
        "low": round(calibration.low, 6),
        "high": round(calibration.high, 6),
        "command": command,
    }
    text = json.dumps([entries[name] for name in sorted(entries)], indent=2)
    write_whole(path, text + "\n")


def _read(path: Path) -> dict[str, dict]:
    return {entry["judge"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}

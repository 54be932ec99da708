"""How good the judges are, and their thresholds: LFW view 2, and calibration on LFW's test people."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from datamodules.archives import cache_folder, progress
from datamodules.cache import AlignedFaces, aligned_faces
from datamodules.datasets import LFW
from datamodules.files import write_whole
from datamodules.sources import find_root
from datamodules.splits import split_of
from experiments.provenance import commit
from lightning_modules.calibration import CALIBRATION, calibrate, impostor_pairs, save_calibration
from lightning_modules.judges import VERSION, Dlib, FaceRes, InsightFace, Judge, OnnxJudge, OwnNetwork

SIZE = 256  # of the aligned crops, in pixels
_FOLDS, _SIDE = 10, 300  # view 2: folds, and same (then different) pairs in each

Device = Literal["cpu", "cuda"]


class Pair(NamedTuple):
    """One line of LFW's list: two files within the data set, and whether they show one person."""

    first: str
    second: str
    same: bool


def lfw_view2(
    judges: tuple[str, ...] = ("mobilefacenet", "dlib", "faceres"),
    root: str | None = None,
    out: str = "docs/results/lfw-view2/results.jsonl",
    limit: int | None = None,
    processes: int = 1,
    device: Device = "cpu",
) -> list[dict[str, Any]]:
    """Verification accuracy on LFW view 2: ten folds, the threshold of each chosen on the other nine.

    Args:
        judges: mobilefacenet, dlib, faceres, insightface, or paths of ArcFace-type ONNX files.
        root: Folder with LFW and its pairs.txt; None looks in KEYVEIL_DATA, data and ../shared/data.
        out: JSON lines to write, one a judge; an older line of the same judge is replaced.
        limit: Take only so many pairs, spread over all folds; for a quick look. None takes all 6,000.
        processes: Processes for dlib.
        device: Where the others run.

    Raises:
        FileNotFoundError: LFW or pairs.txt is not there.
        ValueError: A judge is unknown, or the pairs are not those of view 2.
    """
    chosen = [make_judge(name, processes, device) for name in judges]  # first, so that a mistake costs no time
    made_by = commit()
    pairs = _limited(read_pairs(find_root("LFW's pairs", root, ("pairs.txt",), "download pairs.txt")), limit)
    lfw = LFW(root)
    wanted = {file for pair in pairs for file in pair[:2]}
    faces = _faces(lfw, wanted if limit else wanted | _test_files(lfw))
    row = {picture.file: number for number, picture in enumerate(faces.pictures)}
    # A pair's fold is its place in the list; a pair with a picture that could not be aligned is left out.
    kept = [
        (row[pair.first], row[pair.second], pair.same, number * _FOLDS // len(pairs))
        for number, pair in enumerate(pairs)
        if pair.first in row and pair.second in row
    ]
    a, b, same, fold = (np.array(column) for column in zip(*kept, strict=True))
    lines = []
    for judge in chosen:
        embedded = torch.from_numpy(embeddings(judge, faces))
        scores = np.array(
            [judge.similarity(embedded[i : i + 1], embedded[j : j + 1]).item() for i, j in zip(a, b, strict=True)]
        )
        right, thresholds = cross_validate(scores, same, fold)
        low, high = _bootstrap(right)
        lines.append(
            {
                "method": None,
                "data": "lfw-view2" if limit is None else f"lfw-view2[{len(kept)}]",
                "judge": judge.name,
                "metric": "accuracy",
                "value": float(right.mean()),
                "low": low,
                "high": high,
                "n": len(kept),
                "threshold": float(thresholds.mean()),
                "same": float(scores[same].mean()),
                "different": float(scores[~same].mean()),
                "weights": judge.weights,
                "commit": made_by,
                "command": "keyveil judges verify",
            }
        )
        _write(out, lines[-1])
        print(
            f"{judge.name}: {right.mean():.2%} [{low:.2%}, {high:.2%}] of {len(kept)} pairs, "
            f"threshold {thresholds.mean():.3f}"
        )
    return lines


def calibrate_all(
    judges: tuple[str, ...] = ("mobilefacenet", "dlib", "faceres"),
    root: str | None = None,
    far: float = 1e-3,
    out: str = "docs/results/judges/results.jsonl",
    calibration: str = str(CALIBRATION),
    processes: int = 1,
    device: Device = "cpu",
) -> list[dict[str, Any]]:
    """Take each judge's threshold at a false-accept rate from all impostor pairs of LFW's test people.

    Args:
        judges: mobilefacenet, dlib, faceres, insightface, or paths of ArcFace-type ONNX files.
        root: Folder with LFW; None looks in KEYVEIL_DATA, data and ../shared/data.
        far: False-accept rate.
        out: JSON lines to write: the share of genuine pairs accepted at that threshold.
        calibration: File of thresholds to write; the one that the package reads unless told otherwise.
        processes: Processes for dlib.
        device: Where the others run.

    Raises:
        FileNotFoundError: LFW is not there.
        ValueError: A judge is unknown.
    """
    chosen = [make_judge(name, processes, device) for name in judges]  # first, so that a mistake costs no time
    made_by = commit()
    lfw = LFW(root)
    test = _test_files(lfw)
    try:
        pairs = find_root("LFW's pairs", root, ("pairs.txt",), "download pairs.txt")
        wanted = test | {file for pair in read_pairs(pairs) for file in pair[:2]}  # one cache serves both verbs
    except FileNotFoundError:
        wanted = test
    faces = _faces(lfw, wanted)
    rows = [number for number, picture in enumerate(faces.pictures) if picture.file in test]
    people = np.unique([faces.pictures[number].person for number in rows], return_inverse=True)[1]
    lines = []
    for judge in chosen:
        embedded = torch.from_numpy(embeddings(judge, faces)[rows])
        similarity = judge.similarity(embedded, embedded).numpy()
        scores, who = impostor_pairs(similarity, people)
        found = calibrate(scores, far, who)
        command = "keyveil judges calibrate"
        save_calibration(judge, found, "lfw-test", command, calibration)
        genuine, whose = _genuine(similarity, people)
        accepted = genuine > found.threshold
        low, high = _bootstrap(accepted, whose)
        lines.append(
            {
                "method": None,
                "data": "lfw-test",
                "judge": judge.name,
                "metric": f"tar@far={far:.0e}".replace("e-0", "e-"),
                "value": float(accepted.mean()),
                "low": low,
                "high": high,
                "n": len(genuine),
                "threshold": found.threshold,
                "threshold_low": found.low,
                "threshold_high": found.high,
                "impostor_pairs": found.pairs,
                "impostor_mean": float(scores.mean()),
                "weights": judge.weights,
                "commit": made_by,
                "command": command,
            }
        )
        _write(out, lines[-1])
        print(
            f"{judge.name}: threshold {found.threshold:.4f} [{found.low:.4f}, {found.high:.4f}] "
            f"at FAR {far:g} of {found.pairs:,} pairs; accepts {accepted.mean():.2%} of {len(genuine):,}"
        )
    return lines


def make_judge(name: str, processes: int = 1, device: Device = "cpu") -> Judge:
    """A judge by its name in tables, or by the path of an ArcFace-type ONNX file.

    Raises:
        ValueError: If it is neither.
        FileNotFoundError: If the file or insightface's pack is not there.
    """
    if name.endswith(".onnx"):
        return OnnxJudge(name, provider=device)
    known = {
        "mobilefacenet": lambda: OwnNetwork(device=device),
        "dlib": lambda: Dlib(processes),
        "faceres": lambda: FaceRes(device),
        "insightface": lambda: InsightFace(provider=device),
    }
    if name not in known:
        raise ValueError(f"unknown judge {name!r}; give one of {', '.join(known)}, or the path of an ONNX file")
    return known[name]()


def embeddings(judge: Judge, faces: AlignedFaces) -> Float[ndarray, "faces dim"]:
    """Embeddings of all faces of a cache folder, computed once for each judge's weights."""
    name = f"{judge.name}-{judge.weights.removeprefix('sha256:')[:16]}-{VERSION}-{faces.folder.name}.npy"
    target = cache_folder() / "embeddings" / name
    if not target.is_file():
        found, step = [], 64
        with progress() as bar:
            for start in bar.track(range(0, len(faces), step), description=f"embedding for {judge.name}"):
                pixels = torch.from_numpy(np.array(faces.images[start : start + step]))
                found.append(judge.embed(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).numpy())
        file = io.BytesIO()
        np.save(file, np.concatenate(found))
        write_whole(target, file.getvalue())
    return np.load(target)


def read_pairs(path: Path) -> list[Pair]:
    """LFW's pairs of view 2 in their order: ten folds of 300 same and 300 different.

    Raises:
        ValueError: The file is another.
    """

    def file(person: str, number: str) -> str:
        return f"{person}/{person}_{int(number):04d}.jpg"

    head, *lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if [int(part) for part in head] != [_FOLDS, _SIDE] or len(lines) != 2 * _FOLDS * _SIDE:
        raise ValueError(f"expected LFW's list of {_FOLDS} folds of {_SIDE} + {_SIDE} pairs in {path}")
    return [
        Pair(file(line[0], line[1]), file(line[-2] if len(line) == 4 else line[0], line[-1]), len(line) == 3)
        for line in lines
    ]


def cross_validate(
    scores: Float[ndarray, " pairs"], same: Bool[ndarray, " pairs"], fold: Int[ndarray, " pairs"]
) -> tuple[Bool[ndarray, " pairs"], Float[ndarray, " folds"]]:
    """Whether each pair is judged right by the threshold best on the other folds; and the thresholds."""
    right, thresholds = np.zeros(len(scores), bool), []
    for held in np.unique(fold):
        other = fold != held
        order = np.argsort(-scores[other], kind="stable")
        ranked = scores[other][order]
        # Accepting the k best pairs is right for the same ones among them and the different ones after them.
        gain = np.cumsum(np.where(same[other][order], 1, -1))
        best = min(int(gain.argmax()), len(ranked) - 2)
        threshold = (ranked[best] + ranked[best + 1]) / 2
        right[~other] = (scores[~other] > threshold) == same[~other]
        thresholds.append(threshold)
    return right, np.array(thresholds)


def _limited(pairs: list[Pair], limit: int | None) -> list[Pair]:
    if limit is None:
        return pairs
    each = max(1, limit // (2 * _FOLDS))
    return [pair for start in range(0, len(pairs), _SIDE) for pair in pairs[start : start + each]]


def _test_files(lfw: LFW) -> set[str]:
    return {picture.file for picture in lfw.pictures if split_of(picture.person) == "test"}


def _faces(lfw: LFW, files: set[str]) -> AlignedFaces:
    return AlignedFaces(aligned_faces(lfw, [p for p in lfw.pictures if p.file in files], SIZE))


def _genuine(
    similarity: Float[ndarray, "faces faces"], people: Int[ndarray, " faces"]
) -> tuple[Float[ndarray, " pairs"], Int[ndarray, " pairs"]]:
    """Similarities of all pairs of faces of one person, and who that is."""
    a, b = np.triu_indices(len(people), k=1)
    same = people[a] == people[b]
    return similarity[a[same], b[same]], people[a[same]]


def _bootstrap(
    right: Bool[ndarray, " pairs"], groups: Int[ndarray, " pairs"] | None = None, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of a share, drawing groups anew: people, whose pairs hang together, or (None) single pairs."""
    number = np.arange(len(right)) if groups is None else np.unique(groups, return_inverse=True)[1]
    size, good = np.bincount(number), np.bincount(number, right)
    draw, found = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = draw.integers(len(size), size=len(size))
        found.append(good[drawn].sum() / size[drawn].sum())
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _write(out: str, line: dict[str, Any]) -> None:
    """Put a line into a JSON-lines file, in the place of an older one of the same figure."""
    path, key = Path(out), ("data", "judge", "metric")
    older = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [row for row in map(json.loads, older) if [row[k] for k in key] != [line[k] for k in key]]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, line]))

"""Comparisons and folders of photos for ``keyveil benchmark``: what they cost beside networks, and how memory grows."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import FaceBatch, face_batch
from datamodules.detection import default_detector
from experiments.anonymizing import Hiding
from experiments.compare import compare
from experiments.exchange import Speed, comparison_secret
from experiments.photo_methods import Running, load_photo_method
from experiments.photo_trips import originals
from experiments.photos import anonymize_files
from lightning_modules.judges import OwnNetwork
from lightning_modules.trained import weights_hash


class NoiseFaces(L.LightningDataModule):
    """Pictures of smooth noise, four of a person; each is drawn when it is asked for, so that none is kept.

    Args:
        count: Number of pictures.
        size: Their side in pixels.
    """

    def __init__(self, count: int, size: int = 128) -> None:
        super().__init__()
        self.count, self.size = count, size

    def test_dataloader(self) -> DataLoader[FaceBatch]:
        """All pictures in order."""
        return DataLoader(_Noise(self.count, self.size), batch_size=16)


class _Noise(Dataset[FaceBatch]):
    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> FaceBatch:
        coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(row)) * 2 - 1
        image = F.interpolate(coarse, size=(self.size, self.size), mode="bilinear")[0]
        return face_batch(image, identity=torch.tensor(row // 4), sample=torch.tensor(row))


class TimedComparison:
    """A comparison in a folder that is thrown away.

    Args:
        plan: As in a file under configs/compare/.

    Attributes:
        overhead: Of the last run, its wall time over the seconds of its methods and judges.

    Raises:
        RuntimeError: On a call, if a method fails.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.overhead = plan, float("nan")

    def __call__(self) -> None:
        """Run it.

        A method's time is that of its verbs, with which pictures are hidden and opened; a judge's is that of all
        metrics, from pictures in memory to the lines of results: embeddings, LPIPS, detector, landmarks, bootstrap.
        What is left are faces that are read, keys, files written and read, guards, the process that opens, and the
        report.
        """
        with tempfile.TemporaryDirectory(prefix="keyveil-") as place, contextlib.redirect_stderr(io.StringIO()) as said:
            table, out = Path(place) / "plan.yaml", Path(place) / "run"
            table.write_text(json.dumps(self.plan))  # JSON is YAML
            began = time.perf_counter()
            failed = compare(table, out)
            seconds = time.perf_counter() - began
            if failed:
                raise RuntimeError(said.getvalue())
            parts = [Speed.so_far(file).seconds for file in out.glob("faces/*/*/*ing.json")]
        self.overhead = seconds / sum(parts)


class TimedPhotos:
    """``keyveil anonymize`` on whole pictures of a data set's test people, into a folder that is thrown away.

    Args:
        method: As of ``keyveil anonymize``.
        data: As of ``keyveil judges photos``.
        faces: How many pictures.
        root: Where the data lies; by default the usual places.

    Attributes:
        overhead: Of the last run, its wall time over the seconds of its networks.

    Raises:
        FileNotFoundError: The data set is not there.
        RuntimeError: On a call, if no picture could be done.
    """

    def __init__(self, method: str, data: str, faces: int, root: str | None = None) -> None:
        self.network, self.name = load_photo_method(method, None, None, "cpu")
        self.detector, self.gate = type(default_detector()), OwnNetwork
        self.place = tempfile.TemporaryDirectory(prefix="keyveil-")
        self.pictures = originals(Path(self.place.name) / "original", data, root, faces)
        self.overhead = float("nan")

    def __call__(self) -> None:
        """Run it; networks are the method, the detector and the recogniser of the check."""
        hash_, size = weights_hash(self.network), self.network.size
        hiding = Hiding(self.name, hash_, size, "verify", "none", "picture", "all", "skip", False, None)
        speed, out = Speed(), Path(self.place.name) / "safe"
        running = Running(4, "cpu", 1, False, 2)
        with (
            contextlib.redirect_stderr(io.StringIO()) as said,
            _clocked(type(self.network), "anonymize", speed),
            _clocked(self.detector, "detect", speed),
            _clocked(self.gate, "embed", speed),
        ):
            began = time.perf_counter()
            failed = anonymize_files(self.pictures, out, self.network, hiding, comparison_secret(0), running)
            seconds = time.perf_counter() - began
        # a picture in which somebody is still known under four keys is refused, and took its time
        if failed and not any(out.glob("*.png")):
            raise RuntimeError(said.getvalue())
        self.overhead = seconds / speed.seconds


@contextlib.contextmanager
def _clocked(kind: type, verb: str, speed: Speed) -> Iterator[None]:
    """Every call of a method of a class is counted."""
    real = getattr(kind, verb)

    def clocked(*words: Any, **named: Any) -> Any:
        with speed.timed():
            return real(*words, **named)

    with patch.object(kind, verb, clocked):
        yield

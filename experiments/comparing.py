"""Comparisons for ``keyveil benchmark``: what they cost beside methods and judges, and how their memory grows."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import FaceBatch, face_batch
from experiments.compare import compare
from experiments.exchange import Speed


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

"""Two processes give the numbers of one: every metric of round trips, over a real process group."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from unittest.mock import patch

import pytest
import torch
from test_attributes import TOYS
from test_metrics import FakeDetector, FakeJudge, part, random_trip
from test_realism import Means
from torch import distributed, multiprocessing

from lightning_modules import metrics
from lightning_modules.metrics import realism
from lightning_modules.metrics.attributes import FaceAttributes
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.measured import RoundTripMetric
from lightning_modules.metrics.perceptual import NETWORKS
from lightning_modules.metrics.recovery import PictureQuality
from lightning_modules.metrics.utility import FacesDetected

FACES = 11
SHARE = ([[0, 2, 4], [6, 8], [9, 10]], [[1, 3, 5, 7]])  # by process, the faces of its batches


def realism_of_toys():
    """Real networks give a face other last digits in another batch."""
    with patch.object(realism, "_network", lambda name: Means()):
        return realism.Realism()


MAKE = {  # those that cannot be made of nothing, or whose networks round by the batch
    FaceAttributes: lambda: FaceAttributes(readers=TOYS),
    realism.Realism: realism_of_toys,
    IdentityScores: lambda: IdentityScores(FakeJudge(), threshold=0.4),
    FacesDetected: lambda: FacesDetected(FakeDetector()),
    PictureQuality: lambda: PictureQuality(tuple(NETWORKS)),
}


def all_metrics():
    """Every metric in the room of metrics, by name, made the way a comparison makes it."""
    for _, name, _ in pkgutil.iter_modules(metrics.__path__, f"{metrics.__name__}."):
        importlib.import_module(name)
    found, left = [], [RoundTripMetric]
    while left:
        left += (kinds := left.pop().__subclasses__())
        found += [kind for kind in kinds if kind.__module__.startswith(metrics.__name__)]
    torch.manual_seed(0)
    return {kind.__name__: MAKE.get(kind, kind)() for kind in sorted(found, key=lambda kind: kind.__name__)}


def every_leg():
    """A round trip in which no leg is missing."""
    trip = random_trip(batch=FACES, size=64, people=4)
    again = torch.stack([trip.other.flip(2), trip.recovered.flip(2)], 1)
    trip = trip._replace(other_again=again, wrong_again=again.flip(3), near_again=-again)
    return trip._replace(wrong_attribute=trip.recovered.flip(3), original=trip.original.clamp(min=-0.9))


def work(rank, folder):
    """What one of the processes does: its share of the faces; all ask for figures, the first writes them down."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(SHARE))
    figures = {}
    for name, metric in all_metrics().items():
        for rows in SHARE[rank]:
            metric.update(part(every_leg(), rows))
        figures[name] = (metric.figures(), metric.compute())
    if rank == 0:
        (folder / "figures").write_bytes(pickle.dumps(figures))
    distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    multiprocessing.spawn(work, (tmp_path,), nprocs=len(SHARE))
    together = pickle.loads((tmp_path / "figures").read_bytes())
    alone = all_metrics()
    assert set(together) == set(alone) >= {"FacesDetected", "IdentityScores", "PictureQuality", "Pollution"}
    for name, metric in alone.items():
        metric.update(every_leg())
        figures, means = together[name]
        for ours, theirs in zip(metric.figures(), figures, strict=True):
            for field in ("value", "low", "high"):
                number = getattr(ours, field)
                assert getattr(theirs, field) == (number if number is None else pytest.approx(number, abs=1e-6)), ours
            words = {"value": None, "low": None, "high": None}
            assert {**vars(ours), **words} == {**vars(theirs), **words}
        for what, value in metric.compute().items():
            assert float(means[what]) == pytest.approx(float(value), abs=1e-6), what
        assert any(figure.value is not None for figure in figures) or all(figure.why for figure in figures)

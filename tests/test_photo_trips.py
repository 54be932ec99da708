"""Whole pictures through the photo verbs, measured: toys that come back, and what is missing is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image
from torch.nn import functional as F
from toy_photos import ToyDetector, ToyJudge, draw_alike, picture

from experiments.cli import main
from experiments.comparing import TimedPhotos
from lightning_modules.calibration import Calibration
from lightning_modules.callbacks.paste_back import Gate
from lightning_modules.keys import Cost
from lightning_modules.protocol import read_results


class Judge(ToyJudge):
    """Sees crops of any size."""

    def _embed(self, images):
        return super()._embed(F.interpolate(images, size=(64, 64), mode="area"))


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("experiments.photos.default_detector", ToyDetector)
    monkeypatch.setattr("experiments.photo_trips.default_detector", ToyDetector)
    monkeypatch.setattr("experiments.photos.Gate", lambda: Gate(ToyJudge(), 0.9))
    monkeypatch.setattr("experiments.photo_trips.make_judge", lambda name: Judge())
    threshold = Calibration(threshold=0.9, far=1e-3, pairs=1000, low=0.8, high=0.95)
    monkeypatch.setattr("experiments.photo_trips.load_calibration", lambda judge: threshold)
    monkeypatch.setattr("experiments.anonymizing.Cost", lambda: Cost(1, 64, 1))
    draw_alike(monkeypatch)
    (tmp_path / "toy.yaml").write_text("model: {class_path: toy_photos.ToyMethod}")
    (tmp_path / "untouched.yaml").write_text("model: {class_path: toy_photos.Untouched}")
    (tmp_path / "people").mkdir()
    for seed, name in enumerate(map(str, range(100))):
        Image.fromarray(picture(1, seed)).save(tmp_path / "people" / f"{name}.png")
    monkeypatch.chdir(tmp_path)


def trips(*words, method="toy.yaml"):
    places = ["--data=pictures", "--root=people", "--faces=4", "--judges=[toy]", "--accelerator=cpu"]
    return main(["judges", "photos", "out", f"--method={method}", *places, *words])


def test_pictures_of_test_people_go_there_and_back(capsys):
    assert trips() == 0
    found = {(f.carrier, f.leg, f.reference): f for f in read_results("out/results.jsonl") if "tar" in f.metric}
    assert {carrier for carrier, *_ in found} == {"photo", "png"}
    for carrier in ("photo", "png"):
        assert found[carrier, "recovered", "same-image"].value == 1
    assert found["photo", "anonymized", "same-image"].value == 0  # one that was still known got another key
    assert found["png", "anonymized", "same-image"].value < 1
    assert len(list(Path("out/original").glob("*.png"))) == 4
    assert "whole pictures: recovered, accepted by toy: 100.0 %" in " ".join(capsys.readouterr().err.split())
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    assert trips("--aligned=false") == 0  # goes on with what is there
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")} == before
    assert {f.carrier for f in read_results("out/results.jsonl")} == {"photo"}


def test_a_picture_that_could_not_be_done_is_told(monkeypatch, capsys):
    class Sometimes(ToyDetector):
        def detect(self, picture):
            return super().detect(picture) if picture[0, 0].astype(int).sum() % 3 else []

    monkeypatch.setattr("experiments.photos.default_detector", Sometimes)
    assert trips() == 1
    assert "of 4 pictures were not anonymized" in capsys.readouterr().err
    assert all(f.n < 4 for f in read_results("out/results.jsonl"))


def test_a_method_that_cannot_recover_is_refused(capsys):
    Path("once.yaml").write_text("model: {class_path: lightning_modules.baselines.obscure.Blur}")
    assert trips(method="once.yaml") == 1
    assert "cannot recover" in capsys.readouterr().err


def test_the_overhead_of_photos_is_what_is_left_beside_networks(monkeypatch):
    monkeypatch.setattr("experiments.comparing.default_detector", ToyDetector)
    run = TimedPhotos("toy.yaml", "pictures", 4, "people")
    run()
    assert 1 < run.overhead < math.inf


def test_a_folder_of_something_else_is_refused(capsys):
    assert trips() == 0
    assert trips("--seed=1") == 1
    assert "holds pictures of another data set, method, weights or seed" in capsys.readouterr().err


def test_a_picture_that_was_not_recovered_counts_as_it_was_anonymized(monkeypatch):
    monkeypatch.setattr("experiments.photo_trips.recover_files", lambda *words: 1)
    assert trips() == 1
    found = {(f.carrier, f.leg): f.value for f in read_results("out/results.jsonl") if "tar" in f.metric}
    assert (found["photo", "recovered"], found["png", "recovered"]) == (0, 1)

"""Every logger sees the same figures and the same grid, and no loss network judges."""

from __future__ import annotations

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import face_batch
from lightning_modules.anonymizer import RoundTrip
from lightning_modules.callbacks.round_trip_grid import GAP, HEAD, RoundTripGrid, grid_picture
from lightning_modules.callbacks.round_trip_metrics import RoundTripMetrics
from lightning_modules.carriers import through_file


class FakeJudge:
    """A judge whose embedding is a fixed linear map of the picture."""

    name = "fake"
    weights = "sha256:fake"
    networks = frozenset({"fake"})

    def embed(self, images):
        return torch.nn.functional.normalize(images.flatten(1)[:, :16], dim=1).cpu()

    def similarity(self, a, b):
        return a @ b.T

    def describe(self):
        return self.name


class Faces(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return face_batch(image, identity=torch.tensor(index // 2), sample=torch.tensor(index))


class Negative(L.LightningModule):
    """Hides a face as its negative; the wrong key leaves it so."""

    loss_networks = frozenset({"mobilefacenet"})

    def step(self, batch):
        original = through_file(batch.image)
        made = {"anonymized": -original, "recovered": original, "wrongly_recovered": -original}
        return RoundTrip.of(original, identity=batch.identity, sample=batch.sample, mask=batch.mask, **made)

    def validation_step(self, batch, batch_idx):
        return self.step(batch)

    def test_step(self, batch, batch_idx):
        return self.step(batch)


def trainer(tmp_path, callbacks, logger=False):
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def loader():
    return DataLoader(Faces(), batch_size=5)


def trip(rows=3, size=100):
    images = torch.rand(rows, 3, size, size) * 2 - 1
    made = {"anonymized": -images, "recovered": images, "wrongly_recovered": -images}
    return RoundTrip.of(images, identity=torch.arange(rows), sample=torch.arange(rows), **made)


def test_figures_are_logged_and_kept_after_a_test(tmp_path):
    callback = RoundTripMetrics([FakeJudge()], thresholds={"fake": 0.9})
    logged = trainer(tmp_path, [callback]).test(Negative(), loader(), verbose=False)[0]
    assert logged["test/recovered/bit_exact"] == 1
    assert logged["test/fake/recovered/tar@far=1e-3/same-image"] == 1
    assert logged["test/fake/anonymized/tar@far=1e-3/same-image"] == 0
    figures = {(f.judge, f.metric, f.leg, f.reference): f for f in callback.figures}
    assert figures["fake", "tar@far=1e-3", "recovered", "same-image"].n == 12
    assert figures[None, "psnr", "anonymized", None].value == pytest.approx(logged["test/anonymized/psnr"])
    assert figures["fake", "similarity", "recovered", "same-image"].judge_weights == "sha256:fake"


def test_validation_measures_no_more_faces_than_asked(tmp_path):
    callback = RoundTripMetrics(max_faces=7)
    trainer(tmp_path, [callback]).validate(Negative(), loader(), verbose=False)
    assert len(torch.cat(callback.metrics[""].person)) == 7


def test_each_epoch_starts_anew(tmp_path):
    callback = RoundTripMetrics()
    runner = trainer(tmp_path, [callback])
    for _ in range(2):
        runner.validate(Negative(), loader(), verbose=False)
    assert len(torch.cat(callback.metrics[""].person)) == 12


def test_a_loss_network_may_not_judge_unless_told_so(tmp_path):
    judge = FakeJudge()
    judge.networks = frozenset({"mobilefacenet"})
    with pytest.raises(ValueError, match="judge 'fake' is a loss network of this method .mobilefacenet.; take another"):
        trainer(tmp_path, [RoundTripMetrics([judge])]).validate(Negative(), loader(), verbose=False)
    allowed = RoundTripMetrics([judge], allow_loss_judges=True)
    trainer(tmp_path, [allowed]).validate(Negative(), loader(), verbose=False)


def test_thresholds_come_from_the_run_then_from_the_committed_calibration(tmp_path, monkeypatch):
    from lightning_modules import calibration
    from lightning_modules.callbacks import round_trip_metrics

    file = tmp_path / "calibration.json"
    known = calibration.Calibration(0.25, far=1e-3, pairs=10_000, low=0.2, high=0.3)
    calibration.save_calibration(FakeJudge(), known, "lfw-test", "a command", file)
    read = partial(calibration.load_calibration, path=file)
    monkeypatch.setattr(round_trip_metrics, "load_calibration", read)
    for thresholds, used in ((None, 0.25), ({"fake": 0.5}, 0.5)):
        callback = RoundTripMetrics([FakeJudge()], thresholds)
        trainer(tmp_path, [callback]).validate(Negative(), loader(), verbose=False)
        assert callback.metrics["fake/"].threshold == used


def test_judges_are_named_by_class_path_as_everything_else():
    parser = LightningArgumentParser(parser_mode="omegaconf+")
    parser.add_lightning_class_args(RoundTripMetrics, "metrics")
    parsed = parser.parse_args([f'--metrics.judges=[{{"class_path": "{__name__}.FakeJudge"}}]'])
    assert parsed.metrics.judges[0].class_path.endswith("FakeJudge")


def test_what_is_no_judge_is_refused():
    with pytest.raises(ValueError, match="expected judges, as of lightning_modules.judges, got str"):
        RoundTripMetrics(["dlib"])


def test_judges_need_names_of_their_own_and_thresholds_a_judge():
    with pytest.raises(ValueError, match="a name of its own, got fake, fake"):
        RoundTripMetrics([FakeJudge(), FakeJudge()])
    with pytest.raises(ValueError, match="thresholds for dlib; the judges are fake"):
        RoundTripMetrics([FakeJudge()], thresholds={"dlib": 0.5})


def test_the_grid_has_a_row_a_face_and_a_column_a_present_leg():
    shown = trip(rows=3, size=100)
    picture = grid_picture(shown)
    assert picture.size == (4 * (100 + GAP) - GAP, HEAD + 3 * (100 + GAP) - GAP)
    pixels = np.asarray(picture)
    tile = pixels[HEAD + 100 + GAP : HEAD + 200 + GAP, 100 + GAP : 200 + GAP]
    wanted = ((shown.anonymized[1] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(tile, wanted)
    assert (pixels[:HEAD] < 128).any()  # titles are written
    chosen = grid_picture(shown, {"original": "before", "recovered": "after"}, tile=32)
    assert chosen.size == (2 * (32 + GAP) - GAP, HEAD + 3 * (32 + GAP) - GAP)


def test_small_faces_are_enlarged_so_that_titles_fit():
    assert grid_picture(trip(rows=1, size=16)).size[0] == 4 * (96 + GAP) - GAP


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no picture to draw: the round trip has none of other"):
        grid_picture(trip(), {"other": "other key"})


class PictureLogger(CSVLogger):
    """A logger that takes pictures, as Weights & Biases does."""

    def log_image(self, key, images, step=None):
        self.received = (key, images, step)


def test_every_logger_gets_the_grid_by_what_it_can_do(tmp_path):
    loggers = [
        PictureLogger(tmp_path, name="pictures"),
        TensorBoardLogger(tmp_path, name="board"),
        CSVLogger(tmp_path, name="csv"),
    ]
    trainer(tmp_path, [RoundTripGrid(faces=7)], loggers).validate(Negative(), loader(), verbose=False)
    key, images, step = loggers[0].received
    assert (key, step) == ("val/round_trip", 0)
    size = images[0].size
    assert size[1] == HEAD + 7 * (96 + GAP) - GAP  # rows over two batches
    loggers[1].finalize("success")
    (events,) = (tmp_path / "board").rglob("events*")
    assert b"val/round_trip" in events.read_bytes()
    (file,) = (tmp_path / "csv").rglob("val_round_trip-0000000.png")
    assert Image.open(file).size == size


def test_a_grid_of_no_faces_draws_nothing(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    trainer(tmp_path, [RoundTripGrid(faces=0)], logger).test(Negative(), loader(), verbose=False)
    assert not list(tmp_path.rglob("*.png"))

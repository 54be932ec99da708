"""Checkpoints: whole files, the newest that can be read, and what is saved when a run breaks off."""

import errno
import os
import signal

import pytest
import torch
from conftest import NoiseFaces
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file
from test_optimization import TwoPlayers

from lightning_modules.baselines.obscure import Blur
from lightning_modules.callbacks import FaceWriter, TrainingCheckpoint
from lightning_modules.callbacks.training_checkpoint import WholeFiles, newest_checkpoint
from lightning_modules.carriers import read_picture
from lightning_modules.optimization import DivergedError


def run(quick_trainer, tmp_path, steps, ckpt_path=None):
    saver = TrainingCheckpoint(every_n_train_steps=2)
    trainer = quick_trainer(
        steps, max_epochs=-1, callbacks=[saver], enable_checkpointing=True, default_root_dir=tmp_path
    )
    trainer.fit(TwoPlayers(), NoiseFaces(), ckpt_path=ckpt_path)
    return torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_the_last_checkpoint_is_the_last_step(quick_trainer, tmp_path):
    assert run(quick_trainer, tmp_path, 5) == 5


def test_a_run_that_starts_anew_moves_older_checkpoints_aside(quick_trainer, tmp_path):
    run(quick_trainer, tmp_path, 5)
    assert run(quick_trainer, tmp_path, 2) == 2
    aside = torch.load(tmp_path / "checkpoints-1" / "last.ckpt", weights_only=True)
    assert aside["global_step"] == 5


def test_a_resumed_run_stays_where_it_was(quick_trainer, tmp_path):
    run(quick_trainer, tmp_path, 3)
    assert run(quick_trainer, tmp_path, 4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt") == 4
    assert not (tmp_path / "checkpoints-1").exists()


def test_predictions_become_one_file_a_face(quick_trainer, tmp_path):
    faces = NoiseFaces()
    faces.predict_dataloader = faces.test_dataloader
    trainer = quick_trainer(1, callbacks=[FaceWriter()], default_root_dir=tmp_path)
    trainer.predict(Blur(size=64), faces, return_predictions=False)
    files = sorted((tmp_path / "predictions").iterdir())
    assert [int(file.stem) for file in files] == list(range(24))
    assert read_picture(files[0]).shape == (3, 64, 64)


class Breaks(TwoPlayers):
    """Does something odd in the fourth step, after its optimizers have made theirs."""

    def __init__(self, within):
        super().__init__()
        self.within = within

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        if self.global_step == 4:
            self.within()


def broken(quick_trainer, tmp_path, method, faces=None, error=OSError):
    options = {"callbacks": [TrainingCheckpoint(every_n_train_steps=2)], "enable_checkpointing": True}
    trainer = quick_trainer(10, max_epochs=-1, default_root_dir=tmp_path, **options)
    with pytest.raises(error):
        trainer.fit(method, faces or NoiseFaces())
    return torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)


def power_cut():
    raise OSError("power cut")


def test_a_run_that_breaks_within_a_step_keeps_the_last_whole_one(quick_trainer, tmp_path):
    saved = broken(quick_trainer, tmp_path, Breaks(within=power_cut))
    assert saved["global_step"] == 2


def test_a_run_whose_data_end_in_an_error_is_saved_where_it_was(quick_trainer, tmp_path):
    class Loader(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 3:
                    power_cut()
                yield batch

    faces = NoiseFaces()
    whole = list(faces.train_dataloader())
    faces.train_dataloader = lambda: Loader(whole)
    assert broken(quick_trainer, tmp_path, TwoPlayers(), faces)["global_step"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_makes_its_step_and_saves_it(number, quick_trainer, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    method = Breaks(within=lambda: os.kill(os.getpid(), number))
    saved = broken(quick_trainer, tmp_path, method, error=SIGTERMException)
    assert saved["global_step"] == 4
    for name, value in method.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Validated(TwoPlayers):
    """Is told to stop in the midst of the validation after its fourth step; ``None``: never."""

    def __init__(self, number):
        super().__init__()
        self.number, self.validated = number, 0

    def validation_step(self, batch, batch_idx):
        self.validated += 1
        if self.number and self.global_step == 4 and batch_idx == 1:
            os.kill(os.getpid(), self.number)


def test_a_stop_does_not_wait_for_the_end_of_a_validation_nor_lose_a_step(quick_trainer, tmp_path):
    def fit(folder, method, **words):
        options = {"limit_val_batches": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": -1}
        options |= {"callbacks": [TrainingCheckpoint()], "enable_checkpointing": True, "default_root_dir": folder}
        quick_trainer(7, **options).fit(method, NoiseFaces(), **words)
        return method

    whole = fit(tmp_path / "whole", Validated(None))
    told = Validated(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "cut", told)
    assert (whole.validated, told.validated) == (12, 6)
    saved = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    resumed = fit(tmp_path / "cut", Validated(None), ckpt_path=saved)
    assert (len(told.seen), len(resumed.seen)) == (4, 3)
    assert resumed.validated == 4


def test_gradients_that_are_no_numbers_stop_the_run_and_leave_their_batch(quick_trainer, tmp_path):
    known = []

    class Nan(TwoPlayers):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                known.append((batch.image.clone(), {k: v.clone() for k, v in self.state_dict().items()}))
                batch = batch._replace(image=batch.image * torch.nan)
            super().training_step(batch, batch_idx)

    method = Nan()
    saved = broken(quick_trainer, tmp_path, method, error=DivergedError)
    assert saved["global_step"] == 2
    image, weights = known[0]
    kept = load_file(tmp_path / "diverged-step-3-process-0.safetensors")
    assert torch.equal(kept["image"], image)
    assert {"identity", "sample"} <= set(kept)
    for name, value in method.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    files, path = WholeFiles(), tmp_path / "deep" / "last.ckpt"
    files.save_checkpoint({"global_step": 1}, path)

    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")):

        def half(checkpoint, file, error=error):
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left|cannot be written: PytorchStreamWriter failed"):
            files.save_checkpoint({"global_step": 2}, path)
        assert torch.load(path, weights_only=True) == {"global_step": 1}
        assert os.listdir(path.parent) == ["last.ckpt"]


def test_the_newest_checkpoint_that_can_be_read_is_found(tmp_path, quick_trainer):
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) is None
    run(quick_trainer, tmp_path, 5)
    assert newest_checkpoint(folder) == folder / "last.ckpt"
    last = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(last[: len(last) // 2])
    assert newest_checkpoint(folder) == folder / "step-4.ckpt"
    (folder / "step-4.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* can be read; move them away"):
        newest_checkpoint(folder)


def test_a_dry_run_and_a_resume_that_fails_leave_checkpoints_alone(quick_trainer, tmp_path):
    run(quick_trainer, tmp_path, 5)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    dry = {"callbacks": [TrainingCheckpoint()], "enable_checkpointing": True, "default_root_dir": tmp_path}
    quick_trainer(5, fast_dev_run=True, **dry).fit(TwoPlayers(), NoiseFaces())
    assert last.read_bytes() == before
    faces = NoiseFaces()
    faces.train_dataloader = power_cut
    with pytest.raises(OSError, match="power cut"):
        quick_trainer(9, max_epochs=-1, **dry | {"callbacks": [TrainingCheckpoint()]}).fit(
            TwoPlayers(), faces, ckpt_path=last
        )
    assert last.read_bytes() == before


def test_a_stop_waits_for_the_end_of_an_accumulation(quick_trainer, tmp_path):
    class Accumulates(TwoPlayers):
        batches = 0

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.batches += 1
            if self.batches == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    method = Accumulates(accumulate=3)
    saved = broken(quick_trainer, tmp_path, method, error=SIGTERMException)
    assert saved["global_step"] == 2
    assert method.batches == 6

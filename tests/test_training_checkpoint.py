import torch
from conftest import NoiseFaces
from test_optimization import TwoPlayers

from lightning_modules.baselines.obscure import Blur
from lightning_modules.callbacks import FaceWriter, TrainingCheckpoint
from lightning_modules.carriers import read_picture


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

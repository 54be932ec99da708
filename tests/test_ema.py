"""The moving average of what is trained: what it is, what is measured, what is saved, and how it goes on."""

import pytest
import torch
from conftest import NoiseFaces
from test_optimization import TwoPlayers

from lightning_modules.callbacks import EMA, TrainingCheckpoint


class Permuted(TwoPlayers):
    """With a permutation, and a note of every step's weights and of what validation sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.steps, self.validated = [], []

    def on_train_batch_end(self, *_):
        self.steps.append(self.first.bias.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.first.bias.detach().clone())


def fit(quick_trainer, folder, steps, decay=0.5, ckpt_path=None, callbacks=None, **options):
    torch.manual_seed(0)
    method = Permuted()
    callbacks = [EMA(decay), TrainingCheckpoint(every_n_train_steps=100)] if callbacks is None else callbacks
    options = {"max_epochs": -1, "callbacks": callbacks, "enable_checkpointing": True, **options}
    quick_trainer(steps, default_root_dir=folder, **options).fit(method, NoiseFaces(count=4), ckpt_path=ckpt_path)
    return method, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def averaged(steps, decay=0.5):
    mean = steps[0]
    for step in steps[1:]:
        mean = decay * mean + (1 - decay) * step
    return mean


def test_it_is_the_average_of_all_steps_and_what_is_saved(quick_trainer, tmp_path):
    method, saved = fit(quick_trainer, tmp_path, 5)
    assert len(method.steps) == 5
    torch.testing.assert_close(saved["state_dict"]["first.bias"], averaged(method.steps))
    torch.testing.assert_close(saved["current_model_state"]["first.bias"], method.steps[-1])
    torch.testing.assert_close(method.first.bias.detach(), averaged(method.steps))  # left in the method
    assert not torch.equal(averaged(method.steps), method.steps[-1])


def test_permutations_stay_permutations(quick_trainer, tmp_path):
    method, saved = fit(quick_trainer, tmp_path, 5, decay=0.999)
    assert saved["state_dict"]["order"].tolist() == method.order.tolist() == [2, 0, 1]


def test_the_average_is_measured_and_training_goes_on_without_it(quick_trainer, tmp_path):
    options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    method, _ = fit(quick_trainer, tmp_path / "a", 4, **options, num_sanity_val_steps=1)
    torch.testing.assert_close(method.validated[-1], averaged(method.steps[:3]))
    alone, _ = fit(quick_trainer, tmp_path / "b", 4, decay=0.0)
    for one, two in zip(method.steps, alone.steps, strict=True):
        assert torch.equal(one, two)


def test_a_resumed_run_ends_as_the_unbroken_one(quick_trainer, tmp_path):
    whole, saved = fit(quick_trainer, tmp_path / "whole", 6)
    fit(quick_trainer, tmp_path / "part", 3)
    resumed, again = fit(quick_trainer, tmp_path / "part", 6, ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt")
    for field in ("state_dict", "current_model_state"):
        for name, value in saved[field].items():
            torch.testing.assert_close(again[field][name], value)


def test_without_it_a_checkpoint_holds_the_weights_alone_and_may_be_averaged_from_there_on(quick_trainer, tmp_path):
    method, saved = fit(quick_trainer, tmp_path, 3, decay=0.0)
    assert "current_model_state" not in saved
    torch.testing.assert_close(saved["state_dict"]["first.bias"], method.steps[-1])
    later, _ = fit(quick_trainer, tmp_path, 5, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(later.first.bias.detach(), averaged(later.steps))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_is_a_share(decay):
    with pytest.raises(ValueError, match="below 1"):
        EMA(decay)

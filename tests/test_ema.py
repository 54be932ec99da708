"""The moving average of what is trained: what it is, what is measured, what is saved, and how it goes on."""

import pytest
import torch
from conftest import NoiseFaces
from test_optimization import TwoPlayers

from lightning_modules.callbacks import EMA, TrainingCheckpoint
from lightning_modules.callbacks.ema import WEIGHTS


class Permuted(TwoPlayers):
    """With a permutation, and a note of every step's weights and of what validation sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.fixed = torch.nn.Parameter(torch.full((7,), 0.1), requires_grad=False)
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
    torch.testing.assert_close(saved[WEIGHTS]["first.bias"], method.steps[-1])
    torch.testing.assert_close(method.first.bias.detach(), averaged(method.steps))  # left in the method
    assert not torch.equal(averaged(method.steps), method.steps[-1])


def test_what_is_not_trained_stays_bit_for_bit(quick_trainer, tmp_path):
    method, saved = fit(quick_trainer, tmp_path, 5, decay=0.999)
    assert saved["state_dict"]["order"].tolist() == method.order.tolist() == [2, 0, 1]
    for value in (saved["state_dict"]["fixed"], method.fixed.detach()):
        assert torch.equal(value, torch.full((7,), 0.1))
    assert "fixed" not in saved[WEIGHTS]


def test_an_error_while_the_average_is_measured_saves_both_as_they_are(quick_trainer, tmp_path):
    class Breaks(Permuted):
        def validation_step(self, batch, batch_idx):
            raise OSError("a shard is damaged")

    torch.manual_seed(0)
    method, callbacks = Breaks(), [EMA(0.5), TrainingCheckpoint(every_n_train_steps=100)]
    options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = quick_trainer(
        9, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path, **options
    )
    with pytest.raises(OSError, match="damaged"):
        trainer.fit(method, NoiseFaces(count=4))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    torch.testing.assert_close(saved[WEIGHTS]["first.bias"], method.steps[-1])
    torch.testing.assert_close(saved["state_dict"]["first.bias"], averaged(method.steps))


def test_going_on_without_an_average_takes_the_weights(quick_trainer, tmp_path):
    whole, _ = fit(quick_trainer, tmp_path / "whole", 6, decay=0.0)
    fit(quick_trainer, tmp_path / "part", 3)
    with pytest.warns(UserWarning, match="which ends here"):
        resumed, saved = fit(
            quick_trainer, tmp_path / "part", 6, decay=0.0, ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt"
        )
    torch.testing.assert_close(resumed.first.bias.detach(), whole.first.bias.detach())
    assert WEIGHTS not in saved


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
    for field in ("state_dict", WEIGHTS):
        for name, value in saved[field].items():
            torch.testing.assert_close(again[field][name], value)


def test_without_it_a_checkpoint_holds_the_weights_alone_and_may_be_averaged_from_there_on(quick_trainer, tmp_path):
    method, saved = fit(quick_trainer, tmp_path, 3, decay=0.0)
    assert WEIGHTS not in saved
    torch.testing.assert_close(saved["state_dict"]["first.bias"], method.steps[-1])
    later, _ = fit(quick_trainer, tmp_path, 5, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(later.first.bias.detach(), averaged(later.steps))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_is_a_share(decay):
    with pytest.raises(ValueError, match="below 1"):
        EMA(decay)

import lightning as L
import pytest
import torch
from conftest import NoiseFaces

from datamodules.latent import LatentDataModule
from lightning_modules.keys import KeySpec
from lightning_modules.optimization import TrainingSteps, seed_of
from lightning_modules.trained import export, load_trained


class TwoPlayers(TrainingSteps):
    """Two linear players with a loss each."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x = batch.image.mean((2, 3)).new_ones(len(batch.image), 4) * batch.image.mean()
        one, two = self.optimizers()
        with self.turn_of(one):
            self.seen.append([p.requires_grad for p in self.second.parameters()])
            self.descend(self.first(x).mean() + self.second(x).mean(), one, batch_idx, counts=True)
        with self.turn_of(two):
            self.descend(self.second(x).mean(), two, batch_idx)

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.first, self.second)]


def test_only_the_counting_optimizer_counts(quick_trainer):
    trainer = quick_trainer(4)
    trainer.fit(TwoPlayers(), NoiseFaces())
    assert trainer.global_step == 4


def test_the_other_player_stands_still_on_a_turn(quick_trainer):
    method = TwoPlayers()
    quick_trainer(1).fit(method, NoiseFaces())
    assert method.seen == [[False, False]]
    assert all(p.requires_grad for p in method.parameters())


def test_accumulation_equals_one_large_batch(quick_trainer):
    def trained(batch_size, accumulate):
        torch.manual_seed(0)
        method, faces = TwoPlayers(accumulate=accumulate), NoiseFaces(count=8, batch_size=batch_size)
        faces.train_dataloader = faces.val_dataloader  # in order
        trainer = quick_trainer(-1, max_epochs=1)
        trainer.fit(method, faces)
        return method, trainer.global_step

    (small, small_steps), (large, large_steps) = trained(2, 2), trained(4, 1)
    assert small_steps == large_steps == 2
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_bounds_the_gradient(quick_trainer):
    method = TwoPlayers(clip=1e-3)
    before = [p.detach().clone() for p in method.first.parameters()]
    quick_trainer(1).fit(method, NoiseFaces())
    moved = torch.cat([(p - b).flatten() for p, b in zip(method.first.parameters(), before, strict=True)])
    assert moved.norm() <= 0.1 * 1e-3 * 1.001


def test_resuming_goes_on_with_step_optimizer_and_clock(quick_trainer, tmp_path):
    class Adam(TwoPlayers):
        def configure_optimizers(self):
            return [torch.optim.Adam(m.parameters(), lr=0.1) for m in (self.first, self.second)]

    def trainer(steps):
        save = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
        return quick_trainer(steps, max_epochs=-1, callbacks=[save], enable_checkpointing=True)

    trainer(3).fit(Adam(), NoiseFaces())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert state["training_seconds"] > 0
    resumed, again = Adam(), trainer(5)
    again.fit(resumed, NoiseFaces(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 5
    assert [int(o.state[next(iter(o.state))]["step"]) for o in again.optimizers] == [5, 5]
    assert resumed.training_seconds > state["training_seconds"]


class People(NoiseFaces):
    """Faces of people with marks."""

    def __init__(self, *marks):
        super().__init__()
        self.marks = marks

    def people(self, split):
        return dict(enumerate(self.marks)) if split == "train" else {}


def test_weights_tell_who_trained_them(quick_trainer, tmp_path):
    """From the data into the checkpoint, into safetensors, and on into what starts from them."""

    def trained(name, faces, **options):
        save = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / name, save_last=True, every_n_train_steps=1)
        quick_trainer(1, callbacks=[save], enable_checkpointing=True).fit(TwoPlayers(**options), faces)
        export(tmp_path / name / "last.ckpt", tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    def known(weights):
        method = TwoPlayers()
        load_trained(method, weights)
        return method.trained_on

    first = trained("first", People("a", "b"))
    assert known(first) == known(tmp_path / "first" / "last.ckpt") == {"a", "b"}
    second = trained("second", People("b", "c"), start=first)
    assert known(second) == {"a", "b", "c"}
    unknown = trained("unknown", NoiseFaces())
    assert LatentDataModule(NoiseFaces(), torch.nn.Flatten()).people("train") is None
    assert LatentDataModule(People("a"), torch.nn.Flatten()).people("train") == {0: "a"}
    assert known(unknown) is None
    assert known(trained("after", People("d"), start=unknown)) is None


def test_training_keys_depend_on_step_sample_and_leg_only():
    method, spec = TwoPlayers(seed=1), KeySpec("normal", 8)
    both = method.training_keys(spec, torch.tensor([3, 4]), 0)
    torch.testing.assert_close(method.training_keys(spec, torch.tensor([4]), 0), both[1:])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(method.training_keys(spec, torch.tensor([3]), 1)[0], both[0])


def test_a_seed_is_63_bits_and_fixed():
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(0, 2, 1)
    assert 0 <= seed_of(5) < 2**63
    assert seed_of(1, 2, 3) == 4987016031672207636


def test_accumulate_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        TwoPlayers(accumulate=0)

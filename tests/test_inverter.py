"""The trained inverter: its network, its pairs, what it can and cannot undo, and that a stopped training goes on."""

import io

import pytest
import torch
from conftest import LinearRecognizer, NoiseFaces
from rich.console import Console
from test_compare import LinearJudge

from datamodules.pairs import PairDataModule, Pairs, Steps
from experiments import attack_inverter as room
from experiments.attack_inverter import Budget, by_inverter, trained_inverter
from experiments.attack_pairs import Target, by_pairs
from experiments.comparison import Comparison
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.calibration import Calibration
from lightning_modules.inverter import Inverter, linear_guesses
from lightning_modules.keys import KeySpec
from lightning_modules.networks.unet import UNet
from lightning_modules.weights import WeightsError

BUDGET = Budget(steps=64, size=16, pairs=None, keys=1)


class Negative(ReversibleAnonymizer):
    """Every face as its negative: no key."""

    size, reversible, calls = 16, False, 0

    def anonymize(self, face, key):
        self.calls += 1
        return -face.image


class Signs(Negative):
    """The sign of each channel of each block of 2 × 2 pixels by the key, of whose faces the calls are noted."""

    key_spec, reversible = KeySpec("bits", 3 * 8 * 8), True

    def __init__(self):
        super().__init__()
        self.seen = []

    def anonymize(self, face, key):
        self.seen += list(zip(face.sample.tolist(), map(tuple, key.tolist()), strict=True))
        return face.image * key.view(-1, 3, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)

    recover = anonymize


class OneFixed(Signs):
    """As that, but whatever the key, under one and the same."""

    def anonymize(self, face, key):
        signs = self.key_spec.random(1, torch.Generator().manual_seed(5))
        return super().anonymize(face, signs.expand(len(face.image), -1))


class ManyPeople(NoiseFaces):
    """A face of each of 192 people to learn from, and 48 others for the test."""

    def __init__(self, people=240, count=240):
        super().__init__(size=16, count=count, people=people, batch_size=16)

    def gallery_dataloader(self):
        return torch.utils.data.DataLoader(self.items[:192], batch_size=self.batch_size)


def target_of(method, datamodule=None, judge=None):
    datamodule = datamodule or ManyPeople()
    plan = Comparison(methods={"it": {}}, data={"noise": {}}, judges={}, size=16)
    whole = torch.utils.data.default_collate(datamodule.items[192:])
    judges = {"linear": (judge or LinearJudge(), Calibration(threshold=0.9, far=1e-3, pairs=1000, low=0.8, high=0.95))}
    return Target("it", "noise", method.eval(), datamodule, whole, plan, judges, 0, Console(quiet=True))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(room, "MobileFaceNet", LinearRecognizer)
    monkeypatch.setattr(LinearRecognizer, "name", "linear-recognizer", raising=False)


def test_the_network_starts_by_handing_the_last_picture_out_and_learns_with_every_parameter():
    network, image = UNet(2, width=8, depth=2), torch.rand(2, 6, 32, 32)
    assert torch.equal(network(image), image[:, 3:])
    torch.nn.init.normal_(network.out.weight)
    network(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_each_face_comes_once_a_round_and_a_step_is_the_same_whenever_it_is_taken():
    shown = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 16, 16)
    pairs = Pairs(torch.cat([shown, shown + 100]), torch.cat([shown, shown]) + 0.5, shown)
    steps = list(Steps(pairs, 15, 4, 0, lambda: 0))
    rows = [row for step in steps for row in step]
    assert [sorted(rows[at : at + 10]) for at in range(0, 60, 10)] == 3 * [list(range(10)), list(range(10, 20))]
    assert rows[:10] != rows[20:30]
    assert list(Steps(pairs, 15, 4, 0, lambda: 7)) == steps[7:]
    assert steps != list(Steps(pairs, 15, 4, 1, lambda: 0))
    assert [float(part.mean()) for part in pairs[13]] == [103, 3.5, 3]
    assert [len(batch[0]) for batch in PairDataModule(pairs, 3).train_dataloader()] == [16, 16, 16]


def test_no_first_guess_knows_its_own_original():
    hidden, shown = torch.rand(2, 12, 3, 16, 16).unbind(0)
    changed = shown.clone()
    changed[5] = 1 - changed[5]
    before, after = linear_guesses(hidden, shown), linear_guesses(hidden, changed)
    same = (before == after).flatten(1).all(1)
    assert same.nonzero().flatten().tolist() == [1, 5, 9]  # the fold of the changed one
    twice = linear_guesses(torch.cat([hidden, hidden]), shown)
    torch.testing.assert_close(twice[:12], twice[12:])
    many = torch.rand(400, 3, 16, 16)
    assert (linear_guesses(-many, many) - many).abs().mean() < 0.05


@pytest.mark.parametrize(("method", "wins"), [(Negative, True), (OneFixed, True), (Signs, False)])
def test_an_inverter_undoes_what_is_the_same_for_all_and_no_key_of_its_own(method, wins, tmp_path):
    plain, opened = by_inverter(target_of(method()), BUDGET, tmp_path)
    assert (plain.metric, plain.leg, plain.reference, plain.key) == (
        "tar@far=1e-3",
        "anonymized",
        "same-image",
        "right",
    )
    assert (opened.metric, opened.leg, opened.reference, opened.key) == (
        *("inverter_tar", "attacked", "same-image"),
        "none",
    )
    assert len(plain.values) == len(opened.values) == 48
    assert plain.values.mean() < 0.1
    assert opened.values.mean() > 0.9 if wins else opened.values.mean() < 0.1


def test_the_attacker_learns_from_a_face_of_each_training_person_under_keys_of_its_own(tmp_path):
    method, faces = Signs(), ManyPeople(people=24)
    target = target_of(method, faces)
    owner = {tuple(method.key_spec.numbers(target.ring.right(sample)).tolist()) for sample in range(240)}
    hidden, shown = room._pairs(target, BUDGET._replace(keys=2), 16, tmp_path)
    assert shown.shape == (24, 3, 16, 16)
    assert hidden.shape == (48, 3, 16, 16)
    assert {sample for sample, _ in method.seen} == set(range(24))  # the first picture of each
    drawn = {key for _, key in method.seen}
    assert len(drawn) == 48
    assert not drawn & owner
    method.seen.clear()
    again = room._pairs(target, BUDGET._replace(keys=2), 16, tmp_path)
    assert not method.seen  # read back
    assert torch.equal(again[0], hidden)
    assert len(room._pairs(target, BUDGET._replace(pairs=5), 16, tmp_path / "few")[1]) == 5


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    target, budget = target_of(Negative()), BUDGET._replace(steps=20)
    received = target.received
    whole = trained_inverter(target, budget, tmp_path / "whole")(received)[0]
    learn, read, steps, cut = Inverter.training_step, Pairs.__getitem__, [], [12]

    def step(self, batch, number):
        steps.append(self.trainer.global_step)
        return learn(self, batch, number)

    def reading(self, row):
        if len(steps) in cut:
            raise RuntimeError("power cut")
        return read(self, row)

    monkeypatch.setattr(Inverter, "training_step", step)
    monkeypatch.setattr(Pairs, "__getitem__", reading)
    with pytest.raises(RuntimeError, match="power cut"):
        trained_inverter(target, budget, tmp_path / "cut")
    cut.clear()
    resumed = trained_inverter(target, budget, tmp_path / "cut")(received)[0]
    assert steps == list(range(20))
    assert torch.equal(resumed, whole)
    assert torch.equal(trained_inverter(target, budget, tmp_path / "cut")(received)[0], whole)  # nothing is left to do
    assert len(steps) == 20
    assert not torch.equal(trained_inverter(target, budget._replace(steps=1), tmp_path / "cut")(received)[0], whole)


def test_no_judge_teaches_the_inverter_and_missing_weights_leave_pixels(tmp_path, monkeypatch):
    class Known(LinearJudge):
        networks = frozenset({"linear-recognizer"})

    assert room._recognizer(target_of(Negative(), judge=Known())) is None
    assert isinstance(room._recognizer(target_of(Negative())), LinearRecognizer)

    def missing():
        raise WeightsError("no weights here")

    missing.name = "missing"
    monkeypatch.setattr(room, "MobileFaceNet", missing)
    target = target_of(Negative())
    target.console = Console(record=True, file=io.StringIO())
    assert room._recognizer(target) is None
    assert "by pixels alone: no weights here" in target.console.export_text()


def test_identity_counts_beside_pixels(quick_trainer):
    images = torch.rand(32, 3, 16, 16)
    losses = []
    for recognizer in (None, LinearRecognizer()):
        torch.manual_seed(0)
        trainer = quick_trainer(steps=1)
        trainer.fit(Inverter(recognizer, width=8), PairDataModule(Pairs(images, images.flip(3), images), 1))
        losses.append(float(trainer.callback_metrics["loss"]))
    assert losses[1] > losses[0] == pytest.approx(float((images.flip(3) - images).abs().mean()), rel=0.1)


def test_one_known_picture_of_a_person_under_a_shared_key_gives_that_picture():
    """With one pair, all that blocks teach is its original: no more than the attacker has anyway."""
    method = Signs()
    figures = by_pairs(target_of(method, ManyPeople(people=24)), target_of(method).whole, [1, 2, 10])
    shared = {figure.metric: figure for figure in figures if figure.key == "shared"}
    assert set(shared) == {"known_plaintext@1", "known_plaintext@2", "known_person"}  # the test set has ten of each
    assert torch.equal(shared["known_plaintext@1"].values, shared["known_person"].values)
    assert {figure.key for figure in figures} == {"none", "fixed", "shared"}


def test_a_person_has_one_key_under_which_nobody_else_is_hidden(monkeypatch):
    method = Signs()
    target = target_of(method, ManyPeople(people=24))
    received = target.received
    method.seen.clear()
    from experiments.attack_pairs import _of_a_person

    _of_a_person(target, None, [1])
    assert len(received) == 48
    keys = {}
    for sample, key in method.seen:
        keys.setdefault(sample % 24, set()).add(key)
    assert len(keys) == 24
    assert all(len(of_one) == 1 for of_one in keys.values())
    assert len(set.union(*keys.values())) == 24


def test_known_frames_open_the_others_where_frames_have_enough_in_common():
    """Under one key a person, pairs of as many pictures as a block has unknowns undo linear methods."""
    faces = ManyPeople(people=24)
    # twenty-four people of ten pictures, each a mixture of two of their own: two pairs teach all there is
    for person in range(24):
        of_one = [item for item in faces.items if int(item.identity) == person]
        basis = torch.stack([of_one[0].image, of_one[1].image])
        for number, item in enumerate(of_one):
            share = number / 9
            mixed = share * basis[0] + (1 - share) * basis[1]
            faces.items[int(item.sample)] = item._replace(image=mixed)
    figures = by_pairs(target_of(Signs(), faces), target_of(Signs()).whole, [1, 2, 9])
    shared = {figure.metric: figure.values.mean() for figure in figures if figure.key == "shared"}
    assert shared["known_plaintext@9"] == 1
    assert shared["known_person"] < 1
    assert (
        shared["known_plaintext@9"]
        > {f.metric: f.values.mean() for f in figures if f.key == "none"}["known_plaintext@9"]
    )


def test_methods_without_a_key_are_attacked_by_pairs_too():
    figures = by_pairs(target_of(Negative()), target_of(Negative(), ManyPeople()).whole, [1, 10])
    assert {(f.metric, f.key) for f in figures} == {
        ("known_plaintext@1", "none"),
        ("known_plaintext@10", "none"),
        ("adaptive_tar", "none"),
    }

"""Planted cheats: each must fail its comparison, in one sentence."""

import pytest
import torch
from conftest import NoiseFaces
from test_compare import calibrated, write  # noqa: F401

from experiments.compare import compare
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.keys import KeySpec

KEPT = {}


class Honest(ReversibleAnonymizer):
    """Each pixel's sign by the key: what it hides it brings back, and nothing else does."""

    size, key_spec = 64, KeySpec("bits", 64 * 64)

    def anonymize(self, face, key):
        return face.image * key.view(-1, 1, 64, 64)

    def recover(self, face, key):
        return self.anonymize(face, key)


class KeepsOriginalsInAGlobal(Honest):
    def anonymize(self, face, key):
        KEPT.update({hidden.numpy().tobytes(): image for hidden, image in zip(key, face.image, strict=True)})
        return super().anonymize(face, key) * 0.5

    def recover(self, face, key):
        return torch.stack([KEPT[shown.numpy().tobytes()] for shown in key])


class KeepsOriginalsInItself(KeepsOriginalsInAGlobal):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def anonymize(self, face, key):
        self.kept.update({hidden.numpy().tobytes(): image for hidden, image in zip(key, face.image, strict=True)})
        return Honest.anonymize(self, face, key)

    def recover(self, face, key):
        return torch.stack([self.kept[shown.numpy().tobytes()] for shown in key])


class KeepsOriginalsInABuffer(Honest):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(3, 64, 64))

    def anonymize(self, face, key):
        self.kept = face.image[0].clone()
        return super().anonymize(face, key)


class CopiesThrough(Honest):
    def anonymize(self, face, key):
        return face.image


class OpensForAnyKey(Honest):
    def anonymize(self, face, key):
        return -face.image

    def recover(self, face, key):
        return -face.image


class DependsOnItsBatch(Honest):
    def anonymize(self, face, key):
        return super().anonymize(face, key) * (0.5 if len(face.image) > 1 else 1.0)


class Trains(Honest):
    def prepare(self, datamodule):
        self.train()


CHEATS = [
    (KeepsOriginalsInAGlobal, "a process that has files and key alone cannot recover"),
    (KeepsOriginalsInItself, "a process that has files and key alone cannot recover"),
    (KeepsOriginalsInABuffer, "its tensors changed while it hid faces"),
    (CopiesThrough, "it hands faces out as they came"),
    (OpensForAnyKey, "a wrong key opens its pictures"),
    (DependsOnItsBatch, "depends on the faces beside it"),
    (Trains, "training mode"),
]


@pytest.mark.parametrize(("cheat", "why"), CHEATS, ids=[cheat.__name__ for cheat, _ in CHEATS])
def test_a_planted_cheat_fails(cheat, why, tmp_path):
    methods = {"cheat": {"class_path": f"test_guards.{cheat.__name__}"}}
    assert compare(write(tmp_path / "c.yaml", methods=methods, wrong_keys=2), tmp_path / "out") == 1
    text = " ".join((tmp_path / "out" / "table.md").read_text().split())
    assert why in text
    assert not (tmp_path / "out" / "results.jsonl").exists()


class StrangersAndKnown(NoiseFaces):
    """Noise whose test people have marks, as those of a data set of faces have."""

    def people(self, split):
        return {int(number): f"noise:{number}" for number in self.whole().identity.unique()}


class TrainedOn(Honest):
    def __init__(self, marks: list[str]):
        super().__init__()
        self.register_buffer("weight", torch.zeros(1))
        self.trained_on = frozenset(marks)


@pytest.mark.parametrize(("marks", "cheats"), [(["noise:0", "other:1"], True), (["noise:x", "other:1"], False)])
def test_a_method_trained_on_test_people_is_refused(marks, cheats, tmp_path):
    methods = {"method": {"class_path": "test_guards.TrainedOn", "init_args": {"marks": marks}}}
    data = {"noise": {"class_path": "test_guards.StrangersAndKnown"}}
    plan = write(tmp_path / "c.yaml", methods=methods, data=data, wrong_keys=2)
    assert compare(plan, tmp_path / "out") == cheats
    text = " ".join((tmp_path / "out" / "table.md").read_text().split())
    assert ("it was trained on 1 of the" in text) == cheats
    assert ("1 of noise, none of those tested; 1 of other" in text) == (not cheats)


def test_an_honest_method_passes(tmp_path):
    methods = {"honest": {"class_path": "test_guards.Honest"}}
    assert compare(write(tmp_path / "c.yaml", methods=methods, wrong_keys=2), tmp_path / "out") == 0

"""Planted cheats: each must fail its comparison, in one sentence."""

import os
import struct
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import NoiseFaces
from test_compare import calibrated, write  # noqa: F401

from experiments.compare import compare
from experiments.exchange import hide_into, recover_from
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.carriers import decode, encode
from lightning_modules.keys import KeySpec, Secret

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


class KeepsOriginalsOnTheDisk(Honest):
    """Writes them where nobody looks, one file a key, and dates the files back."""

    def place(self, key):
        return Path(os.environ["HIDEOUT"]) / f"{sha256(key.numpy().tobytes()).hexdigest()}.pt"

    def anonymize(self, face, key):
        for numbers, image in zip(key, face.image, strict=True):
            torch.save(image.clone(), self.place(numbers))
            os.utime(self.place(numbers), (0, 0))
        return super().anonymize(face, key) * 0.5

    def recover(self, face, key):
        found = [self.place(numbers) for numbers in key]
        return torch.stack([torch.load(file) if file.is_file() else face.image[0] for file in found])


class LinksOriginals(KeepsOriginalsOnTheDisk):
    """Gives an old file that holds them a new name."""

    def anonymize(self, face, key):
        new = Path(os.environ["HIDEOUT"]) / "new.pt"
        if not new.exists():
            torch.save(face.image.clone(), new.with_name("old.pt"))
            new.hardlink_to(new.with_name("old.pt"))
        return Honest.anonymize(self, face, key)

    def recover(self, face, key):
        return torch.load(Path(os.environ["HIDEOUT"]) / "new.pt")[: len(key)]


class ReadsTheOriginals(Honest):
    """Those that the comparison itself puts beside what was made of them."""

    def recover(self, face, key):
        files = sorted(Path(os.environ["HIDEOUT"]).parent.rglob("faces/noise/original/*.png"))
        return torch.stack([decode(file.read_bytes()) for file in files[: len(key)]])


class AsksAnother(Honest):
    """Another process reads for it what it may not read itself."""

    def recover(self, face, key):
        return torch.frombuffer(bytearray(subprocess.check_output(["cat", sys.executable])), dtype=torch.float32)


class HidesBesideThePicture(Honest):
    def anonymize(self, face, key):
        return torch.cat([super().anonymize(face, key), face.image], 2)

    def recover(self, face, key):
        return face.image[:, :, 64:]


CHEATS = [
    (KeepsOriginalsInAGlobal, "a process that has files and key alone cannot recover"),
    (KeepsOriginalsInItself, "a process that has files and key alone cannot recover"),
    (KeepsOriginalsInABuffer, "its tensors changed while it hid faces"),
    (CopiesThrough, "it hands faces out as they came"),
    (OpensForAnyKey, "a wrong key opens its pictures"),
    (DependsOnItsBatch, "depends on the faces beside it"),
    (Trains, "training mode"),
    (KeepsOriginalsOnTheDisk, "was written after the method began to hide faces"),
    (LinksOriginals, "was written after the method began to hide faces"),
    (ReadsTheOriginals, "it may hold the original"),
    (AsksAnother, "does so alone, without subprocess.Popen"),
    (HidesBesideThePicture, "got (6, 3, 128, 64) of anonymize"),
]


@pytest.mark.parametrize(("cheat", "why"), CHEATS, ids=[cheat.__name__ for cheat, _ in CHEATS])
def test_a_planted_cheat_fails(cheat, why, tmp_path, monkeypatch):
    monkeypatch.setenv("HIDEOUT", str(tmp_path / "hideout"))
    (tmp_path / "hideout").mkdir()
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


class Labelled(torch.Tensor):
    """Pictures with a note of what they were."""


class HidesBehindThePicture(Honest):
    """In finer steps than grey levels, in values out of range, and in a note on the tensor."""

    def anonymize(self, face, key):
        image = (super().anonymize(face, key).as_subclass(Labelled) * 1000).sign() * (1 + face.image.abs() / 300)
        image.note = face.image
        return image


def chunks(png):
    at, found = 8, []
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        found.append(kind.decode())
        at += 12 + length
    assert at == len(png)  # nothing follows the last one
    return found


def test_a_saved_picture_is_its_grey_levels_and_nothing_else(tmp_path):
    """The comparison writes files, not the method: equal grey levels are equal files, without a word beside them."""
    faces = NoiseFaces(count=2).whole()
    hide_into(tmp_path, HidesBehindThePicture().eval(), [faces], Secret("one"), 0, "png")
    for file in sorted((tmp_path / "anonymized").iterdir()):
        png = file.read_bytes()
        assert set(chunks(png)) == {"IHDR", "IDAT", "IEND"}
        assert encode(decode(png)) == png
        assert decode(png).abs().eq(1).all()  # the signs are left
    recover_from(tmp_path, HidesBehindThePicture().eval(), Secret("one"))
    opened = decode((tmp_path / "recovered" / "000000.png").read_bytes())
    assert opened.abs().eq(1).all()

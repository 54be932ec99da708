from pathlib import Path

import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces
from PIL import Image

from datamodules.batch import FaceBatch
from experiments.chosen import by_chance
from experiments.grids import CONDITIONED, DRAWN, between
from flows.conjugate import Conjugate
from lightning_modules.ifadit import IFADITTransform
from lightning_modules.keys import KeyRing, KeySpec
from lightning_modules.sdn import SDN


def test_between_nothing_and_a_rotation_lie_rotations():
    rotation = KeySpec("rotation", 16).random(3, torch.Generator().manual_seed(0))
    nothing = torch.eye(16).expand(3, -1, -1)
    torch.testing.assert_close(between(rotation, rotation, "rotation", 0.0), nothing, atol=1e-5, rtol=0)
    torch.testing.assert_close(between(rotation, rotation, "rotation", 1.0), rotation, atol=1e-5, rtol=0)
    half = between(rotation, rotation, "rotation", 0.5)
    torch.testing.assert_close(half @ half.mT, nothing, atol=1e-5, rtol=0)
    torch.testing.assert_close(half @ half, rotation, atol=1e-4, rtol=0)


def test_between_two_normal_keys_the_length_stays():
    first, second = torch.randn(2, 4, 2000)
    torch.testing.assert_close(between(first, second, "normal", 0.0), first)
    torch.testing.assert_close(between(first, second, "normal", 1.0), second, atol=1e-5, rtol=0)
    middle = between(first, second, "normal", 0.5)
    torch.testing.assert_close(middle.norm(dim=1) / 2000**0.5, torch.ones(4), atol=0.1, rtol=0)


def test_between_bits_is_nothing():
    with pytest.raises(ValueError, match="nothing between two keys of kind bits"):
        between(torch.ones(1, 4), torch.ones(1, 4), "bits", 0.5)


@pytest.mark.parametrize(("kind", "columns"), [("round-trip", 6), ("keys", 4), ("swap", 3)])
def test_each_kind_has_a_row_a_face(kind, columns):
    method = IFADITTransform(
        LinearGenerator(), LinearRecognizer(), Conjugate(512, 16), size=64, width=8, blocks=1, live_rows=4
    ).eval()
    faces = NoiseFaces(count=24)
    whole = faces.whole()
    with torch.no_grad():
        method.prepare(faces)
        face = type(whole)(*(field[:2] for field in whole))
        picture = DRAWN[kind](method, face, KeyRing.from_seed(0), 3, 32)
    assert picture.size == (columns * 34 - 2, 22 + 2 * 34 - 2)


def test_attributes_and_wrong_factors_have_a_column_each():
    torch.manual_seed(0)
    method = SDN(size=64, width=8, key_bits=16, attributes=2).eval()
    face = NoiseFaces(count=3, attributes=2).whole()
    with torch.no_grad():
        for kind, columns in (("attributes", 4), ("factors", 8)):
            picture = CONDITIONED[kind](method, face, KeyRing.from_seed(0), ("Male", "Young"), 32)
            assert picture.size == (columns * 34 - 2, 22 + 3 * 34 - 2)


def test_faces_without_labels_get_attributes_by_chance(tmp_path, monkeypatch):
    import experiments.grids as grids

    method = SDN(size=64, width=8, key_bits=16, attributes=2).eval()
    monkeypatch.setattr(grids, "load_method", lambda spec: (method, None))
    monkeypatch.setattr(grids, "build", lambda *_: NoiseFaces(count=3))
    for kind in ("round-trip", "factors", "attributes"):
        grids.grid(Path("configs/method/sdn.yaml"), tmp_path / f"{kind}.png", kind=kind, faces=2, tile=32)
        assert Image.open(tmp_path / f"{kind}.png").size[0] > 4 * 32


@pytest.mark.parametrize("kind", ["attributes", "factors"])
def test_a_method_without_attributes_cannot_be_asked_for_them(kind):
    method = SDN(size=64, width=8, key_bits=16).eval()
    with pytest.raises(ValueError, match="SDN was built without attributes"):
        CONDITIONED[kind](method, NoiseFaces(count=2).whole(), KeyRing.from_seed(0), (), 32)
    with pytest.raises(ValueError, match="give the data set labels"):
        CONDITIONED[kind](
            SDN(size=64, width=8, key_bits=16, attributes=2), NoiseFaces(count=2).whole(), KeyRing.from_seed(0), (), 32
        )


def test_attributes_by_chance_belong_to_a_face_and_not_to_its_batch():
    faces = NoiseFaces(count=24).whole()
    drawn = by_chance(faces, 3, seed=0).attributes
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    fewer = by_chance(FaceBatch(*(field[5:7] for field in faces)), 3, seed=0).attributes
    assert torch.equal(fewer, drawn[5:7])
    assert not torch.equal(by_chance(faces, 3, seed=1).attributes, drawn)

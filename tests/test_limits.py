import pytest
import torch
from conftest import LinearGenerator, LinearRecognizer, NoiseFaces

from experiments.limits import STAGES, draw, limits, linkage, measure
from flows.conjugate import Conjugate
from flows.orthogonal import KeyedOrthogonal
from lightning_modules.ifadit import IFADITTransform
from lightning_modules.keys import KeyRing, KeySpec


def method(transform):
    torch.manual_seed(0)
    small = {"size": 64, "width": 8, "blocks": 1, "live_rows": 4}
    return IFADITTransform(LinearGenerator(), LinearRecognizer(), transform, **small).eval()


def test_every_station_is_measured_and_drawn():
    made, faces = method(Conjugate(512, 16)), NoiseFaces(count=24)
    with torch.no_grad():
        made.prepare(faces)
    found = measure(made, faces.whole(), KeyRing.from_seed(0), 8, "faces")
    assert set(found) == {*STAGES, "carried", "linkage"}
    assert len(found["carried"]) == 8
    assert all(-1 <= found[name] <= 1 for name in STAGES)
    lines = [{"data": name, "faces": 24, "weights": f"step {at}", **found} for name in ("a", "b") for at in (1, 2)]
    panels = draw(lines).axes
    assert [len(panel.lines) for panel in panels] == [len(STAGES)] * 2


def test_a_transform_that_hides_nothing_loses_nothing_and_the_same_faces_give_the_same_figures():
    made, face = method(KeyedOrthogonal(512)), NoiseFaces(count=8).whole()
    found = measure(made, face, KeyRing.from_seed(0), 8, "faces")
    assert found["transform"] == pytest.approx(1, abs=1e-4)
    assert found["compensated"] == found["asked"]  # untrained, it changes nothing
    assert "carried" not in found
    again = measure(made, face, KeyRing.from_seed(0), 4, "faces")
    assert again == pytest.approx(found, abs=2e-3)


def test_limits_is_about_ifadit(tmp_path):
    with pytest.raises(ValueError, match="SDN has none"):
        limits("configs/method/sdn.yaml", tmp_path, weights=None)
    with pytest.raises(ValueError, match="two faces at least"):
        limits("configs/method/ifadit-transform.yaml", tmp_path, faces=1)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint nosuch.ckpt"):
        limits("configs/method/ifadit-transform.yaml", tmp_path, phase1=["nosuch.ckpt"])
    assert not list(tmp_path.iterdir())


def test_bands_are_what_a_stranger_can_link_by():
    codes = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for bands in (1, 2, 8):
        spec = KeySpec("rotation", 16, bands)
        hidden = torch.einsum("nij,nj->ni", spec.random(300, torch.Generator().manual_seed(1)), codes)
        found[bands] = linkage(hidden, codes, spec)
    assert found[1] < 0.7  # one length of a unit code: rounding alone
    assert found[2] > 0.95
    assert found[8] > 0.99

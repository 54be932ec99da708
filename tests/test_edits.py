import json

import pytest
import torch
from conftest import NoiseFaces
from orl_faces import need, orl_faces

from experiments.edits import Edits, edit, named, table
from lightning_modules.appearance import Appearance, drawn, shaded
from lightning_modules.keys import KeyRing
from lightning_modules.metrics.realism import frechet
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.sdn import SDN
from lightning_modules.sdn.networks import STYLE
from lightning_modules.sdn.sefa import style_directions


def sdn(**options):
    torch.manual_seed(0)
    return SDN(size=64, width=8, key_bits=16, **options).eval()


def test_the_strongest_direction_is_found_first_whatever_its_sign():
    decoder = sdn().decoder
    strong = torch.nn.functional.normalize(torch.randn(2, STYLE), dim=1)
    strong[1] -= (strong[1] @ strong[0]) * strong[0]
    strong[1] /= strong[1].norm()
    with torch.no_grad():
        affine = decoder.blocks[0].norm1.affine.weight
        affine += 90 * torch.randn(len(affine), 1) * strong[0] / len(affine) ** 0.5
        decoder.scales[0].weight += 50 * torch.randn(len(decoder.scales[0].weight), 1) * strong[1]
    found = style_directions(decoder, 3)
    assert sorted((found[:2] @ strong.mT).abs().amax(1).tolist()) == pytest.approx([1, 1], abs=0.05)
    torch.testing.assert_close(found @ found.mT, torch.eye(3), atol=1e-5, rtol=0)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_direction_moves_the_modulations_by_its_eigenvalue():
    decoder = sdn().decoder
    layers = [module for module in decoder.modules() if type(module).__name__ == "AdaIN"]
    weights = (
        [m.affine.weight for m in layers]
        + [s.weight for s in decoder.scales]
        + [decoder.inject.weight[:, -STYLE:, 0, 0]]
    )
    moved = [sum((w @ v).square().sum() for w in weights).item() for v in style_directions(decoder, STYLE)]
    assert moved == sorted(moved, reverse=True)
    assert sum(moved) == pytest.approx(sum(w.square().sum().item() for w in weights), rel=1e-4)


def test_too_many_directions_are_refused():
    with pytest.raises(ValueError, match="1 to 256 directions, not 257"):
        style_directions(sdn().decoder, 257)


def test_a_degree_is_the_spread_of_styles_and_no_degree_no_edit():
    method, face = sdn(attributes=2), NoiseFaces(attributes=2, count=4).whole()
    torch.nn.init.normal_(method.decoder.out.weight, std=0.05)  # which adds nothing before training
    key = method.key_spec.random(4, torch.Generator().manual_seed(0))
    shift = method.edit_directions(2)
    with torch.no_grad():
        styles = method.factors(torch.randint(2, (4000, 18)) * 2.0 - 1, +1.0)
        unit = torch.nn.functional.normalize(shift, dim=1)
        torch.testing.assert_close((styles @ unit.mT).std(0), shift.norm(dim=1), rtol=0.1, atol=0)
        plain = method.anonymize(face, key)
        torch.testing.assert_close(method.edit(face, key, torch.zeros(STYLE)), plain)
        assert (method.edit(face, key, 20 * shift[0]) - plain).abs().max() > 0.01


def test_a_direction_is_named_by_what_it_moves_most():
    assert named(torch.tensor([0.1, -2.0, 1.0]), ("male", "age", "smile")) == "less age"
    assert named(torch.tensor([0.1, -0.2, 1.0]), ("male", "age", "smile")) == "more smile"


def test_traits_of_landmarks_and_shades():
    points = torch.rand(1, 68, 2, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    points[:, 36:42] = torch.tensor([0.3, 0.4])
    points[:, 42:48] = torch.tensor([0.7, 0.4])
    points[1, [65, 66, 67], 1] += 1.0  # the lower lip
    points[1, 55:60, 1] += 1.0
    points[2, [48, 54], 1] -= 0.2  # the corners of the mouth, upwards
    gap, lift, lids, beside = drawn(points)
    assert gap[1] > gap[0]
    assert gap[2] == gap[0]
    assert lift.tolist() == pytest.approx([float(lift[0]), float(lift[0]), float(lift[0]) + 0.5])
    assert lids.std() == beside.std() == 0
    angle = torch.tensor(0.3)
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    for upright, tilted in zip(drawn(points), drawn(points @ turn.mT), strict=True):
        torch.testing.assert_close(tilted, upright, atol=1e-5, rtol=1e-4)
    grey = torch.full((1, 1, 64, 64), 0.8)
    at = points[:1, [33]].lerp(points[:1, [51]], 0.5)[0, 0]
    moustache = grey.clone()
    moustache[
        0, 0, (at[1] * 64).long() - 1 : (at[1] * 64).long() + 2, (at[0] * 64).long() - 1 : (at[0] * 64).long() + 2
    ] = 0
    assert shaded(points[:1], grey)[0].abs().item() < 1e-6
    assert shaded(points[:1], moustache)[0].item() > 0.1
    assert shaded(points[:1], grey)[1].item() == pytest.approx(0.8)


def test_real_faces_have_traits():
    need("faceres", "landmarks68")
    appearance = Appearance()
    found = dict(zip(appearance.names, appearance(orl_faces().flatten(0, 1)).mT, strict=True))
    assert ((found["male"] >= 0) & (found["male"] <= 1)).all()
    assert 15 < found["age"].mean() < 60
    assert (found["eyes open"] > 0.02).all()


def test_the_same_pictures_lie_at_no_distance():
    need("mobilefacenet")
    faces = orl_faces().flatten(0, 1)
    network = MobileFaceNet()
    assert frechet(network, faces, faces) == pytest.approx(0, abs=1e-3)
    assert frechet(network, faces.flip(2), faces) > 0.1
    with pytest.raises(ValueError, match="two pictures at least, got 1 and 8"):
        frechet(network, faces[:1], faces)


def test_the_distance_of_two_gaussians_is_its_closed_form():
    """‖m − n‖² + Σ (s − t)² of independent coordinates with deviations s and t."""
    deviation = torch.tensor([1.0, 2.0, 0.5])
    first, second = torch.randn(2, 4000, 3, generator=torch.Generator().manual_seed(0)) * deviation
    found = frechet(torch.nn.Flatten(), (2 * first + 1).view(-1, 3, 1, 1), second.view(-1, 3, 1, 1))
    assert found == pytest.approx(float(3 + deviation.square().sum()), rel=0.05)


def test_every_direction_and_degree_is_measured_and_drawn():
    need("faceres", "landmarks68", "mobilefacenet")
    method, face = sdn(), NoiseFaces(count=4).whole()
    found = Edits.measure(method, face, KeyRing.from_seed(0), 2, 1, 3)
    assert [(line["direction"], line["degree"]) for line in found.lines] == [(d, g) for d in (1, 2) for g in (-1, 0, 1)]
    assert found.lines[1]["ssim"] == 1
    assert found.lines[1]["fd_face"] == pytest.approx(0, abs=1e-3)
    assert set(found.lines[1]["moved"].values()) == {0.0}
    assert found.pictures.shape == (2, 3, 4, 3, 64, 64)
    picture = found.drawing(face, 2, 32)
    assert picture.size[1] == 22 + 4 * 34 - 2
    told = {"method": "sdn", "weights": None, "n": 4, "data": "noise", "size": 64, "seed": 0, "commit": "0"}
    text = table([told | line for line in found.lines])
    assert text.startswith("sdn (untrained) on 4 faces of noise at 64 px")
    assert text.count("| fd_face ↓ |") == 2
    assert all(len(row.split("|")) == 7 for row in text.splitlines() if row.startswith("|"))
    json.dumps(found.lines)


def test_edit_is_about_sdn(tmp_path):
    with pytest.raises(ValueError, match="Blur has none"):
        edit("configs/method/blur.yaml", tmp_path)
    with pytest.raises(ValueError, match="degrees, shown and batch must be 1 or more"):
        edit("configs/method/sdn.yaml", tmp_path, degrees=0)
    assert not list(tmp_path.iterdir())

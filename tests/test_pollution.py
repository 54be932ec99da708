import pytest
import torch
from conftest import NoiseFaces
from orl_faces import need, orl_faces
from torchvision.transforms.functional import gaussian_blur as blur

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics import pollution as room
from lightning_modules.metrics.pollution import FIGURES, Pollution, pollution
from lightning_modules.networks.landmarks import Landmarks68
from lightning_modules.paste import FaceMask, paste


@pytest.fixture(scope="module")
def faces():
    need("landmarks68")
    return orl_faces().flatten(0, 1)[:2] / 2 + 0.5


@pytest.fixture(scope="module")
def points(faces):
    return Landmarks68()(faces * 2 - 1)


def figures(image, faces, points):
    return dict(zip(FIGURES, pollution(image, faces, points).mT, strict=True))


def test_nothing_changed_is_nothing_polluted(faces, points):
    assert all((values == 0).all() for values in figures(faces, faces, points).values())


def test_another_background_is_the_backgrounds_alone(faces, points):
    image = faces.clone()
    image[..., -8:, :] = 1
    found = figures(image, faces, points)
    assert (found["background_shift"] > 0.01).all()
    assert (found["eye_shift"] == 0).all()
    assert (found["hair_shift"] == 0).all()


def test_a_shift_of_colour_is_told_in_shares_of_white(faces, points):
    found = figures(faces * 0.5 + 0.1, faces * 0.5, points)
    for name in ("background_shift", "eye_shift", "hair_shift"):
        torch.testing.assert_close(found[name], torch.full((2,), 0.1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["seam"], torch.zeros(2), atol=1e-6, rtol=0)


def test_closed_eyes_are_the_eyes(faces, points):
    image = faces.clone()
    at = (points[:, 36:48].mean(1) * 256).long()
    for one, (x, y) in zip(image, at, strict=True):
        one[:, y - 10 : y + 10, x - 30 : x + 30] = 0.5
    found = figures(image, faces, points)
    assert (found["eye_shift"] > 0.01).all()
    assert (found["background_shift"] == 0).all()


def test_a_seam_is_where_a_mask_ends_and_blur_has_none(faces, points):
    mask = FaceMask()(faces * 2 - 1)
    grey = torch.full_like(faces, 0.4)
    hard = figures(torch.where(mask > 0.5, 0.7, grey), grey, points)["seam"]
    soft = figures(paste(grey + 0.3, grey, mask), grey, points)["seam"]
    other = figures(paste(faces.flip(0), faces, mask), faces, points)["seam"]
    cut = figures(torch.where(mask > 0.5, faces.flip(0) * 0.7, faces), faces, points)["seam"]
    blurred = figures(blur(faces, 31), faces, points)["seam"]
    assert (hard > soft).all()
    assert (soft > 0.005).all()
    assert (cut > other + 0.005).all()
    assert (blurred.abs() < 0.002).all()


def test_a_face_that_fills_the_picture_has_no_background(faces, points):
    large = (points - 0.5) * 4 + 0.5
    found = figures(faces * 0.5, faces, large)
    assert found["background_shift"].isnan().all()
    assert (found["eye_shift"] > 0.05).all()


def test_a_bald_head_is_the_hairs(faces, points):
    image = faces.clone()
    image[..., : int(points[:, 19:25, 1].min() * 256) - 45, :] = 1
    found = figures(image, faces, points)
    assert (found["hair_shift"] > 0.02).all()
    assert (found["eye_shift"] == 0).all()


def trip(images):
    index = torch.arange(len(images))
    return RoundTrip.of(images, anonymized=-images, recovered=images, identity=index, sample=index)


def test_every_face_has_its_figures_and_missing_weights_say_so(monkeypatch):
    need("landmarks68")
    metric = Pollution()
    images = NoiseFaces(count=6).whole().image
    for part in images.split(2):
        metric.update(trip(part))
    found = {(figure.leg, figure.metric): figure for figure in metric.figures()}
    assert {metric for _, metric in found} == set(FIGURES)
    assert found["anonymized", "background_shift"].n == 6
    assert found["anonymized", "background_shift"].value > 0
    assert found["recovered", "background_shift"].value == 0
    monkeypatch.setattr(room, "find", lambda name: None)
    without = Pollution()
    without.update(trip(images))
    assert {figure.why for figure in without.figures()} == {"weights missing: landmarks68"}

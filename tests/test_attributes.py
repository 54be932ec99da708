"""What faces keep beside who they are: figures by toy networks, then the networks themselves on real faces."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from orl_faces import need, orl_faces
from torchvision.transforms.functional import rotate

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics import readers as room
from lightning_modules.metrics.attributes import FIGURES, FaceAttributes, pose_angle, rotation
from lightning_modules.metrics.readers import EyesClosed, HeadPose, Remembered, eye_crop


def first(*at):
    """A reader of the first pixels of a picture."""
    return lambda images: images.flatten(1)[:, at].clone()


TOYS = {"head-pose": first(0, 1, 2), "expression": first(*range(3, 10)), "eyes-open": first(10, 11)}
TOYS["faceres"] = first(12, 13)


def pictures(*faces):
    """Pictures of which the toys read pose, expression, eyes, and gender with age."""
    images = torch.zeros(len(faces), 3, 4, 4)
    for image, (pose, expression, eyes, gender_age) in zip(images, faces, strict=True):
        scores = torch.zeros(7)
        scores[expression] = 1
        image.view(-1)[:14] = torch.cat([torch.tensor(pose), scores, torch.tensor(eyes), torch.tensor(gender_age)])
    return images


def trip(original, **legs):
    index = torch.arange(len(original))
    return RoundTrip.of(original, identity=index, sample=index, **legs)


FRONT, OPEN, SHUT = (0.0, 0.0, 0.0), (0.0, 0.0), (1.0, 1.0)
MAN, WOMAN = (0.9, 30.0), (0.1, 50.0)


def test_each_figure_is_what_was_changed():
    original = pictures(*[(FRONT, 3, OPEN, MAN)] * 4)
    changed = pictures(
        ((20.0, 0.0, 0.0), 3, OPEN, MAN),
        (FRONT, 0, (1.0, 0.0), MAN),  # one eye is a wink
        (FRONT, 3, SHUT, (0.9, 35.0)),
        (FRONT, 5, SHUT, WOMAN),
    )
    metric = FaceAttributes(readers=TOYS)
    metric.update(trip(original, anonymized=changed, recovered=original))
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values["anonymized/pose_deg"] == pytest.approx(5)
    assert values["anonymized/expression_agree"] == 0.5
    assert values["anonymized/eyes_agree"] == 0.5
    assert values["anonymized/gender_agree"] == 0.75
    assert values["anonymized/age_mae"] == 6.25
    # of male, young, smiling: 3 of 3, 2 of 3, 3 of 3 and none
    assert values["anonymized/attribute_agree"] == pytest.approx(8 / 12)
    assert {values[f"recovered/{metric}"] for metric in FIGURES if metric.endswith("agree")} == {1}
    assert (values["recovered/pose_deg"], values["recovered/age_mae"]) == (0, 0)
    assert not any(name.startswith("wrongly_recovered") for name in values)


def test_a_pose_is_as_far_as_the_one_axis_it_turns_about():
    start = torch.tensor([[10.0, -5.0, 3.0]])
    for axis in range(3):
        turned = torch.zeros(1, 3)
        turned[0, axis] = 30
        assert pose_angle(torch.zeros(1, 3), turned).item() == pytest.approx(30, abs=1e-4)
    assert pose_angle(start, start).item() == 0
    far = torch.tensor([[170.0, 0.0, 0.0]])
    assert pose_angle(far, -far).item() == pytest.approx(20, abs=1e-3)  # the short way round


def test_rotations_are_those_of_scipy():
    from scipy.spatial.transform import Rotation

    pose = torch.tensor(np.random.default_rng(0).uniform(-90, 90, (20, 3)))
    other = pose.flip(0)
    yaw, pitch, roll = pose.numpy().T
    theirs = Rotation.from_euler("XYZ", np.stack([pitch, -yaw, roll], 1), degrees=True)
    np.testing.assert_allclose(rotation(pose.float()).numpy(), theirs.as_matrix(), atol=1e-6)
    between = theirs.inv() * Rotation.from_matrix(rotation(other.float()).numpy())
    np.testing.assert_allclose(pose_angle(pose.float(), other.float()), np.rad2deg(between.magnitude()), atol=1e-3)


def test_two_metrics_with_their_states_joined_equal_one():
    generator = torch.Generator().manual_seed(0)
    original, anonymized, recovered = (torch.rand(9, 3, 4, 4, generator=generator) for _ in range(3))
    whole = trip(original, anonymized=anonymized, recovered=recovered)
    alone, one, two = (FaceAttributes(readers=TOYS) for _ in range(3))
    alone.update(whole)
    one.update(RoundTrip(*(field[:4] for field in whole)))
    two.update(RoundTrip(*(field[4:] for field in whole)))
    for state in alone._defaults:
        setattr(one, state, getattr(one, state) + getattr(two, state))
    assert [asdict(figure) for figure in one.figures()] == [asdict(figure) for figure in alone.figures()]


def test_a_network_that_a_loss_used_does_not_judge():
    metric = FaceAttributes(loss_networks={"faceres"}, readers=TOYS)
    metric.update(trip(torch.zeros(2, 3, 4, 4), anonymized=torch.zeros(2, 3, 4, 4)))
    found = {figure.metric: figure for figure in metric.figures()}
    for name in ("gender_agree", "age_mae", "attribute_agree"):
        assert found[name].why == "faceres is a loss network of this method"
    assert found["pose_deg"].value == 0


def test_missing_weights_are_said(monkeypatch):
    monkeypatch.setattr(room, "find", lambda card: None)
    metric = FaceAttributes()
    metric.update(trip(torch.zeros(2, 3, 4, 4), anonymized=torch.zeros(2, 3, 4, 4)))
    found = {figure.metric: figure.why for figure in metric.figures()}
    assert set(found) == set(FIGURES)
    assert found["pose_deg"] == "weights missing: head-pose"
    assert found["eyes_agree"] == "weights missing: eyes-open, landmarks68"


def test_a_picture_is_read_once():
    asked = []

    def count(images):
        asked.append(len(images))
        return images.flatten(1)[:, :2]

    read, images = Remembered(count), torch.rand(3, 3, 4, 4)
    assert torch.equal(read(images), images.flatten(1)[:, :2])
    again = images[[2, 0, 0]]
    assert torch.equal(read(again), again.flatten(1)[:, :2])
    read(torch.cat([images, torch.ones(1, 3, 4, 4)]))
    assert asked == [3, 1]


# --- the networks ---------------------------------------------------------------------------------------


def test_a_turned_face_is_turned():
    need("head-pose")
    read, faces = HeadPose(), orl_faces().flatten(0, 1)
    pose, mirrored = read(faces), read(faces.flip(3))
    turned = read(rotate(faces, 12))  # against the clock
    assert pose.shape == (8, 3)
    assert (turned - pose)[:, 2].mean().item() == pytest.approx(-12, abs=2)
    assert (pose + mirrored)[:, [0, 2]].abs().median() < 5
    assert (pose - mirrored)[:, 1].abs().median() < 3
    assert pose[:, 0].std() > 3  # some look aside


def test_the_eye_is_cut_where_its_points_are():
    across = torch.linspace(0.5, 99.5, 100).expand(1, 1, 100, 100) / 100
    points = torch.tensor([[[0.3, 0.5], [0.35, 0.48], [0.45, 0.48], [0.5, 0.5], [0.45, 0.52], [0.35, 0.52]]])
    crop = eye_crop(across, points)
    assert crop.shape == (1, 1, 24, 24)
    middle = 0.4 + 0.32 * ((torch.arange(24) + 0.5) / 24 - 0.5)
    torch.testing.assert_close(crop[0, 0], middle.expand(24, 24), atol=1e-5, rtol=0)
    down = eye_crop(across.mT, points)[0, 0]
    torch.testing.assert_close(down[:, 0], 0.5 + middle - 0.4, atol=1e-5, rtol=0)


def test_readings_do_not_depend_on_the_batch():
    need("head-pose", "eyes-open", "landmarks68")
    faces = orl_faces().flatten(0, 1)[:3]
    for make in (HeadPose, EyesClosed):
        read = make()
        torch.testing.assert_close(torch.cat([read(face[None]) for face in faces]), read(faces), atol=1e-4, rtol=0)


def test_real_faces_keep_all_that_is_theirs():
    need("head-pose", "eyes-open", "landmarks68", "faceres", "faceres-graph")
    faces = orl_faces().flatten(0, 1)[:4]
    metric = FaceAttributes()
    metric.update(trip(faces, anonymized=faces.roll(2, 0), recovered=faces))
    found = {(figure.leg, figure.metric): figure for figure in metric.figures()}
    for name in ("pose_deg", "age_mae"):
        assert found["recovered", name].value == 0
        assert found["anonymized", name].value > 1
    assert found["recovered", "gender_agree"].value == 1
    assert found["anonymized", "eyes_agree"].n == 4

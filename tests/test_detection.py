"""Detection: real faces of any size are found, their points are in order, and the main face is the middle one."""

import numpy as np
import pytest
from orl_faces import need

from datamodules.datasets import ORL
from datamodules.detection import CenterFace, Detection, Detector, YuNet, default_detector, main_face


@pytest.fixture(scope="module", params=["centerface", "yunet"])
def detector(request):
    need(request.param)
    return {"centerface": CenterFace, "yunet": YuNet}[request.param]()


@pytest.fixture(scope="module")
def portraits():
    need("orl")
    source = ORL()
    return [source.read(picture) for picture in source.pictures[::25]]


def test_a_detector_names_itself_and_its_weights(detector):
    assert isinstance(detector, Detector)
    assert detector.name.split("-")[0] in {"centerface", "yunet"}


def test_every_small_portrait_has_a_face_with_its_points_in_order(detector, portraits):
    for picture in portraits:
        face = main_face(detector.detect(picture), *picture.shape[:2])
        left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])
        assert (face.box[:2] < face.landmarks.mean(0)).all()
        assert (face.landmarks.mean(0) < face.box[2:]).all()


def test_points_follow_the_face_when_the_picture_grows_and_moves(detector, portraits):
    picture = portraits[0]
    points = main_face(detector.detect(picture), *picture.shape[:2]).landmarks
    moved = np.pad(np.kron(picture, np.ones((3, 3, 1), np.uint8)), ((30, 60), (90, 20), (0, 0)), mode="edge")
    found = main_face(detector.detect(moved), *moved.shape[:2]).landmarks
    np.testing.assert_allclose(found, points * 3 + [91, 31], atol=8)  # 3 px of the picture's own


def test_two_faces_are_two_detections(detector, portraits):
    pair = np.hstack([portraits[0], portraits[5]])
    faces = sorted(detector.detect(pair), key=lambda face: face.box[0])
    assert len(faces) == 2
    assert faces[0].landmarks[:, 0].max() < portraits[0].shape[1] < faces[1].landmarks[:, 0].min()


def test_nothing_is_found_in_noise_or_in_one_colour(detector):
    noise = np.random.default_rng(0).integers(0, 256, (120, 100, 3), np.uint8)
    assert detector.detect(noise) == []
    assert detector.detect(np.full((50, 70, 3), 128, np.uint8)) == []


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (1000, 800)])
def test_any_size_of_picture_is_searched(detector, shape):
    assert detector.detect(np.zeros((*shape, 3), np.uint8)) == []


def test_the_default_detector_is_one_that_is_there():
    need("centerface")
    assert isinstance(default_detector(), (YuNet, CenterFace))


def test_the_main_face_is_large_and_central():
    def face(left, top, side):
        box = np.array([left, top, left + side, top + side], np.float32)
        return Detection(box, 0.9, np.zeros((5, 2), np.float32))

    middle, corner, small = face(80, 80, 90), face(0, 0, 95), face(120, 120, 10)
    assert main_face([corner, middle, small], 250, 250) is middle
    assert main_face([], 250, 250) is None

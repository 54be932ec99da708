"""Alignment: a similarity is found exactly, undone exactly, and carries pixels where it carries points."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.alignment import (
    ARCFACE_TEMPLATE,
    align,
    compose,
    crop_map,
    invert,
    similarity_transform,
    template,
    transform,
    warp,
)

similarities = st.builds(
    lambda scale, angle, x, y: np.array(
        [
            [scale * np.cos(angle), -scale * np.sin(angle), x],
            [scale * np.sin(angle), scale * np.cos(angle), y],
        ]
    ),
    st.floats(0.05, 20),
    st.floats(-3.1, 3.1),
    st.floats(-500, 500),
    st.floats(-500, 500),
)


@given(similarities)
def test_a_similarity_is_recovered_exactly(matrix):
    points = template("ffhq", 200)
    np.testing.assert_allclose(similarity_transform(points, transform(matrix, points)), matrix, atol=1e-6)


@given(similarities)
def test_a_map_and_its_inverse_leave_points_where_they_were(matrix):
    points = template("arcface", 112)
    np.testing.assert_allclose(transform(invert(matrix), transform(matrix, points)), points, atol=1e-4)
    np.testing.assert_allclose(compose(invert(matrix), matrix), np.eye(2, 3), atol=1e-6)


def test_mirrored_points_are_met_without_mirroring():
    points = template("ffhq", 100)
    linear = similarity_transform(points, points * [-1, 1])[:, :2]
    assert np.linalg.det(linear) > 0


def test_the_arcface_template_is_the_published_one_at_112_pixels():
    np.testing.assert_allclose(template("arcface", 112), ARCFACE_TEMPLATE, atol=1e-12)


@pytest.mark.parametrize(("size", "other"), [(128, 256), (64, 1024), (100, 37)])
def test_the_templates_of_two_sizes_are_one_face(size, other):
    moved = transform(crop_map("ffhq", size, "ffhq", other), template("ffhq", size))
    np.testing.assert_allclose(moved, template("ffhq", other), atol=1e-9)


@pytest.mark.parametrize("scale", [0.3, 0.8, 1.0, 2.0])
def test_pixels_go_where_their_points_go(scale):
    picture = np.zeros((400, 400, 3), np.uint8)
    landmarks = transform(np.array([[0.97, -0.24, 90.0], [0.24, 0.97, 60.0]]) * [1, 1, 1], template("ffhq", 200))
    for x, y in landmarks:  # soft spots, since a pixel could fall between pixels
        spot = np.hypot(np.arange(400) - x, (np.arange(400) - y)[:, None])
        picture = np.maximum(picture, (255 * np.exp(-((spot / 5) ** 2)))[..., None].astype(np.uint8))
    size = round(200 * scale)
    crop, matrix = align(picture, landmarks, size)
    np.testing.assert_allclose(transform(matrix, landmarks), template("ffhq", size), atol=0.02 * size)
    for x, y in transform(matrix, landmarks):
        reach = max(3, round(8 * scale))
        left, top = round(x) - reach, round(y) - reach
        patch = crop[top : top + 2 * reach + 1, left : left + 2 * reach + 1, 0].astype(float)
        rows, columns = np.mgrid[: len(patch), : patch.shape[1]]
        centre = np.array([(columns * patch).sum(), (rows * patch).sum()]) / patch.sum() + [left, top]
        np.testing.assert_allclose(centre, [x, y], atol=0.35)


def test_shrinking_averages_instead_of_picking_pixels():
    board = np.indices((512, 512)).sum(0) % 2 * 255
    picture = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    matrix = np.array([[0.23, 0, 0], [0, 0.23, 0]])
    small = warp(picture, matrix, 100)
    aliased = cv2.warpAffine(picture, matrix, (100, 100), flags=cv2.INTER_LINEAR)
    assert small.std() < 5 < aliased.std()


def test_the_identity_map_keeps_every_pixel():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(warp(picture, np.eye(2, 3), 64), picture)


def test_outside_the_picture_there_is_no_second_face():
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[40:60, 2:22] = 255  # its reflection lies 20 pixels beyond the border
    crop = warp(picture, np.array([[1.0, 0, 60], [0, 1, 0]]), 160)
    assert crop[40:60, 62:82].min() == 255
    assert crop[:, :30].max() < 40


def test_landmarks_on_one_place_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="at least two distinct points"):
        align(np.zeros((9, 9, 3), np.uint8), np.ones((5, 2)), 32)
    with pytest.raises(ValueError, match="finite points"):
        align(np.zeros((9, 9, 3), np.uint8), np.full((5, 2), np.nan), 32)


def test_a_template_of_another_name_is_refused():
    with pytest.raises(ValueError, match="got 'celeba'"):
        template("celeba", 128)


def test_a_map_that_folds_the_plane_has_no_inverse():
    with pytest.raises(ValueError, match="determinant 0"):
        invert(np.array([[1.0, 2, 0], [2, 4, 0]]))

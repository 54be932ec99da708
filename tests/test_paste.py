"""The mask covers the face and ends; what it changes can be found again on the anonymized picture alone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from orl_faces import need, orl_faces
from torch.nn import functional as F

from lightning_modules.carriers import quantize
from lightning_modules.networks.landmarks import JAW, NOSE_TIP, Landmarks68
from lightning_modules.paste import (
    FaceMask,
    distance_to_hull,
    mask_iou,
    match_border,
    match_tone,
    outline,
    paste,
    seam,
)


@pytest.fixture(scope="module")
def mask():
    need("landmarks68")
    return FaceMask()


@pytest.fixture(scope="module")
def faces():
    return orl_faces().flatten(0, 1)


@pytest.fixture(scope="module")
def others(faces):
    """For each face, another person's."""
    return faces.roll(2, 0)


def at(masks, points):
    """Value of each mask ``(B, 1, S, S)`` at the pixel of a point ``(B, 2)`` in shares."""
    pixel = (points * masks.shape[-1]).long().clamp(0, masks.shape[-1] - 1)
    return masks[torch.arange(len(masks)), 0, pixel[:, 1], pixel[:, 0]]


def test_the_mask_is_1_on_every_landmark_and_0_in_the_corners(mask, faces):
    found, points = mask(faces), mask.landmarks(faces)
    assert found.shape == (8, 1, 256, 256)
    assert found.min() == 0
    assert found.max() == 1
    assert (at(found, points[:, NOSE_TIP]) == 1).all()
    for i in range(68):
        assert (at(found, points[:, i]) == 1).all()
    assert (found[..., [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


def test_the_mask_ends_at_the_stated_distance(mask, faces):
    found = mask(faces)
    distance = distance_to_hull(outline(mask.landmarks(faces), mask.forehead), 256)
    assert (found[distance > mask.dilation + mask.feather / 2 + 1e-6] == 0).all()
    assert (found[distance < mask.dilation - mask.feather / 2 - 1e-6] == 1).all()


def test_outside_the_mask_the_picture_stays_bit_for_bit_and_inside_it_is_the_rendered_face(mask, faces, others):
    found = mask(faces)
    pasted = paste(others, faces, found)
    outside, inside = (found == 0).expand_as(faces), (found == 1).expand_as(faces)
    assert torch.equal(pasted[outside], faces[outside])
    assert torch.equal(pasted[inside], others[inside])
    assert outside.float().mean() > 0.3
    assert inside.float().mean() > 0.2


def test_the_mask_does_not_depend_on_the_batch(mask, faces):
    alone = torch.cat([mask(face[None]) for face in faces[:4]])
    torch.testing.assert_close(alone, mask(faces[:4]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [128, 512])
def test_the_mask_is_the_same_region_at_any_size(mask, faces, size):
    resized = F.interpolate(faces[:4], size=(size, size), mode="bilinear", antialias=True)
    back = F.interpolate(mask(resized), size=(256, 256), mode="bilinear", antialias=True)
    assert mask_iou(back, mask(faces[:4])).min() > 0.97


def test_autocast_does_not_move_the_mask(mask, faces):
    with torch.autocast("cpu", torch.bfloat16):
        found = mask(faces[:2])
    assert torch.equal(found, mask(faces[:2]))


def test_the_mask_is_the_same_on_every_device(mask, faces, device):
    here = mask(faces[:2])
    try:
        there = mask.to(device)(faces[:2].to(device)).cpu()
    finally:
        mask.cpu()
    torch.testing.assert_close(there, here, atol=0.05, rtol=0)  # a GPU may convolve in TF32: a tenth of a pixel


def test_a_mask_of_two_pictures_covers_both_faces(mask, faces, others):
    assert torch.equal(mask(faces, others), torch.maximum(mask(faces), mask(others)))


def test_the_changed_region_is_found_again_without_the_original(mask, faces, others):
    """The original's own render stands for the recovered one; all else comes from the anonymized picture."""
    used = mask(faces, others)
    anonymized = paste(others, faces, used)
    again = mask(anonymized, faces)
    assert mask_iou(used, again).min() > 0.93
    assert ((used > 0.5) & (again < 0.5)).sum() < 0.02 * (used > 0.5).sum()


@pytest.mark.slow
def test_masks_of_two_pictures_agree_better_than_masks_of_one(mask):
    """Where the figures in :class:`FaceMask` come from: 40 generated faces, the identity rows from another code."""
    need("mobilestylegan-synthesis", "mobilestylegan-mapping")
    from lightning_modules.networks.stylegan import MobileStyleGAN

    generator = MobileStyleGAN()
    w = generator.sample_w(torch.randn(120, 512, generator=torch.Generator().manual_seed(5)), 0.9)
    changed = w[:40].clone()
    changed[:, 3:10] = w[60:100, 3:10]
    with torch.no_grad():
        x, y = (generator(codes, size=256, preview=True).clamp(-1, 1) for codes in (w[:40], changed))
    one, both = mask(x), mask(x, y)
    alone = mask_iou(one, mask(quantize(paste(y, x, one))))
    together = mask_iou(both, mask(quantize(paste(y, x, both)), x))
    torch.testing.assert_close(alone.mean(), torch.tensor(0.89), atol=0.01, rtol=0)
    torch.testing.assert_close(together.mean(), torch.tensor(0.99), atol=0.01, rtol=0)
    torch.testing.assert_close(
        torch.stack([alone.min(), together.min()]), torch.tensor([0.79, 0.96]), atol=0.02, rtol=0
    )


def test_a_higher_forehead_only_adds_above_the_temples(mask, faces):
    points = mask.landmarks(faces[:4])
    low, high = (distance_to_hull(outline(points, share), 256) < 0 for share in (0.2, 0.5))
    assert not (low & ~high).any()
    added = (high & ~low).float()
    assert (added.sum((1, 2, 3)) > 500).all()
    rows = (torch.arange(256) + 0.5) / 256
    below = rows[None] > points[:, JAW][:, [0, -1], 1].amax(1, keepdim=True) + 0.02
    assert (added[:, 0] * below[:, :, None]).sum() == 0


def test_the_mask_has_no_gradient_and_hands_the_rendered_face_its_share(mask, faces, others):
    rendered, picture = others[:1].clone().requires_grad_(), faces[:1].clone().requires_grad_()
    found = mask(picture, rendered)
    assert not found.requires_grad
    paste(rendered, picture, found).sum().backward()
    assert torch.equal(rendered.grad, found.expand(1, 3, -1, -1))
    assert torch.equal(picture.grad, 1 - found.expand(1, 3, -1, -1))


def test_nothing_of_it_trains_or_is_stored(mask):
    assert not any(p.requires_grad for p in mask.train().parameters())
    assert mask.state_dict() == {}
    assert isinstance(mask.landmarks, Landmarks68)


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_is_opencvs_distance_to_the_hull(seed):
    points = np.random.default_rng(seed).uniform(0.25, 0.75, (12, 2)).astype(np.float32)
    found = distance_to_hull(torch.tensor(points)[None], 96)[0, 0].numpy()
    hull = cv2.convexHull(points * 96 - 0.5)  # OpenCV counts the centre of the first pixel as 0
    longest = np.linalg.norm(hull[:, 0] - np.roll(hull[:, 0], 1, axis=0), axis=1).max() / 96
    near = longest / 2 * np.sin(np.pi / 72) + 1e-3  # 72 half-planes stand for all
    for y, x in np.random.default_rng(seed).integers(0, 96, (200, 2)):
        expected = -cv2.pointPolygonTest(hull, (float(x), float(y)), measureDist=True) / 96
        assert found[y, x] == pytest.approx(expected, abs=near)


def test_the_hull_is_the_polygon_that_opencv_fills():
    points = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2
    inside = distance_to_hull(points[None], 256) < 0
    filled = np.zeros((256, 256), np.uint8)
    cv2.fillConvexPoly(filled, cv2.convexHull((points.numpy() * 256 - 0.5).round().astype(np.int32)), 1)
    assert mask_iou(inside.float(), torch.tensor(filled)[None, None].float()) > 0.98


def test_points_inside_the_hull_change_nothing():
    corners = torch.tensor([[[0.2, 0.2], [0.8, 0.3], [0.5, 0.9]]])
    more = torch.cat([corners, corners.mean(1, keepdim=True)], 1)
    torch.testing.assert_close(distance_to_hull(corners, 64), distance_to_hull(more, 64))


def test_the_overlap_of_masks_counts_areas():
    left, right, none = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    left[..., :3], right[..., 1:] = 0.9, 0.6
    masks, against = torch.cat([left, left, none, none]), torch.cat([left, right, left, none])
    torch.testing.assert_close(mask_iou(masks, against), torch.tensor([1.0, 0.5, 0.0, 1.0]))


def test_what_cannot_be_a_mask_is_refused(mask):
    with pytest.raises(ValueError, match="feather above 0"):
        FaceMask(mask.landmarks, feather=0.0)
    with pytest.raises(ValueError, match="at least one"):
        mask()


def test_a_toned_face_has_the_colours_of_the_picture_inside_the_mask():
    rendered, picture = torch.rand(2, 3, 32, 32) * 0.4, torch.rand(2, 3, 32, 32) * 0.5 - 0.4
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    inside = (slice(None), slice(None), slice(8, 24), slice(8, 24))
    toned = match_tone(rendered, picture, mask)[inside]
    torch.testing.assert_close(toned.mean((2, 3)), picture[inside].mean((2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(toned.std((2, 3)), picture[inside].std((2, 3)), atol=1e-3, rtol=1e-2)


def test_a_dark_patch_in_the_picture_does_not_blacken_the_new_face():
    rendered, mask = torch.rand(1, 3, 32, 32) * 0.2, torch.ones(1, 1, 32, 32)
    glasses = torch.full((1, 3, 32, 32), 0.5)
    glasses[..., 10:16, :] = -1
    toned = match_tone(rendered, glasses, mask)
    torch.testing.assert_close(toned.std((2, 3)) / rendered.std((2, 3)), torch.full((1, 3), 1.4))


def test_a_face_in_its_own_light_keeps_its_tone():
    picture, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(match_tone(picture, picture, mask), picture, atol=1e-5, rtol=1e-4)


def round_mask(side=64):
    """A disc with a soft border."""
    ticks = (torch.arange(side) + 0.5) / side - 0.5
    return ((0.35 - (ticks[:, None].square() + ticks.square()).sqrt()) / 0.05 + 0.5).clamp(0, 1)[None, None]


def test_a_face_behind_which_another_background_was_rendered_gets_no_rim():
    mask = round_mask()
    picture = torch.full((1, 3, 64, 64), -0.4)
    rendered = torch.full((1, 3, 64, 64), 0.6)
    pasted = paste(match_border(rendered, picture, mask), picture, mask)
    along = (mask > 0.2) & (mask < 0.8)
    assert (pasted[along.expand_as(pasted)] - -0.4).abs().max() < 0.1  # of a difference of 1
    assert (pasted[..., 28:36, 28:36] - 0.6).abs().max() < 0.02  # the middle is the new face's


def test_a_border_that_fits_already_is_left_alone():
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    mask = round_mask().expand(2, -1, -1, -1)
    torch.testing.assert_close(match_border(picture, picture, mask), picture)
    odd = torch.rand(1, 3, 47, 47) * 2 - 1
    assert match_border(-odd, odd, round_mask(47)).shape == odd.shape
    assert torch.isfinite(match_border(-odd, odd, torch.zeros(1, 1, 47, 47))).all()


def test_a_seam_is_told_where_the_mask_ends_and_nowhere_else():
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 0.5
    mask[:, :, 3:5, 3:5] = 1
    picture = torch.zeros(2, 3, 8, 8)
    inside, border = picture.clone(), picture.clone()
    inside[0, :, 3:5, 3:5] = 1
    border[1, :, 2, 2:6] = 1
    assert seam(inside, picture, mask).tolist() == [0, 0]
    torch.testing.assert_close(seam(border, picture, mask), torch.tensor([0, 4 / 12]))
    assert seam(border, picture, torch.ones_like(mask)).tolist() == [0, 0]

"""Figures are what their definitions say: known answers first, then other people's implementations."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, norm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as F

from datamodules.detection import Detection
from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics import perceptual, recovery
from lightning_modules.metrics.diversity import unlinkability
from lightning_modules.metrics.identity import IdentityScores, own_threshold
from lightning_modules.metrics.measured import interval
from lightning_modules.metrics.recovery import PictureQuality, ms_ssim, psnr, scales_of, ssim
from lightning_modules.metrics.utility import FacesDetected

LEGS = ("anonymized", "other", "recovered", "wrongly_recovered", "nearly_recovered", "inverted")


class FakeJudge:
    """A judge whose embedding of a picture is its first pixels; cosine similarity."""

    name = "fake"
    weights = "sha256:fake"
    networks = frozenset({"fake"})

    def __init__(self, dim=4):
        self.dim = dim

    def embed(self, images):
        return F.normalize(images.flatten(1)[:, : self.dim], dim=1).cpu()

    def similarity(self, a, b):
        return a @ b.T

    def describe(self):
        return self.name


def pictures(codes):
    """Pictures that FakeJudge embeds as ``codes``."""
    codes = torch.as_tensor(codes, dtype=torch.float32)
    images = torch.zeros(len(codes), 3, 12, 12)
    images.view(len(codes), -1)[:, : codes.shape[1]] = codes
    return images


def round_trip(identity, *, original, mask=None, **legs):
    known = {} if mask is None else {"mask": mask}
    identity = torch.as_tensor(identity)
    return RoundTrip.of(original, identity=identity, sample=torch.arange(len(original)), **known, **legs)


def random_trip(batch=24, size=16, people=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    original = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    legs = {
        name: (original + k * 0.1 * torch.randn(original.shape, generator=generator)).clamp(-1, 1)
        for k, name in enumerate(LEGS, start=1)
    }
    mask = torch.zeros(batch, 1, size, size)
    mask[..., 2:14, 2:14] = 1
    return round_trip(torch.arange(batch) % people, original=original, mask=mask, **legs)


def assert_same(a, b):
    """Two figures agree in every word and, to rounding, in every number."""
    assert asdict(a) == {
        name: pytest.approx(word, abs=1e-6) if isinstance(word, float) else word for name, word in asdict(b).items()
    }


def part(trip, rows):
    return RoundTrip(*(field[rows] for field in trip))


E = torch.eye(4)


# --- identity ------------------------------------------------------------------------------------------


def test_acceptance_of_constructed_embeddings_is_exactly_known():
    # Persons 0, 0, 1, 2; two of four anonymized faces keep their own direction.
    trip = round_trip(
        [0, 0, 1, 2],
        original=pictures(torch.stack([E[0], E[0], E[1], E[2]])),
        anonymized=pictures(torch.stack([E[0], E[3], E[1], E[3]])),
        recovered=pictures(torch.stack([E[0], E[0], E[1], E[2]])),
        wrongly_recovered=pictures(torch.stack([E[3]] * 4)),
    )
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(trip)
    values = metric.compute()
    assert values["anonymized/tar@far=1e-3/same-image"] == 0.5
    assert values["anonymized/tar@far=1e-3/other-image"] == 0.5
    assert values["anonymized/similarity/same-image"] == 0.5
    assert values["anonymized/id_distance/same-image"] == 0.5
    assert values["recovered/tar@far=1e-3/same-image"] == 1
    assert values["wrongly_recovered/random/tar@far=1e-3/same-image"] == 0
    counts = {(f.metric, f.leg, f.reference): f.n for f in metric.figures()}
    assert counts["tar@far=1e-3", "anonymized", "same-image"] == 4
    assert counts["tar@far=1e-3", "anonymized", "other-image"] == 2  # only person 0 has two pictures


def test_rank1_of_other_images_leaves_the_very_picture_out():
    # Face 0's other picture is unlike it: re-identified only by the picture it was made from.
    trip = round_trip(
        [0, 0, 1],
        original=pictures([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0, 0.8, 0]]),
        anonymized=pictures([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
    )
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(trip)
    values = metric.compute()
    assert values["anonymized/rank1/same-image"] == 1
    # Without itself, face 0 meets person 1; face 1 is like nobody, and the first of equals is face 0.
    assert values["anonymized/rank1/other-image"] == 0.5


def test_false_matches_are_the_share_of_strangers_pairs_accepted():
    # Person 0's two pictures meet one stranger each way; only (0, 2) look alike.
    originals = pictures([[1, 0, 0, 0], [0, 1, 0, 0], [0.8, 0, 0.6, 0], [0, 0, 0, 1]])
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(round_trip([0, 0, 1, 2], original=originals, anonymized=originals))
    (found,) = [figure for figure in metric.figures() if figure.metric == "fmr"]
    # of strangers, face 0 meets 1 of 2 as its own, face 1 none of 2, face 2 1 of 3, face 3 none of 3
    assert found.value == pytest.approx((1 / 2 + 0 + 1 / 3 + 0) / 4)
    assert (found.leg, found.reference, found.threshold, found.n) == ("original", None, 0.5, 4)


def test_one_person_alone_has_no_false_matches():
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(round_trip([0, 0], original=pictures(E[:2]), anonymized=pictures(E[:2])))
    (found,) = [figure for figure in metric.figures() if figure.metric == "fmr"]
    assert (found.value, found.why) == (None, "only one person")


def test_without_labels_nobody_is_ranked():
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(round_trip([0, 0], original=pictures(E[:2]), anonymized=pictures(E[:2])))
    ranks = [figure for figure in metric.figures() if figure.metric == "rank1"]
    assert [figure.value for figure in ranks] == [None, None]
    assert "identity" in ranks[0].why


def test_a_set_of_single_pictures_has_no_other_image():
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(round_trip([0, 1], original=pictures(E[:2]), anonymized=pictures(E[:2])))
    others = [figure for figure in metric.figures() if figure.reference == "other-image"]
    assert others
    assert all(figure.why == "no person with two or more pictures" for figure in others)


def test_absent_legs_have_no_figures():
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(round_trip([0, 1], original=pictures(E[:2]), anonymized=pictures(E[:2])))
    assert {figure.leg for figure in metric.figures()} == {"original", "anonymized"}


def test_two_metrics_with_their_states_joined_equal_one():
    trip = random_trip()
    for make in (lambda: IdentityScores(FakeJudge(), threshold=0.4), PictureQuality):
        one, first, second = make(), make(), make()
        one.update(trip)
        first.update(part(trip, slice(0, None, 2)))  # as a distributed sampler deals them
        second.update(part(trip, slice(1, None, 2)))
        for state in one._reductions:
            getattr(first, state).extend(getattr(second, state))
        for a, b in zip(one.figures(), first.figures(), strict=True):
            assert_same(a, b)


def test_batches_do_not_matter():
    trip = random_trip()
    for make in (lambda: IdentityScores(FakeJudge(), threshold=0.4), PictureQuality):
        whole, parts = make(), make()
        whole.update(trip)
        for rows in torch.arange(24).split(7):
            parts.update(part(trip, rows))
        for a, b in zip(whole.figures(), parts.figures(), strict=True):
            assert_same(a, b)


def test_blocks_do_not_matter(monkeypatch):
    trip = random_trip()
    metric = IdentityScores(FakeJudge(64))
    metric.update(trip)
    whole = metric.figures()
    for room in ("identity", "diversity"):
        monkeypatch.setattr(f"lightning_modules.metrics.{room}.BLOCK", 5)
    for a, b in zip(metric.figures(), whole, strict=True):
        assert_same(a, b)


def test_the_logger_and_the_table_say_the_same():
    for metric in (IdentityScores(FakeJudge(), threshold=0.4), PictureQuality()):
        metric.update(random_trip())
        logged = sorted(round(float(value), 5) for value in metric.compute().values())
        assert logged == sorted(round(f.value, 5) for f in metric.figures() if f.value is not None)


def test_the_threshold_lets_one_in_a_thousand_strangers_in():
    codes = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    person = torch.arange(200)
    threshold = own_threshold(FakeJudge(), codes, person)
    upper = torch.ones(200, 200).triu(1).bool()
    share = ((codes @ codes.T)[upper] > threshold).double().mean()
    assert 0.9e-3 < share <= 1e-3


def test_too_few_strangers_give_no_threshold_and_say_so():
    metric = IdentityScores(FakeJudge())
    metric.update(random_trip())
    figures = [figure for figure in metric.figures() if figure.metric == "tar@far=1e-3"]
    assert figures
    assert all(figure.value is None and "pairs of strangers" in figure.why for figure in figures)
    assert "anonymized/similarity/same-image" in metric.compute()


def test_a_key_of_normal_numbers_is_named_by_its_cosine():
    metric = IdentityScores(FakeJudge(), threshold=0.4, near_key="cosine-0.9")
    metric.update(random_trip())
    keys = {figure.key for figure in metric.figures() if figure.leg == "wrongly_recovered"}
    assert keys == {"random", "cosine-0.9"}


def test_several_wrong_keys_are_averaged_face_by_face():
    # With the first key face 0 opens, with the third face 1 does; the second and third open one and the same person.
    trip = round_trip(
        [0, 1],
        original=pictures([E[0].tolist(), E[1].tolist()]),
        anonymized=pictures([E[3].tolist(), E[3].tolist()]),
        wrongly_recovered=pictures([E[0].tolist(), E[2].tolist()]),
        wrong_again=torch.stack(
            [pictures([E[2].tolist(), E[1].tolist()]), pictures([E[2].tolist(), E[1].tolist()])], 1
        ),
    )
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(trip)
    metric.update(part(trip, torch.tensor([1])))
    found = {(f.metric, f.reference): f for f in metric.measured() if (f.leg, f.key) == ("wrongly_recovered", "random")}
    torch.testing.assert_close(found["tar@far=1e-3", "same-image"].values, torch.tensor([1 / 3, 2 / 3, 2 / 3]))
    torch.testing.assert_close(found["similarity", "same-image"].values, torch.tensor([1 / 3, 2 / 3, 2 / 3]))
    torch.testing.assert_close(found["diversity", "other-key"].values, torch.full((3,), 2 / 3))
    torch.testing.assert_close(found["similarity", "other-key"].values, torch.full((3,), 1 / 3))


# --- diversity ------------------------------------------------------------------------------------------


def test_diversity_is_the_share_of_keys_told_apart():
    trip = round_trip(
        [0, 1, 2, 3],
        original=pictures(E),
        anonymized=pictures(E),
        other=pictures(torch.stack([E[0], E[2], E[3], E[1]])),
    )
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(trip)
    values = metric.compute()
    assert values["anonymized/diversity/other-key"] == 0.75
    assert values["anonymized/similarity/other-key"] == 0.25


def test_diversity_of_three_keys_is_that_of_their_three_pairs():
    # Face 0 is one person under keys 1 and 3, face 1 three people; different people's originals are at 0.
    trip = round_trip(
        [0, 1],
        original=pictures([E[0].tolist(), E[1].tolist()]),
        anonymized=pictures([E[2].tolist(), E[0].tolist()]),
        other=pictures([E[3].tolist(), E[2].tolist()]),
        other_again=pictures([E[2].tolist(), E[3].tolist()])[:, None],
    )
    metric = IdentityScores(FakeJudge(), threshold=0.5)
    metric.update(trip)
    values = metric.compute()
    assert values["anonymized/diversity/other-key"] == pytest.approx(5 / 6)
    assert values["anonymized/similarity/other-key"] == pytest.approx(1 / 6)
    assert values["anonymized/diversity_distance/other-key"] == pytest.approx(1 / 6)  # one of six similarities is 1


def test_unlinkability_is_nothing_for_equal_and_one_for_separate_scores():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 100_000, generator=generator)
    assert unlinkability(a, b) <= 0.02
    assert unlinkability(a, b + 100) == 1
    assert unlinkability(torch.zeros(5), torch.zeros(5)) == 0


def test_unlinkability_of_uniform_scores_meets_its_closed_form():
    # p uniform on [0, 1], q on [0, 2]: D = (1 - 1/2) / (1 + 1/2) = 1/3 where p lives.
    p, q = torch.linspace(0, 1, 100_001)[:-1], torch.linspace(0, 2, 100_000)
    assert unlinkability(p, q) == pytest.approx(1 / 3, abs=1e-3)


def test_unlinkability_of_gaussians_meets_its_integral():
    """p = N(1, 1) and q = N(0, 1), integrated on a fine grid: what 20 bins and chance add or lose is below .02."""
    generator = torch.Generator().manual_seed(0)
    mated, strangers = torch.randn(100_000, generator=generator) + 1, torch.randn(100_000, generator=generator)
    grid = np.linspace(-8, 9, 100_001)
    p, q = norm.pdf(grid, 1), norm.pdf(grid)
    wanted = (p * np.clip((p - q) / (p + q), 0, None)).sum() * (grid[1] - grid[0])
    assert 0.2 < wanted < 0.4
    assert unlinkability(mated, strangers) == pytest.approx(wanted, abs=0.02)


# --- pictures ------------------------------------------------------------------------------------------


def noisy_pair(size=64, sigma=0.1):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 8, generator=generator)
    image = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return image, (image + sigma * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def test_psnr_meets_its_closed_form_and_skimage():
    image, noisy = noisy_pair()
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert psnr(flat, flat + 0.1).item() == pytest.approx(20, abs=1e-4)
    for ours, a, b in zip(psnr(noisy, image), noisy, image, strict=True):
        assert float(ours) == pytest.approx(peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1), abs=1e-4)


def test_ssim_is_skimages():
    image, noisy = noisy_pair()
    for ours, a, b in zip(ssim(noisy, image), noisy, image, strict=True):
        theirs = structural_similarity(
            *(b.numpy(), a.numpy()),
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(ours) == pytest.approx(theirs, abs=1e-5)


def test_figures_inside_the_mask_ignore_the_outside():
    image, noisy = noisy_pair()
    mask = torch.zeros(3, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    outside = torch.where(mask > 0, image, noisy)
    assert (psnr(outside, image, mask) == recovery.PSNR_CAP).all()
    inside = torch.where(mask > 0, noisy, image)
    np.testing.assert_allclose(psnr(inside, image, mask), psnr(noisy, image, mask), atol=1e-4)
    places = ssim(noisy, image, mask)
    theirs = structural_similarity(
        *(image[0].numpy(), noisy[0].numpy()),
        channel_axis=0,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1]
    assert float(places[0]) == pytest.approx(theirs[:, 20:40, 20:40].mean(), abs=1e-5)


@pytest.mark.parametrize(("size", "scales"), [(32, 1), (44, 3), (64, 3), (128, 4), (176, 5)])
def test_ms_ssim_takes_the_scales_that_fit(size, scales):
    assert scales_of(size) == scales
    image, noisy = noisy_pair(size)
    torch.testing.assert_close(ms_ssim(image, image), torch.ones(3))
    assert (ms_ssim(noisy, image) < 1).all()
    torch.testing.assert_close(ms_ssim(noisy, image)[:1], ms_ssim(noisy[:1], image[:1]))


def test_one_scale_of_ms_ssim_is_ssim():
    image, noisy = noisy_pair(32)
    torch.testing.assert_close(ms_ssim(noisy, image), ssim(noisy, image), atol=0.05, rtol=0)


def test_an_identical_recovery_is_exact_and_its_psnr_finite():
    image = noisy_pair()[0] * 2 - 1
    metric = PictureQuality()
    metric.update(round_trip([0, 1, 2], original=image, anonymized=-image, recovered=image.clone()))
    values = metric.compute()
    assert values["recovered/psnr"] == recovery.PSNR_CAP
    assert values["recovered/ssim"] == pytest.approx(1)
    assert values["recovered/ms_ssim"] == pytest.approx(1)
    assert values["recovered/bit_exact"] == 1
    assert values["anonymized/psnr"] < 20
    assert "anonymized/bit_exact" not in values
    assert "recovered/psnr/face" not in values


def test_one_grey_level_is_not_bit_exact():
    image = torch.zeros(2, 3, 16, 16)
    off = image.clone()
    off[0, 0, 0, 0] += 2 / 255
    metric = PictureQuality()
    metric.update(round_trip([0, 1], original=image, recovered=off))
    assert metric.compute()["recovered/bit_exact"] == 0.5


def test_masked_figures_carry_their_region():
    metric = PictureQuality()
    metric.update(random_trip())
    assert {f.metric for f in metric.figures() if f.region == "face"} == {"psnr", "ssim"}


def test_missing_lpips_weights_are_said_and_not_replaced(monkeypatch):
    perceptual.lpips_network.cache_clear()
    monkeypatch.setattr(perceptual, "find", lambda name: None)
    metric = PictureQuality(["lpips"])
    metric.update(random_trip())
    figures = [figure for figure in metric.figures() if figure.metric == "lpips"]
    assert figures
    assert {(figure.value, figure.why) for figure in figures} == {(None, "weights missing: lpips-alex-backbone")}


def test_a_state_dict_of_alexnet_fills_lpips(tmp_path, monkeypatch):
    from torchvision.models import alexnet

    weights = {name: value for name, value in alexnet(weights=None).state_dict().items() if "features" in name}
    torch.save(weights, tmp_path / "alexnet.pth")
    monkeypatch.setattr(perceptual, "find", lambda name: tmp_path / "alexnet.pth")
    perceptual.lpips_network.cache_clear()
    state = torch.random.get_rng_state()
    network = perceptual.lpips_network()
    perceptual.lpips_network.cache_clear()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(network.net.slice5[0].weight, weights["features.10.weight"])
    assert not any(parameter.requires_grad for parameter in network.parameters())
    image = noisy_pair()[0] * 2 - 1
    assert network(image, image).abs().max() == 0


# --- utility ------------------------------------------------------------------------------------------


class FakeDetector:
    """Finds a face, placed by the brightness of its first pixel, where that is not black."""

    name = "fake"

    def detect(self, picture):
        level = int(picture[0, 0, 0])
        points = np.array([[4, 6], [8, 6], [6, 8], [5, 10], [7, 10]], np.float32) + level / 100
        return [Detection(np.array([2, 2, 10, 12], np.float32) + level / 100, 1.0, points)] if level else []


def test_detection_counts_faces_that_were_found_before():
    grey = lambda *levels: torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 127.5 - 1  # noqa: E731
    metric = FacesDetected(FakeDetector())
    metric.update(round_trip([0, 1, 2], original=grey(100, 100, 0), anonymized=grey(200, 0, 100)))
    values = metric.compute()
    assert values["anonymized/detected"] == 0.5  # the third was never found
    # One pixel to the right and one down, with eyes four pixels apart.
    assert values["anonymized/box_shift"] == pytest.approx(math.sqrt(2) / 4)
    assert values["anonymized/landmark_shift"] == pytest.approx(math.sqrt(2) / 4)
    assert {figure.metric: figure.n for figure in metric.figures()}["detected"] == 2


# --- intervals ------------------------------------------------------------------------------------------


def test_the_interval_of_independent_faces_is_the_textbooks():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = interval(values, torch.arange(400))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(float(values.mean() - half), abs=0.02)
    assert high == pytest.approx(float(values.mean() + half), abs=0.02)


def test_many_pictures_of_few_people_are_few_observations():
    person = torch.arange(400) % 10
    values = torch.randn(10, generator=torch.Generator().manual_seed(0))[person]
    people, faces = interval(values, person), interval(values, torch.arange(400))
    assert people[1] - people[0] > 3 * (faces[1] - faces[0])


@pytest.mark.parametrize("each", [1, 5])
def test_the_interval_is_scipys_bootstrap_of_people(each):
    """Of sums over people by counts over people, drawn together."""
    generator = torch.Generator().manual_seed(0)
    person = torch.arange(60).repeat_interleave(torch.arange(60) % each + 1)
    values = (torch.rand(len(person), generator=generator) + torch.rand(60, generator=generator)[person] > 1).float()
    total, count = np.bincount(person, values), np.bincount(person)
    found = bootstrap(
        (total, count),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=0,
    ).confidence_interval
    low, high = interval(values, person)
    width = found.high - found.low
    assert low == pytest.approx(found.low, abs=0.08 * width)
    assert high == pytest.approx(found.high, abs=0.08 * width)


def test_never_seen_is_not_never():
    low, high = interval(torch.zeros(100), torch.arange(100), share=True)
    assert (low, high) == (0, pytest.approx(0.0362, abs=1e-3))  # Clopper-Pearson for 0 of 100
    low, high = interval(torch.ones(100), torch.arange(100), share=True)
    assert (low, high) == (pytest.approx(0.9638, abs=1e-3), 1)


def test_a_metric_can_be_reset_and_copied():
    metric = IdentityScores(FakeJudge(), threshold=0.4)
    metric.update(random_trip())
    copied = copy.deepcopy(metric)
    metric.reset()
    assert metric.figures() == []
    assert copied.figures()

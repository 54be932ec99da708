"""A threshold lets through the share of strangers asked for, and fits only the weights it was made with."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_roc

from lightning_modules.calibration import (
    CALIBRATION,
    Calibration,
    calibrate,
    impostor_pairs,
    load_calibration,
    save_calibration,
)
from lightning_modules.weights import card


class Named:
    """A judge of which only name and weights are asked."""

    networks = frozenset()

    def __init__(self, name, weights):
        self.name, self.weights = name, weights

    def embed(self, images):
        raise AssertionError("no face is to be embedded")

    similarity = describe = embed


JUDGE = Named("some-judge", "sha256:" + "a" * 64)


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(0, 0.1, 200_000)


@pytest.mark.parametrize("far", [1e-2, 1e-3])
def test_on_gaussians_it_is_the_quantile(scores, far):
    exact = NormalDist(0, 0.1).inv_cdf(1 - far)
    found = calibrate(scores, far, draws=300)
    assert found.low < exact < found.high
    assert found.low <= found.threshold <= found.high
    assert found.high - found.low < 0.02
    assert (found.pairs, found.far) == (200_000, far)


def test_at_most_the_asked_share_exceeds_it(scores):
    assert (scores > calibrate(scores, 1e-3, draws=10).threshold).mean() == pytest.approx(1e-3, abs=1e-9)
    tied = np.round(scores, 1)
    assert (tied > calibrate(tied, 1e-3, draws=10).threshold).mean() <= 1e-3


def test_the_rate_holds_on_strangers_it_has_not_seen(scores):
    threshold = calibrate(scores[:100_000], 1e-3, draws=10).threshold
    assert (scores[100_000:] > threshold).mean() == pytest.approx(1e-3, rel=0.35)


@pytest.mark.parametrize("far", [1e-2, 1e-3])
def test_what_it_lets_through_is_the_point_of_the_curve(scores, far):
    """Torchmetrics' ROC: of all thresholds with at most that share of strangers, the one that accepts most mates."""
    strangers = scores[:50_000] * 0.5 + 0.3
    mated = np.random.default_rng(1).normal(0.45, 0.05, 5_000)
    truth = torch.cat([torch.zeros(len(strangers)), torch.ones(len(mated))]).long()
    both = torch.from_numpy(np.concatenate([strangers, mated]))
    assert 0 < both.min() < both.max() < 1  # or torchmetrics takes them for logits
    false_accepts, true_accepts, _ = binary_roc(both, truth)
    wanted = true_accepts[false_accepts <= far + 1e-9].max()
    assert 0.05 < wanted < 0.95
    threshold = calibrate(strangers, far, draws=10).threshold
    assert (mated > threshold).mean() == pytest.approx(float(wanted), abs=1e-6)


def faces(people, each, seed):
    """Embeddings in which some people are alike, so that their pairs are not independent."""
    draw = torch.Generator().manual_seed(seed)
    code = torch.randn(people, 16, generator=draw).repeat_interleave(each, 0)
    code = torch.nn.functional.normalize(code + 0.3 * torch.randn(code.shape, generator=draw))
    return (code @ code.T).numpy(), np.arange(people).repeat(each)


def test_impostor_pairs_are_all_pairs_of_different_people():
    similarity, identity = faces(people=5, each=3, seed=0)
    scores, people = impostor_pairs(similarity, identity)
    assert len(scores) == 15 * 14 // 2 - 5 * 3
    assert (people[:, 0] != people[:, 1]).all()


def test_people_not_pairs_are_what_varies():
    scores, people = impostor_pairs(*faces(people=60, each=8, seed=0))
    of_people = calibrate(scores, 1e-2, people, draws=400)
    of_pairs = calibrate(scores, 1e-2, draws=400)
    assert of_people.threshold == of_pairs.threshold
    assert of_people.high - of_people.low > 2 * (of_pairs.high - of_pairs.low)
    assert of_people.low <= of_people.threshold <= of_people.high


def test_the_interval_over_people_covers_the_truth():
    truth = calibrate(impostor_pairs(*faces(people=700, each=2, seed=99))[0], 1e-2, draws=1).threshold
    hits = 0
    for seed in range(20):
        scores, people = impostor_pairs(*faces(people=80, each=3, seed=seed))
        found = calibrate(scores, 1e-2, people, draws=200)
        hits += found.low <= truth <= found.high
    assert hits >= 15


def test_what_cannot_be_calibrated_is_refused(scores):
    with pytest.raises(ValueError, match="at least 1000 impostor pairs, got 999"):
        calibrate(scores[:999], 1e-3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(scores, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        calibrate(np.append(scores, np.nan))


def test_a_threshold_is_read_as_it_was_written(tmp_path):
    path, found = tmp_path / "calibration.json", Calibration(0.25, 1e-3, 2_000_000, 0.24, 0.26)
    save_calibration(JUDGE, Calibration(0.5, 1e-3, 1000, 0.4, 0.6), "lfw-test", "a command", path)
    save_calibration(JUDGE, found, "lfw-test", "a command", path)
    assert load_calibration(JUDGE, path) == found


def test_other_weights_and_unknown_judges_are_refused(tmp_path):
    path = tmp_path / "calibration.json"
    save_calibration(JUDGE, Calibration(0.25, 1e-3, 1000, 0.2, 0.3), "lfw-test", "a command", path)
    with pytest.raises(ValueError, match="calibrated with other weights"):
        load_calibration(Named(name=JUDGE.name, weights="sha256:" + "b" * 64), path)
    with pytest.raises(ValueError, match="'unheard' has no threshold yet"):
        load_calibration(Named(name="unheard", weights=""), path)


@pytest.mark.parametrize(
    ("name", "file"),
    [("mobilefacenet", "mobilefacenet"), ("dlib", "dlib-recognition"), ("faceres", "faceres")],
)
def test_our_judges_are_calibrated_with_the_weights_of_their_cards(name, file):
    found = load_calibration(Named(name=name, weights=card(file).digest), CALIBRATION)
    assert found.far == 1e-3
    assert found.pairs > 1_000_000
    assert found.low <= found.threshold <= found.high

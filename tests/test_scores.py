"""Scores are counted once each, and what is drawn from the counts is what the table says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_metrics import E, FakeJudge, part, pictures, random_trip, round_trip
from torch.nn import functional as F

from lightning_modules.metrics.diversity import linkability, local_linkability, unlinkability
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.scores import NAMES, Histogram, read_scores


class DistanceJudge(FakeJudge):
    """As dlib's: minus the Euclidean distance."""

    def similarity(self, a, b):
        return -torch.cdist(a, b)


def scores_of(trip, judge=None, threshold=0.5, parts=()):
    metric = IdentityScores(judge or FakeJudge(), threshold)
    for rows in parts or [torch.arange(len(trip.original))]:
        metric.update(part(trip, rows))
    return {found.name: found for found in metric.histograms()}, metric


@pytest.mark.parametrize("judge", [FakeJudge(), DistanceJudge()])
def test_counts_are_numpys(judge):
    trip = random_trip(batch=40)
    found, _ = scores_of(trip, judge)
    assert set(found) == set(NAMES)
    codes = {leg: F.normalize(getattr(trip, leg).flatten(1)[:, :4]) for leg in ("original", "anonymized", "recovered")}
    everybody = judge.similarity(codes["original"], codes["original"]).numpy()
    same = trip.identity[:, None].numpy() == trip.identity.numpy()
    above = np.triu(np.ones_like(same), 1).astype(bool)
    scores = {"genuine": everybody[same & above], "impostor": everybody[~same & above]}
    for leg in ("anonymized", "recovered"):
        scores[leg] = judge.similarity(codes[leg], codes["original"]).diagonal().numpy()
    for name, wanted in scores.items():
        edges = np.array(found[name].edges)
        assert (edges[-1] - edges[0], len(edges)) == (2, 81)
        counts = np.histogram(wanted.clip(edges[0], edges[-1]), edges)[0]
        # rounding may move a score that lies on an edge
        assert np.abs(np.cumsum(counts - np.array(found[name].counts))).max() <= 1
        assert found[name].n == len(wanted)


def test_all_wrong_keys_are_counted_and_batches_do_not_matter():
    trip = round_trip(
        [0, 1],
        original=pictures(E[:2]),
        anonymized=pictures(E[2:]),
        wrongly_recovered=pictures(E[:2]),
        wrong_again=torch.stack([pictures(E[2:]), pictures(-E[:2])], 1),
    )
    found, _ = scores_of(trip)
    wrong = found["wrongly_recovered"]
    assert wrong.n == 6
    assert (wrong.counts[0], wrong.counts[40], wrong.counts[-1]) == (2, 2, 2)  # cosines -1, 0 and 1
    assert "genuine" not in found  # one picture a person
    assert "mated" not in found  # no second key
    assert scores_of(trip, parts=(torch.tensor([0]), torch.tensor([1])))[0] == found


def test_the_figure_of_linkability_is_that_of_the_counts():
    found, metric = scores_of(random_trip(batch=60))
    mated, strangers = (torch.tensor(found[name].counts).float() for name in ("mated", "non-mated"))
    assert found["mated"].edges == found["non-mated"].edges
    overall = float((mated / mated.sum() * local_linkability(mated, strangers)).sum())
    figure = next(f for f in metric.figures() if f.metric == "unlinkability_dsys")
    assert figure.value == pytest.approx(overall, abs=1e-6)
    assert figure.n == found["mated"].n


def test_local_linkability_of_uniform_scores_meets_its_closed_form():
    # p uniform on [0, 1], q on [0, 2]: D(s) = (1 - 1/2) / (1 + 1/2) = 1/3 below 1, and 0 above.
    p, q = torch.linspace(0, 1, 100_001)[:-1], torch.linspace(0, 2, 100_000)
    linked = linkability(p, q)
    torch.testing.assert_close(linked.local, torch.tensor([1 / 3] * 10 + [0] * 10), atol=2e-3, rtol=0)
    torch.testing.assert_close(linked.edges, torch.linspace(0, 2, 21))
    assert unlinkability(p, q) == linked.overall


def test_a_histogram_survives_its_line(tmp_path):
    found = replace(scores_of(random_trip())[0]["genuine"], method="blur", data="orl")
    (tmp_path / "scores.jsonl").write_text(found.to_json() + "\n")
    assert read_scores(tmp_path / "scores.jsonl") == [found]
    assert json.loads(found.to_json())["n"] == found.n


@pytest.mark.parametrize("line", ['{"judge": "x"}', "[1]", "{", '"text"'])
def test_a_line_that_is_no_histogram_is_named(tmp_path, line):
    good = scores_of(random_trip())[0]["genuine"].to_json()
    (tmp_path / "scores.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 2: not a histogram"):
        read_scores(tmp_path / "scores.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "friends"}, "unknown scores 'friends'"),
        ({"edges": (0.0, 1.0)}, "rising edges"),
        ({"edges": (0.0, 2.0, 1.0)}, "rising edges"),
        ({"edges": (0.0, 1.0, float("inf"))}, "finite"),
        ({"counts": (1, -1)}, "finite"),
    ],
)
def test_a_histogram_that_does_not_fit_is_refused(changes, message):
    good = Histogram(judge="x", name="genuine", edges=(0.0, 1.0, 2.0), counts=(1, 2))
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


def test_the_worst_bit_is_the_one_that_opens_most_faces():
    # Three bits: the first opens nobody, the second face 0, the third both; their mean is a half.
    trip = round_trip(
        [0, 1],
        original=pictures(E[:2]),
        anonymized=pictures(E[2:]),
        nearly_recovered=pictures(E[2:]),
        near_again=torch.stack([pictures(torch.stack([E[0], E[3]])), pictures(E[:2])], 1),
    )
    figures = {f.metric: f for f in scores_of(trip)[1].figures() if f.key == "one-bit" and f.reference == "same-image"}
    assert figures["tar@far=1e-3"].value == pytest.approx(0.5)
    assert (figures["tar_worst_bit"].value, figures["tar_worst_bit"].n) == (1, 2)
    metric = IdentityScores(FakeJudge(), 0.5, near_key="cosine-0.9")
    metric.update(trip)
    assert "tar_worst_bit" not in {f.metric for f in metric.figures()}  # a direction is no bit

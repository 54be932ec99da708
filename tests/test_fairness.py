"""Groups of people are compared by what the original looks like, and chance is not called a gap."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from orl_faces import need, orl_faces
from test_metrics import FakeDetector, FakeJudge, part, random_trip

from experiments.report_run import Run, slot
from experiments.report_table import summary, table_of
from lightning_modules.metrics import readers
from lightning_modules.metrics.fairness import LEAST, Groups, by_group
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.measured import Measured
from lightning_modules.metrics.utility import FacesDetected
from lightning_modules.protocol import GROUPS, Figure, append_results, arrow, read_results


def share(values, person=None):
    values = torch.as_tensor(values, dtype=torch.float32)
    person = torch.arange(len(values)) if person is None else person
    return Measured("detected", "anonymized", values, person)


def told(figures):
    return {figure.group: figure.figure() for figure in figures}


def test_every_group_has_its_share_and_every_attribute_its_gap():
    # 40 women of whom 30 are found, 60 men of whom 57 are; all under 40 but 10 of the women that are lost
    values = [1.0] * 30 + [0.0] * 10 + [1.0] * 57 + [0.0] * 3
    gender = [0] * 40 + [1] * 60
    age = [0] * 30 + [1] * 10 + [0] * 60
    found = told(by_group(share(values), torch.tensor([gender, age]).T))
    assert list(found) == ["women", "men", "gender", "under 40", "40 and older", "age"]
    assert (found["women"].value, found["women"].n) == (0.75, 40)
    assert (found["men"].value, found["men"].n) == (pytest.approx(0.95), 60)
    assert (found["gender"].metric, found["gender"].value) == ("detected_gap", pytest.approx(0.2))
    # the textbook's interval of a difference of two shares
    half = 1.96 * (0.75 * 0.25 / 40 + 0.95 * 0.05 / 60) ** 0.5
    assert found["gender"].low == pytest.approx(0.2 - half, abs=0.02)
    assert found["gender"].high == pytest.approx(0.2 + half, abs=0.02)
    assert found["under 40"].n == 90
    assert found["40 and older"].why == f"fewer than {LEAST} faces of the group"
    assert found["age"].why == f"fewer than {LEAST} faces of 40 and older"


def test_chance_is_no_gap():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0)).round()
    found = told(by_group(share(values), torch.arange(400)[:, None].expand(-1, 2) % 2))
    assert found["gender"].value > 0
    assert found["gender"].low < 0


def test_a_group_in_which_nobody_is_lost_may_yet_lose_somebody():
    """6 of 580 and none of 100: Newcombe's interval reaches below nothing, though the second share has no spread."""
    values = torch.tensor([1.0] * 6 + [0.0] * 674)
    found = told(by_group(share(values), torch.tensor([[0, 0]] * 580 + [[1, 1]] * 100)))
    assert found["men"].high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert found["gender"].value == pytest.approx(6 / 580)
    assert found["gender"].low == pytest.approx(
        6 / 580 - ((6 / 580 - found["women"].low) ** 2 + found["men"].high ** 2) ** 0.5
    )
    assert found["gender"].low < 0 < found["gender"].high


def test_alike_is_a_gap_of_nothing_and_a_face_without_a_share_counts_nowhere():
    values = torch.ones(50)
    values[:5] = float("nan")
    found = told(by_group(share(values), torch.arange(50)[:, None].expand(-1, 2) % 2))
    assert found["gender"].value == 0
    assert found["women"].n + found["men"].n == found["gender"].n == 45


def test_groups_are_what_the_original_appears_to_be(monkeypatch):
    groups = Groups(lambda images: torch.tensor([[0.9, 39.0], [0.1, 40.0]]))
    assert groups(torch.zeros(2, 3, 8, 8)).tolist() == [[1, 0], [0, 1]]
    monkeypatch.setattr(readers, "find", lambda card: None)
    without = Groups()
    assert without(torch.zeros(2, 3, 8, 8)).tolist() == [[-1, -1], [-1, -1]]
    found = by_group(share([1.0, 0.0]), torch.tensor([[-1, -1]] * 2), without.why)
    assert {figure.why for figure in found} == {"weights missing: faceres, faceres-graph"}


def bright(images):
    """A toy: who is bright at the first pixel is a man, at the second old."""
    return torch.stack([images[:, 0, 0, 0] / 2 + 0.5, 40 + images[:, 0, 0, 1]], 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IdentityScores(FakeJudge(), 0.9, groups=Groups(bright)),
        lambda: FacesDetected(FakeDetector(), Groups(bright)),
    ],
    ids=["identity", "detection"],
)
def test_two_metrics_with_their_states_joined_equal_one(make):
    whole = random_trip(batch=96)
    alone, one, two = make(), make(), make()
    alone.update(whole)
    one.update(part(whole, slice(0, 50)))
    two.update(part(whole, slice(50, None)))
    for state in alone._defaults:
        setattr(one, state, getattr(one, state) + getattr(two, state))
    found = [figure for figure in alone.figures() if figure.group]
    assert {(figure.leg, figure.group) for figure in found if figure.value is not None} == {
        (leg, word)
        for leg in ("anonymized", "recovered")
        for attribute in GROUPS
        for word in (attribute, *GROUPS[attribute])
    }
    joined = [figure for figure in one.figures() if figure.group]
    for a, b in zip(joined, found, strict=True):
        assert asdict(a) == {k: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v for k, v in asdict(b).items()}


def test_groups_share_the_figures_of_all():
    metric = IdentityScores(FakeJudge(), 0.9, groups=Groups(bright))
    metric.update(random_trip(batch=96))
    found = {
        (f.leg, f.group): f for f in metric.figures() if f.metric == "tar@far=1e-3" and f.reference == "same-image"
    }
    women, men, everybody = (found["recovered", group] for group in ("women", "men", None))
    assert women.n + men.n == everybody.n == 96
    assert women.value * women.n + men.value * men.n == pytest.approx(everybody.value * 96)


def test_only_gaps_are_in_the_table_and_only_large_ones_in_words(tmp_path):
    about = {"method": "m", "data": "d", "leg": "recovered", "judge": "j", "reference": "same-image", "n": 50}
    tar = Figure(metric="tar@far=1e-3", value=0.8, **about)
    women, men = (replace(tar, group=word, value=value) for word, value in (("women", 0.6), ("men", 0.9)))
    women, men = replace(women, low=0.5, high=0.7), replace(men, low=0.8, high=0.95)
    gap = Figure(metric="tar_gap", value=0.3, low=0.1, high=0.5, group="gender", **about)
    hidden = replace(tar, leg="anonymized", value=0.1)
    append_results(tmp_path / "results.jsonl", [hidden, tar, women, men, gap])
    assert read_results(tmp_path / "results.jsonl")[2:] == [women, men, gap]
    assert len({slot(figure) for figure in (tar, women, men, gap)}) == 4
    assert arrow("tar_gap", "recovered") == "↓"
    run = Run(tmp_path)
    ((_, title, cells),) = [other for other in table_of(run, "d").others if "gap" in other[1]]
    assert title == "gap in acceptance ↓, j, same-image, by apparent gender"
    assert cells[0][0].value == "30.0 %"
    (sentence,) = summary(run, "d")
    assert sentence.text.endswith("Accepted when recovered, by apparent gender, j: 90.0 % (men), 60.0 % (women).")
    assert "80.0 % come back" in sentence.text  # that of all faces, not of the worst group
    append_results(tmp_path / "results.jsonl", [replace(men, low=0.65)])
    assert "by apparent" not in summary(Run(tmp_path), "d")[0].text


def test_real_faces_belong_to_groups():
    need("faceres", "faceres-graph")
    found = Groups()(orl_faces().flatten(0, 1))
    assert found.shape == (8, 2)
    assert set(found.unique().tolist()) <= {0, 1}
    assert (found[::2, 0] == found[1::2, 0]).all()  # two pictures of a person

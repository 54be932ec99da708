"""A judge whose network learns from pairs: what it can and cannot learn, and that the judge itself stays."""

import copy

import pytest
import torch
from test_compare import LinearJudge
from test_inverter import ManyPeople, Negative, Signs, target_of

from experiments.attack_pairs import by_pairs
from lightning_modules.judges import CosineJudge
from lightning_modules.tuned_judge import TunedJudge, tunable


class Small(CosineJudge):
    """Each colour at 4 × 4 pixels, mixed into 24 numbers; weights are small, so that few steps turn them far."""

    name, weights, networks, runs_on = "small", "sha256:" + "2" * 64, frozenset({"small-judge"}), "torch cpu"

    def __init__(self):
        torch.manual_seed(3)
        self.network = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 24, bias=False)
        ).requires_grad_(False)
        self.network[2].weight.mul_(0.05)

    def _embed(self, images):
        return self.network(images)


class UpsideDown(Negative):
    """Every face upside down, in other colours: what no line through 24 numbers undoes, but a network over pixels."""

    def anonymize(self, face, key):
        return -face.image.flip(2)


def accepted(method, steps, judge):
    target = target_of(method, judge=judge)
    faces = torch.utils.data.default_collate(ManyPeople().items[:192])
    (figure,) = [found for found in by_pairs(target, faces, [192], steps) if found.metric == "adaptive_tar"]
    return float(figure.values.mean()), figure.threshold


def test_a_network_learns_what_a_line_cannot_and_the_judge_stays_as_it_was():
    judge = Small()
    before = copy.deepcopy(judge.network.state_dict())
    plain, _ = accepted(UpsideDown(), 0, judge)
    tuned, _ = accepted(UpsideDown(), 300, judge)
    assert plain < 0.5 < 0.75 < tuned
    assert all(torch.equal(value, before[name]) for name, value in judge.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in judge.network.parameters())


def test_a_network_learns_nothing_of_keys_of_their_own():
    assert accepted(Signs(), 100, Small())[0] < 0.1


def test_only_judges_with_a_network_are_tuned():
    assert tunable(Small())
    assert not tunable(LinearJudge())
    judge = Small()
    judge.network = None
    with pytest.raises(ValueError, match="judge 'small' has no network"):
        TunedJudge(judge, torch.rand(4, 24))
    assert accepted(UpsideDown(), 50, LinearJudge()) == accepted(UpsideDown(), 0, LinearJudge())


def test_codes_are_those_that_a_judge_gives_with_gradients():
    judge, images = Small(), torch.rand(3, 3, 16, 16, requires_grad=True)
    torch.testing.assert_close(judge.codes(images).detach(), judge.embed(images.detach()))
    judge.codes(images).sum().backward()
    assert images.grad.abs().sum() > 0

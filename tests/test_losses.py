from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from lightning_modules import losses


@dataclass
class Weights:
    near: float = 2.0
    far: float = 3.0


def test_a_sum_needs_a_weight_for_each_term_and_a_term_for_each_weight():
    one = torch.ones(())
    assert losses.weighted_sum({"near": one, "far": one}, Weights()) == 5
    for terms in ({"near": one}, {"near": one, "far": one, "other": one}):
        with pytest.raises(ValueError, match="unmatched: (far|other)"):
            losses.weighted_sum(terms, Weights())


def test_push_and_pull_are_complements_above_the_floor():
    a, b = torch.randn(5, 16), torch.randn(5, 16)
    torch.testing.assert_close(losses.push_apart(a, b) + losses.pull_together(a, b), torch.tensor(1.0))
    assert losses.push_apart(a, -a) == pytest.approx(0.1)
    assert losses.pull_together(a, a) == pytest.approx(0.0, abs=1e-6)


def test_spread_is_the_mean_cosine_of_pairs():
    codes = F.normalize(torch.rand(4, 8), dim=1)
    pairs = [codes[i] @ codes[j] for i in range(4) for j in range(4) if i != j]
    torch.testing.assert_close(losses.spread(codes), torch.stack(pairs).mean())
    assert losses.spread(codes[:1]) == 0


def test_hinges_are_zero_beyond_the_margin():
    assert losses.hinge_real(torch.tensor([2.0])) == 0
    assert losses.hinge_fake(torch.tensor([-2.0])) == 0
    assert losses.hinge_real(torch.tensor([0.0])) == losses.hinge_fake(torch.tensor([0.0])) == 1


@pytest.mark.parametrize("size", [64, 128, 256])
def test_ms_ssim_costs_nothing_for_the_same_picture_and_has_a_gradient(size):
    image = torch.rand(2, 3, size, size) * 2 - 1
    assert losses.ms_ssim_loss(image, image).item() == pytest.approx(0, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.ms_ssim_loss(image, image).item() == pytest.approx(0, abs=1e-4)
    noisy = (image + 0.3 * torch.randn_like(image)).requires_grad_()
    loss = losses.ms_ssim_loss(noisy, image)
    loss.backward()
    assert 0 < loss < 1
    assert noisy.grad.abs().sum() > 0

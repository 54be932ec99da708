from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from lightning_modules import losses
from lightning_modules.networks.discriminators import FaceDiscriminator, gradient_penalty


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
    assert losses.weighted_sum({"far": one}, Weights(), partial=True) == 3
    with pytest.raises(ValueError, match="unmatched: other"):
        losses.weighted_sum({"far": one, "other": one}, Weights(), partial=True)


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


def test_the_gradient_penalty_of_a_plane_is_its_steepness():
    plane = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))

    def judge(image):
        return plane(image)[:, 0], image

    judge_module = torch.nn.Module()
    judge_module.forward = judge
    steepness = plane[1].weight.square().sum()
    found = gradient_penalty(judge_module, torch.rand(5, 3, 2, 2))
    torch.testing.assert_close(found, steepness)
    found.backward()
    torch.testing.assert_close(plane[1].weight.grad, 2 * plane[1].weight.detach())


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_discriminator_learns_to_tell_faces_from_their_blurred_likes(size):
    torch.manual_seed(0)
    judge = FaceDiscriminator(size, 8, attributes=2)
    real = torch.rand(8, 3, size, size) * 2 - 1
    false = F.avg_pool2d(real, 3, 1, 1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(30):
        loss = (F.softplus(-judge(real)[0]) + F.softplus(judge(false)[0])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert judge(real)[0].min() > judge(false)[0].max()
    assert tuple(judge(real)[1].shape) == (8, 2)

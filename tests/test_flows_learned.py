from math import lgamma, log, pi

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from flows.conjugate import Conjugate
from flows.homogeneous import HomogeneousCoupling, LearnedConjugate


def rotations(batch, dim, dtype=torch.float32):
    q, r = torch.linalg.qr(torch.randn(batch, dim, dim, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    q[:, 0] *= torch.linalg.det(q).sign()[:, None]
    return q.to(dtype)


def people(n, dim=32, rank=16, dtype=torch.float32):
    """Unit codes that no linear map makes round: half of their coordinates bend with the others."""
    basis = rotations(1, dim)[0, :rank]
    x = torch.randn(n, rank)
    x[:, rank // 2 :] = 0.5 * x[:, rank // 2 :] + 0.7 * x[:, : rank - rank // 2].abs()
    return normalize(x @ basis, dim=1).to(dtype)


def bent(flow, amount=0.1):
    """A flow whose couplings do something, though nobody trained them."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += amount * torch.randn_like(parameter)
    return flow


def inside(flow, n):
    """Unit codes of the subspace."""
    return normalize(torch.randn(n, flow.key_length).to(flow.directions) @ flow.directions, dim=1)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(3)
    codes = people(3000)
    return LearnedConjugate(32, 16, blocks=4, hidden=32).fit_(codes[:2500], steps=300, noise=0.3), codes


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_the_coupling_is_homogeneous_invertible_and_knows_its_jacobian(dim):
    h = bent(HomogeneousCoupling(dim, 16, torch.Generator().manual_seed(0)).double(), 0.5)
    x = torch.randn(5, dim).double()
    y, log_det = h(x)
    torch.testing.assert_close(h(2.5 * x)[0], 2.5 * y)
    back, log_det_back = h.inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_back, log_det)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: h(v[None])[0][0], x[i])
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet)


def test_a_new_coupling_changes_nothing():
    h = HomogeneousCoupling(6, 8, torch.Generator().manual_seed(0))
    x = torch.randn(4, 6)
    assert torch.equal(h(x)[0], x)
    assert not h(x)[1].any()


@pytest.mark.parametrize("angle", [None, 0.7])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_right_key_undoes_the_learned_transform(angle, dtype, error):
    flow = LearnedConjugate(32, 16, angle, blocks=4, hidden=32).to(dtype).fit_(people(500), steps=0)
    codes, key = inside(bent(flow), 32), rotations(32, 16, dtype)
    hidden, log_det = flow(codes, key)
    back, log_det_back = flow.inverse(3 * hidden, key)
    assert hidden.dtype == dtype
    torch.testing.assert_close(hidden.norm(dim=1), torch.ones(32, dtype=dtype))
    torch.testing.assert_close(back, codes, rtol=0, atol=error)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=100 * error)
    assert (flow.key_kind, flow.key_length) == ("rotation", 16)


def test_a_fitted_one_is_undone_at_full_size_under_autocast_too(device):
    flow = bent(LearnedConjugate().fit_(people(600, 512, 160), steps=0), 0.02).to(device)
    codes, key = inside(flow, 16), rotations(16, 128).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden, _ = flow(codes, key)
        back, _ = flow.inverse(hidden, key)
    assert hidden.dtype == back.dtype == torch.float32
    assert (back - codes).abs().max() < 1e-4
    assert cosine_similarity(hidden, codes).mean().abs() < 0.2


def test_a_wrong_key_brings_back_nobody(fitted):
    flow, codes = fitted
    right, wrong = rotations(200, 16), rotations(200, 16)
    hidden, _ = flow(codes[2500:2700], right)
    assert cosine_similarity(flow.inverse(hidden, right)[0], codes[2500:2700]).min() > 0.999
    assert cosine_similarity(flow.inverse(hidden, wrong)[0], codes[2500:2700]).quantile(0.9) < 0.8


def test_untrained_it_is_the_linear_case():
    codes, key = people(300), rotations(20, 16)
    linear, learned = Conjugate(32, 16).fit_(codes), LearnedConjugate(32, 16, blocks=3, hidden=8)
    learned.fit_(codes, shrink=0.1, steps=0)
    torch.testing.assert_close(learned.log_prob(codes), linear.log_prob(codes))
    torch.testing.assert_close(learned(codes[:20], key), linear(codes[:20], key), rtol=0, atol=1e-4)


def test_the_log_det_is_the_jacobians_on_the_sphere_of_the_subspace():
    flow = bent(LearnedConjugate(9, 5, blocks=3, hidden=8).fit_(people(300, 9, 6), steps=0).double(), 0.3)
    codes, key = inside(flow, 4), rotations(4, 5, torch.float64)

    def tangents(z):  # an orthonormal basis of the subspace at right angles to z
        vectors = torch.linalg.svd(torch.cat([z[None] @ flow.directions.T, torch.zeros(4, 5).double()])).Vh[1:]
        return vectors @ flow.directions

    for way in (flow.forward, flow.inverse):
        out, log_det = way(codes, key)
        for i in range(4):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, i=i, way=way: way(x[None], key[i : i + 1])[0][0], codes[i]
            )
            on_the_sphere = tangents(out[i]) @ jacobian @ tangents(codes[i]).T
            torch.testing.assert_close(log_det[i], torch.linalg.slogdet(on_the_sphere).logabsdet, rtol=0, atol=1e-5)


def test_the_linear_likelihood_is_the_angular_central_gaussian():
    codes = people(300).double()
    flow = Conjugate(32, 16).double().fit_(codes)
    u = normalize(codes @ flow.directions.T, dim=1)
    covariance = torch.diag(flow.scales**2)  # Tyler 1987, equation 1
    square = torch.einsum("bi,ij,bj->b", u, torch.linalg.inv(covariance), u)
    closed = lgamma(8) - log(2 * pi**8) - torch.logdet(covariance) / 2 - 8 * square.log()
    torch.testing.assert_close(flow.log_prob(codes), closed)


@pytest.mark.parametrize("kind", [Conjugate, LearnedConjugate])
def test_the_density_of_a_circle_and_of_a_sphere_adds_up_to_one(kind):
    for dim in (2, 3):
        flow = kind(dim, dim) if kind is Conjugate else kind(dim, dim, blocks=3, hidden=8)
        codes = normalize(torch.randn(200, dim).double() * torch.arange(1, dim + 1), dim=1)
        flow = flow.double().fit_(codes, **({} if kind is Conjugate else {"steps": 0}))
        bent(flow, 0.3)
        theta = (torch.arange(4000).double() + 0.5) / 4000 * 2 * pi
        if dim == 2:
            u, area = torch.stack([theta.cos(), theta.sin()], 1), 2 * pi
        else:  # equal areas: Archimedes' cylinder
            height = (torch.arange(400).double() + 0.5) / 200 - 1
            theta, height = (grid.flatten() for grid in torch.meshgrid(theta[::10], height, indexing="ij"))
            u = torch.stack([(1 - height**2).sqrt() * theta.cos(), (1 - height**2).sqrt() * theta.sin(), height], 1)
            area = 4 * pi
        assert abs(float(flow.log_prob(u).exp().mean()) * area - 1) < 1e-3


def test_people_whom_no_linear_map_makes_round_are_likelier_under_the_learned_one(fitted):
    flow, codes = fitted
    linear = Conjugate(32, 16).fit_(codes[:2500])
    assert flow.log_prob(codes[2500:]).mean() > linear.log_prob(codes[2500:]).mean() + 1


def test_one_key_for_everybody_keeps_real_people_distributed_as_they_are(fitted):
    flow, codes = fitted
    linear, key = Conjugate(32, 16).fit_(codes[:2500]), rotations(1, 16).expand(500, -1, -1)

    def likeliness(transform):
        return flow.log_prob(transform(codes[2500:], key)[0]).mean()

    real = flow.log_prob(codes[2500:]).mean()
    assert likeliness(flow) > real - 1.5
    assert likeliness(linear) < likeliness(flow) - 0.5


def test_it_is_never_worse_than_the_linear_case_on_who_was_held_out():
    round_already = normalize(torch.randn(400, 16), dim=1)
    flow = LearnedConjugate(16, 16, blocks=2, hidden=64).fit_(round_already, steps=100, noise=0.0)
    held_out = round_already[torch.arange(400) // 4 % 10 == 1]
    linear = Conjugate(16, 16).fit_(round_already, shrink=0.3)
    assert flow.log_prob(held_out).mean() > linear.log_prob(held_out).mean() - 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_same_seed_learns_the_same_wherever_it_is_called_from(mode):
    codes, key = people(300), rotations(8, 16)
    one = LearnedConjugate(32, 16, blocks=2, hidden=8, seed=5).fit_(codes, steps=20)
    torch.manual_seed(9)
    two = LearnedConjugate(32, 16, blocks=2, hidden=8, seed=5)
    with mode():
        for _ in range(2):  # the second fit starts anew
            two.fit_(codes.clone(), steps=20)
    torch.testing.assert_close(two(codes[:8], key), one(codes[:8], key), rtol=0, atol=0)
    other = LearnedConjugate(32, 16, blocks=2, hidden=8, seed=6).fit_(codes, steps=20)
    assert not torch.allclose(other(codes[:8], key)[0], one(codes[:8], key)[0])


def test_a_fitted_one_loads_into_a_new_one_and_has_nothing_to_train(fitted):
    flow, codes = fitted
    new = LearnedConjugate(32, 16, blocks=4, hidden=32, seed=1)
    assert any(not torch.equal(a.places, b.places) for a, b in zip(flow.couplings, new.couplings, strict=True))
    new.load_state_dict(flow.state_dict())
    key = rotations(4, 16)
    torch.testing.assert_close(new(codes[:4], key), flow(codes[:4], key), rtol=0, atol=0)
    torch.testing.assert_close(new.inverse(codes[:4], key), flow.inverse(codes[:4], key), rtol=0, atol=0)
    for each in (flow, new, LearnedConjugate(32, 16)):
        assert not any(parameter.requires_grad for parameter in each.parameters())


def test_gradients_reach_the_code(fitted):
    z = fitted[1][:4].clone().requires_grad_(True)
    fitted[0](z, rotations(4, 16))[0][:, 0].sum().backward()
    assert z.grad.abs().sum(1).min() > 0


def test_mistakes_are_answered_with_the_rule(fitted):
    with pytest.raises(ValueError, match="no directions yet"):
        LearnedConjugate(16, 8)(torch.randn(2, 16), rotations(2, 8))
    with pytest.raises(ValueError, match="no directions yet"):
        LearnedConjugate(16, 8).log_prob(torch.randn(2, 16))
    with pytest.raises(ValueError, match="128 directions need at least as many codes, got 100"):
        LearnedConjugate().fit_(people(100, 512))
    with pytest.raises(ValueError, match=r"shrink must lie in \[0, 1\], got 2"):
        LearnedConjugate(8, 4).fit_(people(50, 8, 8), shrink=2.0)
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        LearnedConjugate(8, 4, blocks=0)
    flow = LearnedConjugate(16, 8, blocks=1, hidden=8).fit_(people(50, 16, 8), steps=0).bfloat16()
    with pytest.raises(ValueError, match=r"cannot be inverted in torch.bfloat16"):
        flow(torch.randn(2, 16), rotations(2, 8))

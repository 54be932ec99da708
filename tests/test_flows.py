import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from flows.conjugate import Conjugate
from flows.coupling import KeyedCoupling
from flows.orthogonal import KeyedOrthogonal
from lightning_modules.keys import KeySpec

DIMS = [(8, 4, 2), (7, 3, 3), (64, 32, 4)]


def rotations(batch, dim, dtype=torch.float32):
    q, r = torch.linalg.qr(torch.randn(batch, dim, dim, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    q[:, 0] *= torch.linalg.det(q).sign()[:, None]
    return q.to(dtype)


def people(n, dim=512, rank=128):
    """Unit codes whose variance falls off along `rank` random directions, as those of real faces do."""
    basis = rotations(1, dim)[0, :rank]
    scales = torch.exp(-torch.arange(rank) / (rank / 3))
    return normalize(torch.randn(n, rank) * scales @ basis, dim=1)


def perturbed(flow, amount=0.3):
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)
    return flow


@pytest.mark.parametrize(("dim", "key_dim", "blocks"), DIMS)
def test_the_right_key_undoes_the_flow(dim, key_dim, blocks):
    flow = perturbed(KeyedCoupling(dim, key_dim, blocks).double())
    z, key = torch.randn(16, dim).double(), torch.randn(16, key_dim).double()
    hidden, log_det = flow(z, key)
    back, log_det_back = flow.inverse(hidden, key)
    assert hidden.dtype == torch.float64
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_det_back, -log_det)


@pytest.mark.parametrize(("dim", "key_dim", "blocks"), DIMS[:2])
def test_the_log_det_is_the_jacobians(dim, key_dim, blocks):
    flow = perturbed(KeyedCoupling(dim, key_dim, blocks).double())
    z, key = torch.randn(3, dim).double(), torch.randn(3, key_dim).double()
    for way in (flow.forward, flow.inverse):
        _, log_det = way(z, key)
        for i in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, i=i, way=way: way(x[None], key[i : i + 1])[0][0], z[i]
            )
            torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet)


def test_a_wrong_key_does_not_undo_the_flow():
    flow = perturbed(KeyedCoupling(64, 64))
    z, key, wrong = torch.randn(16, 64), torch.randn(16, 64), torch.randn(16, 64)
    hidden, _ = flow(z, key)
    assert cosine_similarity(flow.inverse(hidden, key)[0], z).min() > 0.999
    assert cosine_similarity(flow.inverse(hidden, wrong)[0], z).max() < 0.9


def test_at_initialisation_the_key_does_next_to_nothing():
    flow = KeyedCoupling()
    z = normalize(torch.randn(8, 512), dim=1)
    one, two = (flow(z, torch.randn(8, 512))[0] for _ in range(2))
    assert cosine_similarity(one, two).min() > 0.99


def test_the_published_sizes_are_the_default():
    flow = KeyedCoupling()
    linears = [layer for layer in flow.flow[0].subnet if isinstance(layer, torch.nn.Linear)]
    assert [layer.in_features for layer in linears] == [768, 256, 128, 128, 256]
    assert linears[-1].out_features == 512
    assert len(flow.flow) == 4
    assert (flow.key_kind, flow.key_length) == ("normal", 512)


@pytest.mark.parametrize("kind", ["autocast", "matmul precision"])
def test_the_round_trip_is_exact_whatever_precision_the_trainer_asks_for(kind, device):
    flow = perturbed(KeyedCoupling(), 0.02)
    rotation, conjugate = KeyedOrthogonal(64), Conjugate(512, 64).fit_(people(500, rank=64))
    z, codes, key = torch.randn(8, 512), people(8, rank=64), torch.randn(8, 512)
    codes = normalize(codes @ conjugate.directions.T @ conjugate.directions, dim=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if kind == "matmul precision" else before)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
            for f, x, k in (
                (flow, z, key),
                (rotation, z[:, :64], rotations(8, 64)),
                (conjugate, codes, rotations(8, 64)),
            ):
                f, x, k = f.to(device), x.to(device), k.to(device)
                hidden, _ = f(x, k)
                back, _ = f.inverse(hidden, k)
                assert hidden.dtype == back.dtype == torch.float32
                assert (back - x).abs().max() < 1e-5
        assert torch.get_float32_matmul_precision() == ("medium" if kind == "matmul precision" else before)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_flow_in_bf16_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="cannot be inverted in torch.bfloat16"):
        KeyedCoupling(8, 4).bfloat16()(torch.randn(2, 8), torch.randn(2, 4))


def test_the_permutations_come_from_the_seed_and_travel_in_the_state_dict():
    one, same, other = (
        KeyedCoupling(16, 8, seed=1),
        KeyedCoupling(16, 8, seed=1),
        KeyedCoupling(16, 8, seed=2),
    )
    permutations = [name for name in one.state_dict() if "w_perm" in name]
    assert len(permutations) == 8
    assert all(torch.equal(one.state_dict()[n], same.state_dict()[n]) for n in permutations)
    assert not all(torch.equal(one.state_dict()[n], other.state_dict()[n]) for n in permutations)
    other.load_state_dict(one.state_dict())
    z, key = torch.randn(4, 16), torch.randn(4, 8)
    torch.testing.assert_close(other(z, key), one(z, key), rtol=0, atol=0)
    torch.testing.assert_close(other.inverse(z, key), one.inverse(z, key), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_every_trainable_parameter_of_the_flow_gets_a_gradient_and_no_permutation_does(way):
    flow = KeyedCoupling(16, 8)
    z_a, _ = getattr(flow, way)(torch.randn(4, 16), torch.randn(4, 8))
    z_a.square().sum().backward()
    for name, parameter in flow.named_parameters():
        if "w_perm" in name:
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_a_rotation_keeps_lengths_and_its_inverse_is_exact():
    flow = KeyedOrthogonal(32)
    z, key = torch.randn(5, 32).double(), rotations(5, 32, torch.float64)
    hidden, log_det = flow(z, key)
    torch.testing.assert_close(hidden, torch.stack([q @ x for q, x in zip(key, z, strict=True)]))
    torch.testing.assert_close(hidden.norm(dim=1), z.norm(dim=1))
    torch.testing.assert_close(flow.inverse(hidden, key)[0], z)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(key).logabsdet)
    assert (flow.key_kind, flow.key_length) == ("rotation", 32)


@pytest.mark.parametrize("angle", [None, 0.7])
def test_the_right_key_undoes_the_conjugate_transform(angle):
    flow = Conjugate(angle=angle).fit_(people(2000))
    codes = normalize(torch.randn(32, 128) @ flow.directions, dim=1)
    key = rotations(32, 128)
    hidden, log_det = flow(codes, key)
    back, log_det_back = flow.inverse(3 * hidden, key)  # a face that is encoded again carries a direction, not a length
    torch.testing.assert_close(hidden.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(back, codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-3, atol=1e-2)
    assert (flow.key_kind, flow.key_length) == ("rotation", 128)


def test_what_lies_outside_the_subspace_is_what_explained_says():
    flow = Conjugate(directions=64).fit_(people(2000))
    codes = people(50)
    key = rotations(50, 64)
    back, _ = flow.inverse(flow(codes, key)[0], key)
    explained = flow.explained(codes)
    assert ((explained > 0) & (explained < 1)).all()
    torch.testing.assert_close(cosine_similarity(back, codes), explained.sqrt(), rtol=0, atol=1e-5)


def test_the_conjugate_log_det_is_the_jacobians_on_the_sphere_of_the_subspace():
    flow = Conjugate(dim=9, directions=5).fit_(people(300, 9, 6)).double()
    codes = normalize(torch.randn(4, 5).double() @ flow.directions, dim=1)
    key = rotations(4, 5, torch.float64)
    hidden, log_det = flow(codes, key)

    def tangents(z):  # an orthonormal basis of the subspace at right angles to z
        vectors = torch.linalg.svd(torch.cat([z[None] @ flow.directions.T, torch.zeros(4, 5).double()])).Vh[1:]
        return vectors @ flow.directions

    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda x, i=i: flow(x[None], key[i : i + 1])[0][0], codes[i])
        on_the_sphere = tangents(hidden[i]) @ jacobian @ tangents(codes[i]).T
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(on_the_sphere).logabsdet)


def test_anonymised_people_are_distributed_as_people():
    codes = people(8000)
    flow = Conjugate().fit_(codes, shrink=0.0)
    key = rotations(1, 128).expand(8000, -1, -1)  # one key for everybody: the hardest case

    def moment(z):
        u = normalize(z @ flow.directions.T / flow.scales, dim=1)
        return torch.linalg.eigvalsh(u.T @ u * 128 / len(u))

    before, after = moment(codes), moment(flow(codes, key)[0])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert after.min() > 0.6
    assert after.max() < 1.4
    along = (flow(codes, key)[0] @ flow.directions.T).square().mean(0)
    torch.testing.assert_close(along / along.sum(), flow.scales**2 / (flow.scales**2).sum(), rtol=0.25, atol=0)


def test_two_keys_give_nearly_orthogonal_people_and_a_wrong_key_nobody():
    flow = Conjugate().fit_(people(2000))
    codes = people(200)
    right, other = rotations(200, 128), rotations(200, 128)
    one, two = flow(codes, right)[0], flow(codes, other)[0]
    for a, b in ((one, two), (one, codes), (flow.inverse(one, other)[0], codes)):
        similarity = cosine_similarity(a, b)
        assert similarity.mean().abs() < 0.05
        assert similarity.std() < 0.25


def test_bands_keep_what_is_lost_in_narrow_directions_out_of_wide_ones():
    torch.manual_seed(0)
    codes, spec = people(2000), KeySpec.of(Conjugate(bands=4))
    flow = Conjugate(bands=4).fit_(codes)
    assert (spec.kind, spec.length, spec.bands) == ("rotation", 128, 4)
    with pytest.raises(ValueError, match="128 directions do not fall into 5 equal bands of at least two"):
        Conjugate(bands=5)
    opened = {}
    for name, key in (("bands", spec.random(200)), ("whole", rotations(200, 128))):
        hidden = flow(codes[:200], key)[0]
        assert cosine_similarity(hidden, codes[:200]).mean().abs() < 0.1
        # half of the directions, the narrow ones, do not arrive
        arrived = hidden @ flow.directions[:64].T @ flow.directions[:64]
        opened[name] = cosine_similarity(flow.inverse(arrived, key)[0], codes[:200]).mean()
    assert opened["bands"] > opened["whole"] + 0.03


@pytest.mark.parametrize(("angle", "cosine"), [(0.0, 1.0), (1.0, 0.7652), (2.4048, 0.0)])
def test_the_angle_turns_round_codes_by_a_bessel_function(angle, cosine):
    flow = Conjugate(256, 256, angle=angle).fit_(torch.randn(2000, 256), shrink=1.0)
    codes = normalize(torch.randn(64, 256), dim=1)
    similarity = cosine_similarity(flow(codes, rotations(64, 256))[0], codes).mean()
    torch.testing.assert_close(similarity, torch.tensor(cosine), rtol=0, atol=0.02)


def test_a_fitted_transform_loads_into_a_new_one_and_has_nothing_to_train():
    flow, new = Conjugate(64, 16).fit_(people(200, 64, 32)), Conjugate(64, 16)
    new.load_state_dict(flow.state_dict())
    codes, key = people(4, 64, 32), rotations(4, 16)
    torch.testing.assert_close(new(codes, key), flow(codes, key), rtol=0, atol=0)
    assert not list(flow.parameters())


def test_gradients_reach_the_code_through_every_flow():
    for flow, key in (
        (KeyedCoupling(16, 8), torch.randn(4, 8)),
        (KeyedOrthogonal(16), rotations(4, 16)),
        (Conjugate(16, 8).fit_(people(100, 16, 12)), rotations(4, 8)),
    ):
        z = torch.randn(4, 16, requires_grad=True)
        flow(z, key)[0][:, 0].sum().backward()
        assert z.grad.abs().sum(1).min() > 0


def test_mistakes_are_answered_with_the_rule():
    with pytest.raises(ValueError, match="no directions yet"):
        Conjugate(16, 8)(torch.randn(2, 16), rotations(2, 8))
    with pytest.raises(ValueError, match="128 directions need at least as many codes, got 100"):
        Conjugate().fit_(people(100))
    with pytest.raises(ValueError, match="fewer than 128 directions"):
        Conjugate().fit_(people(500, rank=20), shrink=0.0)
    with pytest.raises(ValueError, match=r"shrink must lie in \[0, 1\], got 2"):
        Conjugate(8, 4).fit_(people(50, 8, 8), shrink=2.0)
    with pytest.raises(ValueError, match="between 2 and dim = 8, got 9"):
        Conjugate(8, 9)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        KeyedCoupling(dim=1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_keys_in_bands_are_undone_and_leave_no_length_of_a_band(dtype, error):
    torch.manual_seed(0)
    seen, codes = people(600).to(dtype).split(300)
    flow = Conjugate(bands=4).to(dtype).fit_(seen)
    key = torch.stack([torch.block_diag(*rotations(4, 32, dtype)) for _ in codes])
    hidden, log_det = flow(codes, key)
    back, log_det_back = flow.inverse(hidden, key)
    torch.testing.assert_close(back, flow.kept(codes), rtol=0, atol=error)
    assert cosine_similarity(back, codes).mean() > 0.95
    again, log_det = flow(back, key)  # levelled already: nothing more is lost
    torch.testing.assert_close(again, hidden, rtol=0, atol=error)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-3, atol=1e-2)
    lengths = flow._to_round(hidden)[0].unflatten(1, (4, 32)).norm(dim=2)
    torch.testing.assert_close(lengths, flow.lengths.expand(300, -1), rtol=1e-3, atol=1e-3)


def test_with_one_band_all_of_the_subspace_is_kept():
    flow = Conjugate().fit_(people(500))
    codes = normalize(torch.randn(8, 128) @ flow.directions, dim=1)
    torch.testing.assert_close(flow.kept(codes), codes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("angle", [0.0, 1.0, 2.4048])
def test_an_angle_says_how_far_a_whole_code_is_turned_and_the_key_undoes_it(angle):
    """Cao et al.: at 0 nothing is hidden, at 2.4 nothing is alike (a Bessel function of the angle)."""
    flow, z = KeyedOrthogonal(256, angle=angle), torch.nn.functional.normalize(torch.randn(64, 256), dim=1)
    key = torch.linalg.qr(torch.randn(64, 256, 256))[0]
    hidden = flow(z, key)[0]
    torch.testing.assert_close(flow.inverse(hidden, key)[0], z, rtol=1e-4, atol=1e-4)
    wanted = float(torch.special.bessel_j0(torch.tensor(angle)))
    assert abs((hidden * z).sum(1).mean().item() - wanted) < 0.05

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from flows.coupling import KeyedCoupling
from flows.sphere import KeyedSphere


def perturbed(flow, amount=0.3):
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)
    return flow


def codes(n, dim=64, dtype=torch.float32):
    return normalize(torch.randn(n, dim, dtype=dtype), dim=1)


@pytest.mark.parametrize(("dim", "key_dim", "blocks"), [(8, 4, 2), (7, 3, 3), (64, 32, 4)])
def test_gin_blocks_keep_volumes_and_are_undone_exactly(dim, key_dim, blocks):
    flow = perturbed(KeyedCoupling(dim, key_dim, blocks, gin=True).double())
    z, key = torch.randn(3, dim).double(), torch.randn(3, key_dim).double()
    hidden, log_det = flow(z, key)
    torch.testing.assert_close(flow.inverse(hidden, key)[0], z, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, torch.zeros(3).double(), rtol=0, atol=1e-9)
    if dim <= 8:
        for i in range(3):
            jacobian = torch.autograd.functional.jacobian(lambda x, i=i: flow(x[None], key[i : i + 1])[0][0], z[i])
            assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-9


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_codes_of_any_length_become_unit_codes(way):
    flow = perturbed(KeyedSphere(64, 32), 0.1)
    z, key = codes(16), torch.randn(16, 32)
    out, log_det = getattr(flow, way)(z, key)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(getattr(flow, way)(3 * z, key)[0], out)
    assert log_det.abs().max() < 1e-5
    assert (flow.key_kind, flow.key_length) == ("normal", 32)


def test_only_the_lost_length_stands_between_the_right_key_and_the_code():
    flow = perturbed(KeyedSphere(64, 32).double(), 0.1)
    z, key = codes(16, dtype=torch.float64), torch.randn(16, 32).double()
    hidden, _ = flow(z, key)
    lengths = flow.blocks(z, key)[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(flow.blocks.inverse(hidden * lengths, key)[0], z, rtol=0, atol=1e-9)
    error = flow.roundtrip_error(z, key)
    torch.testing.assert_close(error, 1 - cosine_similarity(flow.inverse(hidden, key)[0], z))
    assert error.min() > 1e-9
    torch.testing.assert_close(flow.norm_penalty(z, key), lengths.log().square().mean())


def test_where_lengths_are_kept_the_right_key_undoes_the_sphere():
    flow = KeyedSphere(64, 32).double()
    with torch.no_grad():  # nothing but the permutations is left
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    z, key = codes(16, dtype=torch.float64), torch.randn(16, 32).double()
    torch.testing.assert_close(flow.inverse(flow(z, key)[0], key)[0], z, rtol=0, atol=1e-9)
    assert flow.norm_penalty(z, key) < 1e-18
    assert flow.roundtrip_error(z, key).abs().max() < 1e-9


def test_training_on_the_norm_penalty_brings_the_code_back():
    flow = perturbed(KeyedSphere(16, 8, 2), 0.4)
    z, key = codes(256, 16), torch.randn(256, 8)
    before = flow.roundtrip_error(z, key).mean()
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        flow.norm_penalty(z, key).backward()
        optimizer.step()
    assert flow.roundtrip_error(z, key).mean() < before / 3


def test_trained_to_tell_keys_apart_it_is_opened_by_the_right_key_and_no_other():
    flow = KeyedSphere(16, 8, 3)
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=1e-2)

    def opened():
        z, right, wrong = codes(256, 16), torch.randn(256, 8), torch.randn(256, 8)
        hidden, _ = flow(z, right)
        backs = [cosine_similarity(flow.inverse(hidden, key)[0], z).mean() for key in (right, wrong)]
        return *backs, flow.norm_penalty(z, right)

    for _ in range(150):
        right, wrong, penalty = opened()
        optimizer.zero_grad()
        (wrong.clamp_min(0.1) - right + penalty).backward()
        optimizer.step()
    right, wrong, _ = opened()
    assert right > 0.8
    assert wrong < 0.6


def test_autocast_changes_nothing(device):
    flow = perturbed(KeyedSphere(64, 32), 0.1).to(device)
    z, key = codes(8).to(device), torch.randn(8, 32).to(device)
    hidden, _ = flow(z, key)
    with torch.autocast(device.type, torch.bfloat16):
        again, _ = flow(z, key)
        back, _ = flow.inverse(again, key)
        error = flow.roundtrip_error(z, key)
    assert again.dtype == back.dtype == torch.float32
    torch.testing.assert_close(again, hidden, rtol=0, atol=1e-4)
    torch.testing.assert_close(back, flow.inverse(hidden, key)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(error, flow.roundtrip_error(z, key), rtol=0, atol=1e-4)


def test_the_permutations_come_from_the_seed_and_travel_in_the_state_dict():
    one, same, other = (KeyedSphere(16, 8, seed=seed) for seed in (1, 1, 2))
    permutations = [name for name in one.state_dict() if "w_perm" in name]
    assert len(permutations) == 8
    assert all(torch.equal(one.state_dict()[n], same.state_dict()[n]) for n in permutations)
    assert not all(torch.equal(one.state_dict()[n], other.state_dict()[n]) for n in permutations)
    other.load_state_dict(one.state_dict())
    z, key = codes(4, 16), torch.randn(4, 8)
    torch.testing.assert_close(other(z, key), one(z, key), rtol=0, atol=0)
    torch.testing.assert_close(other.inverse(z, key), one.inverse(z, key), rtol=0, atol=0)


@pytest.mark.parametrize("what", ["forward", "inverse", "norm_penalty", "roundtrip_error"])
def test_every_parameter_that_asks_for_a_gradient_gets_one(what):
    flow = perturbed(KeyedSphere(16, 8), 0.1)
    out = getattr(flow, what)(codes(4, 16), torch.randn(4, 8))
    out = out[0][:, 0] if isinstance(out, tuple) else out
    out.sum().backward()
    for name, parameter in flow.named_parameters():
        if "w_perm" in name or "global_scale" in name:
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_published_flow_still_learns_its_scale():
    scales = [p for n, p in KeyedCoupling(16, 8).named_parameters() if "global_scale" in n]
    assert len(scales) == 4
    assert all(p.requires_grad for p in scales)


def test_a_sphere_in_bf16_is_refused():
    with pytest.raises(ValueError, match=r"cannot be inverted in torch.bfloat16"):
        KeyedSphere(8, 4).bfloat16()(torch.randn(2, 8), torch.randn(2, 4))

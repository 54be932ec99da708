"""IR-SE50 on RANDOM weights of the right names and shapes: the published file is the user's, and is not here."""

import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from lightning_modules.networks.ir_se50 import IRSE50
from lightning_modules.weights.loader import sha256

UNITS = [(64, 3), (128, 4), (256, 14), (512, 3)]


def random_ir_se50():
    """Random tensors under the 397 names of model_ir_se50.pth, written down from its layout, not from our module."""
    g = torch.Generator().manual_seed(0)
    state = {}

    def convolution(name, out, channels, side):
        fan = channels * side * side
        state[f"{name}.weight"] = torch.randn(out, channels, side, side, generator=g) * (2 / fan) ** 0.5

    def norm(name, channels, gain=1.0):
        state[f"{name}.weight"] = gain * (0.8 + 0.4 * torch.rand(channels, generator=g))
        state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=g)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(channels, generator=g)
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=g)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    convolution("input_layer.0", 64, 3, 3)
    norm("input_layer.1", 64)
    state["input_layer.2.weight"] = torch.full((64,), 0.25)
    channels, unit = 64, 0
    for out, count in UNITS:
        for _ in range(count):
            body = f"body.{unit}"
            if channels != out:
                convolution(f"{body}.shortcut_layer.0", out, channels, 1)
                norm(f"{body}.shortcut_layer.1", out)
            norm(f"{body}.res_layer.0", channels)
            convolution(f"{body}.res_layer.1", out, channels, 3)
            state[f"{body}.res_layer.2.weight"] = 0.5 * torch.rand(out, generator=g)
            convolution(f"{body}.res_layer.3", out, out, 3)
            norm(f"{body}.res_layer.4", out, gain=0.3)  # else 24 random units amplify float32's last bit to 10 %
            convolution(f"{body}.res_layer.5.fc1", out // 16, out, 1)
            convolution(f"{body}.res_layer.5.fc2", out, out // 16, 1)
            channels, unit = out, unit + 1
    norm("output_layer.0", 512)
    state["output_layer.3.weight"] = torch.randn(512, 512 * 49, generator=g) / (512 * 49) ** 0.5
    state["output_layer.3.bias"] = 0.01 * torch.randn(512, generator=g)
    norm("output_layer.4", 512)
    return state


def reference(state, crop):
    """The network written out from the raw tensors."""

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = F.conv2d(crop, state["input_layer.0.weight"], padding=1)
    x = F.prelu(norm(x, "input_layer.1"), state["input_layer.2.weight"])
    unit = 0
    for _, count in UNITS:
        for stride in [2] + [1] * (count - 1):
            body, short = f"body.{unit}", x[..., ::stride, ::stride]
            if f"{body}.shortcut_layer.0.weight" in state:
                short = norm(F.conv2d(short, state[f"{body}.shortcut_layer.0.weight"]), f"{body}.shortcut_layer.1")
            y = F.conv2d(norm(x, f"{body}.res_layer.0"), state[f"{body}.res_layer.1.weight"], padding=1)
            y = F.prelu(y, state[f"{body}.res_layer.2.weight"])
            y = norm(F.conv2d(y, state[f"{body}.res_layer.3.weight"], stride=stride, padding=1), f"{body}.res_layer.4")
            gate = state[f"{body}.res_layer.5.fc1.weight"].flatten(1) @ y.mean((2, 3))[..., None]
            gate = (state[f"{body}.res_layer.5.fc2.weight"].flatten(1) @ gate.relu()).sigmoid()
            x, unit = y * gate[..., None] + short, unit + 1
    x = norm(x, "output_layer.0").flatten(1)
    x = F.linear(x, state["output_layer.3.weight"], state["output_layer.3.bias"])
    x = norm(x, "output_layer.4")
    return x / x.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def state():
    return random_ir_se50()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("random-weights") / "random_ir_se50.pth"
    # as old as the published file, which is of PyTorch 0.4
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()  # 175 MB, which pytest would keep


@pytest.fixture(scope="module")
def network(file):
    return IRSE50(file)


@pytest.fixture
def faces():
    coarse = torch.rand(3, 3, 16, 16) * 2 - 1
    return F.interpolate(coarse, size=(256, 256), mode="bilinear")


def test_the_layout_is_the_public_one(state, network):
    weights = [value for name, value in state.items() if "running" not in name and "tracked" not in name]
    assert sum(value.numel() for value in weights) == 43_797_696
    assert {name: value.shape for name, value in network.layers.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }


def test_the_code_is_that_of_the_network_written_out(network, state, faces):
    crop = network.crop(faces[:2])
    torch.testing.assert_close(network.embed_aligned(crop), reference(state, crop), rtol=1e-4, atol=1e-5)


def test_codes_are_unit_length_differ_and_do_not_depend_on_the_batch(network, faces):
    together = network(faces)
    assert together.shape == (3, 512)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.cat([network(face[None]) for face in faces]), together, atol=1e-5, rtol=0)
    assert (together[0] @ together[1]) < 0.999


def test_its_stages_halve_the_side_and_lead_to_the_same_code(network, faces):
    codes, features = network.pyramid(faces[:2])
    torch.testing.assert_close(codes, network(faces[:2]), rtol=1e-4, atol=1e-5)
    assert [tuple(f.shape) for f in features] == [(2, 128, 28, 28), (2, 256, 14, 14), (2, 512, 7, 7)]
    x = torch.zeros(1, 3, 64, 64)
    for stage, side in zip(network.stages(), (16, 8, 4), strict=True):
        x = stage(x)
        assert x.shape[2:] == (side, side)


def test_gradients_reach_the_picture_and_nothing_else(network, faces):
    image = faces[:1].clone().requires_grad_()
    (network(image) @ network(faces[1:2]).T).sum().backward()
    assert image.grad.abs().max() > 0
    assert torch.isfinite(image.grad).all()
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_it_stays_in_eval_mode_and_out_of_checkpoints(network, file):
    method = torch.nn.ModuleDict({"recognizer": network, "head": torch.nn.Linear(2, 2)}).train()
    assert not any(module.training for module in network.modules())
    assert set(method.state_dict()) == {"head.weight", "head.bias"}
    assert method.load_state_dict(method.state_dict(), strict=True).missing_keys == []
    assert network.card_hashes == {"ir-se50": f"sha256:{sha256(file)}"}


def test_safetensors_without_counters_give_the_same_codes(state, network, faces, tmp_path):
    path = tmp_path / "random_ir_se50.safetensors"
    save_file({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    torch.testing.assert_close(IRSE50(path)(faces[:1]), network(faces[:1]))
    path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body.3.shortcut_layer.0.weight": None}, r"it lacks 'body\.3\.shortcut_layer\.0\.weight'"),
        ({"body.7.res_layer.5.fc1.weight": torch.zeros(16, 128, 1, 1)}, r"'body\.7\.res_layer\.5\.fc1\.weight' should"),
        ({"body.24.res_layer.0.weight": torch.zeros(1)}, r"'body\.24\.res_layer\.0\.weight' has no place"),
    ],
)
def test_another_layout_is_told_by_its_first_odd_entry(state, tmp_path, change, message):
    # views of one number: shapes are read before values, and the file stays small
    slim = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()} | change
    path = tmp_path / "other.pth"
    torch.save({name: value for name, value in slim.items() if value is not None}, path)
    with pytest.raises(ValueError, match=rf"other\.pth is not an ArcFace IR-SE50.*{message}") as told:
        IRSE50(path)
    assert "\n" not in str(told.value)


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_nothing_inside_a_file_is_executed(tmp_path, capsys):
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"input_layer.0.weight": Bomb()}, tmp_path / "bomb2.pth")
    for name in ("bomb.pth", "bomb2.pth"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable checkpoint .*more than tensors"):
            IRSE50(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recogniser file .*none.pth"):
        IRSE50(tmp_path / "none.pth")

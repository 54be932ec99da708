import argparse
import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from experiments.convert import convert
from lightning_modules.networks.stylegan.convert import convert_nvlabs, convert_rosinality
from lightning_modules.networks.stylegan.stylegan2 import StyleGAN2, modulated_conv, upsample

W = 512
CHANNELS = {4: 16, 8: 16, 16: 12, 32: 8, 64: 8}
KERNEL = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def nvlabs_state(size=32, depth=3):
    """A random G_ema.state_dict(): names and shapes of stylegan2-ada-pytorch's training/networks.py."""
    g = torch.Generator().manual_seed(size)

    def rand(*shape):
        return torch.randn(shape, generator=g)

    state = {"mapping.w_avg": 0.1 * rand(W)}
    for i in range(depth):
        state |= {f"mapping.fc{i}.weight": 100 * rand(W, W), f"mapping.fc{i}.bias": 10 * rand(W)}
    before = 0
    for res in [r for r in CHANNELS if r <= size]:
        channels, block = CHANNELS[res], f"synthesis.b{res}"
        state[f"{block}.resample_filter"] = KERNEL.clone()
        if res == 4:
            state[f"{block}.const"] = rand(channels, 4, 4)
        for conv in ("conv1",) if res == 4 else ("conv0", "conv1"):
            inward = before if conv == "conv0" else channels
            state |= {
                f"{block}.{conv}.weight": rand(channels, inward, 3, 3),
                f"{block}.{conv}.noise_strength": rand() * 0.3,
                f"{block}.{conv}.bias": 0.3 * rand(channels),
                f"{block}.{conv}.resample_filter": KERNEL.clone(),
                f"{block}.{conv}.noise_const": rand(res, res),
                f"{block}.{conv}.affine.weight": rand(inward, W),
                f"{block}.{conv}.affine.bias": 1 + 0.1 * rand(inward),
            }
        state |= {
            f"{block}.torgb.weight": rand(3, channels, 1, 1),
            f"{block}.torgb.bias": 0.1 * rand(3),
            f"{block}.torgb.affine.weight": rand(channels, W),
            f"{block}.torgb.affine.bias": 1 + 0.1 * rand(channels),
        }
        before = channels
    return state


def rosinality_checkpoint(nvlabs):
    """The same generator under the names and shapes of model.py in rosinality's stylegan2-pytorch."""
    g = {"input.input": nvlabs["synthesis.b4.const"][None]}
    for name, value in nvlabs.items():
        if name.startswith("mapping.fc"):
            layer, part = name.removeprefix("mapping.fc").split(".")
            g[f"style.{int(layer) + 1}.{part}"] = value
    sizes = sorted({int(name.split(".")[1][1:]) for name in nvlabs if name.startswith("synthesis")})

    def layer(source, target, number=None):
        g[f"{target}.conv.weight"] = nvlabs[f"{source}.weight"][None]
        g[f"{target}.conv.modulation.weight"] = nvlabs[f"{source}.affine.weight"]
        g[f"{target}.conv.modulation.bias"] = nvlabs[f"{source}.affine.bias"]
        if number is None:
            g[f"{target}.bias"] = nvlabs[f"{source}.bias"].view(1, 3, 1, 1)
        else:
            g[f"{target}.activate.bias"] = nvlabs[f"{source}.bias"]
            g[f"{target}.noise.weight"] = nvlabs[f"{source}.noise_strength"].view(1)
            g[f"noises.noise_{number}"] = nvlabs[f"{source}.noise_const"][None, None]

    layer("synthesis.b4.conv1", "conv1", 0)
    layer("synthesis.b4.torgb", "to_rgb1")
    for i, res in enumerate(sizes[1:]):
        layer(f"synthesis.b{res}.conv0", f"convs.{2 * i}", 2 * i + 1)
        layer(f"synthesis.b{res}.conv1", f"convs.{2 * i + 1}", 2 * i + 2)
        layer(f"synthesis.b{res}.torgb", f"to_rgbs.{i}")
        g[f"convs.{2 * i}.conv.blur.kernel"] = g[f"to_rgbs.{i}.upsample.kernel"] = 4 * KERNEL
    return {"g_ema": g, "latent_avg": nvlabs["mapping.w_avg"]}


def upfirdn(x, up=2, pad=(2, 1)):
    """The definition: insert zeros, pad, convolve with the filter at gain up²."""
    b, c, h, w = x.shape
    spread = x.new_zeros(b, c, up * h, up * w)
    spread[:, :, ::up, ::up] = x
    spread = F.pad(spread, (*pad, *pad)).reshape(b * c, 1, up * h + sum(pad), -1)
    return F.conv2d(spread, (up**2 * KERNEL).flip(0, 1)[None, None].to(x)).reshape(b, c, up * h, up * w)


def reference(state, w):
    """The synthesis written out for one sample after another from NVlabs' raw weights."""
    sizes = sorted({int(name.split(".")[1][1:]) for name in state if name.startswith("synthesis")})
    pictures = []
    for rows in w:
        x, image, row = state["synthesis.b4.const"][None], None, 0
        for res in sizes:
            for conv in ("conv0", "conv1", "torgb"):
                name = f"synthesis.b{res}.{conv}"
                if f"{name}.weight" not in state:
                    continue
                style = state[f"{name}.affine.weight"] @ rows[row] / W**0.5 + state[f"{name}.affine.bias"]
                weight, bias = state[f"{name}.weight"], state[f"{name}.bias"].view(1, -1, 1, 1)
                if conv == "torgb":
                    rgb = F.conv2d(x, weight * style[:, None, None] / weight.shape[1] ** 0.5) + bias
                    image = rgb if image is None else upfirdn(image) + rgb
                    continue
                weight = weight * style[:, None, None]
                weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
                if conv == "conv0":  # true convolution of the spread input, then the filter
                    x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
                    x = _blur(x)
                else:
                    x = F.conv2d(x, weight, padding=1)
                x = x + state[f"{name}.noise_const"] * state[f"{name}.noise_strength"] + bias
                x = F.leaky_relu(x, 0.2) * 2**0.5
                row += 1
        pictures.append(image)
    return torch.cat(pictures)


def _blur(x):
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = padded.shape[2] - 3, padded.shape[3] - 3
    return sum(4 * KERNEL[i, j] * padded[:, :, i : i + height, j : j + width] for i in range(4) for j in range(4))


@pytest.fixture(scope="module")
def state():
    return nvlabs_state(32)


@pytest.fixture(scope="module")
def generator(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylegan2")
    torch.save(state, folder / "g.pt")
    return convert(folder / "g.pt", folder / "g.safetensors")


@pytest.fixture
def w(generator):
    torch.manual_seed(1)
    return torch.randn(2, generator.num_layers, W)


def test_the_picture_is_that_of_the_synthesis_written_out(generator, state, w):
    torch.testing.assert_close(generator(w), reference(state, w), rtol=1e-4, atol=1e-4)


def test_the_picture_is_the_same_on_every_device(generator, w, device):
    there = copy.deepcopy(generator).to(device)(w.to(device)).cpu()
    torch.testing.assert_close(there, generator(w), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [32, 64])
def test_both_public_layouts_of_the_same_weights_give_the_same_picture(tmp_path, size):
    nvlabs = nvlabs_state(size)
    torch.save(rosinality_checkpoint(nvlabs), tmp_path / "rosinality.pt")
    save_file(nvlabs, tmp_path / "nvlabs.safetensors")
    one = convert(tmp_path / "rosinality.pt", tmp_path / "one.safetensors")
    two = convert(tmp_path / "nvlabs.safetensors", tmp_path / "two.safetensors")
    z = torch.randn(2, W)
    torch.testing.assert_close(one.sample_w(z), two.sample_w(z))
    torch.testing.assert_close(one(one.sample_w(z)), two(two.sample_w(z)), rtol=1e-4, atol=1e-4)
    assert one.native_size == size
    assert one.num_layers == 2 * (size.bit_length() - 1) - 2


@pytest.mark.parametrize("demodulate", [True, False])
def test_a_modulated_convolution_is_a_convolution_with_each_samples_own_weights(demodulate):
    torch.manual_seed(0)
    x, weight, style = torch.randn(3, 5, 8, 8), torch.randn(7, 5, 3, 3), torch.randn(3, 5)
    one_by_one = []
    for sample, scale in zip(x, style, strict=True):
        own = weight * scale[None, :, None, None]
        if demodulate:
            own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        one_by_one.append(F.conv2d(sample[None], own, padding=1))
    torch.testing.assert_close(
        modulated_conv(x, weight, style, demodulate=demodulate), torch.cat(one_by_one), rtol=1e-4, atol=1e-5
    )


def test_upsampling_is_zero_insertion_and_the_filter():
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(upsample(x), upfirdn(x))
    inner = upsample(torch.ones(1, 1, 8, 8))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones_like(inner))  # a flat picture stays flat


def test_the_upsampling_convolution_is_zero_insertion_convolution_and_the_filter():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    spread = torch.zeros(2, 4, 9, 9)
    spread[:, :, ::2, ::2] = x
    spread = F.conv2d(F.pad(spread, (2, 2, 2, 2)), weight.flip(2, 3))
    expected = _blur(spread)
    got = modulated_conv(x, weight, torch.ones(2, 4), demodulate=False, up=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_each_w_row_acts_on_its_own_layers(generator, w):
    seen = {}
    layers = [(f"{b}.{n}", m) for b, block in generator.blocks.items() for n, m in block.items()]
    hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out)) for n, m in layers]
    generator(w)
    before = dict(seen)
    rows = {}  # the row each layer reads: a to-RGB layer shares the next convolution's
    convolutions = 0
    for name, _ in layers:
        rows[name] = convolutions
        convolutions += not name.endswith("torgb")
    assert max(rows.values()) == generator.num_layers - 1
    for row in range(generator.num_layers):
        moved = w.clone()
        moved[:, row] += 1
        generator(moved)
        first = min(i for i, (name, _) in enumerate(layers) if rows[name] == row)
        for i, (name, _) in enumerate(layers):
            # what comes before is untouched; the layers of the row, and all convolutions after one, are not
            fed_by_row = rows[name] == row or any(
                rows[n] == row and not n.endswith("torgb") for n, _ in layers[: i + 1]
            )
            assert torch.equal(seen[name], before[name]) != fed_by_row, (row, name)
            assert i >= first or torch.equal(seen[name], before[name])
    for hook in hooks:
        hook.remove()


def test_the_gradient_reaches_every_row_and_no_weight(generator, w):
    w = w.requires_grad_()
    generator(w).square().mean().backward()
    assert (w.grad.abs().sum((0, 2)) > 0).all()
    assert not any(p.requires_grad for p in generator.parameters())


def test_the_same_code_gives_the_same_picture_alone_and_in_a_batch(generator, w):
    torch.testing.assert_close(generator(w), generator(w), rtol=0, atol=0)
    torch.testing.assert_close(generator(w[:1]), generator(w)[:1], rtol=1e-4, atol=1e-5)


def test_a_layout_without_noise_buffers_has_no_noise(state, tmp_path):
    checkpoint = rosinality_checkpoint(state)
    quiet = {name: value for name, value in checkpoint["g_ema"].items() if not name.startswith("noises.")}
    converted = convert_rosinality({"g_ema": quiet, "latent_avg": checkpoint["latent_avg"]})
    assert not any(name.endswith(".noise") for name in converted)
    silent = {n: torch.zeros(()) if n.endswith("noise_strength") else v for n, v in state.items()}
    save_file(converted, tmp_path / "quiet.safetensors")
    w = torch.randn(1, 8, W)
    torch.testing.assert_close(StyleGAN2(tmp_path / "quiet.safetensors")(w), reference(silent, w), rtol=1e-4, atol=1e-4)


def test_truncation_draws_codes_towards_the_mean(generator, state):
    z = torch.randn(4, W)
    torch.testing.assert_close(generator.mean_w, state["mapping.w_avg"])
    assert generator.mapping(z).shape == (4, W)
    torch.testing.assert_close(generator.sample_w(z, 0.0), generator.mean_w.expand(4, 8, W))
    torch.testing.assert_close(generator.sample_w(z, 1.0)[:, 3], generator.mapping(z))


def test_a_mean_code_that_is_absent_is_taken_over_many_codes(state):
    checkpoint = rosinality_checkpoint(state)
    converted = convert_rosinality(checkpoint["g_ema"])
    assert converted["mean_w"].shape == (W,)
    torch.testing.assert_close(converted["mean_w"], convert_rosinality(checkpoint["g_ema"])["mean_w"])


def test_smaller_pictures_are_averages_and_previews_are_the_skip_picture(generator, w):
    torch.testing.assert_close(generator(w, size=8), F.avg_pool2d(generator(w), 4))
    assert generator(w, size=16, preview=True).shape == (2, 3, 16, 16)
    torch.testing.assert_close(generator(w, preview=True), generator(w))


def test_a_generator_stays_frozen_and_out_of_checkpoints(generator):
    method = torch.nn.ModuleDict({"generator": generator, "head": torch.nn.Linear(2, 2)}).train()
    assert set(method.state_dict()) == {"head.weight", "head.bias"}
    method.load_state_dict(method.state_dict())
    assert not generator.training
    assert generator.card_hashes["stylegan2"].startswith("sha256:")


def test_a_training_checkpoint_with_its_command_line_inside_is_read(state, tmp_path):
    checkpoint = rosinality_checkpoint(state) | {"args": argparse.Namespace(size=32), "d": {}}
    torch.save(checkpoint, tmp_path / "train.pt")
    assert convert(tmp_path / "train.pt", tmp_path / "g.safetensors").native_size == 32


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_inside_a_checkpoint_is_executed(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"g_ema": Bomb()}, "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb.pt holds more than weights or is damaged"):
        convert("bomb.pt", "g.safetensors")
    (tmp_path / "ffhq.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"ffhq.pkl is a pickle, and opening a pickle runs whatever"):
        convert("ffhq.pkl", "g.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.pt", "ffhq.pkl"]


def test_other_architectures_are_refused_in_one_sentence(state):
    with pytest.raises(ValueError, match="StyleGAN3"):
        convert_nvlabs({"synthesis.input.weight": torch.zeros(1), "mapping.fc0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="conditional on classes"):
        convert_nvlabs(state | {"mapping.embed.weight": torch.zeros(W, 10)})
    with pytest.raises(ValueError, match="skip architecture"):
        convert_nvlabs({n: v for n, v in state.items() if "b4.torgb" not in n})
    with pytest.raises(ValueError, match="got 1 channels"):
        convert_nvlabs(state | {"synthesis.b4.torgb.bias": torch.zeros(1)})


def test_a_conversion_that_fails_leaves_the_old_file_alone(state, tmp_path):
    out = tmp_path / "g.safetensors"
    save_file(state, tmp_path / "whole.safetensors")
    convert(tmp_path / "whole.safetensors", out)
    before = out.read_bytes()
    lame = {n: v for n, v in state.items() if n != "synthesis.b16.conv1.weight"}
    broken = state | {"synthesis.b8.conv0.weight": torch.full((16, 16, 3, 3), float("nan"))}
    for name, tensors, message in (
        ("lame", lame, "lacks layers"),
        ("broken", broken, "not finite"),
        ("other", {"x": torch.zeros(1)}, "not the weights of a StyleGAN2"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"{name}.safetensors", out)
        assert out.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_mistakes_are_answered_with_the_rule(generator, w, tmp_path):
    with pytest.raises(ValueError, match=r"expected W\+ codes \(B, 8, 512\), got \(2, 7, 512\)"):
        generator(w[:, 1:])
    with pytest.raises(ValueError, match="a size must divide 32"):
        generator(w, size=24)
    with pytest.raises(ValueError, match="g.safetensors would be overwritten"):
        convert("g.safetensors")
    with pytest.raises(ValueError, match="named \\*.safetensors"):
        convert("g.pt", "g.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        convert(tmp_path / "none.pt", tmp_path / "g.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no generator file"):
        StyleGAN2(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="is not a converted StyleGAN2"):
        StyleGAN2(tmp_path / "text.safetensors")


def test_the_converted_file_holds_weights_and_says_where_they_came_from(tmp_path, state):
    torch.save(state, tmp_path / "ffhq.pt")
    convert(tmp_path / "ffhq.pt", tmp_path / "g.safetensors")
    tensors = load_file(tmp_path / "g.safetensors")
    assert all(value.dtype == torch.float32 for value in tensors.values())
    assert b'"source":"ffhq.pt"' in (tmp_path / "g.safetensors").read_bytes()[:2000]

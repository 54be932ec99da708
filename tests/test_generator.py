"""The frozen generator: arithmetic against the published graph, W+ rows, sizes, gradients."""

import numpy as np
import pytest
import torch

from experiments.generator import draw_codes, haar_bands, psnr
from lightning_modules.networks.stylegan import MobileStyleGAN
from lightning_modules.networks.stylegan.ir import read_constants
from lightning_modules.networks.stylegan.mobile import inverse_haar
from lightning_modules.weights import locate


@pytest.fixture(scope="module")
def generator():
    return MobileStyleGAN()


@pytest.fixture(scope="module")
def codes(generator):
    return generator.sample_w(torch.randn(2, 512, generator=torch.Generator().manual_seed(5)), 0.7)


def test_a_batch_equals_its_faces(generator, codes):
    with torch.no_grad():
        together, alone = generator(codes), generator(codes[1:])
    assert together.shape == (2, 3, 1024, 1024)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)


def test_a_smaller_size_is_the_area_average(generator, codes):
    with torch.no_grad():
        full, small = generator(codes[:1]), generator(codes[:1], size=256)
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(full, 4), atol=1e-5, rtol=0)


def test_faces_are_in_range_and_differ(generator, codes):
    with torch.no_grad():
        image = generator(codes, size=128, preview=True)
    assert image.abs().quantile(0.99) < 1.3
    assert (image[0] - image[1]).abs().mean() > 0.05


def test_the_preview_looks_like_the_picture(generator):
    """Four codes that no head has seen; the measurement over 64 is `keyveil generator measure-preview` (≥ 30 dB)."""
    w = draw_codes(generator, 4, seed=11)
    with torch.no_grad():
        for size in (256, 128):
            found = psnr(generator(w, size, preview=True), generator(w, size))
            assert found.mean() > 29, found


@pytest.mark.parametrize("preview", [True, False])
def test_a_gradient_reaches_every_row_and_no_weight(generator, codes, preview):
    w = codes[:1].clone().requires_grad_()
    generator(w, size=128, preview=preview).square().mean().backward()
    assert (w.grad.abs().sum(2) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in generator.parameters())


def test_it_stays_frozen_and_out_of_checkpoints(generator):
    assert not generator.train().training
    assert not any(module.training for module in generator.modules())
    holder = torch.nn.ModuleDict({"generator": generator, "trained": torch.nn.Linear(1, 1)})
    assert set(holder.state_dict()) == {"trained.weight", "trained.bias"}
    holder.load_state_dict(holder.state_dict())  # strictly


def test_truncation_0_is_the_mean_face(generator):
    w = generator.sample_w(torch.randn(2, 512), truncation=0.0)
    torch.testing.assert_close(w, generator.mean_w.expand(2, 23, 512))


def test_wrong_shapes_and_sizes_are_told(generator, codes):
    with pytest.raises(ValueError, match=r"expected W\+ codes"):
        generator(codes[:, :5])
    with pytest.raises(ValueError, match="must divide 1024, got 300"):
        generator(codes, size=300)
    with pytest.raises(ValueError, match="must divide 256, got 512"):
        generator(codes, size=512, preview=True)


def test_haar_and_back_is_the_identity():
    image = torch.randn(2, 3, 8, 8)
    bands = haar_bands(image)
    torch.testing.assert_close(inverse_haar(bands.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), image)
    torch.testing.assert_close(bands.square().sum(), image.square().sum())  # orthonormal


def test_the_mapping_normalises_its_input(generator):
    z = torch.randn(2, 512)
    torch.testing.assert_close(generator.mapping(z), generator.mapping(7 * z), atol=1e-4, rtol=1e-4)


def test_a_file_that_does_not_belong_is_told(tmp_path):
    (tmp_path / "short.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="too short"):
        read_constants(locate("mobilestylegan-mapping-graph"), tmp_path / "short.bin")


def test_it_agrees_with_the_published_graph(generator, codes):
    openvino = pytest.importorskip("openvino", reason="the published graph is run by the extra `crosscheck`")
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled = {}
    for part in ("mapping", "synthesis"):
        graph, weights = locate(f"mobilestylegan-{part}-graph"), locate(f"mobilestylegan-{part}")
        compiled[part] = core.compile_model(core.read_model(graph, weights), "CPU")
    z = np.random.default_rng(0).standard_normal((1, 512), np.float32)
    w = compiled["mapping"](z)[0]
    torch.testing.assert_close(generator.mapping(torch.from_numpy(z)), torch.from_numpy(w), atol=1e-3, rtol=0)
    with torch.no_grad():
        image = generator(torch.from_numpy(w.copy())[:, None].expand(-1, 23, -1))
    torch.testing.assert_close(image, torch.from_numpy(compiled["synthesis"](w)[0].copy()), atol=1e-3, rtol=0)

"""The landmark network is the file's network, frozen, and its points follow the face at any size."""

from __future__ import annotations

import copy

import lightning as L
import onnxruntime
import pytest
import torch
from orl_faces import need, orl_faces
from torch import nn
from torch.nn import functional as F

from datamodules.alignment import FFHQ_TEMPLATE
from lightning_modules.networks.landmarks import CHIN, MOUTH, NOSE_TIP, Landmarks68
from lightning_modules.weights import WeightsError, card, locate

# Where each of the 68 points goes when the picture is mirrored.
MIRRORED = [
    *range(16, -1, -1),
    *range(26, 16, -1),
    *(27, 28, 29, 30, 35, 34, 33, 32, 31),
    *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),
    *(54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65),
]


@pytest.fixture(scope="module")
def network():
    need("landmarks68")
    return Landmarks68()


@pytest.fixture(scope="module")
def faces():
    return orl_faces().flatten(0, 1)


def five(points):
    """The five points of the alignment: middles of the eyes, tip of the nose, corners of the mouth."""
    eyes = [points[:, 36:42].mean(1), points[:, 42:48].mean(1)]
    return torch.stack([*eyes, points[:, NOSE_TIP], points[:, MOUTH][:, 0], points[:, MOUTH][:, 6]], 1)


def test_the_native_network_is_the_onnx_file(network):
    crops = torch.rand(4, 1, 64, 64)
    session = onnxruntime.InferenceSession(locate("landmarks68"), providers=["CPUExecutionProvider"])
    expected = torch.cat([torch.tensor(session.run(None, {"input": crop.numpy()})[0]) for crop in crops.split(1)])
    torch.testing.assert_close(network.locate_in_crop(crops).flatten(1), expected, atol=1e-5, rtol=0)


def test_points_do_not_depend_on_the_batch(network, faces):
    together = network(faces[:4])
    assert together.shape == (4, 68, 2)
    torch.testing.assert_close(torch.cat([network(face[None]) for face in faces[:4]]), together, atol=1e-5, rtol=0)


def test_eyes_nose_and_mouth_of_real_faces_lie_near_the_template(network, faces):
    away = (five(network(faces)) - torch.tensor(FFHQ_TEMPLATE).float()).norm(dim=2)
    assert away.mean() < 0.03  # shares of the side; the eyes lie 0.25 apart
    assert away.max() < 0.10  # heads turn: the tip of the nose moves most


def test_eyes_nose_and_mouth_of_generated_faces_lie_near_the_template(network):
    need("mobilestylegan-synthesis", "mobilestylegan-mapping")
    from lightning_modules.networks.stylegan import MobileStyleGAN

    generator = MobileStyleGAN()
    w = generator.sample_w(torch.randn(4, 512, generator=torch.Generator().manual_seed(5)), 0.7)
    points = network(generator(w, size=128, preview=True))
    assert (five(points) - torch.tensor(FFHQ_TEMPLATE).float()).norm(dim=2).mean() < 0.03
    assert (points[:, CHIN, 1] > points[:, MOUTH, 1].amax(1)).all()


@pytest.mark.parametrize("size", [128, 1024])
def test_points_are_shares_of_the_side_at_any_size(network, faces, size):
    resized = F.interpolate(faces[:4], size=(size, size), mode="bilinear", antialias=True)
    assert (network(resized) - network(faces[:4])).norm(dim=2).mean() < 0.004  # 1 px of 256


@pytest.mark.parametrize("shift", [(6, 0), (0, -6)])
def test_points_move_with_the_face(network, faces, shift):
    moved = network(faces.roll(shift, (3, 2))) - network(faces)
    torch.testing.assert_close(moved.mean((0, 1)), torch.tensor(shift) / 256, atol=0.004, rtol=0)


def test_points_of_the_mirrored_face_are_the_mirrored_points(network, faces):
    points, mirrored = network(faces), network(faces.flip(3))[:, MIRRORED]
    mirrored = torch.stack([1 - mirrored[..., 0], mirrored[..., 1]], 2)
    assert (points - mirrored).norm(dim=2).mean() < 0.01


def test_gradients_reach_the_picture_and_nothing_else(network, faces):
    image = faces[:2].clone().requires_grad_()
    network(image).square().sum().backward()
    assert torch.isfinite(image.grad).all()
    assert (image.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_the_gradient_is_the_slope(network, faces):
    exact = copy.deepcopy(network).double()
    image = faces[:1].double().requires_grad_()
    direction = torch.randn_like(image)
    exact(image).sum().backward()
    with torch.no_grad():
        slope = (exact(image + 1e-6 * direction).sum() - exact(image - 1e-6 * direction).sum()) / 2e-6
    torch.testing.assert_close((image.grad * direction).sum(), slope, rtol=1e-3, atol=0)


def test_it_stays_in_eval_mode_and_out_of_checkpoints(network):
    class Method(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.landmarks, self.head = network, nn.Linear(2, 2)

    method = Method().train()
    assert not any(module.training for module in network.modules())
    assert set(method.state_dict()) == {"head.weight", "head.bias"}
    assert method.load_state_dict(method.state_dict(), strict=True).missing_keys == []
    assert network.card_hashes == {"landmarks68": card("landmarks68").digest}


def test_an_altered_file_is_refused(tmp_path):
    (tmp_path / "fr_landmark.onnx").write_bytes(b"altered")
    with pytest.raises(WeightsError, match="sha256"):
        Landmarks68(tmp_path / "fr_landmark.onnx")

"""The identity network is the file's network, frozen, and sees the same face at any size."""

from __future__ import annotations

import lightning as L
import numpy as np
import onnxruntime
import pytest
import torch
from orl_faces import need, orl_faces
from torch import nn
from torch.nn import functional as F

from datamodules.alignment import ARCFACE_TEMPLATE, crop_map, template, warp
from lightning_modules.networks.crop import FixedCrop
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.weights import WeightsError, card, locate


@pytest.fixture(scope="module")
def network():
    need("mobilefacenet")
    return MobileFaceNet()


@pytest.fixture(scope="module")
def faces():
    return orl_faces().flatten(0, 1)


@pytest.fixture(scope="module")
def crops(network, faces):
    return network.crop(faces[:3])


def reference(crops):
    session = onnxruntime.InferenceSession(locate("mobilefacenet"), providers=["CPUExecutionProvider"])
    return torch.cat([torch.tensor(session.run(None, {"input": crop.numpy()})[0]) for crop in crops.split(1)])


def test_the_native_network_is_the_onnx_file(network, crops):
    expected = reference(crops)
    torch.testing.assert_close(network.layers(crops).flatten(1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(network.embed_aligned(crops), F.normalize(expected), atol=1e-5, rtol=0)


def test_the_native_network_is_what_insightface_makes_of_the_file(network, crops):
    from insightface.model_zoo import get_model

    model = get_model(str(locate("mobilefacenet")), providers=["CPUExecutionProvider"])
    assert model.taskname == "recognition"
    bgr = ((crops + 1) * 127.5).flip(1).permute(0, 2, 3, 1).numpy()
    expected = np.concatenate([model.get_feat(np.ascontiguousarray(picture)) for picture in bgr])
    torch.testing.assert_close(network.embed_aligned(crops), F.normalize(torch.tensor(expected)), atol=1e-4, rtol=0)


def test_codes_are_unit_length_and_do_not_depend_on_the_batch(network, faces):
    together = network(faces[:3])
    assert together.shape == (3, 512)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.cat([network(face[None]) for face in faces[:3]]), together, atol=1e-5, rtol=0)


def test_gradients_reach_the_picture_and_nothing_else(network, faces):
    image = faces[:1].clone().requires_grad_()
    (network(image) @ network(faces[1:2]).T).sum().backward()
    assert image.grad.abs().max() > 0
    assert torch.isfinite(image.grad).all()
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_it_stays_in_eval_mode_and_out_of_checkpoints(network):
    class Method(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.recognizer, self.head = network, nn.Linear(2, 2)

    method = Method().train()
    assert not any(module.training for module in network.modules())
    assert set(method.state_dict()) == {"head.weight", "head.bias"}
    before = network.layers[0].weight.clone()
    assert method.load_state_dict(method.state_dict(), strict=True).missing_keys == []
    assert torch.equal(network.layers[0].weight, before)
    assert network.card_hashes == {"mobilefacenet": card("mobilefacenet").digest}
    assert method.to(torch.float64).recognizer.layers[0].weight.dtype == torch.float64
    method.to(torch.float32)


@pytest.mark.parametrize("size", [128, 1024])
def test_the_same_face_at_another_size_has_the_same_code(network, faces, size):
    resized = F.interpolate(faces[:2], size=(size, size), mode="bilinear", antialias=True)
    assert F.cosine_similarity(network(resized), network(faces[:2])).min() > 0.98


def test_people_are_told_apart(network, faces):
    codes = network(faces).view(4, 2, 512)
    same = (codes[:, 0] * codes[:, 1]).sum(1)
    different = (codes[:, 0] @ codes[:, 1].T)[~torch.eye(4, dtype=torch.bool)]
    assert same.min() > different.max()


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_the_crop_carries_the_five_points_onto_the_other_template(size):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    crop = FixedCrop(ARCFACE_TEMPLATE, 112)
    carried = crop_map("ffhq", size, "arcface", 112)
    for point in template("ffhq", size):
        blob = torch.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * (0.03 * size) ** 2))
        seen = crop(blob.expand(1, 3, -1, -1).float())[0, 0]
        v, u = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
        found = torch.stack([(seen * u).sum(), (seen * v).sum()]) / seen.sum()
        torch.testing.assert_close(found, torch.tensor(carried @ [*point, 1.0], dtype=torch.float32), atol=0.15, rtol=0)


def test_the_crop_is_the_warp_of_the_alignment(faces):
    picture = ((faces[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    warped = torch.tensor(warp(picture, crop_map("ffhq", 256, "arcface", 112), 112)).permute(2, 0, 1)
    cropped = (FixedCrop(ARCFACE_TEMPLATE, 112)(faces[:1])[0] + 1) * 127.5
    assert (cropped - warped).abs().mean() < 2  # grey levels: two good filters differ by their sharpness


def test_an_altered_file_is_refused(tmp_path):
    (tmp_path / "fr_feature.onnx").write_bytes(b"altered")
    with pytest.raises(WeightsError, match="sha256"):
        MobileFaceNet(tmp_path / "fr_feature.onnx")

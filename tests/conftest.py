"""What the tests share: stand-ins for the frozen networks, and a data set of noise."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datamodules.batch import FaceBatch, face_batch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the networks under test run: cpu or cuda")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws from the same seed."""
    torch.manual_seed(0)


class LinearGenerator(nn.Module):
    """W+ in, picture out, and nothing else: 5 rows, 64 px, linear in the code."""

    num_layers, native_size = 5, 64

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.register_buffer("mean_w", torch.zeros(512), persistent=False)
        self.register_buffer("basis", torch.randn(5 * 512, 3 * 8 * 8, generator=random) * 0.02, persistent=False)

    def sample_w(self, z, truncation=0.7):
        return truncation * z[:, None].expand(-1, self.num_layers, -1)

    def forward(self, w, size=64, preview=False):
        small = torch.tanh(w.flatten(1) @ self.basis).view(-1, 3, 8, 8)
        return F.interpolate(small, size=(size, size), mode="bilinear")


class LinearRecognizer(nn.Module):
    """Picture in, unit code out; linear."""

    card_hashes = {"linear-recognizer": "sha256:0"}

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(2)
        self.register_buffer("basis", torch.randn(3 * 8 * 8, 512, generator=random), persistent=False)

    def forward(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 8).flatten(1) @ self.basis, dim=1)

    def pyramid(self, images):
        return self(images), [images]


class DetailRecognizer(LinearRecognizer):
    """One that sees more than the means of blocks, which some methods keep."""

    def __init__(self):
        super().__init__()
        self.basis = torch.randn(3 * 16 * 16, 512, generator=torch.Generator().manual_seed(2))

    def forward(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 16).flatten(1) @ self.basis, dim=1)


class NoiseFaces(L.LightningDataModule):
    """Smooth noise pictures with people, for tests that train."""

    def __init__(self, size=64, count=24, people=6, batch_size=4, attributes=0, w_rows=0):
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.batch_size = batch_size
        coarse = torch.rand(count, 3, 8, 8, generator=random) * 2 - 1
        images = F.interpolate(coarse, size=(size, size), mode="bilinear")
        identity = torch.arange(count) % people
        labels = torch.randint(0, 2, (count, attributes), generator=random).float() * 2 - 1
        codes = torch.randn(count, w_rows, 512, generator=random) if w_rows else torch.zeros(count, 0)
        self.items = [
            face_batch(images[i], identity=identity[i], sample=torch.tensor(i), attributes=labels[i], w=codes[i])
            for i in range(count)
        ]

    def _loader(self, shuffle=False):
        return torch.utils.data.DataLoader(self.items, batch_size=self.batch_size, shuffle=shuffle, drop_last=shuffle)

    def train_dataloader(self):
        return self._loader(shuffle=True)

    def val_dataloader(self):
        return self._loader()

    def test_dataloader(self):
        return self._loader()

    def gallery_dataloader(self):
        return self._loader()

    def whole(self) -> FaceBatch:
        return torch.utils.data.default_collate(self.items)


@pytest.fixture
def linear_generator():
    return LinearGenerator()


@pytest.fixture
def linear_recognizer():
    return LinearRecognizer()


@pytest.fixture
def quick_trainer(tmp_path):
    """A trainer that writes under the test's folder and says nothing."""

    def make(steps=2, **options):
        defaults = {
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **options})

    return make

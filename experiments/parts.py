"""What `keyveil benchmark` measures: every part of the package on random codes and pictures, ready to run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from datamodules.alignment import align, template
from datamodules.batch import face_batch
from datamodules.datasets import ORL
from datamodules.detection import default_detector
from datamodules.faces import FaceDataModule
from datamodules.sources import read_picture
from flows.conjugate import Conjugate
from flows.coupling import KeyedCoupling
from lightning_modules.ifadit import IFADITTransform
from lightning_modules.ifadit.networks import AttributeEncoder
from lightning_modules.judges import Dlib, FaceRes, Judge
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.networks.stylegan import MobileStyleGAN
from lightning_modules.sdn.networks import Decoder, Encoder, Factors


@dataclass(frozen=True)
class Work:
    """What is measured: a call on ``faces`` faces, and the networks in it.

    Args:
        run: The call.
        faces: Faces it handles.
        modules: Networks whose parameters count; empty where the part is none of ours.
        torch: Whether its arithmetic runs in torch, where it can be counted.
        once: Whether it is long enough to be timed once, without warming up.
        overhead: What a comparison took over what its methods and judges took; photos, over what their networks took.
    """

    run: Callable[[], object]
    faces: int
    modules: Sequence[nn.Module] = ()
    torch: bool = True
    once: bool = False
    overhead: Callable[[], float] | None = None


@dataclass(frozen=True)
class Part:
    """One row of the table: how work is set up on a device, the pixels of its pictures, and whether it is long."""

    build: Callable[[torch.device], Work]
    size: int | None = None
    long: bool = False


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _generator(batch: int, size: int, preview: bool = False) -> Part:
    def build(device: torch.device) -> Work:
        generator = MobileStyleGAN().to(device)
        w = generator.sample_w(_random(batch, 512).to(device))
        if preview:
            return Work(lambda: generator(w, size=size, preview=True), batch, [generator])
        return Work(lambda: generator(w, size=size), batch, [generator])

    return Part(build, size)


def _flow(make: Callable[[], nn.Module], key: Callable[[int], torch.Tensor], inverse: bool, batch: int = 64) -> Part:
    def build(device: torch.device) -> Work:
        flow, z, numbers = make().to(device), _random(batch, 512).to(device), key(batch).to(device)
        return Work(lambda: (flow.inverse if inverse else flow)(z, numbers), batch, [flow])

    return Part(build)


def _conjugate() -> Conjugate:
    return Conjugate().fit_(_random(256, 512))


def _rotations(batch: int) -> torch.Tensor:
    return torch.linalg.qr(_random(batch, 128, 128))[0]


def _network(make: Callable[[], nn.Module], size: int, batch: int) -> Part:
    def build(device: torch.device) -> Work:
        network, image = make().to(device).eval(), _random(batch, 3, size, size).clamp(-1, 1).to(device)
        return Work(lambda: network(image), batch, [network])

    return Part(build, size)


def _sdn(size: int = 128, batch: int = 4) -> Part:
    def build(device: torch.device) -> Work:
        encoder, decoder, factors = (m.to(device).eval() for m in (Encoder(64), Decoder(64), Factors(64)))
        image, bits = _random(batch, 3, size, size).to(device), _random(batch, 64).sign().to(device)
        return Work(lambda: decoder(encoder(image), factors(bits, 1.0)), batch, [encoder, decoder, factors])

    return Part(build, size)


def _ifadit(size: int, recover: bool, batch: int = 4) -> Part:
    """Anonymize or recover, keys and all, rendered in full."""

    def build(device: torch.device) -> Work:
        method = IFADITTransform(MobileStyleGAN(), MobileFaceNet(), _conjugate(), trunk="recognizer", size=size)
        method = method.to(device).eval()
        face = face_batch(_random(batch, 3, size, size).clamp(-1, 1).to(device))
        key, verb = _rotations(batch).to(device), method.recover if recover else method.anonymize
        return Work(lambda: verb(face, key), batch, [method])

    return Part(build, size)


def _attribute_encoder() -> AttributeEncoder:
    return AttributeEncoder(17, trunk=[copy.deepcopy(stage) for stage in MobileFaceNet().stages()])


def _judge(make: Callable[[], Judge], torch_network: bool, batch: int = 4) -> Part:
    def build(_: torch.device) -> Work:
        judge, image = make(), _random(batch, 3, 256, 256).clamp(-1, 1)
        modules = [judge.network] if torch_network else []
        return Work(lambda: judge.embed(image), batch, modules, torch=torch_network)

    return Part(build, 256)


def _picture(folder: str) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    path = Path(folder) / "photo.jpg"
    cv2.imwrite(str(path), cv2.resize(coarse, (250, 250), interpolation=cv2.INTER_CUBIC))
    return path


def _reading(size: int = 256) -> Part:
    def build(_: torch.device) -> Work:
        folder = tempfile.TemporaryDirectory(prefix="keyveil-")  # lives as long as the closure
        points = template("ffhq", 180) + 35

        def face() -> torch.Tensor:
            crop, _ = align(read_picture(Path(folder.name) / "photo.jpg"), points, size)
            return torch.from_numpy(crop).permute(2, 0, 1).float() / 127.5 - 1

        _picture(folder.name)
        return Work(face, 1, torch=False)

    return Part(build, size)


def _loading(batch: int = 256, size: int = 128) -> Part:
    """A pass over cached faces, as training reads them: memory map, FaceBatch, collate, in this process."""

    def build(_: torch.device) -> Work:
        faces = FaceDataModule(ORL(), size=size, batch_size=batch, num_workers=0)
        loader = faces.gallery_dataloader()
        return Work(lambda: [batch.image.mean() for batch in loader], len(loader.dataset), torch=False)

    return Part(build, size)


def _detection() -> Part:
    def build(_: torch.device) -> Work:
        with tempfile.TemporaryDirectory(prefix="keyveil-") as folder:
            detector, picture = default_detector(), read_picture(_picture(folder))
        return Work(lambda: detector.detect(picture), 1, torch=False)

    return Part(build, 250)


def _overhead(faces: str, count: int, size: int, trained: bool = False) -> Part:
    """The right key and eight wrong ones on the test faces of a data set, by a method that is quick."""

    def build(_: torch.device) -> Work:
        from experiments.comparing import TimedComparison  # not at the top: other parts have no use for it
        from experiments.photo_methods import METHODS

        FaceRes()  # without its weights there is no comparison
        data = {"faces": {"class_path": f"datamodules.datasets.{faces}"}, "size": size, "num_workers": 0}
        run = TimedComparison(
            {
                "size": size,
                "faces": count,
                "wrong_keys": 8,
                "judges": {"faceres": {"class_path": "lightning_modules.judges.FaceRes"}},
                "data": {"faces": {"class_path": "datamodules.faces.FaceDataModule", "init_args": data}},
                "methods": {"SDN": METHODS["sdn"] if trained else {"config": METHODS["sdn"]["config"]}},
            }
        )
        return Work(run, count, torch=False, once=True, overhead=lambda: run.overhead)

    return Part(build, size, long=trained)


def _photos(method: str, count: int) -> Part:
    """Whole pictures of LFW's test people through ``keyveil anonymize``."""

    def build(_: torch.device) -> Work:
        from experiments.comparing import TimedPhotos  # not at the top: other parts have no use for it

        run = TimedPhotos(method, "lfw", count)
        return Work(run, count, torch=False, once=True, overhead=lambda: run.overhead)

    return Part(build, 250, long=method != "sdn")


def _comparison(faces: int, size: int = 64) -> Part:
    """Blur on so many pictures of noise: memory must not grow with them."""

    def build(_: torch.device) -> Work:
        from experiments.comparing import TimedComparison  # not at the top: other parts have no use for it

        FaceRes()
        data = {"class_path": "experiments.comparing.NoiseFaces", "init_args": {"count": faces, "size": size}}
        blur = {"class_path": "lightning_modules.baselines.obscure.Blur", "init_args": {"size": size}}
        run = TimedComparison(
            {
                "size": size,
                "faces": faces,
                "judges": {"faceres": {"class_path": "lightning_modules.judges.FaceRes"}},
                "data": {"noise": data},
                "methods": {"blur": blur},
            }
        )
        return Work(run, faces, torch=False, once=True)

    return Part(build, size)


PARTS: dict[str, Part] = {
    "generator": _generator(1, 1024),
    "generator-x4": _generator(4, 1024),
    "preview-256": _generator(1, 256, preview=True),
    "preview-256-x4": _generator(4, 256, preview=True),
    "preview-128-x4": _generator(4, 128, preview=True),
    "identity-encoder-x8": _network(MobileFaceNet, 256, 8),
    "attribute-encoder-x8": _network(_attribute_encoder, 256, 8),
    "ifadit-anonymize-256-x4": _ifadit(256, recover=False),
    "ifadit-recover-256-x4": _ifadit(256, recover=True),
    "ifadit-anonymize-1024-x4": _ifadit(1024, recover=False),
    "ifadit-recover-1024-x4": _ifadit(1024, recover=True),
    "conjugate-x4": _flow(_conjugate, _rotations, inverse=False, batch=4),
    "coupling-x64": _flow(KeyedCoupling, lambda n: _random(n, 512), inverse=False),
    "coupling-inverse-x64": _flow(KeyedCoupling, lambda n: _random(n, 512), inverse=True),
    "conjugate-x64": _flow(_conjugate, _rotations, inverse=False),
    "sdn-x4": _sdn(),
    "judge-dlib-x4": _judge(Dlib, torch_network=False),
    "judge-faceres-x4": _judge(FaceRes, torch_network=True),
    "read-and-align": _reading(),
    "cached-faces-128": _loading(),
    "detect": _detection(),
    "compare-overhead": _overhead("ORL", 40, 128),
    "compare-lfw-1000": _overhead("LFW", 1000, 128, trained=True),
    "compare-100": _comparison(100),
    "compare-1000": _comparison(1000),
    "photos-sdn-200": _photos("sdn", 200),
    "photos-ifadit-200": _photos("ifadit", 200),
}
"""Every part by its name; ``-x4`` handles four faces a call. The others are compared with the first."""

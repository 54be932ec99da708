"""What `keyveil benchmark` measures: every part of the package on random codes and pictures, ready to run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from experiments.trainings import Training


@dataclass(frozen=True)
class Work:
    """What is measured: a call on ``faces`` faces, and the networks in it.

    Args:
        run: The call.
        faces: Faces it handles.
        modules: Networks whose parameters count; empty where the part is none of ours.
        torch: Whether its arithmetic runs in torch, where one more call can be counted.
        once: Whether it is long enough to be timed once, without warming up.
        seconds: Of the stretches of that call, where it clocks itself; each handles ``faces`` faces.
        figures: What else the call found, by metric; it takes the place of what is found from outside.
        sample: A shorter call for the profiler.
    """

    run: Callable[[], object]
    faces: int
    modules: Sequence[nn.Module] = ()
    torch: bool = True
    once: bool = False
    seconds: Callable[[], Sequence[float]] | None = None
    figures: Callable[[], dict[str, float]] = dict
    sample: Callable[[], object] | None = None


@dataclass(frozen=True)
class Part:
    """One row of the table: how work is set up on a device, the pixels of its pictures, if it is long, and the data."""

    build: Callable[[torch.device], Work]
    size: int | None = None
    long: bool = False
    data: str = "random"


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

    return Part(build, size, data="orl")


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
        return Work(run, count, torch=False, once=True, figures=lambda: {"overhead": run.overhead})

    return Part(build, size, long=trained, data=faces.lower())


def _photos(method: str, count: int) -> Part:
    """Whole pictures of LFW's test people through ``keyveil anonymize``."""

    def build(_: torch.device) -> Work:
        from experiments.comparing import TimedPhotos  # not at the top: other parts have no use for it

        run = TimedPhotos(method, "lfw", count)
        return Work(run, count, torch=False, once=True, figures=lambda: {"overhead": run.overhead})

    return Part(build, 250, long=method != "sdn", data="lfw")


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


def _peak() -> Part:
    """What this machine can do at most: the faster of a matrix product and a 3×3 convolution, both of a good size."""

    def build(device: torch.device) -> Work:
        from torch.utils.benchmark import Timer  # not at the top: with it come torch's tools for compilers

        factor, image = _random(2048, 2048).to(device), _random(8, 128, 64, 64).to(device)
        image = image.to(memory_format=torch.channels_last)  # a third faster on a CPU
        layer = nn.Conv2d(128, 128, 3, padding=1).to(device, memory_format=torch.channels_last)
        arithmetic = {
            lambda: factor @ factor: 2 * 2048**3,
            lambda: layer(image): 2 * image.numel() * 128 * 9,
        }

        def rate(run: Callable[[], object]) -> float:
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            return arithmetic[run] / min(timer.timeit(2).median for _ in range(3))

        fastest = max(arithmetic, key=rate)
        return Work(lambda: [fastest() for _ in range(5)], 5)

    return Part(build)


def _training(method: str, size: int, batch: int, steps: int) -> Part:
    """Training steps of a method as configured, on ORL's faces.

    Args:
        method: Name of the file below configs/method/.
        size: As configured.
        batch: Faces of a step, as in the recipes for a CPU; the data's own 16 take as much longer.
        steps: Of a round: SDN's discriminator has its penalty in one step of eight, and iFADIT's first phase lends a
            face another identity in one of three.
    """

    def build(device: torch.device) -> Work:
        from experiments.trainings import TimedSteps  # not at the top: other parts have no use for it

        return _clocked(TimedSteps(method, {}, {"size": size, "batch_size": batch}, steps, device), batch * steps)

    return Part(build, size, data="orl")


def _scaling(processes: int, batch: int = 4, steps: int = 8) -> Part:
    """SDN as configured with ``batch`` faces a step on each of several CPU processes, against one such process."""

    def build(device: torch.device) -> Work:
        from experiments.trainings import TimedScaling  # not at the top: other parts have no use for it

        run = TimedScaling("sdn", {}, {"size": 64, "batch_size": batch}, steps, device, processes=processes)
        return _clocked(run, processes * batch * steps)

    return Part(build, 64, long=True, data="orl")


def _growth(batch: int = 2) -> Part:
    """3,000 steps of an SDN that is as narrow and sees as few faces as will do."""

    def build(device: torch.device) -> Work:
        from experiments.trainings import TimedGrowth  # not at the top: other parts have no use for it

        narrow = {"width": 4, "key_bits": 16, "identities": 64}
        return _clocked(TimedGrowth("sdn", narrow, {"size": 64, "batch_size": batch}, 1, device), batch)

    return Part(build, 64, long=True, data="orl")


def _clocked(run: Training, faces: int) -> Work:
    """A training clocks itself; ``faces`` of a stretch."""
    return Work(
        run,
        faces,
        [run.method],
        torch=False,
        once=True,
        seconds=lambda: run.seconds,
        figures=lambda: run.figures,
        sample=lambda: run.train(run.steps),
    )


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
    "peak": _peak(),
    "train-sdn": _training("sdn", 64, 8, steps=8),
    "train-ifadit-disentangle": _training("ifadit-disentangle", 256, 4, steps=3),
    "train-ifadit-transform": _training("ifadit-transform", 256, 4, steps=2),
    "compare-overhead": _overhead("ORL", 40, 128),
    "compare-lfw-1000": _overhead("LFW", 1000, 128, trained=True),
    "compare-100": _comparison(100),
    "compare-1000": _comparison(1000),
    "photos-sdn-200": _photos("sdn", 200),
    "photos-ifadit-200": _photos("ifadit", 200),
    "scaling-2": _scaling(2),
    "scaling-4": _scaling(4),
    "scaling-8": _scaling(8),
    "memory-of-training": _growth(),
}
"""Every part by its name; ``-x4`` handles four faces a call. The others are compared with the first."""

"""Judges: frozen networks that only measure. Aligned pictures → embeddings → how alike two faces are."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from datamodules.alignment import FFHQ_TEMPLATE
from datamodules.alignment import template as template_points
from lightning_modules.networks.crop import WORKING_SIZE, FixedCrop
from lightning_modules.networks.dlib_resnet import Worker, describer
from lightning_modules.networks.faceres import Attributes, FaceResNet
from lightning_modules.networks.recognizers import MobileFaceNet
from lightning_modules.weights import card, cards, locate

Image = Float[Tensor, "batch 3 height width"]
Embedding = Float[Tensor, "batch dim"]
Provider = Literal["auto", "cpu", "cuda"]

# Part of the name of cached embeddings: count it up when a judge's crop or preparation changes.
VERSION = 1

_BATCH = 32  # pictures at once; embeddings do not depend on it


@runtime_checkable
class Judge(Protocol):
    """A recogniser that no loss of the judged method used.

    Attributes:
        name: Its name in tables and in the calibration.
        weights: Hash of what it was read from, ``"sha256:…"``.
        networks: Card names of its networks (its own name for a file without card); a method whose losses
            used one of them may not be judged by it.
    """

    name: str
    weights: str
    networks: frozenset[str]

    def embed(self, images: Image) -> Embedding:
        """Embeddings of FFHQ-style crops of any size, RGB in [-1, 1]; float32 on the CPU."""
        ...

    def similarity(self, a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
        """How alike each face of ``a`` is to each of ``b``; higher is more alike."""
        ...

    def describe(self) -> str:
        """One line for a table's foot: name, hash, and where it runs."""
        ...


class CosineJudge:
    """A judge with unit-length embeddings, compared by their cosine in [-1, 1]."""

    name: str
    weights: str
    networks: frozenset[str]
    device: str = "cpu"
    runs_on: str

    def _embed(self, images: Image) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _embed(images)")

    def codes(self, images: Image) -> Embedding:
        """Unit-length embeddings of a few pictures, where the judge runs; gradients flow where its network has some."""
        return F.normalize(self._embed(images))

    @torch.no_grad()
    def embed(self, images: Image) -> Embedding:
        """See :meth:`Judge.embed`; unit length."""
        with torch.autocast(torch.device(self.device).type, enabled=False):  # a yardstick has one length
            parts = [self._embed(part.float()) for part in images.split(_BATCH)]
        return F.normalize(torch.cat(parts).cpu())

    def similarity(self, a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
        """Cosine of every pair."""
        return F.normalize(a) @ F.normalize(b).T

    def describe(self) -> str:
        """Name, hash and where it runs."""
        return f"{self.name} ({self.weights[:19]}…, {self.runs_on})"


class OwnNetwork(CosineJudge):
    """The identity network of the losses as a judge: to calibrate it, and for methods that never saw it.

    Args:
        network: The network; ``None`` reads it from its card.
        device: Where it runs.
    """

    def __init__(self, network: MobileFaceNet | None = None, device: str = "cpu") -> None:
        self.network = (network or MobileFaceNet()).to(device)
        self.name, self.weights = self.network.name, self.network.weights
        self.networks, self.device, self.runs_on = frozenset({self.network.name}), device, f"torch {device}"

    def _embed(self, images: Image) -> Tensor:
        return self.network(images.to(self.device))


# A square of 0.9 of the crop, centred 0.03 below its centre: of five tried on 800 LFW pairs the best (98.5 %;
# the whole crop 97.9 %, 0.7 of it 97.8 %).
_FACERES_POINTS = ((FFHQ_TEMPLATE - (0.5, 0.53)) / 0.9 + 0.5) * 224 - 0.5


class FaceRes(CosineJudge):
    """MobileNet trained on VGGFace2 identities, which also names apparent gender and age; card ``faceres``.

    Args:
        device: Where it runs.
        path: A local copy of the weights; ``None`` asks the card's sources.
        graph: A local copy of the graph.
    """

    name = "faceres"
    networks = frozenset({"faceres"})

    def __init__(self, device: str = "cpu", path: str | Path | None = None, graph: str | Path | None = None) -> None:
        self.network, self.crop = (
            FaceResNet(path, graph).to(device),
            FixedCrop(_FACERES_POINTS, 224).to(device),
        )
        self.weights, self.device, self.runs_on = card("faceres").digest, device, f"torch {device}"

    def _embed(self, images: Image) -> Tensor:
        return self.network(self.crop(images.to(self.device)))

    @torch.no_grad()
    def attributes(self, images: Image) -> Attributes:
        """Apparent gender and age of faces; CPU tensors of ``(B,)``."""
        with torch.autocast(torch.device(self.device).type, enabled=False):
            found = [self.network.attributes(self._embed(part.float())) for part in images.split(_BATCH)]
        return Attributes(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def providers(provider: Provider) -> list[str]:
    """Providers of onnxruntime for a wish; a GPU that was asked for is never silently replaced.

    Raises:
        ValueError: If ``cuda`` is asked for and this onnxruntime has no CUDA.
    """
    available = onnxruntime.get_available_providers()
    if provider not in ("auto", "cpu", "cuda"):
        raise ValueError(f"expected a provider of 'auto', 'cpu' or 'cuda', got {provider!r}")
    if provider == "cuda" and "CUDAExecutionProvider" not in available:
        raise ValueError(
            f"provider 'cuda' was asked for, but this onnxruntime offers only {', '.join(available)}; "
            "install onnxruntime-gpu or choose 'auto' or 'cpu'"
        )
    cuda = provider != "cpu" and "CUDAExecutionProvider" in available
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]


def _provider_in_use(session: onnxruntime.InferenceSession, provider: Provider) -> str:
    """The provider that a session really got; CUDA can be offered and still fail to load."""
    used = session.get_providers()
    if provider == "cuda" and used[0] != "CUDAExecutionProvider":
        raise ValueError(
            f"provider 'cuda' was asked for, but onnxruntime could only start {', '.join(used)}; "
            "check that its CUDA and cuDNN libraries can be loaded, or choose 'auto' or 'cpu'"
        )
    return used[0]


def _file_identity(path: Path) -> tuple[str, frozenset[str]]:
    """Hash of a user's file and the cards it is a copy of; its own name where it is of none."""
    digest = "sha256:" + sha256(path.read_bytes()).hexdigest()
    known = frozenset(name for name, entry in cards().items() if entry.digest == digest)
    return digest, known or frozenset({path.stem})


class OnnxJudge(CosineJudge):
    """Any recogniser in an ONNX file, such as AdaFace or FaceNet, run by onnxruntime.

    Args:
        path: The file.
        size: Side of its input in pixels.
        mean: Subtracted from pixel values in [0, 255]; one number, or one a channel in the network's order.
        std: Divides them then.
        template: Where its crop has the five points: ``"arcface"`` or ``"ffhq"``.
        provider: ``"cuda"`` or ``"cpu"`` forces one, ``"auto"`` takes CUDA where there is one.
        bgr: Whether it wants blue first.
        name: Name in tables; ``None`` takes the file's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``cuda`` is forced and this onnxruntime has no CUDA.
        ValueError: If ``cuda`` is forced and cannot be started.
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 112,
        mean: float | Sequence[float] = 127.5,
        std: float | Sequence[float] = 127.5,
        template: str = "arcface",
        provider: Provider = "auto",
        bgr: bool = False,
        name: str | None = None,
    ) -> None:
        wanted, path = providers(provider), _existing(path)
        self.session = onnxruntime.InferenceSession(str(path), providers=wanted)
        self.runs_on = _provider_in_use(self.session, provider)
        self.name = name or path.stem
        self.weights, self.networks = _file_identity(path)
        self.crop = FixedCrop(template_points(template, size), size)
        self.bgr, self._input = bgr, self.session.get_inputs()[0]
        self.mean, self.std = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))

    def _embed(self, images: Image) -> Tensor:
        pixels = (self.crop(images.cpu()) + 1) * 127.5
        blob = ((pixels.flip(1) if self.bgr else pixels) - self.mean) / self.std
        # A file exported with a batch of one takes one face at a time.
        parts = blob.split(1) if self._input.shape[0] == 1 else [blob]
        found = [self.session.run(None, {self._input.name: part.numpy()})[0] for part in parts]
        return torch.from_numpy(np.concatenate(found)).flatten(1)


class InsightFace(CosineJudge):
    """A recogniser of insightface's model zoo on the user's disk, such as ``w600k_r50`` of ``buffalo_l``.

    Nothing is downloaded. The packs' licence is for non-commercial research.

    Args:
        model: Path of an ONNX file, or the name of a pack under ``root/models``.
        root: insightface's folder.
        provider: As for :class:`OnnxJudge`.

    Raises:
        FileNotFoundError: If the file or the pack is not there, or holds no recogniser.
        ValueError: If ``cuda`` is forced and this onnxruntime has no CUDA.
        ValueError: If ``cuda`` is forced and cannot be started.
    """

    def __init__(
        self,
        model: str | Path = "buffalo_l",
        root: str | Path = "~/.insightface",
        provider: Provider = "auto",
    ) -> None:
        from insightface.model_zoo import get_model  # slow to import, and only needed here

        load = partial(get_model, providers=providers(provider))
        if str(model).endswith(".onnx"):
            found = [(path := _existing(model), load(str(path)))]
        else:
            folder = Path(root).expanduser() / "models" / model
            found = [(path, load(str(path))) for path in sorted(folder.glob("*.onnx"))]
        found = [(path, one) for path, one in found if getattr(one, "taskname", None) == "recognition"]
        if not found:
            where = model if str(model).endswith(".onnx") else folder
            raise FileNotFoundError(
                f"no recogniser of insightface in {where}; "
                "put the pack's ONNX files there or give the path of one (nothing is downloaded)"
            )
        path, self.model = found[0]
        self.runs_on = _provider_in_use(self.model.session, provider)
        self.name = f"insightface-{path.stem}"
        self.weights, self.networks = _file_identity(path)
        size = self.model.input_size[0]
        self.crop = FixedCrop(template_points("arcface", size), size)

    def _embed(self, images: Image) -> Tensor:
        pixels = ((self.crop(images.cpu()) + 1) * 127.5).flip(1).permute(0, 2, 3, 1).numpy()  # BGR, as OpenCV's
        found = [self.model.get_feat(np.ascontiguousarray(one)) for one in pixels]
        return torch.from_numpy(np.concatenate(found))


class Dlib:
    """dlib's ResNet-29 (King, 2017): 128 numbers a face, compared by Euclidean distance.

    Similarity is minus the distance; dlib's own threshold is 0.6. Needs ``keyveil[judges]``.

    Args:
        processes: Processes that share the work; dlib holds Python's lock, so threads would not.

    Raises:
        ImportError: If dlib is not installed.
        WeightsError: If a file cannot be found.
    """

    name = "dlib"
    networks = frozenset({"dlib-recognition", "dlib-landmarks5"})

    def __init__(self, processes: int = 1) -> None:
        paths = (str(locate("dlib-landmarks5")), str(locate("dlib-recognition")))
        self.weights, self.processes = card("dlib-recognition").digest, processes
        self._run: Callable[..., Any]
        if processes == 1:
            self._run = partial(map, describer(*paths))
        else:
            # Not forked: torch's threads do not survive it.
            self._pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), Worker.start, initargs=paths
            )
            self._run = partial(self._pool.map, Worker.run, chunksize=8)

    @torch.no_grad()
    def embed(self, images: Image) -> Float[Tensor, "batch 128"]:
        """See :meth:`Judge.embed`."""
        size = (WORKING_SIZE, WORKING_SIZE)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.from_numpy(np.stack(list(self._run(pixels))).astype(np.float32))

    def similarity(self, a: Float[Tensor, "n 128"], b: Float[Tensor, "m 128"]) -> Float[Tensor, "n m"]:
        """Minus the Euclidean distance of every pair."""
        return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def describe(self) -> str:
        """Name, hash and where it runs."""
        return f"{self.name} ({self.weights[:19]}…, {self.processes} CPU process{'es' * (self.processes > 1)})"


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a recogniser's ONNX file")
    return path

"""Do two sets of pictures look alike as sets? Distances between distributions of features."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics.identity import Embeddings
from lightning_modules.metrics.measured import LEGS, Measured, RoundTripMetric, gathered, legs_of
from lightning_modules.networks.efficientnet_lite import CARD as EFFICIENTNET_CARD
from lightning_modules.networks.efficientnet_lite import EfficientNetLite0
from lightning_modules.weights import WeightsError, find

Features = Float[Tensor, "n dim"]
Others = Float[Tensor, "m dim"]

INCEPTION_CARD = "inception-fid"
FEW = "a distribution takes two faces at least"


def frechet_distance(features: Features, reference: Others) -> float:
    r"""Squared Fréchet distance of the Gaussians that fit two sets of features (0: alike); Heusel et al., 2017, eq. 6.

    .. math:: \|\mu - \nu\|^2 + \mathrm{tr}\,\Sigma + \mathrm{tr}\,T - 2\,\mathrm{tr}\,(\Sigma T)^{1/2}

    The last trace is the sum of the singular values of :math:`A B^T` where :math:`A^T A = \Sigma` and
    :math:`B^T B = T`: no root of a covariance that few faces leave singular. In float64.

    With fewer faces than features it is biased upwards, so figures compare only at equal numbers of faces.

    Raises:
        ValueError: If a set has fewer than two features.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a distribution takes two pictures at least, got {len(features)} and {len(reference)}")
    means, roots = [], []
    for found in (features.double(), reference.double()):
        means.append(found.mean(0))
        root = (found - means[-1]) / (len(found) - 1) ** 0.5
        roots.append(torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root)
    apart = (means[0] - means[1]).square().sum() + sum(root.square().sum() for root in roots)
    return max(0.0, float(apart - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()))


def kernel_distance(features: Features, reference: Others) -> float:
    r"""Unbiased squared MMD of two sets of features under :math:`(x^T y / d + 1)^3`; Bińkowski et al., 2018, eq. 4.

    Over all pairs at once, where published KIDs draw subsets: of one expectation, and without chance. In float64; it
    may be negative.

    Raises:
        ValueError: If a set has fewer than two features.
    """
    n, m = len(features), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"a distribution takes two pictures at least, got {n} and {m}")
    x, y = features.double(), reference.double()

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / x.shape[1] + 1) ** 3

    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())


@torch.no_grad()
def frechet(
    network: nn.Module, images: Float[Tensor, "n 3 height width"], reference: Float[Tensor, "m 3 height width"]
) -> float:
    """:func:`frechet_distance` of two sets of pictures, of a network's features.

    Args:
        network: Pictures in [-1, 1] → features ``(B, d)``; `fd_face` of ``keyveil edit`` takes the identity network's.
        images: Pictures in [-1, 1], at least two.
        reference: Pictures to compare with, at least two.

    Raises:
        ValueError: If a set has fewer than two pictures.
    """
    return frechet_distance(*(torch.cat([network(part) for part in all.split(32)]) for all in (images, reference)))


class Inception(nn.Module):
    """The 2048 pooled features of FID's Inception, by torchmetrics and torch-fidelity; card ``inception-fid``.

    Raises:
        WeightsError: If the weights or torch-fidelity are missing; nothing is downloaded, and other weights would give
            no FID.
    """

    def __init__(self) -> None:
        super().__init__()
        if (file := find(INCEPTION_CARD)) is None:
            raise WeightsError(f"weights missing: {INCEPTION_CARD}; `keyveil weights fetch {INCEPTION_CARD}` brings it")
        if find_spec("torch_fidelity") is None:
            raise WeightsError("package missing: torch-fidelity; `pip install keyveil[fid]` brings it")
        from torchmetrics.image.fid import NoTrainInceptionV3

        torch.load(file, weights_only=True)  # tensors alone, or it ends here: torch-fidelity's own reading runs pickles
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 2048"]:
        """Features of pictures of any size, RGB in [-1, 1], in whole grey levels."""
        return self.network(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def _efficientnet() -> nn.Module:
    if find(EFFICIENTNET_CARD) is None:  # a comparison measures what is there and fetches nothing
        raise WeightsError(f"weights missing: {EFFICIENTNET_CARD}")
    return EfficientNetLite0()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"inception": Inception, "efficientnet": _efficientnet}
FIGURES: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "fid": ("inception", frechet_distance),
    "kid": ("inception", kernel_distance),
    "fd_efflite0": ("efficientnet", frechet_distance),
}
"""Figure → the network whose features it takes, and what it takes of two sets of them."""


@lru_cache(maxsize=2)
def _network(name: str) -> nn.Module:
    return NETWORKS[name]()


class Realism(RoundTripMetric):
    """``fid``, ``kid`` and ``fd_efflite0`` of anonymized, recovered and wrongly opened faces against the originals.

    - ``fid``: :func:`frechet_distance` of Inception features, and ``kid``: :func:`kernel_distance` of them, with the
      weights that all published ones have, where they are on this machine;
    - ``fd_efflite0``: :func:`frechet_distance` of EfficientNet-lite0's, which is no FID.

    Without its weights a figure is n/a and says so. ``n`` is the number of faces: at the few hundred of a comparison
    Fréchet distances are biased upwards, and compare only at one ``n``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._networks: dict[str, nn.Module] = {}  # no submodules: never saved, never trained
        self._missing: dict[str, str] = {}
        for name in NETWORKS:
            try:
                self._networks[name] = _network(name)
            except WeightsError as error:
                self._missing[name] = str(error).partition(";")[0]
            for picture in ("original", *(leg for leg, _ in LEGS)):
                self.add_state(f"{name}_{picture}", [], dist_reduce_fx="cat")
        for leg, _ in LEGS:
            self.add_state(f"seen_{leg}", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, trip: RoundTrip) -> None:
        """Take the features of a batch's pictures."""
        pictures = {leg: images for (leg, key), images in legs_of(trip).items() if (leg, key) in LEGS}
        for leg, images in pictures.items():
            getattr(self, f"seen_{leg}").add_(len(images))
        for picture, images in {"original": trip.original, **pictures}.items():
            for name, network in self._networks.items():
                features = network.to(images.device)(images.float())
                getattr(self, f"{name}_{picture}").append(features.to(self.device))

    def measured(self) -> list[Measured]:
        """Three figures a leg."""
        figures = []
        for leg, key in LEGS:
            if not (seen := int(getattr(self, f"seen_{leg}"))):
                continue
            for metric, (name, distance) in FIGURES.items():
                if name in self._missing:
                    figures.append(Measured(metric, leg, None, key=key, why=self._missing[name]))
                    continue
                sets = [gathered(getattr(self, f"{name}_{picture}")) for picture in (leg, "original")]
                figures.append(_apart(metric, leg, key, distance(*sets) if seen > 1 else None, seen))
        return figures


def alike_as_sets(faces: Embeddings) -> list[Measured]:
    """``fd_face`` of the same legs: :func:`frechet_distance` of a judge's embeddings."""
    figures, original = [], faces.pictures["original"]
    for leg, key in LEGS:
        if (embeddings := faces.pictures.get(leg)) is None:
            continue
        n = len(embeddings)
        found = _apart("fd_face", leg, key, frechet_distance(embeddings, original) if n > 1 else None, n)
        figures.append(found._replace(judge=faces.judge.name, judge_weights=faces.judge.weights))
    return figures


def _apart(metric: str, leg: str, key: str, distance: float | None, n: int) -> Measured:
    """A figure of a whole set: one number without an interval."""
    if distance is None:
        return Measured(metric, leg, None, key=key, why=FEW)
    return Measured(metric, leg, torch.tensor([distance], dtype=torch.float64), key=key, n=n)

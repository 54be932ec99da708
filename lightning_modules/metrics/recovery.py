"""Is the original back? Distances between pictures, and the judge's acceptance of recovered faces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multiscale_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as ssim_of

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.metrics.identity import Embeddings
from lightning_modules.metrics.measured import Measured, RoundTripMetric, gathered, legs_of
from lightning_modules.metrics.perceptual import NETWORKS, SMALLEST
from lightning_modules.weights import WeightsError

Images = Float[Tensor, "batch 3 height width"]  # in [0, 1]

PSNR_CAP = 100.0
"""dB of identical pictures, whose PSNR is infinite: a mean over faces must stay a number."""

RIM = 5  # half of the 11-pixel window: SSIM is taken where the whole window lies inside the picture


def recovered_identity(faces: Embeddings) -> list[Measured]:
    """``tar@far=1e-3`` and ``similarity`` of recovered faces, and of the auto-encoding that bounds them."""
    return [
        *faces.acceptance("recovered", "recovered"),
        *faces.acceptance("inverted", "inverted", "none"),
    ]


def psnr(image: Images, reference: Images, mask: Tensor | None = None) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each picture in dB, at most :data:`PSNR_CAP`; inside ``mask`` if any."""
    error = (image.double() - reference.double()).square()
    weight = torch.ones_like(error) if mask is None else mask.double().expand_as(error)
    mse = (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return (-10 * mse.log10()).clamp(max=PSNR_CAP).float()


def ssim(image: Images, reference: Images, mask: Tensor | None = None) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al., 2004; Gaussian window of 11 pixels, σ 1.5) of each picture.

    Mean over the places where the whole window lies inside the picture, as published; with ``mask``, over
    those of them inside it. Needs pictures of 11 pixels or more.
    """
    places = ssim_of(image, reference, data_range=1.0, reduction="none", return_full_image=True)[1]
    places = places[..., RIM:-RIM, RIM:-RIM]
    weight = torch.ones_like(places)
    if mask is not None:
        weight = mask[..., RIM:-RIM, RIM:-RIM].to(places).expand_as(places)
    return (places * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def scales_of(size: int) -> int:
    """Scales of MS-SSIM that fit a picture: 5 from 176 pixels, 4 from 99, 3 from 44, otherwise 1."""
    return next((scales for smallest, scales in ((176, 5), (99, 4), (44, 3)) if size >= smallest), 1)


def ms_ssim(image: Images, reference: Images) -> Float[Tensor, " batch"]:
    """Multi-scale SSIM (Wang et al., 2003) of each picture, with as many scales as fit (:func:`scales_of`).

    The published weights of the first scales, renormalised to one; negative terms are cut to 0
    (``normalize="relu"``). So a figure is comparable only at one picture size.
    """
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[: scales_of(min(image.shape[-2:]))]
    betas = tuple(weight / sum(weights) for weight in weights)
    values = multiscale_ssim(image, reference, data_range=1.0, reduction="none", betas=betas, normalize="relu")
    return values.reshape(len(image))


class PictureQuality(RoundTripMetric):
    """``psnr``, ``ssim``, ``ms_ssim`` and perceptual distances of every leg to the original, on [0, 1] pictures.

    Of the whole picture, and for PSNR and SSIM also inside the face mask where there is one (region
    ``face``). Recovered faces also get ``bit_exact``: the share equal to the original in every grey level.

    Args:
        perceptual: Distances by networks to measure, of :data:`~lightning_modules.metrics.perceptual.NETWORKS`;
            without its weights a figure is n/a and says so.
        near_key: As in :class:`~lightning_modules.metrics.identity.IdentityScores`.
    """

    def __init__(self, perceptual: Sequence[str] = (), near_key: str = "one-bit") -> None:
        super().__init__()
        self.near_key = near_key
        self._perceptual: dict[str, nn.Module] = {}  # no submodules: never saved, never trained
        self._missing: dict[str, str] = {}
        for name in perceptual:
            try:
                self._perceptual[name] = NETWORKS[name]()
            except WeightsError as error:
                self._missing[name] = str(error).partition(";")[0]
        self._columns = ("psnr", "ssim", "ms_ssim", "bit_exact", "psnr/face", "ssim/face", *self._perceptual)
        self._states = {
            ("anonymized", "right"): "anonymized",
            ("recovered", "right"): "recovered",
            ("wrongly_recovered", "random"): "wrongly_recovered",
            ("wrongly_recovered", near_key): "nearly_recovered",
            ("wrongly_recovered", "attribute"): "wrong_attribute",
            ("inverted", "none"): "inverted",
        }
        self.add_state("person", [], dist_reduce_fx="cat")
        for state in self._states.values():
            self.add_state(state, [], dist_reduce_fx="cat")  # each (N, columns); nan where a column does not apply

    def update(self, trip: RoundTrip) -> None:
        """Measure a batch."""
        self.person.append(trip.identity.to(self.device))
        mask = trip.mask if trip.mask.numel() else None
        for leg, images in legs_of(trip, self.near_key).items():
            rows = self._rows(images.float(), trip.original.to(images).float(), mask)
            getattr(self, self._states[leg]).append(rows.to(self.device))

    def measured(self) -> list[Measured]:
        """One figure a leg and column that applies."""
        person, figures = gathered(self.person), []
        for (leg, key), state in self._states.items():
            rows = gathered(getattr(self, state))
            if rows is None or person is None:
                continue
            for column, name in enumerate(self._columns):
                metric, _, region = name.partition("/")
                values = rows[:, column]
                kept = ~values.isnan()
                if (metric == "bit_exact" and leg != "recovered") or (region and not kept.any()):
                    continue
                figures.append(Measured(metric, leg, values[kept], person[kept], key=key, region=region or None))
            figures += [Measured(name, leg, None, key=key, why=why) for name, why in self._missing.items()]
        return figures

    def _rows(self, images: Tensor, originals: Tensor, mask: Tensor | None) -> Float[Tensor, "batch columns"]:
        image, reference = (images + 1) / 2, (originals + 1) / 2
        absent = image.new_full((len(image),), float("nan"))
        columns = [
            psnr(image, reference),
            ssim(image, reference),
            ms_ssim(image, reference),
            ((image - reference).abs().amax((1, 2, 3)) < 0.5 / 255).float(),
            absent if mask is None else psnr(image, reference, mask.to(image)),
            absent if mask is None else ssim(image, reference, mask.to(image)),
        ]
        if images.shape[-1] < SMALLEST:
            images, originals = (
                F.interpolate(x, size=(SMALLEST, SMALLEST), mode="bilinear") for x in (images, originals)
            )
        columns += [network.to(images.device)(images, originals).reshape(-1) for network in self._perceptual.values()]
        return torch.stack(columns, 1)

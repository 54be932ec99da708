"""Do two keys give two people? Diversity, and unlinkability of one person under two keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import wasserstein_distance
from torch import Tensor

from lightning_modules.metrics.identity import BLOCK, Embeddings, strangers_of
from lightning_modules.metrics.measured import Measured

BINS = 20
FEWEST = 100  # mated scores below which the histogram says nothing


def diversity(faces: Embeddings) -> list[Measured]:
    """Figures of the same face anonymized under unrelated keys, two or more (reference ``other-key``).

    - ``diversity``: share of pairs of keys that the judge tells apart, that is one less the share accepted as
      the same person at a FAR of 0.1 %.
    - ``similarity``: their mean.
    - ``diversity_distance``: how far these similarities are from those of different people's originals (Wasserstein's
      first distance): 0 means that keys make people as unlike as people are.
    - ``unlinkability_dsys``: :func:`unlinkability` of one person under two keys against two people under two
      keys.
    """
    if "other" not in faces.pictures or "anonymized" not in faces.pictures:
        return []
    similarity, apart = faces.between(["anonymized", *faces.tries("other")])
    told_apart = None if apart is None else apart.mean(0)
    figures = [
        faces.measured("diversity", "anonymized", "other-key", told_apart),
        faces.measured("similarity", "anonymized", "other-key", similarity.mean(0)),
    ]
    distance = faces.measured("diversity_distance", "anonymized", "other-key", None, why="only one person")
    if len(people := strangers_of(faces.judge, faces.pictures["original"], faces.person)):
        apart_by = wasserstein_distance(similarity.flatten().double().numpy(), people.double().numpy())
        distance = distance._replace(values=torch.tensor([apart_by]), n=similarity.numel(), why=None)
    figures.append(distance)
    mated, strangers = two_keys(faces)
    why = f"fewer than {FEWEST} scores of one person, or of two people, under two keys"
    linked = faces.measured("unlinkability_dsys", "anonymized", "other-key", None, why=why)
    if min(len(mated), len(strangers)) >= FEWEST:
        linked = linked._replace(values=unlinkability(mated, strangers)[None], n=len(mated), why=None)
    return [*figures, linked]


def two_keys(faces: Embeddings) -> tuple[Tensor, Tensor]:
    """Similarities across two keys: of the same person, and of two people; empty without a second key."""
    if "other" not in faces.pictures or "anonymized" not in faces.pictures:
        return torch.empty(0), torch.empty(0)
    mated, strangers = [], []
    for block in torch.arange(len(faces.person)).split(BLOCK):
        similarity = faces.judge.similarity(faces.pictures["anonymized"][block], faces.pictures["other"])
        same = faces.person[block][:, None] == faces.person
        mated.append(similarity[same])
        strangers.append(similarity[~same])
    return torch.cat(mated), torch.cat(strangers)


class Linkability(NamedTuple):
    """Scores across two keys in bins, and how far each bin links.

    Attributes:
        edges: Of the bins, ``(bins + 1,)``.
        mated, strangers: Counts of scores of the same person and of two people, ``(bins,)``.
        local: ``D(s)`` of each bin, ``(bins,)`` in [0, 1]; 0 where there is no score.
        overall: ``D_sys``, its mean over the mated scores.
    """

    edges: Float[Tensor, " edges"]
    mated: Float[Tensor, " bins"]
    strangers: Float[Tensor, " bins"]
    local: Float[Tensor, " bins"]
    overall: Float[Tensor, ""]


def linkability(mated: Float[Tensor, " m"], strangers: Float[Tensor, " n"], bins: int = BINS) -> Linkability:
    r"""How well a score :math:`s` tells that two pictures under two keys are of one person.

    .. math:: D_{sys} = \int p(s \mid H_m) \, D(s) \, ds, \quad
        D(s) = \max\left(0, \frac{p(s \mid H_m) - p(s \mid H_{nm})}{p(s \mid H_m) + p(s \mid H_{nm})}\right)

    with equal priors (Gomez-Barrero et al., 2018, eq. 6 and 9: :math:`D = 2 \frac{LR}{1 + LR} - 1` where
    :math:`LR > 1`). Densities are histograms of ``bins`` equal bins between the smallest and the largest
    score of all; chance differences between bins add to it, about :math:`0.2 \sqrt{bins / m}`.
    """
    low, high = (float(edge) for edge in torch.cat([mated, strangers]).aminmax())
    if low == high:  # one score for all: one bin of some width holds it
        low, high = low - 0.5, high + 0.5
    counts = [torch.histc(scores.float(), bins, low, high) for scores in (mated, strangers)]
    local = local_linkability(*counts)
    overall = (counts[0] / len(mated) * local).sum()
    return Linkability(torch.linspace(low, high, bins + 1), *counts, local, overall)


def local_linkability(mated: Float[Tensor, " bins"], strangers: Float[Tensor, " bins"]) -> Float[Tensor, " bins"]:
    """``D(s)`` of :func:`linkability` for each bin, from the counts of both kinds of scores.

    Example:
        >>> local_linkability(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([6.0, 3.0, 0.0]))
        tensor([0.0000, 0.5000, 0.0000])
    """
    p, q = mated / mated.sum(), strangers / strangers.sum()
    return ((p - q) / (p + q)).nan_to_num(0).clamp(min=0)


def unlinkability(mated: Float[Tensor, " m"], strangers: Float[Tensor, " n"], bins: int = BINS) -> Float[Tensor, ""]:
    """Global linkability ``D_sys`` (:func:`linkability`): 0 nothing links two pictures of a person, 1 everything does.

    Example:
        >>> unlinkability(torch.ones(50), torch.zeros(50))
        tensor(1.)
    """
    return linkability(mated, strangers, bins).overall

"""The store behind questions of identity: a judge's embeddings of each leg, and how they meet originals."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.judges import Judge
from lightning_modules.metrics.fairness import Groups, by_group
from lightning_modules.metrics.measured import Measured, RoundTripMetric, gathered

if TYPE_CHECKING:
    from lightning_modules.metrics.scores import Histogram

PICTURES = (
    "original",
    "anonymized",
    "other",
    "recovered",
    "wrongly_recovered",
    "nearly_recovered",
    "wrong_attribute",
    "inverted",
)
AGAIN = {  # the same legs with further keys
    "other_again": "other",
    "wrong_again": "wrongly_recovered",
    "near_again": "nearly_recovered",
}
FAR = 1e-3
BLOCK = 1024  # rows of a similarity matrix held at once


class Meeting(NamedTuple):
    """How one leg's faces meet the originals, face by face, each ``(N,)``.

    Attributes:
        same: Similarity to the very picture it was made from.
        other: Mean similarity to that person's other pictures; nan where there is none.
        other_accepted: Share of that person's other pictures accepted; nan where there is none.
        rank1: Whether the nearest original, of all, is of that person.
        rank1_other: The same with the very picture left out of the gallery.
        strangers: Share of all other people's originals accepted; nan where there is nobody else.
    """

    same: Float[Tensor, " n"]
    other: Float[Tensor, " n"]
    other_accepted: Float[Tensor, " n"]
    rank1: Bool[Tensor, " n"]
    rank1_other: Bool[Tensor, " n"]
    strangers: Float[Tensor, " n"]


class Embeddings:
    """All embeddings of a run on the CPU, and the comparisons between them.

    Args:
        judge: Whose embeddings they are.
        threshold: Accepting similarity; ``None`` calibrates it on these very originals at a FAR of 0.1 %.
        pictures: Leg → embeddings ``(N, D)``; absent legs are missing. ``other 2``, ``wrongly_recovered 2`` and so on
            are those legs with further keys.
        person: ``(N,)``.
        near_key: Word of the protocol for the key of ``nearly_recovered``.
    """

    def __init__(
        self,
        judge: Judge,
        threshold: float | None,
        pictures: dict[str, Tensor],
        person: Tensor,
        near_key: str,
    ) -> None:
        self.judge, self.pictures, self.person, self.near_key = judge, pictures, person, near_key
        self.people = len(person.unique())
        self.threshold = own_threshold(judge, pictures["original"], person) if threshold is None else threshold
        self._meetings: dict[str, Meeting] = {}

    def measured(
        self,
        metric: str,
        leg: str,
        reference: str | None,
        values: Tensor | None,
        key: str = "right",
        why: str = f"fewer than {round(1 / FAR)} pairs of strangers to calibrate on",
    ) -> Measured:
        """Values of a figure; faces whose value is nan (nothing to compare with) are left out."""
        figure = Measured(
            *(metric, leg, None, None, reference, key),
            judge=self.judge.name,
            judge_weights=self.judge.weights,
            threshold=self.threshold if metric in ("tar@far=1e-3", "fmr", "diversity", "tar_worst_bit") else None,
        )
        if values is None:
            return figure._replace(why=why)
        kept = ~values.isnan()
        if not kept.any():
            return figure._replace(why="no person with two or more pictures")
        return figure._replace(values=values[kept], person=self.person[kept])

    def accepted(self, similarity: Tensor) -> Tensor | None:
        """1 where the judge takes two faces for one person; ``None`` without a threshold."""
        return None if self.threshold is None else (similarity > self.threshold).float()

    def acceptance(self, picture: str, leg: str, key: str = "right") -> list[Measured]:
        """TAR and mean similarity of a leg against both references; empty where the leg is absent."""
        if picture not in self.pictures:
            return []
        meeting = self.meeting(picture)
        other = None if self.threshold is None else meeting.other_accepted
        return [
            self.measured("tar@far=1e-3", leg, "same-image", self.accepted(meeting.same), key),
            self.measured("tar@far=1e-3", leg, "other-image", other, key),
            self.measured("similarity", leg, "same-image", meeting.same, key),
            self.measured("similarity", leg, "other-image", meeting.other, key),
        ]

    def tries(self, leg: str) -> list[str]:
        """Names of all pictures of a leg, one a key."""
        return [name for name in self.pictures if name.split()[0] == leg]

    def between(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """All pairs of pictures of the same face: similarity and whether told apart, each ``(pairs, N)``."""
        similarity = torch.stack([self.paired(a, b) for a, b in combinations(names, 2)])
        accepted = self.accepted(similarity)
        return similarity, None if accepted is None else 1 - accepted

    def paired(self, a: str, b: str) -> Float[Tensor, " n"]:
        """Similarity of each face in leg ``a`` to the same face in leg ``b``."""
        first, second = self.pictures[a], self.pictures[b]
        blocks = zip(first.split(BLOCK), second.split(BLOCK), strict=True)
        return torch.cat([self.judge.similarity(x, y).diagonal() for x, y in blocks])

    def meeting(self, picture: str) -> Meeting:
        """Compare a leg with all originals, a block of rows at a time (kept, since several questions ask)."""
        if picture not in self._meetings:
            self._meetings[picture] = self._meet(self.pictures[picture])
        return self._meetings[picture]

    def _meet(self, embeddings: Tensor) -> Meeting:
        everyone, person = self.pictures["original"], self.person
        rows: list[tuple[Tensor, ...]] = []
        for block in torch.arange(len(person)).split(BLOCK):
            similarity = self.judge.similarity(embeddings[block], everyone)
            own = block[:, None] == torch.arange(len(person))
            others = (person[block][:, None] == person) & ~own
            accepted = similarity > (torch.inf if self.threshold is None else self.threshold)
            strangers = person[block][:, None] != person
            count = others.sum(1)  # 0 gives nan below, as no stranger does: nothing to compare with
            rows.append(
                (
                    similarity[own],
                    similarity.masked_fill(~others, 0).sum(1) / count,
                    (accepted & others).sum(1) / count,
                    person[similarity.argmax(1)] == person[block],
                    person[similarity.masked_fill(own, -torch.inf).argmax(1)] == person[block],
                    (accepted & strangers).sum(1) / strangers.sum(1),
                )
            )
        return Meeting(*(torch.cat(column) for column in zip(*rows, strict=True)))


def strangers_of(judge: Judge, originals: Tensor, person: Tensor) -> Float[Tensor, " pairs"]:
    """Similarities of all pairs of pictures of two people."""
    strangers = []
    for block in torch.arange(len(person)).split(BLOCK):
        apart = (person[block][:, None] != person) & (block[:, None] < torch.arange(len(person)))
        strangers.append(judge.similarity(originals[block], originals)[apart])
    return torch.cat(strangers)


def own_threshold(judge: Judge, originals: Tensor, person: Tensor) -> float | None:
    """Similarity that at most one in a thousand pairs of strangers among these pictures exceeds.

    As :func:`lightning_modules.calibration.calibrate`, without its interval.

    Returns:
        ``None`` where there are fewer than a thousand such pairs.
    """
    scores = strangers_of(judge, originals, person)
    if len(scores) < 1 / FAR:
        return None
    return float(scores.topk(int(len(scores) * FAR) + 1).values[-1])


class IdentityScores(RoundTripMetric):
    """Embeds every leg with one judge and answers the questions of anonymity, recovery, security, diversity.

    Its memory grows by the embedding of each picture, 0.5 to 4 KB: with the right key and eight wrong ones of either
    kind, twenty pictures a face.

    Args:
        judge: A frozen recogniser that no loss of the method used.
        threshold: Accepting similarity, calibrated beforehand; ``None`` calibrates on the originals seen.
        near_key: Word of the protocol for the key of ``nearly_recovered``: ``"one-bit"``, or ``"cosine-0.9"``
            for a method whose key is a vector of normal numbers.
        groups: To which group a face belongs; ``None`` tells nothing of groups.
    """

    def __init__(
        self,
        judge: Judge,
        threshold: float | None = None,
        near_key: str = "one-bit",
        groups: Groups | None = None,
    ) -> None:
        super().__init__()
        self.judge, self.threshold, self.near_key, self.groups = judge, threshold, near_key, groups
        for name in (*PICTURES, *AGAIN, "person", "sample", "group"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, trip: RoundTrip) -> None:
        """Embed a batch; a leg that is absent is not embedded."""
        for name in PICTURES:
            images = getattr(trip, name)
            if images.numel():
                getattr(self, name).append(self.judge.embed(images).to(self.device))
        for name in AGAIN:
            if (images := getattr(trip, name)).numel():
                codes = [self.judge.embed(of_one_key) for of_one_key in images.unbind(1)]
                getattr(self, name).append(torch.stack(codes, 1).to(self.device))
        self.person.append(trip.identity.to(self.device))
        self.sample.append(trip.sample.to(self.device))
        if self.groups is not None:
            self.group.append(self.groups(trip.original).to(self.device))

    def embeddings(self) -> Embeddings | None:
        """What was gathered so far; ``None`` before the first face."""
        person = gathered(self.person)
        if person is None:
            return None
        found = {name: gathered(getattr(self, name)) for name in PICTURES}
        for name, leg in AGAIN.items():
            if (codes := gathered(getattr(self, name))) is not None:
                found |= {f"{leg} {at}": of_one_key for at, of_one_key in enumerate(codes.unbind(1), 2)}
        pictures = {name: numbers.cpu() for name, numbers in found.items() if numbers is not None}
        return Embeddings(self.judge, self.threshold, pictures, person.cpu(), self.near_key)

    def histograms(self) -> list[Histogram]:
        """The scores behind the figures, counted; on several processes all must call it."""
        from lightning_modules.metrics.scores import histograms

        with self.synced():
            known = self.embeddings()
        return [] if known is None else histograms(known)

    def measured(self) -> list[Measured]:
        """Figures of all questions about identity, and ``fd_face``, which asks the same embeddings."""
        from lightning_modules.metrics import anonymity, diversity, realism, recovery, security

        known = self.embeddings()
        if known is None:
            return []
        return [
            *anonymity.anonymity(known),
            *recovery.recovered_identity(known),
            *security.security(known),
            *diversity.diversity(known),
            *realism.alike_as_sets(known),
            *self._by_group(known),
        ]

    def _by_group(self, faces: Embeddings) -> list[Measured]:
        """Acceptance against the very picture, group by group."""
        group = gathered(self.group)
        if self.groups is None or group is None:
            return []
        shares = [
            faces.measured("tar@far=1e-3", leg, "same-image", faces.accepted(faces.meeting(leg).same))
            for leg in ("anonymized", "recovered")
            if leg in faces.pictures
        ]
        return [figure for share in shares for figure in by_group(share, group.cpu(), self.groups.why)]

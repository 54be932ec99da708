"""What a comparison refuses to measure: methods that cheat, by mistake or not."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import ReversibleAnonymizer, RoundTrip
from lightning_modules.judges import Judge
from lightning_modules.keys import KeyRing

ALIKE = 30.0  # dB between two renderings of a face: optimisation drifts by rounding (35 dB, one face of iFADIT)


class Guard:
    """Looks at what a method does, and refuses what cannot be what it seems.

    Args:
        method: Whom to watch, before it hides a test face; its ``prepare`` is trusted to look at training faces alone.

    Raises:
        ValueError: If it is in training mode.
    """

    def __init__(self, method: ReversibleAnonymizer) -> None:
        if method.training:
            raise ValueError("it is in training mode")
        self.method, self.tensors = method, tensors_digest(method)
        self.keyed = method.reversible and method.key_spec.kind != "none"

    def unchanged(self) -> None:
        """Check that it keeps nothing of the faces in its tensors.

        Raises:
            ValueError: If they are not what they were.
        """
        if tensors_digest(self.method) != self.tensors:
            raise ValueError("its tensors changed while it hid faces; recovery could read the originals there")

    def on_strangers(self, people: Collection[str]) -> None:
        """Check that nobody it is tested on trained it, as far as its weights say who did.

        Args:
            people: Marks of the test people (:meth:`datamodules.faces.FaceDataModule.people`).

        Raises:
            ValueError: If somebody did.
        """
        known = getattr(self.method, "trained_on", None) or frozenset()
        if met := known.intersection(people):
            raise ValueError(f"it was trained on {len(met)} of the {len(people)} people it is tested on")

    @torch.no_grad()
    def alone_or_in_company(self, batch: FaceBatch) -> None:
        """Check that a face is hidden alike alone and beside others, and that the same is kept of it.

        Raises:
            ValueError: If what the method makes or keeps of a face depends on the others of its batch.
        """
        if len(batch.image) < 2:
            return
        method, ring = self.method, KeyRing.from_seed(0)
        face = method.fit_size(FaceBatch(*(field[:2] for field in batch)))
        keys = torch.stack([method.key_spec.numbers(ring.right(int(s))) for s in face.sample])
        one = FaceBatch(*(field[:1] for field in face))
        together, alone = method.anonymize(face, keys)[:1], method.anonymize(one, keys[:1])
        if float((together - alone).square().mean()) / 4 > 10 ** (-ALIKE / 10):
            raise ValueError("what it makes of a face depends on the faces beside it")
        together, alone = method.kept_beside(face, keys), method.kept_beside(one, keys[:1])
        if together is None or alone is None:
            if together is not alone:
                raise ValueError("whether it keeps something of a face depends on the faces beside it")
            return
        if not _alike(together[:1].float(), alone.float()):
            raise ValueError("what it keeps of a face depends on the faces beside it")

    def judge(self, trips: Iterable[RoundTrip]) -> None:
        """Judge the round trips of all faces; the first honest one is enough.

        Raises:
            ValueError: If every face was handed out as it came, or every one opens alike under a wrong key.
        """
        copied, opened = True, self.keyed
        for trip in trips:
            copied = copied and _equal(trip.anonymized, trip.original)
            opened = opened and _equal(trip.recovered, trip.wrongly_recovered)
            if not (copied or opened):
                return
        if copied:
            raise ValueError("it hands faces out as they came; nobody is hidden")
        if opened:
            raise ValueError("a wrong key opens its pictures just as the right one does")


def check_judges(method: ReversibleAnonymizer, judges: Mapping[str, Judge]) -> None:
    """Check that no judge is a network that a loss of the method used.

    Raises:
        ValueError: If one is.
    """
    for name, judge in judges.items():
        if shared := sorted(method.loss_networks & judge.networks):
            raise ValueError(
                f"judge {name!r} is a loss network of this method ({', '.join(shared)}); "
                "take another judge, or set allow_loss_judges"
            )


def training_people(method: ReversibleAnonymizer, tested: Collection[str]) -> str:
    """What is known of the people who trained a method, in words.

    Args:
        method: In whose weights it may be noted.
        tested: Marks of the test people.
    """
    if not method.state_dict():
        return "nobody"
    people = getattr(method, "trained_on", None)
    if people is None or not tested:
        return "not known"
    count = Counter(mark.partition(":")[0] for mark in people)
    met = {mark.partition(":")[0] for mark in tested}
    said = [f"{n:,} of {name}" + (", none of those tested" if name in met else "") for name, n in sorted(count.items())]
    return "; ".join(said) or "nobody"


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether what is kept of a face twice agrees, as closely as two renderings of one must."""
    if one.shape != other.shape:
        return False
    return float((one - other).square().sum()) <= 10 ** (-ALIKE / 10) * float(other.square().sum())


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two legs are there and agree in every grey level."""
    return one.shape == other.shape and one.numel() > 0 and float((one - other).abs().max()) < 0.5 / 127.5


def tensors_digest(method: ReversibleAnonymizer) -> str:
    """Hash of all tensors that a method has, those of its ``state_dict``, which cross over, and the others."""
    digest, found = hashlib.sha256(), {**dict(method.named_parameters()), **dict(method.named_buffers())}
    found |= {name: value for name, value in method.state_dict().items() if isinstance(value, Tensor)}
    for name, value in sorted(found.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

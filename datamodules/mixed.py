"""Several data sets in one training: batches of real faces and batches of generated ones, by share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from datamodules.batch import FaceBatch
from datamodules.faces import FaceDataModule
from datamodules.splits import Split
from datamodules.stream import Stream, StreamingDataModule


class MixedLoader:
    """Batches of several streams by share, in an order without chance: each batch is whole of one stream.

    The next batch comes from the stream that is furthest behind its share, so every process of a training takes
    them in the same order. A pass is about as long as the first stream's.

    Args:
        streams: Streams, the first of which measures a pass.
        shares: What share of the batches each gives; positive.
        first: What to add to the numbers of each one's people, so that nobody of one is somebody of another.
    """

    def __init__(self, streams: list[Stream], shares: list[float], first: list[int]) -> None:
        self.streams, self.first = streams, first
        self.shares = [share / sum(shares) for share in shares]
        self.given = [0] * len(streams)

    def __len__(self) -> int:
        return round(len(self.streams[0]) / self.shares[0])

    def __iter__(self) -> Iterator[FaceBatch]:
        running = [iter(stream) for stream in self.streams]
        for _ in range(len(self)):
            count = sum(self.given) + 1
            at = max(range(len(self.given)), key=lambda i: self.shares[i] * count - self.given[i])
            batch = next(running[at], None)
            if batch is None:
                running[at] = iter(self.streams[at])
                batch = next(running[at])
            self.given[at] += 1
            yield _numbered(batch, self.first[at])

    def state_dict(self) -> dict[str, Any]:
        """How many batches each stream gave, and where it is."""
        return {
            "given": list(self.given),
            "shares": list(self.shares),
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: They are of another number of streams.
        """
        if len(state["streams"]) != len(self.streams):
            raise ValueError(
                f"the checkpoint was trained on {len(state['streams'])} data sets at once, this is {len(self.streams)}"
            )
        if state["shares"] == self.shares:  # others begin to count anew: nobody makes up for what was right then
            self.given = list(state["given"])
        for stream, at in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(at)


def _numbered(batch: FaceBatch, first: int) -> FaceBatch:
    return batch._replace(identity=batch.identity + first)


class MixedFaceDataModule(StreamingDataModule):
    """Several data sets that train together; the first one validates and tests.

    Batches are not mixed within: generated faces have style codes and real ones have none.

    Args:
        parts: Data modules of one picture size.
        shares: Share of the training batches that each gives; ``None``: equal shares.

    Raises:
        ValueError: If there are no parts, or shares and parts do not match.
    """

    def __init__(self, parts: list[FaceDataModule], shares: list[float] | None = None) -> None:
        super().__init__()
        shares = [1.0] * len(parts) if shares is None else shares
        if not parts or len(shares) != len(parts) or min(shares) <= 0:
            raise ValueError(f"expected a positive share for each part, got {len(shares)} for {len(parts)} parts")
        self.parts, self.shares = parts, shares

    def prepare_data(self) -> None:
        """Align what each part is about to need."""
        for part in self._running:
            part.prepare_data()

    def train_dataloader(self) -> MixedLoader:
        """Shuffled training faces of all parts."""
        return self._going_on(MixedLoader([part.train_dataloader() for part in self._running], self.shares, self.first))

    @property
    def first(self) -> list[int]:
        """Where the numbers of each part's training people begin."""
        return [0, *accumulate(part.num_identities for part in self.parts)][:-1]

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attributes of the first part's faces, which validate and test."""
        return self.parts[0].attribute_names

    def people(self, split: Split) -> dict[int, str]:
        """Number → mark of each person of a split, as of a part; all parts train, the first one is tested."""
        if split != "train":
            return self.parts[0].people(split)
        numbered = zip(self.parts, self.first, strict=True)
        return {number + first: mark for part, first in numbered for number, mark in part.people(split).items()}

    @property
    def num_identities(self) -> int:
        """Number of training people of all parts."""
        return sum(part.num_identities for part in self.parts)

    def gallery_dataloader(self) -> Any:
        """All training faces of all parts, in order and as they are."""
        for part, first in zip(self._running, self.first, strict=True):
            for batch in part.gallery_dataloader():
                yield _numbered(batch, first)

    def val_dataloader(self) -> Any:
        """Validation faces of the first part."""
        return self._running[0].val_dataloader()

    def test_dataloader(self) -> Any:
        """Test faces of the first part."""
        return self._running[0].test_dataloader()

    def predict_dataloader(self) -> Any:
        """Test faces of the first part."""
        return self._running[0].predict_dataloader()

    @property
    def _running(self) -> list[FaceDataModule]:
        """The parts, told which trainer they serve: how many processes there are is its word."""
        for part in self.parts:
            part.trainer = self.trainer
        return self.parts

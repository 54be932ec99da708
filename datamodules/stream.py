"""Training faces as an endless stream: which come next depends on the seed and on how many came before, no more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.batch import FaceBatch


class Turn(NamedTuple):
    """Whose turn it is: what a stream asks a data set for.

    Attributes:
        row: Of the data set.
        seed: For what is drawn about this face in this turn, such as an augmentation.
    """

    row: int
    seed: int


class Turns(Sampler[list[Turn]]):
    """Batches of one process, from a position of the stream on.

    Round after round each face comes once, in an order of its own; a batch may reach from one round into the next.
    Of the positions of a batch each process takes every ``processes``-th: together they have what one process would.

    Args:
        faces: How many faces there are.
        batch_size: Faces in a batch of one process.
        seed: Where order and changes come from.
        processes: How many processes share the stream.
        rank: Which one this is.

    Attributes:
        start: Position of the next batch, in faces of all processes.
    """

    def __init__(self, faces: int, batch_size: int, seed: int, processes: int = 1, rank: int = 0) -> None:
        self.faces, self.batch_size, self.seed, self.processes, self.rank = faces, batch_size, seed, processes, rank
        self.start = 0

    @property
    def together(self) -> int:
        """Faces in a batch of all processes."""
        return self.batch_size * self.processes

    def __len__(self) -> int:
        return max(1, self.faces // self.together)

    def __iter__(self) -> Iterator[list[Turn]]:
        for batch in range(len(self)):
            first = self.start + batch * self.together + self.rank
            yield [self._turn(first + place * self.processes) for place in range(self.batch_size)]

    def _turn(self, position: int) -> Turn:
        around, place = divmod(position, self.faces)
        digest = sha256(f"{self.seed},{position}".encode()).digest()
        return Turn(_order(self.faces, self.seed, around)[place], int.from_bytes(digest[:4], "big") >> 1)


@lru_cache(maxsize=4)
def _order(faces: int, seed: int, around: int) -> list[int]:
    """The order of a round. One seed's rounds are not the next seed's."""
    return torch.randperm(faces, generator=torch.Generator().manual_seed(1_000_003 * seed + around)).tolist()


class Stream:
    """A loader of training faces that goes on where it was, in the same run and in a resumed one.

    A pass gives as many batches as there are whole ones in the data set, and the next pass goes on from there.
    Lightning keeps its state in checkpoints, in faces: a run that is resumed on another number of processes goes on as
    well.

    Args:
        faces: The data set; it is asked for each :class:`Turn`.
        batch_size: Faces in a batch of one process; fewer where there are not as many.
        seed: Where order and changes come from.
        processes: How many processes share the stream.
        rank: Which one this is.
        again: Whether every pass has the same faces in the same order, as to overfit on a few.
        **how: Passed on to the loader.
    """

    def __init__(
        self,
        faces: Dataset[FaceBatch],
        batch_size: int,
        seed: int,
        processes: int = 1,
        rank: int = 0,
        again: bool = False,
        **how: Any,
    ) -> None:
        most = max(1, len(faces) // processes)
        self.turns = Turns(len(faces), min(batch_size, most), seed, processes, rank)
        self.loader, self.position, self.again = DataLoader(faces, batch_sampler=self.turns, **how), 0, again

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[FaceBatch]:
        self.turns.start = self.position
        for batch in self.loader:
            self.position += 0 if self.again else self.turns.together
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many faces were handed out, by all processes together."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.position = state["position"]


class StreamingDataModule(L.LightningDataModule):
    """A data module whose training faces are a stream; it, and checkpoints, know how far that is."""

    _training: Any = None  # the loader of training faces, once there is one
    _before: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """How far the stream is."""
        return dict(self._before) if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._before, self._training = state_dict, None

    def _streamed(self, faces: Dataset[FaceBatch], batch_size: int, **how: Any) -> Stream:
        """A stream for this process, by the run's seed, from where the one before it was."""
        again = bool(getattr(self.trainer, "overfit_batches", 0))
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        return self._going_on(Stream(faces, batch_size, seed, *self._processes, again=again, **how))

    def _going_on(self, loader: Any) -> Any:
        """A loader, from where the one before it was."""
        if before := self.state_dict():
            loader.load_state_dict(before)
        self._training = loader
        return loader

    @property
    def _processes(self) -> tuple[int, int]:
        """How many processes there are, and which this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

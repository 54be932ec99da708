"""Pairs of anonymized and original pictures, for those who learn the way back."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Each original with what became of it, round after round; pictures are handed out as floats in [-1, 1].

    Args:
        shown: Originals.
        hidden: What became of them: each round another key.
    """

    def __init__(
        self, shown: UInt8[Tensor, "faces 3 size size"], hidden: UInt8[Tensor, "rounds faces 3 size size"]
    ) -> None:
        self.shown, self.hidden = shown, hidden

    def __len__(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        turn, face = divmod(row, len(self.shown))
        return self.hidden[turn, face].float() / 127.5 - 1, self.shown[face].float() / 127.5 - 1


EPOCH = 512  # fewest pairs of an epoch: of a few, each comes several times


class OneRound(Sampler[int]):
    """A round an epoch, in an order by the seed and the epoch alone: a training that goes on sees what it would have.

    Args:
        pairs: Whose rows.
        seed: Where the order comes from.
    """

    def __init__(self, pairs: Pairs, seed: int) -> None:
        self.pairs, self.seed, self.epoch = pairs, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the number of the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-EPOCH // len(self.pairs.shown)) * len(self.pairs.shown)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        faces = len(self.pairs.shown)
        start = self.epoch % len(self.pairs.hidden) * faces
        for _ in range(len(self) // faces):
            yield from (start + torch.randperm(faces, generator=generator)).tolist()


class PairDataModule(L.LightningDataModule):
    """Training batches of pairs; a last one that is not full is dropped.

    Args:
        pairs: The pairs.
        batch_size: Pairs in a batch.
        seed: Where their order comes from.
    """

    def __init__(self, pairs: Pairs, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """One round of keys each epoch."""
        sampler = OneRound(self.pairs, self.seed)
        return DataLoader(self.pairs, self.batch_size, sampler=sampler, drop_last=True)

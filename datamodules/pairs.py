"""Pairs of anonymized and original pictures, for one who learns the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """What became of each face, a first guess at its original, and the original: RGB in [-1, 1], round after round.

    Args:
        hidden: What became of the faces: each round another key.
        guessed: Guesses at the originals, likewise.
        shown: The originals.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "pairs 3 size size"],
        guessed: Float[Tensor, "pairs 3 size size"],
        shown: Float[Tensor, "faces 3 size size"],
    ) -> None:
        self.hidden, self.guessed, self.shown = hidden, guessed, shown

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden[row], self.guessed[row], self.shown[row % len(self.shown)]


class Steps(Sampler[list[int]]):
    """Rows of each training step; which depends on its number and the seed alone, so that a training can go on.

    Round after round each face comes once, in an order of its own; after the last round the first one comes again.

    Args:
        pairs: Whose rows.
        steps: Training steps in all.
        batch_size: Pairs in a batch.
        seed: Where the order comes from.
        done: How many steps are done when it starts.
    """

    def __init__(self, pairs: Pairs, steps: int, batch_size: int, seed: int, done: Callable[[], int]) -> None:
        self.pairs, self.steps, self.batch_size, self.seed, self.done = pairs, steps, batch_size, seed, done

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        faces, order = len(self.pairs.shown), {}
        for step in range(self.done(), self.steps):
            rows = []
            for at in range(step * self.batch_size, (step + 1) * self.batch_size):
                turn = at // faces
                if turn not in order:
                    generator = torch.Generator().manual_seed(1_000_003 * self.seed + turn)
                    start = turn * faces % len(self.pairs)
                    order = {turn: (start + torch.randperm(faces, generator=generator)).tolist()}
                rows.append(order[turn][at % faces])
            yield rows


class PairDataModule(L.LightningDataModule):
    """Pairs for a training of so many steps, as one long epoch.

    Args:
        pairs: The pairs.
        steps: Training steps in all.
        batch_size: Pairs in a batch.
        seed: Where their order comes from.
    """

    def __init__(self, pairs: Pairs, steps: int, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.pairs, self.steps, self.batch_size, self.seed = pairs, steps, batch_size, seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
        """The batches of the steps that are left."""

        def done() -> int:
            return 0 if self.trainer is None else self.trainer.global_step

        return DataLoader(self.pairs, batch_sampler=Steps(self.pairs, self.steps, self.batch_size, self.seed, done))

"""A judge's embeddings on the disk, so that no picture is embedded twice, by one run or the next."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.judges import Embedding, Image, Judge


class Remembering:
    """A judge that looks up what it has embedded before (ours).

    Everything but :meth:`embed` is the judge's own.

    Args:
        judge: Who embeds.
        file: SQLite file of embeddings, by the hash of the picture's values; made if it is not there.
        settings: All that makes its embeddings what they are, beside its name and weights.
    """

    def __init__(self, judge: Judge, file: Path, settings: str) -> None:
        self.judge, self.file, self.settings = judge, file, settings

    def __getattr__(self, name: str) -> Any:
        if name == "judge":  # not set yet, as while it is being copied
            raise AttributeError(name)
        return getattr(self.judge, name)

    def embed(self, images: Image) -> Embedding:
        """See :meth:`~lightning_modules.judges.Judge.embed`."""
        seed = f"{self.judge.name} {self.judge.weights} {self.settings} {tuple(images.shape[1:])}".encode()
        keys = [sha256(seed + image.float().cpu().contiguous().numpy().tobytes()).digest() for image in images]
        with closing(sqlite3.connect(self.file, timeout=60)) as store, store:
            store.execute("CREATE TABLE IF NOT EXISTS embeddings (picture BLOB PRIMARY KEY, vector BLOB)")
            known = {key: self._look_up(store, key) for key in set(keys)}
        new = [index for index, key in enumerate(keys) if known[key] is None and key not in keys[:index]]
        if new:
            made = dict(zip((keys[index] for index in new), self.judge.embed(images[new]), strict=True))
            with closing(sqlite3.connect(self.file, timeout=60)) as store, store:
                rows = [(key, vector.float().cpu().numpy().tobytes()) for key, vector in made.items()]
                store.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
            known |= made
        return torch.stack([known[key] for key in keys])

    @staticmethod
    def _look_up(store: sqlite3.Connection, key: bytes) -> Tensor | None:
        row = store.execute("SELECT vector FROM embeddings WHERE picture = ?", (key,)).fetchone()
        return None if row is None else torch.frombuffer(bytearray(row[0]), dtype=torch.float32)

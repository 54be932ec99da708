"""Identity codes instead of pictures: what a warm start in latent space trains on."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import lightning as L
import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules.archives import cache_folder
from datamodules.batch import FaceBatch, face_batch
from datamodules.contents import add_tensors
from datamodules.faces import FaceDataModule
from datamodules.files import write_tensors
from datamodules.splits import Split
from datamodules.stream import Stream, StreamingDataModule, Turn


class Codes(Dataset[FaceBatch]):
    """Codes ``(n, d)`` as faces without pictures: ``image`` is ``(3, 1, 1)`` and black.

    Args:
        codes: Identity codes.
        identity: Number of each person.
    """

    def __init__(self, codes: Tensor, identity: Tensor) -> None:
        self.codes, self.identity = codes, identity

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, at: int | Turn) -> FaceBatch:
        row = at.row if isinstance(at, Turn) else at
        blank = torch.full((3, 1, 1), -1.0)
        return face_batch(blank, z=self.codes[row], identity=self.identity[row], sample=torch.tensor(row))


class LatentDataModule(StreamingDataModule):
    """Identity codes of the training faces of another data module (or of its parts), computed once and cached.

    The cache's name holds the hashes of the faces and of the identity network.

    Args:
        faces: Whose training faces.
        recognizer: Frozen identity network, pictures ``(B, 3, H, W)`` → codes ``(B, d)``.
        batch_size: Codes in a batch, on each process.
    """

    def __init__(self, faces: L.LightningDataModule, recognizer: nn.Module, batch_size: int = 256) -> None:
        super().__init__()
        self.faces, self.recognizer, self.batch_size = faces, recognizer, batch_size

    def prepare_data(self) -> None:
        """Compute the codes, on one process."""
        self.codes()

    def codes(self) -> Codes:
        """Codes of the training faces, in order.

        Raises:
            ValueError: If the data set has no training faces.
        """
        return Codes(*gallery_codes(self.faces, self.recognizer))

    def train_dataloader(self) -> Stream:
        """Shuffled codes without an end."""
        return self._streamed(self.codes(), self.batch_size)

    def gallery_dataloader(self) -> Any:
        """All codes, in order."""
        return DataLoader(self.codes(), self.batch_size)

    def people(self, split: Split) -> dict[int, str] | None:
        """Number → mark of each person of a split, as of the faces; ``None`` where they have no marks."""
        return self.faces.people(split) if hasattr(self.faces, "people") else None

    def val_dataloader(self) -> list[Any]:
        """None: figures are taken on pictures."""
        return []


def gallery_codes(faces: L.LightningDataModule, recognizer: nn.Module) -> tuple[Tensor, Tensor]:
    """Identity codes ``(n, d)`` of all training faces, in order, and the numbers of their people ``(n,)``; cached.

    Args:
        faces: A data module of faces, or of codes.
        recognizer: Frozen identity network, pictures ``(B, 3, H, W)`` → codes ``(B, d)``.
    """
    if isinstance(faces, LatentDataModule):
        faces = faces.faces
    found = [_cached(part, recognizer) for part in getattr(faces, "parts", [faces])]
    first = getattr(faces, "first", [0])  # where the numbers of each part's people begin
    people = [part["identity"] + start for part, start in zip(found, first, strict=True)]
    return torch.cat([part["codes"] for part in found]), torch.cat(people)


@torch.no_grad()
def _cached(part: L.LightningDataModule, recognizer: nn.Module) -> dict[str, Tensor]:
    if not isinstance(part, FaceDataModule):  # nothing to name a cache by
        rows = [
            (recognizer(batch.image.to(_device(recognizer))).cpu(), batch.identity)
            for batch in part.gallery_dataloader()
        ]
        return {"codes": torch.cat([z for z, _ in rows]), "identity": torch.cat([i for _, i in rows])}
    name = part.dataset("train").name
    known = getattr(recognizer, "card_hashes", {})
    digest = sha256(f"{name} {' '.join(f'{k}={v}' for k, v in sorted(known.items()))}".encode())
    if not known:
        add_tensors(digest, recognizer)
    path = cache_folder() / "codes" / f"{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        device = _device(recognizer)
        batches = track(part.gallery_dataloader(), f"identity codes of {part.faces.name}")
        rows = [(recognizer(batch.image.to(device)).cpu(), batch.identity) for batch in batches]
        write_tensors(path, {"codes": torch.cat([z for z, _ in rows]), "identity": torch.cat([i for _, i in rows])})
    return load_file(path)


def _device(network: nn.Module) -> torch.device:
    return next(iter([*network.parameters(), *network.buffers()]), torch.zeros(())).device

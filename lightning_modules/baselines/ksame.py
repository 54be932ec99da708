"""k-same (Newton, Sweeney & Malin, 2005): every face becomes the mean of k faces of a gallery."""

from __future__ import annotations

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer, resize


class KSame(ReversibleAnonymizer):
    """Mean picture of the k gallery faces nearest in identity space, none of them the person.

    Averaging aligned pictures gives ghostly faces; that is what the method does. The gallery holds training people
    only, one picture each, so the 1/k bound is against a gallery that the shown person is not even in.

    Args:
        recognizer: Frozen identity network that measures "near".
        k: Faces averaged.
        size: Pixels of a picture.
        gallery_size: Largest number of gallery people.
    """

    reversible = False

    def __init__(self, recognizer: nn.Module, k: int = 5, size: int = 128, gallery_size: int = 1000) -> None:
        super().__init__()
        self.recognizer, self.k, self.size, self.gallery_size = recognizer, k, size, gallery_size
        self.loss_networks = frozenset(getattr(recognizer, "card_hashes", {}))
        self.gallery: Tensor | None = None
        self.codes: Tensor | None = None

    @torch.no_grad()
    def prepare(self, datamodule: LightningDataModule) -> None:
        """Collect one picture of each training person.

        Raises:
            ValueError: If there are fewer than ``k`` training people.
        """
        if self.gallery is not None:
            return
        seen: set[int] = set()
        pictures, codes = [], []
        for batch in datamodule.gallery_dataloader():
            fresh = [i for i, person in enumerate(batch.identity.tolist()) if not (person in seen or seen.add(person))]
            if fresh:
                image = resize(batch.image[fresh], self.size)
                pictures.append((image * 127.5 + 127.5).round().byte())
                codes.append(self.recognizer(image.to(self.device)).cpu())
            if len(seen) >= self.gallery_size:
                break
        if len(seen) < self.k:
            raise ValueError(f"k-same needs at least k = {self.k} training people, found {len(seen)}")
        self.gallery, self.codes = torch.cat(pictures), torch.cat(codes)

    def anonymize(self, face: FaceBatch, key: Tensor) -> Image:
        """Average the k nearest gallery faces.

        Raises:
            ValueError: If there is no gallery yet.
        """
        if self.gallery is None:
            raise ValueError("k-same has no gallery yet: call prepare(datamodule) first")
        cosine = self.recognizer(face.image).cpu() @ self.codes.T
        nearest = cosine.topk(self.k, dim=1).indices
        return (self.gallery[nearest].float().mean(1) / 127.5 - 1).to(face.image.device)

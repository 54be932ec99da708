"""One verb of a method on the faces of pictures, as Lightning predicts: each face under a key of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from datamodules.batch import FaceBatch
from lightning_modules.anonymizer import Image, ReversibleAnonymizer
from lightning_modules.keys import Key


class PhotoStep(L.LightningModule):
    """Anonymizes or recovers a batch of faces.

    Args:
        method: The method, in eval mode.
        verb: Which of its two verbs.
        key_of: A face's running number → its key; when anonymizing, a fresh one at every call.
    """

    def __init__(
        self, method: ReversibleAnonymizer, verb: Literal["anonymize", "recover"], key_of: Callable[[int], Key]
    ) -> None:
        super().__init__()
        self.method, self.verb, self.key_of = method, verb, key_of

    @property
    def keyed(self) -> bool:
        """Whether another key makes another face."""
        return self.method.key_spec.kind != "none"

    def predict_step(self, batch: FaceBatch, batch_idx: int = 0) -> Image:
        """What the method makes of the faces, ``(B, 3, size, size)`` in [-1, 1]."""
        keys = [self.method.key_spec.numbers(self.key_of(int(sample))) for sample in batch.sample]
        numbers = torch.stack(keys).to(batch.image.device)
        verb: Callable[[FaceBatch, Tensor], Tensor] = getattr(self.method, self.verb)
        return verb(self.method.fit_size(batch), numbers)

"""One verb of a method on the faces of pictures, as Lightning predicts: each face under a key of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

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
        code_of: When recovering, a face's running number → the code that was sealed, or ``None``.
    """

    def __init__(
        self,
        method: ReversibleAnonymizer,
        verb: Literal["anonymize", "recover"],
        key_of: Callable[[int], Key],
        code_of: Callable[[int], Tensor | None] = lambda sample: None,
    ) -> None:
        super().__init__()
        self.method, self.verb, self.key_of, self.code_of = method, verb, key_of, code_of

    @property
    def keyed(self) -> bool:
        """Whether another key makes another face."""
        return self.method.key_spec.kind != "none"

    def predict_step(self, batch: FaceBatch, batch_idx: int = 0) -> Image:
        """What the method makes of the faces, ``(B, 3, size, size)`` in [-1, 1]."""
        face, samples = self.method.fit_size(batch), [int(sample) for sample in batch.sample]
        keys = torch.stack([self.method.key_spec.numbers(self.key_of(sample)) for sample in samples])
        codes = [self.code_of(sample) for sample in samples]
        if all(code is None for code in codes):
            verb: Callable[[FaceBatch, Tensor], Tensor] = getattr(self.method, self.verb)
            return verb(face, keys.to(face.image))
        made = torch.empty_like(face.image)
        for sealed in (True, False):
            rows = [index for index, code in enumerate(codes) if (code is not None) == sealed]
            if not rows:
                continue
            part = FaceBatch(*(value[rows] for value in face))
            if sealed:
                made[rows] = self.method.recover_from(part, torch.stack([codes[row] for row in rows]).to(part.image))
            else:
                made[rows] = self.method.recover(part, keys[rows].to(part.image))
        return made


def predict_photos(
    step: PhotoStep, photos: L.LightningDataModule, paste: L.Callback, machines: Mapping[str, Any]
) -> None:
    """One pass over faces under Lightning, which says nothing of itself.

    Args:
        step: What becomes of a batch of faces.
        photos: The faces.
        paste: What puts them back.
        machines: What Lightning's trainer is told of accelerator, devices, nodes and strategy.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it tells of devices and tips
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(infer the batch indices|num_workers|IterableDataset|GPU available)"
        )
        L.Trainer(
            **machines,
            callbacks=[paste],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # refinement takes gradients
        ).predict(step, datamodule=photos, return_predictions=False)

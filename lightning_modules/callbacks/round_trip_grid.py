"""A picture of round trips for every logger: a row a face, a column a leg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_modules.anonymizer import RoundTrip, resize
from lightning_modules.carriers import to_pixels

TITLES = {
    "original": "original",
    "anonymized": "anonymized",
    "other": "other key",
    "recovered": "recovered",
    "wrongly_recovered": "wrong key",
    "nearly_recovered": "nearly right key",
    "inverted": "inverted",
}
HEAD, GAP = 22, 2  # pixels: height of the titles, white space between tiles


def grid_picture(trip: RoundTrip, titles: dict[str, str] | None = None, tile: int | None = None) -> Image.Image:
    """Draw round trips as one picture: a row a face, a titled column for each leg that is present.

    Args:
        trip: The faces, as many rows.
        titles: Field of the round trip → title, in the order of the columns; ``None`` shows all under usual
            names.
        tile: Side of a tile in pixels; ``None`` keeps the pictures' size, but no less than 96, so that titles
            fit.

    Raises:
        ValueError: If there is no face, or none of the asked legs.
    """
    titles = TITLES if titles is None else titles
    columns = [(title, getattr(trip, field)) for field, title in titles.items()]
    columns = [(title, images) for title, images in columns if images.numel()]
    if not columns:
        raise ValueError(f"no picture to draw: the round trip has none of {', '.join(titles)}")
    return sheet(columns, tile)


def sheet(columns: list[tuple[str, Tensor]], tile: int | None = None, names: list[str] | None = None) -> Image.Image:
    """Draw titled columns of pictures ``(n, 3, H, H)`` in [-1, 1], a row for each of the n, perhaps with its name."""
    tile = tile or max(96, columns[0][1].shape[-1])
    rows, font = len(columns[0][1]), ImageFont.load_default(13)
    margin = 2 * GAP + max((round(font.getlength(name)) for name in names), default=0) if names else 0
    canvas = Image.new("RGB", (margin + len(columns) * (tile + GAP) - GAP, HEAD + rows * (tile + GAP) - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(names or []):
        draw.text((margin - 2 * GAP, HEAD + row * (tile + GAP) + tile // 2), name, "black", font, anchor="rm")
    for column, (title, images) in enumerate(columns):
        left = margin + column * (tile + GAP)
        draw.text((left + tile // 2, HEAD // 2), title, "black", font, anchor="mm")
        for row, image in enumerate(resize(images.float().cpu(), tile)):
            canvas.paste(Image.fromarray(to_pixels(image)), (left, HEAD + row * (tile + GAP)))
    return canvas


class RoundTripGrid(Callback):
    """Shows the first faces of each validation and test to every logger of the trainer.

    Loggers with ``log_image`` (Weights & Biases) get it there, those whose experiment has ``add_image``
    (TensorBoard) there, all others a PNG file in their folder. The grid shows faces as they are: with real
    people and a logger that leaves the machine, set ``faces`` to 0 or drop this callback.

    Args:
        faces: Rows of the grid.
        every_n_epochs: Draw each so many validations.
        tile: Side of a tile in pixels; ``None`` as in :func:`grid_picture`.
    """

    def __init__(self, faces: int = 8, every_n_epochs: int = 1, tile: int | None = None) -> None:
        if faces < 0 or every_n_epochs < 1:
            raise ValueError(f"expected faces >= 0 and every_n_epochs >= 1, got {faces} and {every_n_epochs}")
        self.faces, self.every_n_epochs, self.tile = faces, every_n_epochs, tile
        self._kept: list[RoundTrip] = []

    def _keep(self, trainer: L.Trainer, outputs: Any) -> None:
        room = self.faces - sum(len(trip.original) for trip in self._kept)
        if trainer.is_global_zero and room > 0 and isinstance(outputs, RoundTrip):
            self._kept.append(RoundTrip(*(field[:room].detach().cpu() for field in outputs)))

    def _show(self, trainer: L.Trainer, stage: str) -> None:
        kept, self._kept = self._kept, []
        if not kept or (stage == "val" and trainer.current_epoch % self.every_n_epochs):
            return
        trip = RoundTrip(*(torch.cat(fields) for fields in zip(*kept, strict=True)))
        picture = grid_picture(trip, tile=self.tile)
        for logger in trainer.loggers:
            send(logger, f"{stage}/round_trip", picture, trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first faces."""
        if not trainer.sanity_checking:
            self._keep(trainer, outputs)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first faces."""
        self._keep(trainer, outputs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw ``val/round_trip``."""
        self._show(trainer, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw ``test/round_trip``."""
        self._show(trainer, "test")


def send(logger: Any, name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to a logger by what it can do; no logger's package is imported."""
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif folder := logger.log_dir or logger.save_dir:
        path = Path(folder) / f"{name.replace('/', '_')}-{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

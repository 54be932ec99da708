"""Checkpoints in training steps: the newest under one name, whole or not there, and the end of a run never lost."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place, onto the disk, and then renames them.

    Lightning's own are moved from the system's folder for temporary files, which is no renaming where that lies on
    another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            OSError: If it cannot be written; what was there before is there still.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # torch's word for a full disk
                    raise OSError(f"{path} cannot be written: {' '.join(str(error).split())[:200]}") from error
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


class TrainingCheckpoint(ModelCheckpoint):
    """Writes ``checkpoints/last.ckpt`` every so many training steps, when a run ends, and when it is told to stop.

    A run that breaks off between two batches saves, too, unless others run beside it, which would not save with it; one
    that breaks off within a batch does not: some networks would have made the step, and others not.

    A run that starts anew in a folder that holds checkpoints moves them aside first (``checkpoints-1``, …); a resumed
    one goes on among them.

    Args:
        every_n_train_steps: Training steps between checkpoints; only the generator's optimizer counts.
        dirpath: Folder of the checkpoints; by default ``checkpoints`` in the trainer's root.
    """

    def __init__(self, every_n_train_steps: int = 500, dirpath: str | Path | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=1,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._within, self._asked, self._stepped = True, False, 0
        self._before: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder, and how files are written."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO and "://" not in self.dirpath:
            trainer.strategy.checkpoint_io = WholeFiles()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """When training starts anew, move older checkpoints aside.

        Raises:
            ValueError: If processes have resumed from different checkpoints.
        """
        super().on_train_start(trainer, pl_module)
        if trainer.strategy.broadcast(trainer.global_step) != trainer.global_step:
            raise ValueError(
                "processes would go on from different steps: is the run's folder the same for all of them?"
            )
        self._note_signals()
        self._stepped, folder = trainer.global_step, Path(self.dirpath)
        if trainer.global_step or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        if (folder / "last.ckpt").exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
                number += 1
            folder.rename(aside)

    def on_train_batch_start(self, trainer: L.Trainer, *others: Any) -> None:
        """From here on networks are half-way."""
        self._within = True

    def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
        """They have all made their step."""
        self._within = False
        super().on_train_batch_end(trainer, *others)
        asked = self._asked
        if trainer.world_size > 1:  # whoever was asked, all stop after the same batch
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and trainer.global_step > self._stepped:  # not in the midst of an accumulation
            trainer._signal_connector.received_sigterm = True  # where Lightning's loop looks after each batch
        self._stepped = trainer.global_step

    def on_validation_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
        """Do not let a stop wait for the end of a validation; several processes do: their batches may differ in number.

        Raises:
            SIGTERMException: If the run was told to stop.
        """
        if trainer.state.fn == "fit" and trainer.world_size == 1 and self._asked:
            raise SIGTERMException

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what is whole."""
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)  # that one reaches all processes
        if trainer.state.fn == "fit" and together and not self._within:
            self._save_newest(trainer)

    def _note_signals(self) -> None:
        """From here on SIGTERM and the first Ctrl-C ask for a stop after the step at hand; the second stops at once.

        Lightning's own handler of SIGTERM talks to the other processes in the midst of whatever they are exchanging.
        """
        if threading.current_thread() is not threading.main_thread() or self._before:
            return

        def note(number: int, frame: Any) -> None:
            self._asked = True
            if signal.SIGINT in self._before:
                signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))

        self._asked = False
        self._before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let Ctrl-C stop at once again."""
        while self._before:
            signal.signal(*self._before.popitem())
        super().teardown(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the very last step too."""
        if not trainer.fast_dev_run:
            super().on_train_end(trainer, pl_module)
            self._save_newest(trainer)

    def _save_newest(self, trainer: L.Trainer) -> None:
        if trainer.global_step and not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of most training steps that can be read; ``None`` where there is none.

    Args:
        folder: Of ``.ckpt`` files.

    Raises:
        ValueError: If there are some, and none can be read.
    """
    found: list[tuple[int, bool, Path]] = []
    files = sorted(Path(folder).glob("*.ckpt"))
    for path in files:
        try:
            steps = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        except Exception:  # whatever is wrong with it, another may do
            continue
        found.append((int(steps), path.name == "last.ckpt", path))
    if files and not found:
        raise ValueError(f"none of the {len(files)} checkpoints in {folder} can be read; move them away to begin anew")
    return max(found)[2] if found else None

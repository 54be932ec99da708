"""The measurements of a run: every method is judged here, so that no method is measured differently."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_modules.anonymizer import RoundTrip
from lightning_modules.calibration import load_calibration
from lightning_modules.judges import Judge
from lightning_modules.metrics.identity import IdentityScores
from lightning_modules.metrics.measured import RoundTripMetric
from lightning_modules.metrics.recovery import PictureQuality
from lightning_modules.protocol import Figure


class RoundTripMetrics(Callback):
    """Measures the round trips of validation and test, and logs ``val/…`` and ``test/…`` when an epoch ends.

    Picture quality always; figures of identity for each judge, as
    ``val/JUDGE/anonymized/tar@far=1e-3/same-image``. Metrics are synchronized over processes. After a test,
    ``figures`` holds the lines of results with intervals (without method, data, config …, which the caller
    adds).

    Args:
        judges: Frozen recognisers (:class:`~lightning_modules.judges.Judge`) that no loss of the method used.
        thresholds: Judge's name → accepting similarity, instead of the committed calibration. A judge with
            neither is calibrated at a FAR of 0.1 % on the originals of the run, and has no acceptance figures
            where they make fewer than a thousand pairs of strangers.
        lpips: Also measure LPIPS, where its weights exist.
        max_faces: Faces of validation that are measured, of all processes together; bounds memory and time.
            ``None``: all. A test always measures all.
        allow_loss_judges: Accept a judge that is also a loss network; such figures flatter the method.
    """

    def __init__(
        self,
        judges: list[object] | None = None,  # of Judge, to which the command line's parser matches no class
        thresholds: dict[str, float] | None = None,
        lpips: bool = False,
        max_faces: int | None = 512,
        allow_loss_judges: bool = False,
    ) -> None:
        judges, thresholds = judges or [], thresholds or {}
        if strangers := [type(judge).__name__ for judge in judges if not isinstance(judge, Judge)]:
            raise ValueError(f"expected judges, as of lightning_modules.judges, got {strangers[0]}")
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise ValueError(f"each judge needs a name of its own, got {', '.join(names)}")
        if unknown := thresholds.keys() - set(names):
            raise ValueError(f"thresholds for {', '.join(sorted(unknown))}; the judges are {', '.join(names)}")
        self.judges, self.thresholds, self.lpips = tuple(judges), thresholds, lpips
        self.max_faces, self.allow_loss_judges = max_faces, allow_loss_judges
        self.metrics: dict[str, RoundTripMetric] = {}
        self.figures: list[Figure] = []
        self._seen = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a judge that is a loss network of the method, and build the metrics.

        Raises:
            ValueError: If a judge shares a network with the method's losses.
        """
        for judge in self.judges:
            shared = judge.networks & getattr(pl_module, "loss_networks", frozenset())
            if shared and not self.allow_loss_judges:
                raise ValueError(
                    f"judge {judge.name!r} is a loss network of this method ({', '.join(sorted(shared))}); "
                    "take another judge, or set allow_loss_judges to see figures that flatter the method"
                )
        kind = getattr(getattr(pl_module, "key_spec", None), "kind", None)
        near_key = "cosine-0.9" if kind == "normal" else "one-bit"
        self.metrics = {"": PictureQuality(("lpips",) if self.lpips else (), near_key)}
        for judge in self.judges:
            self.metrics[f"{judge.name}/"] = IdentityScores(judge, self._threshold(judge), near_key)

    def _threshold(self, judge: Judge) -> float | None:
        if judge.name in self.thresholds:
            return self.thresholds[judge.name]
        try:
            return load_calibration(judge).threshold
        except (ValueError, OSError):  # never calibrated, or with other weights
            return None

    def _start(self, pl_module: L.LightningModule) -> None:
        self._seen = 0
        for metric in self.metrics.values():
            metric.reset()
            metric.to(pl_module.device)

    def _update(self, trip: Any, most: int | None) -> None:
        if not isinstance(trip, RoundTrip):
            raise ValueError(f"the evaluation step must return a RoundTrip, got {type(trip).__name__}")
        room = len(trip.original) if most is None else min(most - self._seen, len(trip.original))
        if room > 0:
            self._seen += room
            for metric in self.metrics.values():
                metric.update(RoundTrip(*(field[:room] for field in trip)))

    def _log(self, pl_module: L.LightningModule, stage: str) -> None:
        for prefix, metric in self.metrics.items():
            values = metric.compute()
            named = {f"{stage}/{prefix}{name}": value.to(pl_module.device) for name, value in values.items()}
            # Equal on every process already; sync_dist only spares Lightning's warning for each of them.
            pl_module.log_dict(named, sync_dist=True)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last epoch."""
        self._start(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last epoch."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the round trip that ``validation_step`` returned."""
        if not trainer.sanity_checking:
            most = self.max_faces
            self._update(outputs, None if most is None else math.ceil(most / trainer.world_size))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the round trip that ``test_step`` returned."""
        self._update(outputs, None)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``val/…``."""
        if not trainer.sanity_checking:
            self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``test/…`` and keep the lines of results."""
        self._log(pl_module, "test")
        self.figures = [figure for metric in self.metrics.values() for figure in metric.figures()]

"""Manual optimisation that several methods share: whose turn it is, accumulation, clipping, and what counts as a step.

Lightning refuses ``accumulate_grad_batches`` and ``gradient_clip_val`` under manual optimisation, and its
``global_step`` counts every optimizer. Here both are the method's own arguments, and only the optimizer that
``counts`` advances ``global_step``: checkpoints, ``max_steps`` and curves speak in *training steps*.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from datamodules.files import write_tensors
from lightning_modules.keys import KeySpec
from lightning_modules.processes import world
from lightning_modules.trained import load_trained


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from whole numbers, the same on every platform and in every process."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class DivergedError(ValueError):
    """Gradients that are infinite or not numbers."""


class TrainingSteps(L.LightningModule):
    """A LightningModule that steps its optimizers by hand.

    Args:
        accumulate: Batches whose gradients add up to one training step.
        clip: Largest norm of each optimizer's gradients; ``None`` leaves them as they are.
        seed: Where training keys come from, together with the step and the sample.
        start: Trained weights to start from, or to measure (checkpoint, safetensors or card); a checkpoint that is
            resumed or measured takes their place.
        decay: Let the learning rate of :meth:`scheduled` optimizers fall to zero along a cosine over ``max_steps``.
    """

    learning_rate: float

    def __init__(
        self,
        accumulate: int = 1,
        clip: float | None = None,
        seed: int = 0,
        start: str | Path | None = None,
        decay: bool = False,
    ) -> None:
        super().__init__()
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.automatic_optimization = False
        self.accumulate, self.clip, self.seed, self.start, self.decay = accumulate, clip, seed, start, decay
        self.training_seconds, self._resumed_at, self._started = 0.0, 0.0, False
        self.trained_on: frozenset[str] | None = frozenset()
        """Marks of the people who trained it and what it started from; ``None`` where that is not known."""

    def setup(self, stage: str) -> None:
        """Load the weights to start from."""
        if stage == "fit":
            self._load_start()

    def on_validation_start(self) -> None:
        """Measure the weights to start from where nothing was trained or loaded."""
        self._load_start()
        super().on_validation_start()

    def on_test_start(self) -> None:
        """As for validation."""
        self._load_start()
        super().on_test_start()

    def on_predict_start(self) -> None:
        """As for validation."""
        self._load_start()
        super().on_predict_start()

    def _load_start(self) -> None:
        if self.start is not None and not self._started:
            load_trained(self, self.start)
        self._started = True

    def on_train_start(self) -> None:
        """Start the clock, and note who trains."""
        self._resumed_at = time.monotonic() - self.training_seconds
        datamodule = getattr(self.trainer, "datamodule", None)
        people = datamodule.people("train") if hasattr(datamodule, "people") else None
        if people is None or self.trained_on is None:
            self.trained_on = None
        else:
            self.trained_on |= frozenset(people.values())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how long and on whom was trained, over all resumed runs, beside what other bases note."""
        super().on_save_checkpoint(checkpoint)
        if self._resumed_at:
            self.training_seconds = time.monotonic() - self._resumed_at
        checkpoint["training_seconds"] = self.training_seconds
        checkpoint["trained_on"] = None if self.trained_on is None else sorted(self.trained_on)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the time already trained, and from nothing else."""
        self._started = True
        super().on_load_checkpoint(checkpoint)
        self.training_seconds = checkpoint.get("training_seconds", 0.0)
        people = checkpoint.get("trained_on")
        self.trained_on = None if people is None else frozenset(people)

    @contextmanager
    def turn_of(self, optimizer: LightningOptimizer) -> Iterator[None]:
        """Within, only this optimizer's parameters take gradients."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def descend(self, loss: Tensor, optimizer: LightningOptimizer, batch_idx: int, *, counts: bool = False) -> None:
        """Add the gradients of ``loss``; at the end of an accumulation, clip and step.

        Args:
            loss: A scalar.
            optimizer: Whose turn it is.
            batch_idx: Number of the batch, which tells where an accumulation ends.
            counts: Whether this step is the one that advances ``global_step``; true for exactly one optimizer.

        Raises:
            DivergedError: If a gradient is infinite or not a number: this optimizer makes no step, the batch is saved.
        """
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate and not self.trainer.is_last_batch:
            return
        before, after = optimizer._on_before_step, optimizer._on_after_step
        if not counts:  # these two callbacks are Lightning's progress counter
            optimizer._on_before_step = optimizer._on_after_step = lambda: None
        try:
            optimizer.step()
        finally:
            optimizer._on_before_step, optimizer._on_after_step = before, after
        optimizer.zero_grad()
        if counts and self.decay:
            schedulers = self.lr_schedulers()
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                if scheduler.optimizer.state:  # a first stage may leave some networks alone
                    scheduler.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and see that gradients are numbers; under fp16 they have been scaled back by now.

        Raises:
            DivergedError: If one is infinite or not a number; under fp16 the scaler leaves such a step out instead.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if self.clip is None else self.clip)
        if not norm.isfinite() and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self._give_up()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch at hand, in case it breaks the training."""
        self._batch = batch

    def _give_up(self) -> None:
        """Save the batch that gave no numbers.

        Raises:
            DivergedError: Always.
        """
        folder = Path(self.trainer.default_root_dir)
        path = folder / f"diverged-step-{self.global_step}-process-{self.global_rank}.safetensors"
        fields = self._batch._asdict() if hasattr(self._batch, "_asdict") else {}
        write_tensors(path, {name: value for name, value in fields.items() if isinstance(value, Tensor)})
        raise DivergedError(
            f"the gradients of training step {self.global_step} are not numbers; its batch is in {path}. Go on from "
            "the last checkpoint with a lower learning rate, or with clipping (model.init_args.clip)"
        )

    def log_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Log the terms of a training step, each the mean over all processes."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        if world()[0] > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        self.log_dict(dict(zip(terms, values, strict=True)))

    def adversaries(self, *groups: Iterable[nn.Module | nn.Parameter]) -> Any:
        """:meth:`scheduled` Adam (0.5, 0.999), as where networks compete, for each group of networks and parameters."""
        parameters = [
            [p for part in group for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
            for group in groups
        ]
        return self.scheduled(
            *(torch.optim.Adam(group, lr=self.learning_rate, betas=(0.5, 0.999)) for group in parameters)
        )

    def scheduled(self, *optimizers: torch.optim.Optimizer) -> Any:
        """What ``configure_optimizers`` returns: the optimizers, and their schedules if they decay.

        Raises:
            ValueError: If the learning rate is to decay over a training without an end.
        """
        if not self.decay:
            return list(optimizers)
        steps = self.trainer.max_steps
        if steps <= 0:
            raise ValueError("decay: true lets the learning rate fall over trainer.max_steps, which is not set")
        warm_up = min(100, steps // 10)

        def factor(step: int) -> float:
            return min((step + 1) / (warm_up + 1), (1 + math.cos(math.pi * min(step / steps, 1))) / 2)

        return list(optimizers), [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]

    def training_keys(self, spec: KeySpec, sample: Tensor, leg: int) -> Tensor:
        """Random keys, one a sample, drawn from (seed, step, sample, leg): the same on one process and on many."""
        rows = [
            spec.random(1, torch.Generator().manual_seed(seed_of(self.seed, self.global_step, int(s), leg)))
            for s in sample
        ]
        return torch.cat(rows).to(sample.device)

"""Trainings for ``keyveil benchmark``: how long steps take and wait, what a plain loop makes of the same networks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from experiments.build import build, configuration, method_spec, read_yaml
from experiments.instruments import Flops, memory, now, resident
from lightning_modules.anonymizer import ReversibleAnonymizer

ROUNDS = 7  # timed ones


class StepClock(L.Callback):
    """Clocks a training by rounds of steps, from the second round on.

    What goes by between two steps counts as waiting for data: fetching the batch, beginning the data set anew, moving
    it to the device, and the little that Lightning does then. So it is never told too low.

    Args:
        steps: Training steps of a round: as many as it takes until steps are alike again.
        file: Where to write what was found at the end; ``None``: nowhere.

    Attributes:
        seconds: Of each round after the first.
        waited: Of all these seconds, those between steps.
        resident: Bytes of main memory held after each round, the first included.
    """

    def __init__(self, steps: int, file: str | None = None) -> None:
        self.steps, self.file = steps, file
        self.seconds: list[float] = []
        self.resident: list[int] = []
        self.waited, self.done, self._began, self._ended = 0.0, 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """A step begins."""
        if self.done >= self.steps:
            self.waited += now(pl_module.device) - self._ended

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """A step has ended, and perhaps a round."""
        self._ended = now(pl_module.device)
        self.done += 1
        if self.done % self.steps == 0:
            if self.done > self.steps:
                self.seconds.append(self._ended - self._began)
            self.resident.append(resident())
            self.between_rounds(pl_module)
            self._began = self._ended = now(pl_module.device)

    def between_rounds(self, method: L.LightningModule) -> None:
        """Something that is not clocked."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it down, on the first process."""
        if self.file is not None and trainer.is_global_zero:
            found = {"seconds": self.seconds, "resident": self.resident, "peak": memory(pl_module.device, peak=True)}
            Path(self.file).write_text(json.dumps(found))


class PlainLoop:
    """The networks of a training step once more, each forward and backward: no losses, no optimizers, no Lightning.

    From when it is made until :meth:`stop` it notes which networks are called with what. A call repeats them.

    Args:
        method: Whose networks.
    """

    def __init__(self, method: nn.Module) -> None:
        self.calls: list[tuple[nn.Module, Any, bool]] = []
        self._depth = 0
        self._hooks = [
            hook
            for module in method.modules()
            if module is not method
            for hook in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]

    def _enter(self, module: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self._depth:  # what a network calls within is the network's
            kept = pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), (words, named))
            self.calls.append((module, kept, torch.is_grad_enabled()))
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1

    def stop(self) -> None:
        """Note no more calls."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self) -> None:
        """Repeat them; gradients are dropped."""
        for module, (words, named), grad in self.calls:
            with torch.set_grad_enabled(grad):
                made = module(*words, **named)
                ends = [x.sum() for x in pytree.tree_leaves(made) if isinstance(x, Tensor) and x.requires_grad]
            if ends:
                sum(ends).backward()
            module.zero_grad()
            pytree.tree_map_only(Tensor, _forget_gradient, (words, named))


def _forget_gradient(x: Tensor) -> None:
    x.grad = None


class _Measuring(StepClock):
    """Counts the arithmetic of the first round, and after each later one runs the plain loop of its last step."""

    def __init__(self, steps: int, counting: contextlib.ExitStack) -> None:
        super().__init__(steps)
        self.counting, self.plain_seconds = counting, []

    def on_train_start(self, *_: Any) -> None:
        self.counter = self.counting.enter_context(Flops())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        super().on_train_batch_start(trainer, pl_module)
        if self.done == self.steps - 1:
            self.plain = PlainLoop(pl_module)

    def between_rounds(self, method: L.LightningModule) -> None:
        if not self.seconds:
            self.counting.close()
            self.plain.stop()
            with Flops() as counter:
                self.plain()
            self.flops, self.plain_flops = self.counter.total, counter.total
            return
        began = now(method.device)
        self.plain()
        self.plain_seconds.append(now(method.device) - began)


class Training:
    """A method's training on ORL's faces.

    Args:
        method: Name of its file below configs/method/.
        model: What to change in ``init_args`` of that file.
        data: What to change in ``init_args`` of configs/data/orl.yaml; ``size`` and ``batch_size`` at least.
        steps: Training steps of a round.
        device: Where it trains.

    Attributes:
        seconds: Of the last call's rounds but the first, on a call of the classes below.
        figures: What else that call found, by metric.

    Raises:
        WeightsError: The faces or a network are not there.
    """

    def __init__(
        self, method: str, model: dict[str, Any], data: dict[str, Any], steps: int, device: torch.device
    ) -> None:
        self.files = (f"configs/method/{method}.yaml", "configs/data/orl.yaml")
        self.changes = {"model": {"init_args": model}, "data": {"init_args": data}}
        self.steps, self.device = steps, device
        self.seconds: list[float] = []
        self.figures: dict[str, float] = {}
        faces = read_yaml(configuration(self.files[1]))["data"]
        self.data = build(L.LightningDataModule, {**faces, "init_args": {**faces["init_args"], **data}}, "data")
        self.data.dataset("train")  # aligned before the clock runs
        spec = method_spec({"config": self.files[0], "init_args": model})
        self.method = build(ReversibleAnonymizer, {k: spec[k] for k in ("class_path", "init_args")}, "method")

    def train(self, steps: int, *callbacks: L.Callback) -> None:
        """Train in this process, without logger and checkpoints."""
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with (
            tempfile.TemporaryDirectory(prefix="keyveil-") as folder,
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # that frozen networks stay in eval mode, and the like
            L.Trainer(
                accelerator=self.accelerator,
                devices=1,
                max_steps=steps,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=list(callbacks),
                default_root_dir=folder,
            ).fit(self.method, self.data)

    def fit(self, rounds: int, processes: int = 1) -> dict[str, Any]:
        """``keyveil fit`` in processes of its own: what a :class:`StepClock` wrote down.

        Raises:
            RuntimeError: The training failed.
        """
        with tempfile.TemporaryDirectory(prefix="keyveil-") as folder:
            found, changes = Path(folder) / "clock.json", Path(folder) / "changes.yaml"
            clock = {"steps": self.steps, "file": str(found)}
            trainer = {
                "accelerator": self.accelerator,
                "devices": processes,
                "max_steps": self.steps * rounds,
                "limit_val_batches": 0,
                "enable_progress_bar": False,
                "default_root_dir": folder,
                "callbacks": [{"class_path": "experiments.trainings.StepClock", "init_args": clock}],
            }
            changes.write_text(json.dumps({**self.changes, "trainer": trainer}))  # JSON is YAML
            kind = "cpu" if processes == 1 else "ddp-cpu"
            files = [*(configuration(name) for name in (*self.files, f"configs/trainer/{kind}.yaml")), changes]
            command = [sys.executable, "-m", "experiments.cli", "fit", *(f"--config={file}" for file in files)]
            threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError((done.stderr.splitlines() or ["the training failed"])[-1])
            return json.loads(found.read_text())

    @property
    def accelerator(self) -> str:
        """Lightning's word for the device."""
        return {"cuda": "gpu"}.get(self.device.type, self.device.type)


class TimedSteps(Training):
    """Training steps beside a plain loop over the same networks.

    The loop runs after each round, so that other work on the machine meets both. Figures are ``flops`` of a face,
    ``data_wait`` and ``plain_share``.
    """

    def __call__(self) -> None:
        """Train for a round to warm up, in which arithmetic is counted, and for those that are timed."""
        with contextlib.ExitStack() as counting:
            clock = _Measuring(self.steps, counting)
            self.train((1 + ROUNDS) * self.steps, clock)
        self.seconds = clock.seconds
        rates = [clock.flops / seconds for seconds in clock.seconds]
        plain = [clock.plain_flops / seconds for seconds in clock.plain_seconds]
        self.figures = {
            "flops": clock.flops / (self.steps * self.data.batch_size),
            "data_wait": clock.waited / sum(clock.seconds),
            "plain_share": statistics.median(ours / theirs for ours, theirs in zip(rates, plain, strict=True)),
        }


class TimedScaling(Training):
    """``keyveil fit`` on one process and on several, each with as many faces a step and as many threads.

    Figures are ``scaling``, and ``peak_memory`` of one of the several.

    Args:
        processes: How many.
        **rest: As of every training.
    """

    def __init__(self, *rest: Any, processes: int) -> None:
        super().__init__(*rest)
        self.processes = processes

    def __call__(self) -> None:
        """One, several, several, one: other work on the machine that grows or falls meets both alike.

        Raises:
            RuntimeError: A training failed.
        """
        found: dict[int, list[dict[str, Any]]] = {1: [], self.processes: []}
        for processes in (1, self.processes, self.processes, 1):
            found[processes].append(self.fit(rounds=4, processes=processes))
        alone, self.seconds = ([s for run in found[n] for s in run["seconds"]] for n in (1, self.processes))
        held = max(run["peak"] for run in found[self.processes])
        self.figures = {"scaling": scaling(alone, self.seconds, self.processes), "peak_memory": held}


class TimedGrowth(Training):
    """``keyveil fit`` for 3,000 rounds of a step, and a line through the memory held after each of the last 2,000.

    In the first thousand buffers and caches fill, those of the first two checkpoints too. Figures are ``memory_growth``
    and ``peak_memory``.
    """

    def __call__(self) -> None:
        """Train.

        Raises:
            RuntimeError: The training failed.
        """
        found = self.fit(rounds=3000)
        self.seconds = found["seconds"]
        self.figures = {"memory_growth": growth(found["resident"][1000:]), "peak_memory": found["peak"]}


def scaling(alone: Sequence[float], together: Sequence[float], processes: int) -> float:
    """Faces a second of ``processes`` over those of one, by medians of seconds for as many faces on each.

    Example:
        >>> scaling([3.0, 3.0, 9.0], [4.0, 4.0], processes=2)
        1.5
    """
    return processes * statistics.median(alone) / statistics.median(together)


def growth(held: Sequence[int]) -> float:
    """Bytes a step by which memory grows: the slope of the line nearest to what is held after each step.

    Example:
        >>> growth([100, 103, 106, 109])
        3.0
    """
    return round(float(np.polyfit(np.arange(len(held)), np.asarray(held, float), 1)[0]), 6)

"""What `keyveil benchmark` finds out about trainings."""

import json
import mmap
import time

import lightning as L
import pytest
import torch
from conftest import NoiseFaces
from orl_faces import need
from torch import nn

from experiments import trainings
from experiments.instruments import Flops
from experiments.trainings import PlainLoop, StepClock, TimedGrowth, TimedScaling, TimedSteps, growth, scaling

CPU = torch.device("cpu")
TINY = {"width": 4, "key_bits": 16, "identities": 64}


class Mean(L.LightningModule):
    """Learns one number; keeps every batch as long as ``leaks``."""

    def __init__(self, leaks=False):
        super().__init__()
        self.mean, self.leaks, self.kept = nn.Parameter(torch.zeros(1)), leaks, []

    def training_step(self, batch, batch_idx):
        if self.leaks:
            self.kept.append(mmap.mmap(-1, 8_000_000))  # not from the heap, where earlier tests left room
            self.kept[-1].write(bytes(8_000_000))
        return (batch.image - self.mean).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SlowFaces(NoiseFaces):
    """Takes 50 ms a batch."""

    def train_dataloader(self):
        fast = super().train_dataloader()

        class Slow:
            def __len__(self):
                return len(fast)

            def __iter__(self):
                for batch in fast:
                    time.sleep(0.05)
                    yield batch

        return Slow()


def test_rounds_are_clocked_from_the_second_on_and_written_down(quick_trainer, tmp_path):
    clock = StepClock(2, str(tmp_path / "clock.json"))
    quick_trainer(9, callbacks=[clock]).fit(Mean(), NoiseFaces())
    assert (len(clock.seconds), len(clock.resident)) == (3, 4)
    assert 0 < clock.waited < sum(clock.seconds)
    found = json.loads((tmp_path / "clock.json").read_text())
    assert found["seconds"] == clock.seconds
    assert found["peak"] >= max(found["resident"]) // 2


def test_a_training_whose_data_are_slow_waits(quick_trainer):
    clock = StepClock(2)
    quick_trainer(8, callbacks=[clock]).fit(Mean(), SlowFaces())
    assert clock.waited >= 6 * 0.05
    assert 0.2 < clock.waited / sum(clock.seconds) < 1


def test_growth_is_the_slope_whatever_the_noise_around_it():
    noise = torch.randn(1800, generator=torch.Generator().manual_seed(0)) * 1e6
    flat = (5e8 + noise).tolist()
    leak = (5e8 + 4096 * torch.arange(1800.0) + noise).tolist()
    assert abs(growth(flat)) < 200
    assert growth(leak) == pytest.approx(4096, rel=0.05)


def test_the_memory_of_a_method_that_leaks_grows(quick_trainer):
    found = {}
    for leaks in (True, False):
        clock = StepClock(1)
        quick_trainer(30, callbacks=[clock]).fit(Mean(leaks), NoiseFaces())
        found[leaks] = growth(clock.resident[10:])
    assert found[True] > 4e6
    assert abs(found[False]) < 1e6


def test_each_gradient_of_a_convolution_costs_what_the_convolution_does():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for groups in (1, 8):
        layer = nn.Conv2d(8, 8, 3, groups=groups, bias=False)
        with Flops() as counter:
            made = layer(x)
        forward = counter.total
        assert forward == 2 * made.numel() * 9 * 8 // groups
        with Flops() as counter:
            made.sum().backward()
        assert counter.total == 2 * forward


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained, self.frozen = (
            nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True)) for _ in range(2)
        )
        self.frozen.requires_grad_(False)

    def step(self, x):
        with torch.no_grad():
            aim = self.frozen(x)
        (self.frozen(self.trained(x)) - aim).square().mean().backward()


def test_a_plain_loop_does_the_arithmetic_of_the_step_it_saw_and_leaves_nothing_behind():
    step, x = Step(), torch.randn(4, 8)
    loop = PlainLoop(step)
    step.step(x)
    loop.stop()
    assert [module for module, *_ in loop.calls] == [step.frozen, step.trained, step.frozen]  # not what is within
    step.zero_grad()
    step.step(x)
    step.zero_grad()
    counts = []
    for run in (lambda: step.step(x), loop):
        with Flops() as counter:
            run()
        counts.append(counter.total)
        assert loop.calls[2][1][0][0].grad is None
        step.zero_grad()
    assert counts[0] == counts[1] == 5 * 2 * 4 * 8 * 8  # three forward, two gradients
    assert len(loop.calls) == 3
    loop()
    assert all(p.grad is None for p in step.parameters())


def test_steps_of_a_method_say_their_arithmetic_their_wait_and_how_a_plain_loop_does(monkeypatch):
    need("orl", "centerface")
    monkeypatch.setattr(trainings, "ROUNDS", 2)
    run = TimedSteps("sdn", TINY, {"size": 64, "batch_size": 2}, 1, CPU)
    run()
    assert len(run.seconds) == 2
    assert set(run.figures) == {"flops", "data_wait", "plain_share"}
    assert run.figures["flops"] > 1e6
    assert 0 < run.figures["data_wait"] < 1
    assert run.figures["plain_share"] > 0


def test_scaling_is_faces_a_second_over_those_of_one(monkeypatch):
    need("orl", "centerface")
    run = TimedScaling("sdn", TINY, {"size": 64, "batch_size": 2}, 8, CPU, processes=2)
    asked = []

    def fit(rounds, processes=1):
        asked.append(processes)
        return {"seconds": [4.0] if processes == 2 else [3.0], "peak": 10 * len(asked)}

    monkeypatch.setattr(run, "fit", fit)
    run()
    assert asked == [1, 2, 2, 1]
    assert run.seconds == [4.0, 4.0]
    assert run.figures == {"scaling": 1.5, "peak_memory": 30}
    assert scaling([1.0], [1.0], processes=4) == 4


def test_growth_leaves_out_the_beginning(monkeypatch):
    need("orl", "centerface")
    run = TimedGrowth("sdn", TINY, {"size": 64, "batch_size": 2}, 1, CPU)
    held = [10**9 * step for step in range(200)] + [5 * step for step in range(1800)]
    monkeypatch.setattr(run, "fit", lambda rounds: {"seconds": [1.0] * 1999, "resident": held, "peak": 7})
    run()
    assert run.figures == {"memory_growth": 5.0, "peak_memory": 7}


@pytest.mark.slow
def test_a_training_in_a_process_of_its_own_writes_down_what_it_took():
    need("orl", "centerface")
    run = TimedScaling("sdn", TINY, {"size": 64, "batch_size": 2}, 2, CPU, processes=2)
    for processes in (1, 2):
        found = run.fit(rounds=3, processes=processes)
        assert (len(found["seconds"]), len(found["resident"])) == (2, 3)
        assert found["peak"] > 1e8
    run.changes["model"]["init_args"]["size"] = 65
    with pytest.raises(RuntimeError, match="multiple of 32"):
        run.fit(rounds=1)

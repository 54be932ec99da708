"""Two processes train as one does with the same batch: losses step by step, and what is exchanged for that."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from orl_faces import need
from test_processes import SMALL
from torch import distributed as dist

from lightning_modules.losses import spread
from lightning_modules.networks.discriminators import FaceDiscriminator, gradient_penalty
from lightning_modules.processes import everyone, neighbours, variance
from lightning_modules.sdn.losses import club

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
# Adam moves a weight as far for a gradient of rounding alone as for any other. At 1e-4, phase 1 on one process, with
# other instructions of the same CPU, differs from itself by percents after 20 steps in single precision. So the rates
# that methods are trained with are shown in double precision, and single precision at a lower one.
RATES = {"32-true": "1e-6", "64-true": None}


def on_each(work, *arguments):
    """What two processes make of some work, in order."""
    torch.multiprocessing.spawn(_join, (work, *arguments), nprocs=2)


def _join(rank, work, folder, *arguments):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save(work(*(part[rank::2] for part in arguments)), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def gathered(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def rearranged(rows, marks):
    return [everyone(rows), neighbours(marks), neighbours(marks, 2), variance(rows)]


def losses_and_gradients(codes, mean, images):
    """Of terms over a batch, and of what trains by them: a network before the exchange, and the penalty's slopes."""
    torch.manual_seed(0)
    network, discriminator = torch.nn.Linear(6, 6), FaceDiscriminator(16, 4)
    made = network(codes)
    terms = {
        "spread": spread(everyone(made)),
        "club": club(*(everyone(part) for part in (made, mean, 0.1 * made))),
        "score": discriminator(images)[0].square().mean(),
        "penalty": gradient_penalty(discriminator, images),
    }
    sum(terms.values()).backward()
    gradients = [p.grad for part in (network, discriminator) for p in part.parameters() if p.grad is not None]
    return terms, gradients


def test_terms_over_a_batch_and_their_gradients_are_those_of_one_process(tmp_path):
    generator = torch.Generator().manual_seed(1)
    codes, mean = torch.randn(2, 6, 6, generator=generator)
    images, marks = torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6.0)
    (tmp_path / "a").mkdir()
    on_each(rearranged, tmp_path / "a", codes, marks)
    for rank, (all_of_them, one, two, spread_of) in enumerate(gathered(tmp_path / "a")):
        assert torch.equal(all_of_them, codes)
        assert one.tolist() == marks.roll(1)[rank::2].tolist()
        assert two.tolist() == marks.roll(2)[rank::2].tolist()
        torch.testing.assert_close(spread_of, codes.var(0, correction=0))
    (tmp_path / "b").mkdir()
    on_each(losses_and_gradients, tmp_path / "b", codes, mean, images)
    terms, gradients = losses_and_gradients(codes, mean, images)
    found = gathered(tmp_path / "b")
    for name, term in terms.items():
        torch.testing.assert_close((found[0][0][name] + found[1][0][name]) / 2, term.detach())
    for number, gradient in enumerate(gradients):  # as DDP takes them
        torch.testing.assert_close((found[0][1][number] + found[1][1][number]) / 2, gradient, rtol=1e-4, atol=1e-6)


def trained(name, trainer, batch, precision, folder):
    small = {key: value for key, value in SMALL[name].items() if key != "learning_rate"}
    if RATES[precision]:
        small["learning_rate"] = RATES[precision]
    files = ("method/" + name, "data/orl", "trainer/" + trainer, "debug/tiny")
    command = [
        *(sys.executable, ROOT / "tests" / "in_double.py" if precision == "64-true" else "-mexperiments.cli", "fit"),
        *(word for file in files for word in ("--config", f"configs/{file}.yaml")),
        *(f"--model.init_args.{key}={value}" for key, value in small.items()),
        *("--data.init_args.size=128", "--data.init_args.num_workers=0", "--data.init_args.augment=true"),
        *(f"--data.init_args.batch_size={batch}", f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=0"),
        *(f"--trainer.precision={precision}", f"--trainer.default_root_dir={folder}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as lines:
        return {
            (int(row["step"]), key): float(value)
            for row in csv.DictReader(lines)
            for key, value in row.items()
            if key.startswith("train/") and value
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "32-true") for name in SMALL), ("sdn", "64-true"), ("ifadit-disentangle", "64-true")],
)
def test_losses_of_twenty_steps_agree(name, precision, tmp_path):
    need()
    one, two = (
        trained(name, trainer, batch, precision, tmp_path / trainer) for trainer, batch in (("cpu", 4), ("ddp-cpu", 2))
    )
    assert one.keys() == two.keys()
    assert {step for step, _ in one} == set(range(STEPS))
    for at, value in one.items():
        # an estimate of information in nats is a difference of two numbers, each a hundred times as large
        assert two[at] == pytest.approx(value, rel=1e-4, abs=1e-5), at

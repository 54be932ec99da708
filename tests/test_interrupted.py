"""`keyveil fit` killed again and again, and told to stop: with `--resume auto` it ends where an unbroken run ends."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from orl_faces import need
from test_processes import SMALL

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12


@pytest.fixture(autouse=True)
def faces():
    need()


def command(name, folder, trainer="cpu", steps=STEPS):
    files = ("method/" + name, "data/orl", "trainer/" + trainer, "debug/tiny")
    return [
        *(Path(sys.executable).parent / "keyveil", "fit"),
        *(word for file in files for word in ("--config", f"configs/{file}.yaml")),
        *(f"--model.init_args.{key}={value}" for key, value in SMALL[name].items()),
        *("--data.init_args.size=128", "--data.init_args.num_workers=2", "--data.init_args.augment=true"),
        *(f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=1"),
        *(f"--trainer.default_root_dir={folder}", "--resume=auto"),
    ]


def begun(name, folder, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(name, folder, *more),
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def ended(process, *codes):
    told = process.communicate(timeout=600)[1]
    assert process.returncode in codes, told[-3000:]
    return told


def steps(folder):
    try:
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, mmap=True)["global_step"]
    except FileNotFoundError:
        return 0


def when(folder, process, wanted):
    """Wait until so many steps are saved, or the run has ended."""
    while steps(folder) < wanted and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdn", "ifadit-disentangle", "ifadit-transform"])
def test_a_run_killed_five_times_ends_as_the_unbroken_one(name, tmp_path):
    ended(begun(name, tmp_path / "whole"), 0)
    chance, kills = random.Random(0), 0
    for wanted in sorted(chance.sample(range(1, STEPS - 1), 5)):
        process = begun(name, tmp_path / "killed")
        when(tmp_path / "killed", process, wanted)
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
    ended(begun(name, tmp_path / "killed"), 0)
    assert kills >= 4
    whole, killed = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "killed")
    )
    assert whole["global_step"] == killed["global_step"] == STEPS
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(killed["state_dict"][key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_says_how_it_goes_on_and_a_damaged_checkpoint_is_passed_over(tmp_path):
    process = begun("sdn", tmp_path / "run")
    when(tmp_path / "run", process, 2)
    process.send_signal(signal.SIGTERM)
    assert "--resume auto" in ended(process, 143)
    last, done = tmp_path / "run" / "checkpoints" / "last.ckpt", steps(tmp_path / "run")
    assert 2 <= done < STEPS
    last.write_bytes(last.read_bytes()[:5000])
    again = begun("sdn", tmp_path / "run")
    assert "going on from" in (told := ended(again, 0))
    assert f"step-{done - 1}" in told or f"step-{done}" in told
    assert steps(tmp_path / "run") == STEPS
    last.write_bytes(b"nothing")
    asked = [*command("sdn", tmp_path / "run")[:-1], f"--ckpt_path={last}"]
    refused = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "is not a readable checkpoint" in refused.stderr


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_when_the_first_is_asked(tmp_path):
    process = begun("sdn", tmp_path / "run", "ddp-cpu", 1000)
    when(tmp_path / "run", process, 2)
    process.send_signal(signal.SIGTERM)
    assert "--resume auto" in ended(process, 143)
    done = steps(tmp_path / "run")
    assert 2 <= done < 1000
    assert "going on from" in ended(
        begun("sdn", tmp_path / "run", "cpu", done + 2), 0
    )  # on another number of processes
    assert steps(tmp_path / "run") == done + 2

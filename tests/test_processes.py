"""`keyveil fit` on two CPU processes: only the trainer's file differs, and training is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.build import build, read_yaml
from lightning_modules.anonymizer import ReversibleAnonymizer

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "sdn": {"size": 64, "width": 8, "key_bits": 16, "identities": 64, "information_warmup": 1, "learning_rate": 1e-2},
    "ifadit-disentangle": {"size": 128, "width": 8, "blocks": 1, "learning_rate": 1e-3},
    "ifadit-transform": {"size": 128, "width": 8, "blocks": 1, "learning_rate": 1e-2},
    "ifadit-flow": {"size": 128, "width": 8, "blocks": 1, "learning_rate": 1e-2},
}


def fit(name, folder, steps, *more):
    """Two processes, two faces each, ORL."""
    options = [f"--model.init_args.{key}={value}" for key, value in SMALL[name].items()]
    files = [
        f"configs/method/{name}.yaml",
        "configs/data/orl.yaml",
        "configs/trainer/ddp-cpu.yaml",
        "configs/debug/tiny.yaml",
    ]
    command = [
        *(Path(sys.executable).parent / "keyveil", "fit"),
        *(word for file in files for word in ("--config", file)),
        *options,
        *("--data.init_args.size=128", "--data.init_args.limit=160", "--data.init_args.num_workers=0"),
        *(f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={folder}"),
        *more,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_processes_train_every_parameter_and_go_on_where_they_stopped(name, tmp_path):
    spec = read_yaml(ROOT / f"configs/method/{name}.yaml")["model"]
    spec["init_args"] |= SMALL[name]
    torch.manual_seed(0)
    method = build(ReversibleAnonymizer, spec, name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    torch.save({"state_dict": before, "global_step": 0}, tmp_path / "start.ckpt")

    saved = fit(name, tmp_path / "run", 3, f"--model.init_args.start={tmp_path / 'start.ckpt'}")
    assert saved["global_step"] == 3
    after, trainable = saved["state_dict"], {n for n, p in method.named_parameters() if p.requires_grad}
    assert set(after) == set(before)  # frozen networks are in no checkpoint
    assert all(torch.isfinite(value.float()).all() for value in after.values())
    assert {n for n in trainable if torch.equal(before[n], after[n])} == set()
    frozen = {n for n, p in method.named_parameters() if not p.requires_grad} & set(before)
    assert {n for n in frozen if not torch.equal(before[n], after[n])} == set()
    losses = (tmp_path / "run" / "logs").rglob("metrics.csv")
    assert "nan" not in next(iter(losses)).read_text()

    resumed = fit(name, tmp_path / "run", 5, f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}")
    assert resumed["global_step"] == 5
    steps = {int(s["step"]) for optimizer in resumed["optimizer_states"] for s in optimizer["state"].values()}
    assert steps == {5}
    assert resumed["training_seconds"] > saved["training_seconds"]

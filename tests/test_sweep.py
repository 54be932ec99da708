import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import sweep as room
from experiments.build import read_yaml
from experiments.cli import main
from experiments.sweep import expand, sweep, trials

ABLATION = Path("configs/sweep/sdn-ablation.yaml")


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        told = {
            "method": "grid",
            "parameters": {"a": {"values": [1, 2]}, "config": {"values": ["x/one.yaml", "two.yaml"]}, "b": {"value": 3}},
            "command": ["${interpreter}", "-m", "somewhere", "${args}"],
            **changes,
        }
        OmegaConf.save(OmegaConf.create({k: v for k, v in told.items() if v is not None}), tmp_path / "sweep.yaml")
        return tmp_path / "sweep.yaml"

    return write


@pytest.fixture
def runs(monkeypatch):
    seen, codes = [], []

    def run(command, environment):
        seen.append((command, environment))
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(room, "run_training", run)
    return seen, codes


def test_a_grid_is_every_combination_by_name(written):
    plan = read_yaml(written(), resolve=False)
    found = dict(trials(plan, written()))
    assert list(found) == ["1-one", "1-two", "2-one", "2-two"]
    assert found["2-one"] == {"a": 2, "config": "x/one.yaml", "b": 3}
    assert expand(plan, found["2-one"]) == [
        *(sys.executable, "-m", "somewhere"),
        *("--a=2", "--config=x/one.yaml", "--b=3"),
    ]


def test_trials_run_offline_and_a_failed_one_loses_no_other(written, runs, tmp_path):
    seen, codes = runs
    codes += [0, 3]
    assert sweep(written(), offline=True, out=tmp_path / "out") == 3
    assert len(seen) == 4
    assert all(environment == {"WANDB_MODE": "offline"} for _, environment in seen)
    assert sweep(written(), offline=True, out=tmp_path / "out") == 0
    assert [command for command, _ in seen[4:]] == [seen[1][0]]
    done = json.loads((tmp_path / "out" / "1-two" / "finished.json").read_text())
    assert done["seconds"] >= 0


def test_some_trials_alone(written, runs, tmp_path):
    assert sweep(written(), offline=True, out=tmp_path / "out", only=["2-two"]) == 0
    assert len(runs[0]) == 1
    with pytest.raises(ValueError, match="no trial 'three'; it has 1-one"):
        sweep(written(), offline=True, out=tmp_path / "out", only=["three"])


def test_a_dry_run_runs_nothing(written, runs, tmp_path):
    assert sweep(written(), dry_run=True, out=tmp_path / "out") == 0
    assert not runs[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "bayes"}, "only a grid"),
        ({"parameters": {"a": {"min": 1}}}, "parameter a needs a value"),
        ({"parameters": None}, "no parameters"),
    ],
)
def test_what_is_no_grid_is_told(written, changes, why):
    with pytest.raises(ValueError, match=why):
        sweep(written(**changes), offline=True)


ARMS = dict(trials(read_yaml(ABLATION, resolve=False), ABLATION))


@pytest.mark.parametrize("name", ARMS)
def test_every_trial_of_the_ablation_parses(name, capsys):
    command = expand(read_yaml(ABLATION, resolve=False), ARMS[name])
    assert command[:5] == ["/usr/bin/env", sys.executable, "-m", "experiments.cli", "fit"]
    with pytest.raises(SystemExit) as stopped:
        main([*command[4:], "--print_config"])
    assert stopped.value.code == 0
    told = OmegaConf.create(capsys.readouterr().out)
    assert told.trainer.default_root_dir == f"runs/sdn-ablation/{name}"
    assert told.trainer.max_steps == 300

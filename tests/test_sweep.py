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
            "parameters": {
                "a": {"values": [1, 2]},
                "config": {"values": ["x/one.yaml", "2.yaml"]},
                "b": {"value": 3},
            },
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
    assert list(found) == ["1-one", "1-2", "2-one", "2-2"]
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
    assert all(environment["WANDB_MODE"] == "offline" for _, environment in seen)
    assert [environment["WANDB_NAME"] for _, environment in seen] == ["1-one", "1-2", "2-one", "2-2"]
    assert sweep(written(), offline=True, out=tmp_path / "out") == 0
    assert [command for command, _ in seen[4:]] == [seen[1][0]]
    done = json.loads((tmp_path / "out" / "1-2" / "finished.json").read_text())
    assert done["seconds"] >= 0


def test_numbers_name_trials_whole(written):
    plan = read_yaml(written(parameters={"lr": {"values": [0.1, 0.01, 0.15]}}), resolve=False)
    assert [name for name, _ in trials(plan, written())] == ["0.1", "0.01", "0.15"]


def test_macros_are_those_of_wandbs_agent(monkeypatch):
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    trial = {"a": 1, "b": True, "c": None, "d": 0.5, "config": "x.yaml"}
    monkeypatch.setenv("SOMETHING", "else")
    command = ["${env}", "${interpreter}", "-m", "${program}", "${envvar:SOMETHING}", "${args}"]
    flags = sweeps.create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    found = expand({"program": "p", "command": command}, trial)
    assert found == [
        "/usr/bin/env",
        sys.executable,
        "-m",
        "p",
        *sweeps.create_sweep_command(["${envvar:SOMETHING}"]),
        *flags["args"],
    ]  # noqa: E501


def test_a_changed_file_is_trained_again(written, runs, tmp_path):
    (tmp_path / "one.yaml").write_text("a: 1\n")
    file = written(command=["python", "--config", str(tmp_path / "one.yaml"), "${args}"])
    for changed, count in (("a: 1\n", 4), ("a: 1\n", 4), ("a: 2\n", 8)):
        (tmp_path / "one.yaml").write_text(changed)
        assert sweep(file, offline=True, out=tmp_path / "out") == 0
        assert len(runs[0]) == count


def test_some_trials_alone(written, runs, tmp_path):
    assert sweep(written(), offline=True, out=tmp_path / "out", only=["2-2"]) == 0
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
        ({"parameters": {"a": {"values": []}}}, "parameter a needs a value"),
        ({"parameters": None}, "is no sweep"),
        ({"parameters": ["a"]}, "is no sweep"),
        ({"command": "python x"}, "is no sweep"),
        ({"command": ["${args_json_file}"]}, "macro"),
        ({"parameters": {"config": {"values": ["a/full.yaml", "b/full.yaml"]}}}, "two trials would be called full"),
    ],
)
def test_what_is_no_grid_is_told(written, changes, why):
    with pytest.raises(ValueError, match=why):
        sweep(written(**changes), offline=True)


LEFT_OUT = {
    "full": set(),
    "without-lower-bound": {"recovered_information"},
    "without-club": {"hidden_information"},
    "without-triplet": {"triplet"},
    "without-dual-inference": {"dual", "cycle"},
    "without-wrong-factors": {"wrong_factors"},
    "without-attributes": {"attributes"},
    "without-password-head": {"password"},
}
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
    assert told.data.init_args.faces.init_args.attributes == ["Male", "Young", "Mouth_Slightly_Open"]
    options = told.model.init_args
    off = {term for term, weight in options.weights.items() if not weight}
    off |= {option for option in ("dual", "wrong_factors", "attributes") if not options[option]}
    assert off == LEFT_OUT[name] | {"diversity"}  # which the recipe turns on, and no arm

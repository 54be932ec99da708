import json
import signal
import sys

import pytest
from omegaconf import OmegaConf

from experiments import recipe as room
from experiments.recipe import read_recipe, recipe


@pytest.fixture
def written(tmp_path):
    (tmp_path / "method.yaml").write_text("model: {}\n")

    def write(**changes):
        told = {
            "out": str(tmp_path / "out"),
            "common": {"config": [str(tmp_path / "method.yaml")], "set": {"model": {"init_args": {"a": 1, "b": 1}}}},
            "stages": {"first": None, "second": {"set": {"model": {"init_args": {"b": 2}}}}},
            **changes,
        }
        OmegaConf.save(OmegaConf.create(told), tmp_path / "recipe.yaml")
        return tmp_path / "recipe.yaml"

    return write


@pytest.fixture
def runs(monkeypatch):
    """What would have been trained; each run leaves a checkpoint and the exit code that is asked for."""
    seen, codes = [], []

    def run(command):
        overlay = OmegaConf.load(command[command.index("--config") + 3])
        folder = overlay.trainer.default_root_dir
        seen.append((command, overlay))
        (room.Path(folder) / "checkpoints").mkdir(parents=True, exist_ok=True)
        (room.Path(folder) / "checkpoints" / "last.ckpt").write_bytes(b"")
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(room, "run_training", run)
    return seen, codes


def test_a_stage_is_what_all_share_and_its_own_changes(written):
    out, (first, second) = read_recipe(written())
    assert first.overlay(out / "first")["model"]["init_args"] == {"a": 1, "b": 1}
    assert second.overlay(out / "second")["model"]["init_args"] == {"a": 1, "b": 2}
    assert second.overlay(out / "second")["trainer"]["default_root_dir"] == (out / "second").as_posix()


def test_stages_run_in_order_and_finished_ones_are_kept(written, runs):
    seen, _ = runs
    assert recipe(written()) == 0
    assert [overlay.model.init_args.b for _, overlay in seen] == [1, 2]
    assert recipe(written()) == 0
    assert len(seen) == 2


def test_a_stage_that_failed_stops_the_recipe_and_then_goes_on_from_its_checkpoint(written, runs):
    seen, codes = runs
    codes.append(3)
    assert recipe(written()) == 3
    assert len(seen) == 1
    assert recipe(written()) == 0
    assert "--ckpt_path" in seen[1][0]
    assert "--ckpt_path" not in seen[2][0]


def test_a_changed_stage_is_trained_anew(written, runs):
    seen, _ = runs
    recipe(written())
    recipe(written(stages={"first": {"set": {"model": {"init_args": {"a": 5}}}}}))
    assert len(seen) == 3
    assert "--ckpt_path" not in seen[2][0]


def test_a_changed_stage_that_was_stopped_at_once_does_not_go_on_from_the_old_checkpoint(written, runs, monkeypatch):
    seen, _ = runs
    recipe(written())
    changed = written(stages={"first": {"set": {"model": {"init_args": {"a": 5}}}}})
    trained = room.run_training
    monkeypatch.setattr(room, "run_training", lambda command: 143)  # before it saved anything
    assert recipe(changed) == 143
    monkeypatch.setattr(room, "run_training", trained)
    assert recipe(changed) == 0
    assert "--ckpt_path" not in seen[-1][0]


def test_a_request_to_stop_is_handed_on_and_waited_for():
    child = """if True:
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    """
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        room.run_training([sys.executable, "-c", child])
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_training_that_was_killed_has_a_shells_exit_code():
    assert room.run_training([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def test_a_stage_that_began_anew_is_not_finished(written, runs):
    recipe(written())
    changed = written(stages={"first": {"set": {"model": {"init_args": {"a": 5}}}}})
    runs[1].append(143)
    assert recipe(changed) == 143
    assert recipe(written()) == 0
    assert len(runs[0]) == 4  # two, the one that was stopped, and the first again


def test_a_dry_run_trains_nothing(written, runs, tmp_path):
    assert recipe(written(), dry_run=True) == 0
    assert not runs[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": {}}, "at least one of `stages`"),
        ({"stage": {}}, "unknown entry 'stage'"),
        ({"stages": {"first": {"sets": {}}}}, "unknown entry 'sets'"),
    ],
)
def test_what_is_no_recipe_is_told(written, changes, said):
    with pytest.raises(ValueError, match=said):
        recipe(written(**changes))


def test_an_unknown_stage_and_a_missing_file_are_told(written):
    with pytest.raises(ValueError, match="no stage 'third'"):
        recipe(written(), only="third")
    with pytest.raises(FileNotFoundError, match="no configuration at nowhere.yaml"):
        recipe(written(common={"config": ["nowhere.yaml"]}))


def test_the_recipes_of_the_repository_are_whole():
    for path in room.Path("configs/recipe").glob("*.yaml"):
        out, stages = read_recipe(path)
        assert json.dumps([stage.overlay(out) for stage in stages])

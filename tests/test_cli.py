"""The command line: every pairing of files parses, and every mistake ends in one sentence and a non-zero exit."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from experiments.build import read_yaml
from experiments.cli import main

ROOT = Path(__file__).resolve().parent.parent
METHODS, DATA, TRAINERS = (sorted((ROOT / "configs" / room).glob("*.yaml")) for room in ("method", "data", "trainer"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def told(capsys, *arguments):
    """The one sentence on standard error."""
    code = main([str(a) for a in arguments])
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert error.startswith("error: ")
    assert "\n" not in error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "files",
    [*itertools.product(METHODS, DATA[:1], TRAINERS[:1]), *itertools.product(METHODS[:1], DATA, TRAINERS)],
    ids=lambda files: "-".join(f.stem for f in files),
)
def test_every_method_data_and_trainer_file_fits_the_others(files, capsys):
    configs = [word for file in files for word in ("--config", str(file))]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *configs, "--print_config"])
    assert stopped.value.code == 0
    resolved = capsys.readouterr().out
    assert "class_path" in resolved
    assert "${" not in resolved
    assert "inference_mode: false" in resolved  # refinement takes gradients while it measures


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_is_valid(file):
    assert read_yaml(file, resolve=False)


def test_an_unknown_key_of_a_file_is_named(capsys, tmp_path):
    (tmp_path / "sdn.yaml").write_text((ROOT / "configs/method/sdn.yaml").read_text().replace("width:", "widht:"))
    assert "'widht' is not accepted" in told(
        capsys, "fit", "--config", tmp_path / "sdn.yaml", "--config", "configs/data/orl.yaml"
    )


def test_an_unknown_option_of_the_trainer_is_named(capsys):
    error = told(capsys, "fit", "--config", "configs/method/sdn.yaml", "--trainer.max_stepz=3")
    assert "max_stepz" in error


def test_a_missing_config_is_named(capsys):
    assert "nope.yaml" in told(capsys, "fit", "--config", "nope.yaml")
    assert "nope.yaml" in told(capsys, "compare", "nope.yaml")


def test_an_unknown_key_of_a_comparison_is_named(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("metods: {}")
    assert "unknown key 'metods'" in told(capsys, "compare", tmp_path / "c.yaml")


def test_a_missing_card_offline_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path))
    monkeypatch.setenv("KEYVEIL_OFFLINE", "1")
    error = told(capsys, "weights", "path", "mobilefacenet")
    assert "mobilefacenet" in error
    assert "KEYVEIL_WEIGHTS" in error


def test_an_altered_file_is_refused_by_name(capsys, monkeypatch, tmp_path):
    (tmp_path / "fr_feature.onnx").write_bytes(b"not the network")
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KEYVEIL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("KEYVEIL_OFFLINE", "1")
    error = told(capsys, "weights", "path", "mobilefacenet")
    assert "mobilefacenet" in error
    assert "sha256" in error or "hash" in error


def test_a_folder_without_faces_is_one_sentence(capsys, tmp_path):
    import cv2
    import numpy as np

    for person in range(30):
        folder = tmp_path / "faces" / f"person{person}"
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "1.png"), np.full((64, 64, 3), 7 * person, np.uint8))
    files = ["--config", "configs/data/folder.yaml", "--config", "configs/method/blur.yaml"]
    root = f"--data.init_args.faces.init_args.root={tmp_path / 'faces'}"
    error = told(capsys, "test", *files, root, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}")
    assert "face" in error


def test_the_console_script_answers_from_anywhere(tmp_path):
    script = Path(sys.executable).parent / "keyveil"
    found = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0
    for verb in ("fit", "compare", "weights", "benchmark", "judges"):
        assert verb in found.stdout
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("keyveil ")
    wrong = subprocess.run([script, "compair"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "Traceback" not in wrong.stderr


def test_a_training_that_was_told_to_stop_does_not_count_as_done(capsys, monkeypatch):
    def stopped(*_, **__):
        raise SIGTERMException

    monkeypatch.setattr("lightning.pytorch.cli.LightningCLI.__init__", stopped)
    with pytest.raises(SystemExit) as exit_:
        main(["fit"])
    assert exit_.value.code == 143
    assert "--resume auto" in capsys.readouterr().err

"""Logs become curves: stages in a row, a run that went on put together, mistakes in one sentence."""

from __future__ import annotations

import csv

import pytest

from experiments.cli import main
from experiments.curves import curves, read_stage


def log(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch,step,train/loss,train/club_nats\n" + "".join(f"{x}\n" for x in lines))
    return folder


def test_stages_follow_one_another(tmp_path):
    log(tmp_path / "painter" / "logs", "0,9,2.0,", "0,19,1.0,")
    log(tmp_path / "joint" / "logs", "0,4,.5,7", "0,9,.25,6")
    curves([tmp_path / "painter", tmp_path / "joint"], tmp_path / "c.png")
    with (tmp_path / "c.csv").open() as lines:
        found = list(csv.DictReader(lines))
    loss = [line for line in found if line["figure"] == "train/loss"]
    assert [(line["stage"], line["step"], line["step of all"], float(line["value"])) for line in loss] == [
        ("painter", "9", "9", 2.0),
        ("painter", "19", "19", 1.0),
        ("joint", "4", "24", 0.5),
        ("joint", "9", "29", 0.25),
    ]
    assert [line["value"] for line in found if line["figure"] == "train/club_nats"] == ["7.0", "6.0"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_went_on_is_one_curve(tmp_path):
    log(tmp_path / "run" / "version_0", "0,9,4,", "0,19,3,", "0,29,9,")
    log(tmp_path / "run" / "version_1", "0,29,2,", "0,39,nan,")  # went on from step 20
    assert read_stage(tmp_path / "run", "run").points["train/loss"] == {9: 4.0, 19: 3.0, 29: 2.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["", "c.png"], "the folders of one training or more"),
        (["run nowhere", "c.png"], "holds no metrics.csv"),
        (["run", "c.jpg"], ".png"),
        (["run", "c.png", "--of", "[train/nothing]"], "'train/nothing' was not logged; there are"),
        (["broken", "c.png"], "is not what Lightning's CSVLogger writes"),
        (["empty", "c.png"], "logged no number"),
        (["once", "c.png"], "nothing was logged at more than one step"),
        (["both", "c.png"], "holds several trainings"),
        (["run", "run/metrics.png"], "may be a training's log"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, words, said):
    log(tmp_path / "run", "0,1,1,1", "0,2,1,1")
    log(tmp_path / "broken", "0,x,1,1")
    log(tmp_path / "empty")
    log(tmp_path / "once", "0,1,1,1")
    log(tmp_path / "both" / "a" / "version_0", "0,1,1,1")
    log(tmp_path / "both" / "b" / "version_0", "0,1,1,1")
    monkeypatch.chdir(tmp_path)
    run, out, *more = words
    assert main(["curves", *run.split(), "--out", out, *more]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


def test_stages_of_the_same_name_are_told_apart(tmp_path):
    for recipe in ("first", "further"):
        log(tmp_path / recipe / "people", "0,1,1,1", "0,2,1,1")
    curves([tmp_path / "first" / "people", tmp_path / "further" / "people"], tmp_path / "c.png")
    with (tmp_path / "c.csv").open() as lines:
        assert {line["stage"] for line in csv.DictReader(lines)} == {"first/people", "further/people"}

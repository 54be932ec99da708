"""Pseudo-labels: the CSV says who guessed, is whole or absent, and is read back as attributes."""

import cv2
import numpy as np
import pytest
import torch
from orl_faces import need, orl_faces

from datamodules.alignment import template
from datamodules.datasets import LFW
from datamodules.faces import FaceDataModule, read_labels, read_people
from datamodules.splits import split_of
from experiments import data
from experiments.data import Landmarks68, label, mouth_gap, overlap
from lightning_modules.carriers import to_pixels
from lightning_modules.weights import card


@pytest.fixture
def faces(tmp_path, monkeypatch):
    """Three people of the LFW layout with landmarks, and guesses that cost nothing."""
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    numbers = ",".join(f"{number:.2f}" for number in (template("ffhq", 40) + 5).flatten())
    lines = ["file,a,b,c,d,e,f,g,h,i,j"]
    for seed, name in enumerate(["Ann", "Bo", "Cy"]):
        folder = tmp_path / "lfw-deepfunneled" / name
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (50, 50, 3), np.uint8)
        cv2.imwrite(str(folder / f"{name}_0001.png"), pixels)
        lines.append(f"{name}_0001.png,{numbers}")
    (tmp_path / "lfw-landmarks5.csv").write_text("\n".join(lines))
    guesses = [(0.9, 20.0, 0.05), (0.1, 70.0, 0.0), (0.6, 39.9, 0.002)]
    monkeypatch.setattr(data, "_guesses", lambda aligned, device: iter(guesses[: len(aligned)]))
    return tmp_path


def test_labels_name_their_networks_and_are_read_back_as_attributes(faces, capsys):
    label("lfw", str(faces / "labels.csv"), root=str(faces))
    first = (faces / "labels.csv").read_text().splitlines()[0]
    assert card("faceres").digest in first
    assert card("landmarks68").digest in first
    names, rows = read_labels(faces / "labels.csv")
    assert names == ("pseudo_male", "pseudo_young", "pseudo_mouth_open")
    assert [rows[f"{n}/{n}_0001.png"].tolist() for n in ("Ann", "Bo", "Cy")] == [[1, 1, 1], [-1, -1, -1], [1, 1, -1]]
    assert "3 faces labelled" in capsys.readouterr().out


def test_a_limit_labels_the_first_pictures_alone(faces):
    label("lfw", str(faces / "labels.csv"), root=str(faces), limit=1)
    assert len(read_labels(faces / "labels.csv")[1]) == 1


def test_labels_that_break_off_leave_no_csv(faces, monkeypatch):
    def broken(aligned, device):
        yield 0.5, 30.0, 0.0
        raise OSError("disk on fire")

    monkeypatch.setattr(data, "_guesses", broken)
    with pytest.raises(OSError, match="disk on fire"):
        label("lfw", str(faces / "labels.csv"), root=str(faces))
    assert not (faces / "labels.csv").exists()


def test_a_mouth_gap_is_the_distance_of_the_inner_lips():
    points = np.zeros((68, 2))
    points[61:64], points[65:68] = [[0.4, 0.7], [0.5, 0.7], [0.6, 0.7]], [[0.6, 0.73], [0.5, 0.73], [0.4, 0.73]]
    assert mouth_gap(points) == pytest.approx(0.03)


def test_the_68_points_of_real_faces_lie_where_the_five_do():
    need("landmarks68")
    find_points = Landmarks68()
    for face in orl_faces(people=4, each=1).flatten(0, 1):
        pixels = ((face + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        points = find_points(pixels)
        five = [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
        np.testing.assert_allclose(five, (template("ffhq", 256) + 0.5) / 256, atol=0.08)


def lfw_of(root, people):
    """A folder of the LFW layout with one aligned picture a person."""
    numbers = ",".join(f"{number:.2f}" for number in template("ffhq", 256).flatten())
    lines = ["file,a,b,c,d,e,f,g,h,i,j"]
    for name, image in people.items():
        folder = root / "lfw-deepfunneled" / name
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / f"{name}_0001.png"), to_pixels(image)[..., ::-1])
        lines.append(f"{name}_0001.png,{numbers}")
    (root / "lfw-landmarks5.csv").write_text("\n".join(lines))
    return str(root)


def test_training_people_who_are_test_people_elsewhere_are_listed_and_left_out(tmp_path, monkeypatch, capsys):
    need("mobilefacenet")
    (first, again), (second, _), (third, _) = orl_faces()[:3]
    network = data.MobileFaceNet()
    monkeypatch.setattr(data, "MobileFaceNet", lambda: network)
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    names = [f"Person_{number}" for number in range(100)]
    trained, tested = ([name for name in names if split_of(name) == split] for split in ("train", "test"))
    training = lfw_of(tmp_path / "a", {trained[0]: first, trained[1]: second, tested[0]: third})
    testing = lfw_of(tmp_path / "b", {tested[1]: again, trained[2]: second})
    overlap("lfw", "lfw", tmp_path / "overlap.csv", training, testing)
    text = (tmp_path / "overlap.csv").read_text()
    assert card("mobilefacenet").digest in text.splitlines()[0]
    assert read_people(tmp_path / "overlap.csv") == {trained[0]}  # the second is a training person in both
    assert tested[1] not in text
    assert "1 of 2 training people of lfw (2 faces) listed" in capsys.readouterr().out
    kept = FaceDataModule(LFW(training), without=str(tmp_path / "overlap.csv")).chosen
    assert [picture.person for picture in kept["train"]] == [trained[1]]
    assert [picture.person for picture in kept["test"]] == [tested[0]]


def test_a_list_made_for_another_data_set_is_refused(tmp_path):
    root = lfw_of(tmp_path / "a", {"Ann": torch.zeros(3, 256, 256)})
    (tmp_path / "people.csv").write_text('# of celeba\nperson,similarity\n2880,0.5\n#9,0.4\n"Smith, Ann",0.4\n')
    assert read_people(tmp_path / "people.csv") == {"2880", "#9", "Smith, Ann"}
    with pytest.raises(ValueError, match="names 3 people, none of whom is in lfw"):
        FaceDataModule(LFW(root), without=str(tmp_path / "people.csv")).dataset("train")


def test_a_file_that_names_nobody_is_refused(tmp_path):
    (tmp_path / "people.csv").write_text("file,smile\na.png,1\n")
    with pytest.raises(ValueError, match="people.csv names nobody"):
        read_people(tmp_path / "people.csv")

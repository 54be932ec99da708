"""Every method trains (or, where nothing is learned, is measured) on every data set under every trainer's file."""

import itertools

import pytest
import torch
import yaml
from orl_faces import need, orl_faces
from test_cli import DATA, METHODS, ROOT, TRAINERS
from test_datasets import MiddleFace

from datamodules.datasets import ImageFolderFaces
from datamodules.shards import write_shards
from experiments.cli import main
from lightning_modules.carriers import write_picture

SMALL = {
    "sdn": {"width": 4, "discriminator_width": 4},
    "ciagan": {"width": 8, "discriminator_width": 4, "siamese_width": 4, "identities": 16384},
    "a3gan": {"width": 4, "discriminator_width": 4},
    "riddle": {"size": 128},
    "facebert": {"first": "tokens"},
    "fit": {"width": 4, "blocks": 1, "discriminator_width": 4},
    "mfm": {"width": 4, "blocks": 1, "discriminator_width": 4},
    "ifadit-disentangle": {"size": 128, "width": 8, "blocks": 1},
    "ifadit-transform": {"size": 128, "width": 8, "blocks": 1},
    "ifadit-flow": {"size": 128, "width": 8, "blocks": 1},
}
# Those of the paper's size need weights of one's own; tests/test_paper_size.py has their shapes.
HERE = [file for file in METHODS if "paper" not in file.stem]
CODES = ("ifadit-transform", "ifadit-flow")  # what may train on identity codes alone
TRIPLES = [  # along the data sets each method meets every trainer's file
    (method, data, trainer)
    for method in HERE
    for data, trainer in zip(
        [data for data in DATA if data.stem != "codes" or method.stem in CODES], itertools.cycle(TRAINERS), strict=False
    )
]
# One core stands in for GPUs and machines; the rest of each trainer's file is used as it is.
ONE_CORE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "fast_dev_run": "true"}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Folders of faces for the files that name none: pictures, and shards of them."""
    need("orl", "centerface", "mobilestylegan-synthesis")
    room = tmp_path_factory.mktemp("own")
    for person, faces in enumerate(orl_faces(40, 6, 128)):
        for number, face in enumerate(faces):
            write_picture(room / "pictures" / f"{person:02d}" / f"{number}.png", torch.as_tensor(face))

    write_shards(ImageFolderFaces(str(room / "pictures")), room / "shards", 128, detector=MiddleFace())
    return room


def shrink(found, own):
    """A data set's file with a few faces of each split."""
    if isinstance(found, list):
        return [shrink(one, own) for one in found]
    if not isinstance(found, dict):
        return found
    made = {key: shrink(value, own) for key, value in found.items()}
    kind = str(made.get("class_path", "")).rpartition(".")[2]
    more = {
        "FaceDataModule": {"limit": 160, "batch_size": 2, "num_workers": 0},
        "LatentDataModule": {"batch_size": 2},
        "GeneratedFaces": {"count": 200, "preview": True},
        "ImageFolderFaces": {"root": str(own / "pictures")},
        "Shards": {"root": str(own / "shards")},
    }.get(kind, {})
    return {**made, "init_args": made.get("init_args", {}) | more} if more else made


@pytest.mark.slow
@pytest.mark.parametrize(("method", "data", "trainer"), TRIPLES, ids=lambda file: file.stem)
def test_only_the_configuration_differs(method, data, trainer, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    smaller = tmp_path / "data.yaml"
    smaller.write_text(yaml.safe_dump(shrink(yaml.safe_load(data.read_text()), own)))
    options = {f"trainer.{key}": value for key, value in ONE_CORE.items()} | {"trainer.default_root_dir": tmp_path}
    options |= {f"model.init_args.{key}": value for key, value in SMALL.get(method.stem, {}).items()}
    if data.stem == "codes":
        options["model.init_args.latent"] = "true"
    verb = "fit" if method.stem in SMALL else "test"
    words = [word for file in (method, smaller, trainer) for word in ("--config", str(file))]
    code = main([verb, *words, *(f"--{key}={value}" for key, value in options.items())])
    told = capsys.readouterr().err
    if code and ("was not found: looked for" in told or "has nobody in the test split" in told):
        pytest.skip(told.strip().splitlines()[-1])
    assert code == 0, told[-2000:]


def test_every_trainer_meets_every_method():
    assert {(m.stem, t.stem) for m, _, t in TRIPLES} == {(m.stem, t.stem) for m in HERE for t in TRAINERS}

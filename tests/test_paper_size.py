"""iFADIT at the paper's size, on RANDOM weights of the right shapes: whose files are the user's, and are not here."""

import csv
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import test_stylegan2
import torch
from test_ir_se50 import random_ir_se50

from experiments.build import build, read_yaml
from experiments.cli import main
from experiments.convert import convert
from lightning_modules.anonymizer import ReversibleAnonymizer
from lightning_modules.networks.ir_se50 import IRSE50
from lightning_modules.networks.stylegan.stylegan2 import StyleGAN2
from lightning_modules.trained import card_hashes, save_trained

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("disentangle", "transform")
# Channels by resolution: those of the published 256-px generators, and a hundredth of their arithmetic.
WIDTHS = {
    "wide": {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128},
    "narrow": {4: 64, 8: 64, 16: 48, 32: 32, 64: 32, 128: 16, 256: 8},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Makes, and in the end deletes, the two random files: widths → paths of generator and recognizer."""
    folder = tmp_path_factory.mktemp("random-weights")
    torch.save(random_ir_se50(), folder / "random_ir_se50.pth")

    def made(widths):
        out = folder / f"random-stylegan2-256-{widths}.safetensors"
        if not out.is_file():
            with mock.patch.dict(test_stylegan2.CHANNELS, WIDTHS[widths], clear=True):
                state = test_stylegan2.nvlabs_state(256, depth=8)
            # with the command the files name, from the layout they name
            torch.save(test_stylegan2.rosinality_checkpoint(state), folder / "random.pt")
            convert(folder / "random.pt", out)
        return out, folder / "random_ir_se50.pth"

    yield made
    for path in folder.iterdir():  # half a gigabyte, which pytest would keep
        path.unlink()


def spec_of(phase, files, **changes):
    """The `model` of a phase's YAML, with the user's paths."""
    spec = read_yaml(ROOT / f"configs/method/ifadit-paper-{phase}.yaml")["model"]
    for part, path in zip(("generator", "recognizer"), files, strict=True):
        assert spec["init_args"][part]["init_args"]["path"].startswith("weights/")
        spec["init_args"][part]["init_args"]["path"] = str(path)
    spec["init_args"] |= changes
    return spec


@pytest.fixture(scope="module")
def methods(weights):
    """Both phases, built as `keyveil compare` builds them; phase 2 starts from the file of phase 1."""
    files = weights("narrow")
    trained = files[0].with_name("phase1.safetensors")
    first = build(ReversibleAnonymizer, spec_of("disentangle", files), "phase 1")
    save_trained(first, trained, {"cards": json.dumps(card_hashes(first))})
    return first, build(ReversibleAnonymizer, spec_of("transform", files, disentangled=str(trained)), "phase 2")


def test_the_files_build_the_networks_of_the_paper(methods):
    for method in methods:
        generator, recognizer = method.disentangler.generator, method.disentangler.recognizer
        assert isinstance(generator, StyleGAN2)
        assert isinstance(recognizer, IRSE50)
        assert (generator.num_layers, generator.native_size, method.size) == (14, 256, 256)
        assert method.preview in (False, "never")
        assert method.learning_rate == 1e-4
    flow = methods[1].transform
    assert (flow.dim, flow.key_length, len(flow.flow)) == (512, 512, 4)
    linear = [layer for layer in flow.flow[0].subnet if isinstance(layer, torch.nn.Linear)]
    assert [layer.in_features for layer in linear] == [768, 256, 128, 128, 256]
    assert linear[-1].out_features == 512


def test_every_row_of_the_generator_has_an_attribute_code_of_its_own(methods):
    first, _ = methods
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        attributes = first.disentangler.attribute_encoder(images)
        w = first.disentangler.codes(first.disentangler.recognizer(images), attributes)
    assert attributes.shape == w.shape == (1, 14, 512)
    assert (w[:, -1] != w[:, -2]).any()  # no row is a copy of the last live one


def test_phase_2_starts_from_phase_1_and_neither_stores_the_users_files(methods):
    first, second = (method.state_dict() for method in methods)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-3, rtol=1e-2)
    assert not any("generator" in name or "recognizer" in name for name in second)
    assert set(methods[1].frozen_cards()) >= {"stylegan2", "ir-se50"}


@pytest.mark.parametrize("widths", ["narrow", pytest.param("wide", marks=pytest.mark.slow)])
def test_the_command_of_each_file_takes_a_training_step(weights, widths, tmp_path, monkeypatch):
    """`keyveil fit` as the files say it, on two faces of noise."""
    monkeypatch.chdir(tmp_path)
    generator, recognizer = weights(widths)
    phase_1 = tmp_path / "disentangle" / "checkpoints" / "last.ckpt"
    for phase in PHASES:
        files = (f"method/ifadit-paper-{phase}.yaml", "trainer/cpu.yaml")
        data = {"size": 256, "batch_size": 2, "count": 2, "w_rows": 14}
        more = {"disentangle": [], "transform": [f"--model.init_args.disentangled={phase_1}"]}
        trainer = {"max_steps": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
        code = main(
            [
                "fit",
                *(word for file in files for word in ("--config", str(ROOT / "configs" / file))),
                f"--model.init_args.generator.init_args.path={generator}",
                f"--model.init_args.recognizer.init_args.path={recognizer}",
                *more[phase],
                "--data=conftest.NoiseFaces",
                *(f"--data.init_args.{name}={value}" for name, value in data.items()),
                *(f"--trainer.{name}={value}" for name, value in trainer.items()),
                f"--trainer.default_root_dir={tmp_path / phase}",
            ]
        )
        assert code == 0
        (log,) = (tmp_path / phase).rglob("metrics.csv")
        with log.open() as lines:
            losses = {name: value for row in csv.DictReader(lines) for name, value in row.items() if value}
        assert {"disentangle": "train/same/code", "transform": "train/icl"}[phase] in losses
        assert all(math.isfinite(float(value)) for value in losses.values()), losses
    for path in tmp_path.rglob("*.ckpt"):  # with Adam's moments half a gigabyte, which pytest would keep
        path.unlink()

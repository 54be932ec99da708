import pickle

import pytest
import torch
from torch import nn

from lightning_modules.baselines.obscure import Blur
from lightning_modules.trained import (
    all_notes,
    export,
    load_trained,
    read_notes,
    read_state,
    save_trained,
    weights_hash,
)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_what_is_saved_comes_back(tmp_path):
    one, two = net(), net()
    save_trained(one, tmp_path / "net.safetensors", {"steps": "12", "seconds": "3.5"})
    load_trained(two, tmp_path / "net.safetensors")
    assert weights_hash(one) == weights_hash(two)
    assert read_notes(tmp_path / "net.safetensors") == {"steps": 12, "seconds": 3.5}


def test_a_checkpoint_becomes_safetensors_with_its_notes(tmp_path):
    one = net()
    checkpoint = {"state_dict": one.state_dict(), "global_step": 7, "training_seconds": 1.25}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "net.safetensors", "a test")
    assert read_notes(tmp_path / "net.safetensors") == {"steps": 7, "seconds": 1.2}
    two = net()
    load_trained(two, tmp_path / "net.safetensors")
    assert weights_hash(one) == weights_hash(two)


def test_a_checkpoint_says_which_method_it_is_of(tmp_path):
    checkpoint = {"state_dict": net().state_dict(), "global_step": 7}
    Blur().on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "net.safetensors")
    assert all_notes(tmp_path / "net.safetensors")["method"] == "lightning_modules.baselines.obscure.Blur"


def test_the_hash_sees_every_value():
    one = net()
    before = weights_hash(one)
    one[1].bias.data[0] += 1e-6
    assert weights_hash(one) != before
    assert weights_hash(nn.Identity()) == "none"


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name, write in (("a.ckpt", torch.save), ("b.ckpt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        write({"state_dict": Trap()}, tmp_path / name)
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read_state(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_missing_damaged_and_misfitting_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_state(tmp_path / "nowhere.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_state(tmp_path / "cut.safetensors")
    save_trained(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), tmp_path / "wide.safetensors", {})
    with pytest.raises(ValueError, match="does not fit Sequential"):
        load_trained(net(), tmp_path / "wide.safetensors")
    save_trained(nn.Linear(3, 4), tmp_path / "other.safetensors", {})
    with pytest.raises(ValueError, match="without a partner"):
        load_trained(net(), tmp_path / "other.safetensors")


def test_weights_trained_against_another_network_are_refused(tmp_path):
    one = net()
    one[0].card_hashes = {"generator": "sha256:" + "a" * 64}
    checkpoint = {"state_dict": one.state_dict(), "global_step": 1, "cards": dict(one[0].card_hashes)}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "net.safetensors")
    for name in ("last.ckpt", "net.safetensors"):
        load_trained(one, tmp_path / name)
        other = net()
        other[0].card_hashes = {"generator": "sha256:" + "b" * 64}
        with pytest.raises(ValueError, match="trained against another 'generator'"):
            load_trained(other, tmp_path / name)

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from datamodules.files import write_tensors, write_whole


def test_text_and_bytes_arrive_and_folders_are_made(tmp_path):
    for data, wanted in (("grüße", "grüße".encode()), (b"\x00\xff", b"\x00\xff")):
        write_whole(tmp_path / "a" / "b.txt", data)
        assert (tmp_path / "a" / "b.txt").read_bytes() == wanted
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_what_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    write_whole(tmp_path / "kept", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_tensors_and_notes_arrive_whatever_their_layout(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    write_tensors(
        tmp_path / "a" / "t.safetensors", {"view": x[:, 1:], "turned": x.mT, "wide": x[:1].expand(3, 3, 4)}, {"k": "v"}
    )
    found = load_file(tmp_path / "a" / "t.safetensors")
    assert torch.equal(found["view"], x[:, 1:])
    assert torch.equal(found["turned"], x.mT)
    assert torch.equal(found["wide"], x[:1].expand(3, 3, 4))
    with safe_open(tmp_path / "a" / "t.safetensors", "pt") as file:
        assert file.metadata() == {"k": "v"}


def test_shared_tensors_are_refused_in_a_sentence(tmp_path):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="share one tensor"):
        write_tensors(tmp_path / "t.safetensors", {"a": x, "b": x})
    assert not (tmp_path / "t.safetensors").exists()

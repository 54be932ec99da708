import os

import pytest

from datamodules.files import write_whole


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

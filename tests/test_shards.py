"""Shards hold what their data set gives; a run on them is the same run; what is damaged is left out and told."""

import json
import os
import tarfile

import numpy as np
import pytest
import torch
from test_datasets import MiddleFace

from datamodules.cache import AlignedFaces, aligned_faces
from datamodules.datasets import ImageFolderFaces
from datamodules.faces import FaceDataModule
from datamodules.latent import gallery_codes
from datamodules.shards import FACTS, Shards, write_shards
from experiments.cli import main
from lightning_modules.carriers import write_picture


@pytest.fixture
def people(tmp_path, monkeypatch):
    """Sixty people with three pictures each, one of which is no picture."""
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    random = torch.Generator().manual_seed(0)
    for number in range(180):
        path = tmp_path / "people" / f"{number // 3:02d}" / f"{number % 3}.png"
        coarse = torch.rand(1, 3, 6, 6, generator=random) * 2 - 1
        write_picture(path, torch.nn.functional.interpolate(coarse, size=48, mode="bilinear")[0])
    (tmp_path / "people" / "07" / "1.png").write_text("no picture")
    return ImageFolderFaces(str(tmp_path / "people"))


@pytest.fixture
def shards(people, tmp_path):
    write_shards(people, tmp_path / "shards", 32, faces=50, quality=None, detector=MiddleFace())
    return Shards(str(tmp_path / "shards"))


def module(source, **how):
    return FaceDataModule(source, size=32, batch_size=8, num_workers=0, detector=MiddleFace(), **how)


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_training_sees_the_same_faces_from_shards(people, shards):
    first, second = module(people, flip=True), module(shards, flip=True)
    assert first.people("test") == second.people("test")
    for split in ("train", "val", "test"):
        assert len(first.dataset(split)) == len(second.dataset(split)) > 0
    assert_same(*(next(iter(m.test_dataloader())) for m in (first, second)))
    for one, two in zip(first.train_dataloader(), second.train_dataloader(), strict=True):
        assert_same(one, two)


def test_identity_codes_of_shards_are_cached_under_a_name_of_their_own(shards, people):
    recognizer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))
    first, again = (gallery_codes(module(shards), recognizer)[0] for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(gallery_codes(module(people), recognizer)[0], first, rtol=1e-4, atol=1e-4)


def test_other_programs_read_them_as_tar_archives(people, shards):
    kept = {picture.sample: picture for picture in shards.pictures}
    assert len(kept) == 180
    seen = []
    for path in sorted(shards.folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            names = shard.getnames()
            seen += [name for name in names if name.endswith(".png")]
            told = json.loads(shard.extractfile(names[1]).read())
        assert told["person"] == kept[int(names[1].split(".")[0])].person
    assert len(seen) == 179
    assert len(list(shards.folder.glob("*.tar"))) == 4


def test_smaller_faces_are_had_and_larger_ones_refused(shards, people):
    small = module(shards)
    small.size = 16
    image, place, _ = small.dataset("train").face(0)
    assert image.shape == (16, 16, 3)
    whole, large, _ = module(shards).dataset("train").face(0)
    np.testing.assert_allclose(image, whole.reshape(16, 2, 16, 2, 3).mean((1, 3)), atol=0.51)
    # a point in the middle of the crop's first four pixels is the middle of the small one's first
    point = np.linalg.solve(large[:, :2], [0.5, 0.5] - large[:, 2])
    np.testing.assert_allclose(place[:, :2] @ point + place[:, 2], [0, 0], atol=1e-4)
    small = module(shards)
    small.size = 64
    with pytest.raises(ValueError, match="have 32 pixels, so 64 cannot be had"):
        small.dataset("train")


def broken(shards, shard="000001.tar", at=None):
    path = shards.folder / shard
    data = bytearray(path.read_bytes())
    if at is None:
        data = data[: len(data) // 2]
    else:
        data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_face_is_left_out_and_counted(shards, people):
    row = next(row for row in shards.rows.values() if row.shard == "000001.tar" and row.length)
    broken(shards, at=row.start + row.length // 2)
    assert list(Shards(str(shards.folder)).damaged) == sorted([row.file, "07/1.png"])
    faces = module(Shards(str(shards.folder)))
    whole = module(people)
    lost = [len(whole.dataset(split)) - len(faces.dataset(split)) for split in ("train", "val", "test")]
    assert sorted(lost) == [0, 0, 1]
    assert faces.identities == whole.identities


@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_damaged_shard_is_left_out_up_to_the_share_allowed(harm, shards, people):
    if harm == "truncated":
        broken(shards)
    else:
        (shards.folder / "000001.tar").unlink()
    with pytest.raises(ValueError, match=r"(?s)are of no use.*skip_share=0.1"):
        module(Shards(str(shards.folder))).dataset("train")
    with pytest.warns(UserWarning, match="are left out"):
        faces = module(Shards(str(shards.folder)), skip_share=0.5).dataset("train")
    assert 0 < len(faces) < len(module(people).dataset("train"))


def test_a_shard_that_breaks_while_it_is_read_is_named(shards):
    faces = module(shards).dataset("train")
    for path in shards.folder.glob("*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(OSError, match="is damaged"):
        faces[0]


def test_what_cannot_be_read_for_now_is_not_taken_for_damage(shards, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.shards.crc32", lambda data: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        with pytest.raises(OSError, match="Stale"):
            Shards(str(shards.folder)).damaged  # noqa: B018
    assert list(Shards(str(shards.folder)).damaged) == ["07/1.png"]


def test_a_shard_that_was_mended_is_read_again(shards):
    path = shards.folder / "000001.tar"
    whole, state = path.read_bytes(), path.stat()
    row = next(row for row in shards.rows.values() if row.shard == "000001.tar" and row.length)
    broken(shards, at=row.start)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(Shards(str(shards.folder)).damaged) == 2
    path.write_bytes(whole)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(Shards(str(shards.folder)).damaged) == 1


def test_a_lost_or_altered_index_is_told(shards):
    index = shards.folder / "000002.csv"
    lines = index.read_text().splitlines(keepends=True)
    for text in ("".join(lines[:-3]), "".join(lines).replace("/", "\\"), None):
        if text is None:
            index.unlink()
        else:
            index.write_text(text)
        with pytest.raises(ValueError, match="000002.csv is missing or damaged"):
            Shards(str(shards.folder)).pictures  # noqa: B018
    for text in ("", "{}", "[]"):
        (shards.folder / FACTS).write_text(text)
        with pytest.raises(ValueError, match="shards.json is missing or damaged"):
            Shards(str(shards.folder)).pictures  # noqa: B018


def test_pictures_without_a_face_count_and_their_people_keep_their_numbers(people, tmp_path):
    class Half(MiddleFace):
        def detect(self, picture):
            return super().detect(picture) if picture[0, 0, 0] % 2 else []

    write_shards(people, tmp_path / "half", 32, detector=Half())
    half, whole = module(Shards(str(tmp_path / "half"))), module(people)
    assert half.identities == whole.identities
    with pytest.raises(ValueError, match="are of no use .*no face"):
        half.dataset("train")


def test_pictures_of_no_use_count_in_any_data_set(people):
    with pytest.raises(ValueError, match="1 of .* pictures of the .* split .* are of no use"):
        [module(people, skip_share=0.0).dataset(split) for split in ("train", "val", "test")]


def test_a_stopped_run_goes_on_and_other_faces_do_not_mix(people, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert write_shards(people, whole, 32, faces=50, detector=MiddleFace())[0] == 179
    part = tmp_path / "part"
    write_shards(people, part, 32, faces=50, detector=MiddleFace())
    for name in (FACTS, "000003.csv", "000003.tar"):
        (part / name).unlink()
    with pytest.raises(FileNotFoundError, match="or not yet"):
        Shards(str(part)).pictures  # noqa: B018
    (part / "000000.tar").touch()
    before = (part / "000000.tar").stat().st_mtime_ns
    count, skipped = write_shards(people, part, 32, faces=50, detector=MiddleFace())
    assert count == 179
    assert "cannot be read" in skipped["07/1.png"]
    assert (part / "000000.tar").stat().st_mtime_ns == before
    for path in sorted(whole.glob("*.*")):
        assert path.read_bytes() == (part / path.name).read_bytes()
    with pytest.raises(ValueError, match="choose another folder"):
        write_shards(people, part, 16, faces=50, detector=MiddleFace())


def test_the_verb_writes_them(tmp_path, monkeypatch, capsys):
    from orl_faces import need

    need("orl", "centerface")
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "orl"
    assert main(["data", "shard", str(out), "--data=orl", "--size=64", "--faces=20", "--limit=40", "--lossless"]) == 0
    assert "40 faces of orl in" in capsys.readouterr().out
    assert len(Shards(str(out)).pictures) == 40
    assert main(["data", "shard", str(out), "--data=orl", "--size=32", "--faces=20", "--limit=40"]) == 1
    assert "choose another folder" in capsys.readouterr().err


def test_jpeg_shards_are_near(people, tmp_path):
    write_shards(people, tmp_path / "jpeg", 32, detector=MiddleFace())
    aligned = AlignedFaces(aligned_faces(people, people.pictures, 32, MiddleFace()))
    shards = Shards(str(tmp_path / "jpeg"))
    for row, picture in enumerate(aligned.pictures[:10]):
        difference = shards.read(picture).astype(float) - aligned.images[row]
        assert np.abs(difference).mean() < 4

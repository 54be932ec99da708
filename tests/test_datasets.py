"""Data sets: each public layout gives its people, numbers and labels; what is missing or broken is told in words."""

import os
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from datamodules.alignment import align, template
from datamodules.archives import unpacked
from datamodules.cache import AlignedFaces, aligned_faces
from datamodules.contents import contents
from datamodules.datasets import LFW, ORL, CelebA, GeneratedFaces, ImageFolderFaces
from datamodules.detection import Detection
from datamodules.sources import NoFaceError


class MiddleFace:
    """A detector that sees one face in the middle of whatever is not black."""

    name = "middle-face"

    def detect(self, picture):
        if not picture.any():
            return []
        height, width = picture.shape[:2]
        points = template("ffhq", min(height, width)).astype(np.float32)
        return [Detection(np.array([0, 0, width, height], np.float32), 1.0, points)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYVEIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KEYVEIL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def picture(path, seed=0, size=(60, 50), grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if grey else (*size, 3)
    pixels = np.random.default_rng(seed).integers(1, 256, shape, np.uint8)
    cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def lfw(tmp_path):
    root = tmp_path / "lfw-deepfunneled"
    for seed, name in enumerate(["Ann_Lee_0001", "Ann_Lee_0002", "Bo_0001", "Cy_de_la_Cruz_0001"]):
        picture(root / name.rsplit("_", 1)[0] / f"{name}.jpg", seed)
    return root


@pytest.fixture
def celeba(tmp_path):
    root = tmp_path / "celeba"
    for number in (1, 2, 5):
        picture(root / "img_align_celeba" / f"{number:06d}.jpg", number, (109, 89))
    (root / "identity_CelebA.txt").write_text("000001.jpg 7\n000002.jpg 9\n000003.jpg 9\n000005.jpg 7\n")
    rows = "000001.jpg  1 -1  1\n000002.jpg -1 -1  1\n000003.jpg 1 1 1\n000005.jpg -1  1 -1\n"
    (root / "list_attr_celeba.txt").write_text(f"4\nBald Male Young\n{rows}")
    return root


def archive(folder, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as bundle:
            for file in sorted(folder.rglob("*.*")):
                bundle.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as bundle:
            bundle.add(folder, folder.name)
    return path


def seen(source):
    return [(p.file, p.person, p.sample) for p in source.pictures]


LFW_PICTURES = [
    ("Ann_Lee/Ann_Lee_0001.jpg", "Ann_Lee", 0),
    ("Ann_Lee/Ann_Lee_0002.jpg", "Ann_Lee", 1),
    ("Bo/Bo_0001.jpg", "Bo", 2),
    ("Cy_de_la_Cruz/Cy_de_la_Cruz_0001.jpg", "Cy_de_la_Cruz", 3),
]


@pytest.mark.parametrize("form", ["folder", "above", "tgz", "tar", "zip", "above tgz", "environment", "beside"])
def test_lfw_is_the_same_however_it_is_kept(form, lfw, tmp_path, monkeypatch):
    root = {"folder": lfw, "above": tmp_path}.get(form)
    if form in ("tgz", "tar", "zip", "above tgz"):
        suffix = form.split()[-1]
        (tmp_path / "kept").mkdir()
        path = archive(lfw, tmp_path / "kept" / f"lfw-deepfunneled.{suffix}")
        root = path.parent if form.startswith("above") else path
    if form == "environment":
        monkeypatch.setenv("KEYVEIL_DATA", str(tmp_path))
    if form == "beside":
        (tmp_path / "data").mkdir()
        lfw.rename(tmp_path / "data" / lfw.name)
    source = LFW(str(root) if root else None)
    assert seen(source) == LFW_PICTURES
    assert source.read(source.pictures[0]).shape == (60, 50, 3)


def test_lfw_takes_the_landmarks_beside_it_and_needs_no_detector(lfw, tmp_path):
    points = template("ffhq", 40) + 3
    numbers = ",".join(f"{number:.4f}" for number in points.flatten())
    lines = [f"{Path(file).name},{numbers}" for file, _, _ in LFW_PICTURES]
    (tmp_path / "lfw-landmarks5.csv").write_text("\n".join(["file,a,b,c,d,e,f,g,h,i,j", *lines]))
    source = LFW(str(lfw))
    assert not source.detects(source.pictures)
    face = source.face(source.pictures[2], 32, None)
    expected, place = align(source.read(source.pictures[2]), points.round(4), 32)
    np.testing.assert_array_equal(face.image, expected)
    np.testing.assert_allclose(face.place, place, rtol=1e-6)
    assert LFW(str(lfw), landmarks=str(tmp_path / "lfw-landmarks5.csv")).points.keys() == source.points.keys()


def test_orl_reads_grey_pictures_as_rgb(tmp_path):
    for person in ("s1", "s2"):
        for number in (1, 2):
            picture(tmp_path / "orl" / person / f"{number}.pgm", number, (112, 92), grey=True)
    (tmp_path / "orl" / "s1" / "README.jpg").write_text("not of the set")
    source = ORL(str(tmp_path / "orl"))
    assert [p.person for p in source.pictures] == ["s1", "s1", "s2", "s2"]
    pixels = source.read(source.pictures[0])
    assert pixels.shape == (112, 92, 3)
    assert (pixels == pixels[..., :1]).all()


def test_celeba_keeps_its_own_numbers_people_and_labels(celeba):
    source = CelebA(str(celeba))
    assert seen(source) == [("000001.jpg", "7", 1), ("000002.jpg", "9", 2), ("000005.jpg", "7", 5)]
    assert source.attribute_names == ("Bald", "Male", "Young")
    assert source.attributes(source.pictures[2]).tolist() == [-1, 1, -1]
    chosen = CelebA(str(celeba), attributes=["Young", "Bald"])
    assert chosen.attributes(chosen.pictures[1]).tolist() == [1, -1]


def test_celeba_is_read_from_its_archive_and_from_the_folder_anno(celeba, tmp_path):
    (celeba / "Anno").mkdir()
    for name in ("identity_CelebA.txt", "list_attr_celeba.txt"):
        (celeba / name).rename(celeba / "Anno" / name)
    path = archive(celeba, tmp_path / "faces.tgz")
    assert seen(CelebA(str(path))) == seen(CelebA(str(celeba)))


def test_celebas_public_landmarks_are_scaled_to_smaller_pictures(celeba):
    points = template("ffhq", 120) + [29, 40]  # in a picture 178 wide; these are 89
    numbers = " ".join(str(number) for number in points.round().astype(int).flatten())
    rows = "\n".join(f"{number:06d}.jpg {numbers}" for number in (1, 2, 3, 5))
    (celeba / "list_landmarks_align_celeba.txt").write_text(f"4\nlx ly rx ry nx ny ax ay bx by\n{rows}\n")
    source = CelebA(str(celeba))
    expected, _ = align(source.read(source.pictures[0]), points.round() / 2, 48)
    np.testing.assert_array_equal(source.face(source.pictures[0], 48, None).image, expected)


def test_an_unknown_attribute_is_refused_with_the_known_ones(celeba):
    with pytest.raises(ValueError, match="no attribute 'Smiley'; it has Bald, Male, Young"):
        _ = CelebA(str(celeba), attributes=["Smiley"]).attribute_names


@pytest.mark.parametrize(
    ("files", "people"),
    [
        (["0000045/001.jpg", "0000045/002.jpg", "0000099/001.jpg"], ["0000045", "0000045", "0000099"]),
        (["train/n000002/0001_01.jpg", "test/n000001/0001_01.jpg"], ["n000001", "n000002"]),
        (["actors/faces/Al_Roker/Al_Roker_1.png"], ["Al_Roker"]),
    ],
    ids=["CASIA-WebFace", "VGGFace2", "FaceScrub"],
)
def test_a_folder_right_above_a_picture_is_its_person(files, people, tmp_path):
    for file in files:
        picture(tmp_path / "set" / file)
    assert [p.person for p in ImageFolderFaces(str(tmp_path / "set")).pictures] == people


@pytest.mark.parametrize("files", [["00000.png", "00001.png"], ["00000/00000.png", "00000/00001.png"]])
def test_in_ffhq_every_picture_is_its_own_person(files, tmp_path):
    for file in files:
        picture(tmp_path / "data" / "ffhq" / file)
    source = ImageFolderFaces(name="ffhq", people="picture")
    assert len({p.person for p in source.pictures}) == 2


def test_generated_faces_carry_the_code_that_renders_them(linear_generator):
    source = GeneratedFaces(linear_generator, count=5, seed=3, batch=2)
    faces = AlignedFaces(aligned_faces(source, source.pictures, 32))
    for face in faces:
        rendered = linear_generator(face.w[None], size=32)[0].clamp(-1, 1)
        torch.testing.assert_close(face.image, rendered, atol=1 / 127, rtol=0)  # 8 bits
        assert face.place.tolist() == torch.eye(2, 3).tolist()
    assert len({int(face.identity) for face in faces}) == 5


def test_a_generated_face_depends_on_its_seed_and_number_alone(linear_generator):
    few, many = (GeneratedFaces(linear_generator, count=n, batch=b) for n, b in ((3, 1), (9, 4)))
    wanted = list(few.faces(few.pictures, 32, None))
    again = list(many.faces(many.pictures[2:3], 32, None))
    np.testing.assert_array_equal(wanted[2].w, again[0].w)
    other = GeneratedFaces(linear_generator, seed=1)
    assert not np.allclose(next(iter(other.faces(other.pictures[2:3], 32, None))).w, wanted[2].w)
    assert few.fingerprint(few.pictures) != other.fingerprint(other.pictures[:3])


@pytest.mark.parametrize("source", [LFW, CelebA, ImageFolderFaces])
def test_a_missing_data_set_is_told_with_the_places_and_the_remedy(source):
    with pytest.raises(
        FileNotFoundError, match=r"looked for .* in data, \.\./shared/data; .*root.*KEYVEIL_DATA"
    ) as told:
        _ = source().pictures
    assert "\n" not in str(told.value)


def test_a_root_that_is_not_there_is_the_only_place_named():
    with pytest.raises(FileNotFoundError, match="in /no/such/place; download"):
        _ = LFW("/no/such/place").pictures


def test_a_folder_without_pictures_counts_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("no face")
    with pytest.raises(FileNotFoundError, match=r"holds no picture \(1 other files were found\)"):
        _ = ImageFolderFaces(str(tmp_path)).pictures


def test_a_broken_picture_is_named(tmp_path):
    for content in (b"not a jpeg", b""):
        (tmp_path / "broken.jpg").write_bytes(content)
        source = ImageFolderFaces(str(tmp_path))
        with pytest.raises(OSError, match=r"broken\.jpg cannot be read as a picture"):
            source.read(source.pictures[0])


def test_a_picture_without_a_face_is_named(tmp_path):
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((20, 20, 3), np.uint8))
    source = ImageFolderFaces(str(tmp_path))
    with pytest.raises(NoFaceError, match=r"no face was found in .*black\.png"):
        source.face(source.pictures[0], 32, MiddleFace())


def test_an_archive_may_not_write_outside_its_folder(tmp_path):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("../outside.jpg", b"x")
    with pytest.raises(OSError, match="would leave the folder"):
        unpacked(path)
    assert not list((tmp_path / "cache").rglob("*.jpg"))


def test_a_file_that_is_no_archive_is_told(tmp_path):
    (tmp_path / "lfw.tgz").write_bytes(b"not an archive")
    with pytest.raises(OSError, match="cannot be read as an archive"):
        unpacked(tmp_path / "lfw.tgz")


def test_a_cached_face_is_the_face(lfw):
    source, detector = LFW(str(lfw)), MiddleFace()
    faces = AlignedFaces(aligned_faces(source, source.pictures, 40, detector))
    for number, picture in enumerate(source.pictures):
        alone = source.face(picture, 40, detector)
        np.testing.assert_array_equal(faces.images[number], alone.image)
        expected = torch.from_numpy(alone.image).permute(2, 0, 1).float() / 127.5 - 1
        torch.testing.assert_close(faces[number].image, expected)
        np.testing.assert_array_equal(faces[number].place, alone.place)
        assert int(faces[number].sample) == picture.sample


def test_the_cache_is_made_once_and_anew_when_anything_that_matters_changes(lfw, monkeypatch):
    source, detector = LFW(str(lfw)), MiddleFace()
    folder = aligned_faces(source, source.pictures, 40, detector)
    monkeypatch.setattr("datamodules.cache._build", lambda *_: pytest.fail("was made again"))
    assert aligned_faces(LFW(str(lfw)), source.pictures, 40, detector) == folder
    monkeypatch.undo()
    monkeypatch.setenv("KEYVEIL_CACHE", str(folder.parents[1]))
    others = [
        aligned_faces(source, source.pictures, 32, detector),
        aligned_faces(source, source.pictures[:2], 40, detector),
    ]
    detector.name = "another"
    others.append(aligned_faces(source, source.pictures, 40, detector))
    picture(lfw / "Bo" / "Bo_0001.jpg", 99, (80, 70))
    others.append(aligned_faces(LFW(str(lfw)), source.pictures, 40, detector))
    assert len({folder, *others}) == 5
    assert sorted(p.name for p in folder.parent.iterdir()) == sorted(p.name for p in {folder, *others})


def test_a_picture_of_the_same_name_and_length_is_another_when_it_shows_something_else(lfw):
    source, path = LFW(str(lfw)), lfw / "Bo" / "Bo_0001.jpg"
    length = 10_000  # both are filled up to it: JPEG ends before
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    folder = aligned_faces(source, source.pictures, 40, MiddleFace())
    picture(path, 99, (60, 50))
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    assert aligned_faces(source, source.pictures, 40, MiddleFace()) != folder


def test_files_are_read_once_and_again_when_they_were_touched(lfw, monkeypatch):
    read, names = [], ["Bo/Bo_0001.jpg", "Ann_Lee/Ann_Lee_0001.jpg"]
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or whole(path))
    first = contents(lfw, names)
    assert first[names[0]] == sha256(whole(lfw / names[0])).hexdigest()
    assert contents(lfw, names[:1]) == {names[0]: first[names[0]]}
    assert sorted(read) == ["Ann_Lee_0001.jpg", "Bo_0001.jpg"]
    os.utime(lfw / names[0], ns=(1, 1))
    assert contents(lfw, names) == first
    assert read[2:] == ["Bo_0001.jpg"]
    for kept in Path(os.environ["KEYVEIL_CACHE"], "contents").iterdir():
        kept.write_bytes(b"{half")
    assert contents(lfw, names) == first
    assert "No such file" in contents(lfw, ["gone.jpg"])["gone.jpg"]


def test_pictures_that_give_no_face_are_left_out_with_the_reason(lfw):
    (lfw / "Bo" / "Bo_0001.jpg").write_bytes(b"broken")
    cv2.imwrite(str(lfw / "Ann_Lee" / "Ann_Lee_0001.jpg"), np.zeros((20, 20, 3), np.uint8))
    source = LFW(str(lfw))
    with pytest.warns(UserWarning, match="2 of 4 pictures of lfw gave no face"):
        faces = AlignedFaces(aligned_faces(source, source.pictures, 24, MiddleFace()))
    assert [p.sample for p in faces.pictures] == [1, 3]
    assert len(faces) == len(faces.images) == 2
    assert "cannot be read" in faces.skipped["Bo/Bo_0001.jpg"]
    assert "no face" in faces.skipped["Ann_Lee/Ann_Lee_0001.jpg"]


def test_a_folder_of_no_faces_is_told_with_counts(tmp_path):
    for number in range(3):
        (tmp_path / "set").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "set" / f"{number}.png"), np.zeros((20, 20, 3), np.uint8))
    source = ImageFolderFaces(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="3 of 3 pictures of faces gave no face .*; expected pictures of faces in"):
        aligned_faces(source, source.pictures, 24, MiddleFace())
    assert not list((tmp_path / "cache" / "faces").iterdir())

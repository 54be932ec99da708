"""`keyveil anonymize` and `recover` on files and folders: nothing is lost, half-written, or left as it was unsaid."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from orl_faces import need
from PIL import Image
from toy_photos import ToyDetector, ToyJudge, draw_alike, picture

import experiments.photos
from datamodules.alignment import warp
from datamodules.detection import Detection, default_detector
from datamodules.photo_files import encode_photo, read_photo, with_record
from datamodules.photo_search import Found
from datamodules.photos import ODD, _turned_back, find_faces, misfit
from experiments.cli import main
from experiments.photo_folder import OutputFolder, rank_of_process
from lightning_modules.callbacks.paste_back import Gate, put_back
from lightning_modules.keys import Cost, Record
from lightning_modules.manifest import Manifest, signer, signing_key

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    """Toys for the networks, a cheap Argon2id, a folder for the signing key, and the secret in the environment."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("KEYVEIL_SECRET", SECRET)
    monkeypatch.setattr("experiments.photos.default_detector", ToyDetector)
    monkeypatch.setattr("experiments.photos.Gate", lambda: Gate(ToyJudge(), 0.9))
    monkeypatch.setattr("experiments.anonymizing.Cost", lambda: Cost(1, 64, 1))
    draw_alike(monkeypatch)
    (tmp_path / "toy.yaml").write_text("model: {class_path: toy_photos.ToyMethod}")
    (tmp_path / "factors.yaml").write_text("model: {class_path: toy_photos.ToyFactors}")
    (tmp_path / "untouched.yaml").write_text("model: {class_path: toy_photos.Untouched}")
    monkeypatch.chdir(tmp_path)


def save(name, faces=1, seed=0, **options):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(faces, seed)).save(path, **options)
    return path


def hide(*paths, out="safe", method="toy.yaml", **options):
    words = [f"--{name}={value}" for name, value in options.items()]
    return main(["anonymize", *map(str, paths), "--out", out, "--method", method, "--accelerator=cpu", *words])


def open_(*paths, out="back", **options):
    words = [f"--{name}={value}" for name, value in options.items()]
    return main(["recover", *map(str, paths), "--out", out, "--accelerator=cpu", *words])


def pixels(path):
    return read_photo(Found(Path(path), "x")).pixels.astype(int)


def record(path):
    return Record.from_json(read_photo(Found(Path(path), "x")).record)


def entries(folder="safe", name="manifest.jsonl"):
    return [json.loads(line)["entry"] for line in Path(folder, name).read_text().splitlines()]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file() and p.name[0] != ".")


# -- another secret ----------------------------------------------------------------------------------------------------


def rekeyed(*paths, out, old, new, monkeypatch):
    monkeypatch.setenv("KEYVEIL_SECRET", old)
    monkeypatch.setenv("KEYVEIL_NEW_SECRET", new)
    return main(["rekey", *paths, "--out", out])


@pytest.mark.parametrize("mode", ["verify", "decoy"])
@pytest.mark.parametrize(
    ("name", "header"), [("a.png", "picture"), ("a.jpg", "picture"), ("a.webp", "both"), ("a.jpg", "sidecar")]
)
def test_another_secret_opens_the_same_pixels(name, header, mode, monkeypatch, capsys):
    monkeypatch.setattr("experiments.rekey.Cost", lambda: Cost(1, 64, 1))
    monkeypatch.setattr("lightning_modules.callbacks.paste_back.TRIES", 16)
    save(f"in/{name}", faces=8)  # the toy has eight keys
    seals = {"seal": "original"} if mode == "verify" and name == "a.png" else {}
    assert hide("in", mode=mode, header=header, **seals) == open_("safe", method="toy.yaml") == 0
    assert rekeyed("safe", out="safer", old=SECRET, new="second", monkeypatch=monkeypatch) == 0
    assert rekeyed("safer", out="safest", old="second", new="third", monkeypatch=monkeypatch) == 0
    assert (pixels(f"safe/{name}") == pixels(f"safest/{name}")).all()
    assert files("safe") == files("safest")
    monkeypatch.setenv("KEYVEIL_SECRET", "third")
    assert open_("safest", out="right", method="toy.yaml") == main(["verify", "safest"]) == 0
    assert Path(f"right/{name}").read_bytes() == Path(f"back/{name}").read_bytes()
    capsys.readouterr()
    for secret in ("second", SECRET):
        monkeypatch.setenv("KEYVEIL_SECRET", secret)
        assert open_("safest", out=f"by {secret}", method="toy.yaml") == (mode == "verify")
        if mode == "verify":
            assert "wrong secret" in "".join(capsys.readouterr())
        else:
            assert (pixels(f"by {secret}/{name}") != pixels(f"back/{name}")).any()
    assert rekeyed("safe", out="other", old="guess", new="second", monkeypatch=monkeypatch) == (mode == "verify")


def test_rekeying_goes_on_and_refuses_what_makes_no_sense(monkeypatch, capsys):
    monkeypatch.setattr("experiments.rekey.Cost", lambda: Cost(1, 64, 1))
    save("in/a.png")
    save("plain/b.png")
    assert hide("in") == 0
    assert rekeyed("safe", out="x", old=SECRET, new=SECRET, monkeypatch=monkeypatch) == 1
    assert "the new secret is the old one" in capsys.readouterr().err
    assert rekeyed("plain", out="x", old=SECRET, new="new", monkeypatch=monkeypatch) == 1
    assert "holds no record" in "".join(capsys.readouterr())
    for _ in range(2):
        assert rekeyed("safe", out="safer", old=SECRET, new="new", monkeypatch=monkeypatch) == 0
    assert "1 done before" in "".join(capsys.readouterr())
    with pytest.raises(ValueError, match="no record that could be replaced"):
        with_record(Path("in/a.png").read_bytes(), "x")


# -- there and back ---------------------------------------------------------------------------------------------------


def test_a_folder_is_hidden_and_comes_back_from_its_files_and_the_secret_alone(capsys):
    names = ["holiday/a.png", "holiday/deep/ä ö 日本.png", "holiday/deep/c.webp"]
    for number, name in enumerate(names):
        save(name, faces=number + 1, seed=number, **({"lossless": True} if name.endswith("webp") else {}))
    assert hide("holiday", batch_size=4) == 0
    assert files("safe") == [*sorted(name.removeprefix("holiday/") for name in names), "manifest.jsonl"]
    shutil.move("holiday", "elsewhere")
    assert open_("safe", method="toy.yaml") == 0
    for name in names:
        name = name.removeprefix("holiday/")
        original, hidden, back = pixels(f"elsewhere/{name}"), pixels(f"safe/{name}"), pixels(f"back/{name}")
        assert np.abs(hidden - original).max() > 60
        assert np.abs(back - original).mean() < 0.1 * np.abs(hidden - original).mean()
    assert {e["faces"]["changed"] for e in entries() if "faces" in e} == {1, 2, 3}
    assert main(["verify", "safe"]) == main(["verify", "back"]) == 0


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_the_background_stays_bit_for_bit(suffix):
    save(f"a.{suffix}", faces=2, **({"lossless": True} if suffix == "webp" else {}))
    assert hide(f"a.{suffix}") == 0
    changed = (pixels(f"a.{suffix}") != pixels(f"safe/a.{suffix}")).any(2)
    ys, xs = np.nonzero(changed)
    assert changed[:, :100].any()
    assert changed[:, 100:].any()
    # the middle half of an 80-pixel crop, a little wider, at rows 20 to 100
    assert ys.min() >= 35
    assert ys.max() <= 85
    assert not changed[:, 85:115].any()


def test_pasting_replaces_and_never_adds_differences():
    """Fine detail of what was there is gone where a smooth face is pasted over it."""
    noisy = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    crop = np.full((64, 64, 3), 128, np.uint8)
    made = crop.copy()
    made[16:48, 16:48] = 90
    matrix = np.array([[0.4, 0, -8], [0, 0.4, -8]])
    box = put_back(noisy, crop, made, matrix)
    inner = noisy[70:130, 70:130]
    assert inner.min() == inner.max() == 90
    assert box[0] >= 40
    assert box[2] <= 160


def test_a_face_that_pasting_enlarges_is_cut_out_again_as_it_was_made():
    """Also its finest detail, which enlarging and shrinking smooths away."""
    rng = np.random.default_rng(0)
    picture = cv2.blur(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8), (9, 9))
    turn = np.deg2rad(7)
    matrix = 0.4 * np.array([[np.cos(turn), -np.sin(turn), -12], [np.sin(turn), np.cos(turn), -30]])
    crop = warp(picture, matrix, 64)
    made = cv2.blur(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), (5, 5))
    made = np.clip(made.astype(int) + rng.integers(-8, 9, made.shape), 0, 255).astype(np.uint8)
    lost = {}
    for legible in (False, True):
        written = picture.copy()
        left, top, right, bottom = put_back(written, crop, made, matrix, legible)
        again = warp(written, matrix, 64)
        lost[legible] = np.abs(again.astype(int) - made)[6:-6, 6:-6].mean()
        outside = np.ones((200, 200), bool)
        outside[top:bottom, left:right] = False
        assert (written[outside] == picture[outside]).all()
    assert lost[True] < 0.35 * lost[False]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_sealed_originals_come_back(name):
    save(name, faces=2)
    assert hide(name, seal="original") == 0
    assert len(record(f"safe/{name}").faces if name != "a.jpg" else [1]) > 0
    assert open_(f"safe/{name}") == 0
    if name == "a.png":
        assert (pixels("back/a.png") == pixels("a.png")).all()
    else:
        assert np.abs(pixels(f"back/{name}") - pixels(name)).mean() < 3
    assert (Path("safe") / f"{name}.keyveil").exists() == (name == "a.jpg" and "a.jpg.keyveil" in files("safe"))


def test_sealed_codes_recover_what_a_method_alone_would_lose():
    save("in/a.png", faces=2)
    save("in/b.png", seed=1)
    assert hide("in/a.png", seal="code", header="sidecar") == hide("in/b.png", header="sidecar") == 0
    spoilt = pixels("safe/a.png").astype(np.uint8)
    spoilt[55:65, 45:55] ^= 64  # of a face's middle: the pixels no longer tell what was there
    Image.fromarray(spoilt).save("safe/a.png")
    assert open_("safe", method="toy.yaml") == 0  # both in one batch
    inner = slice(50, 70), slice(40, 60)
    assert np.abs(pixels("back/a.png")[inner].astype(int) - pixels("in/a.png")[inner]).max() < 8
    assert np.abs(pixels("back/b.png")[inner].astype(int) - pixels("in/b.png")[inner]).max() < 8
    sealed = [Record.from_json(Path(f"safe/{name}.png.keyveil").read_bytes()).faces[0].sealed for name in "ab"]
    assert sealed[0] > 1000
    assert sealed[1] == 0


def test_attributes_that_are_factors_are_drawn_and_told():
    save("in/a.png", faces=8)
    assert hide("in", method="factors.yaml") == open_("safe", method="factors.yaml") == 0
    asked = [face.attributes for face in record("safe/a.png").faces]
    assert len(set(asked)) > 1
    assert np.abs(pixels("back/a.png") - pixels("in/a.png")).mean() < 1
    assert np.abs(pixels("safe/a.png") - pixels("in/a.png")).mean() > 5


def test_who_is_to_stay_stays():
    save("friends/one.png", seed=7)
    Image.fromarray(np.hstack([picture(seed=7), picture(seed=8)])).save("group.png")
    assert hide("group.png", "friends/one.png", faces="except", except_for="friends") == 0
    changed = (pixels("group.png") != pixels("safe/group.png")).any(2)
    assert not changed[:, :100].any()
    assert changed[:, 100:].any()
    assert (pixels("safe/one.png") == pixels("friends/one.png")).all()
    told = {e["picture"]: e["faces"] for e in entries() if "faces" in e}
    assert told["group.png"] == {"found": 2, "changed": 1, "left": 1}
    assert hide("group.png", faces="all", out="all") == 0
    assert (pixels("group.png") != pixels("all/group.png")).any(2)[:, :100].any()
    save("friends/one.png", seed=8)  # another friend: what was done before is no longer what is asked for
    assert hide("group.png", faces="except", except_for="friends/one.png") == 0
    assert not (pixels("group.png") != pixels("safe/group.png")).any(2)[:, 100:].any()


def test_the_verbs_are_functions(tmp_path):
    from experiments.photos import anonymize, recover, verify

    save("in/a.png")
    (tmp_path / "secret.txt").write_text(SECRET)
    assert anonymize(["in"], out="safe", method="toy.yaml", secret_file="secret.txt", accelerator="cpu") == 0
    assert recover(["safe"], out="back", method="toy.yaml", secret_file="secret.txt", accelerator="cpu") == 0
    assert verify("safe") == verify("back") == 0
    with pytest.raises(ValueError, match="--out"):
        anonymize(["in"])


def test_a_record_too_long_for_a_jpeg_lies_beside_it():
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 1400, 3), dtype=np.uint8)).save("a.jpg")
    assert hide("a.jpg", seal="original") == 0
    assert files("safe") == ["a.jpg", "a.jpg.keyveil", "manifest.jsonl"]
    assert "a.jpg.keyveil" in entries()[0]["files"]
    assert open_("safe") == 0
    shutil.rmtree("back")
    Path("safe/a.jpg.keyveil").unlink()
    assert main(["verify", "safe"]) == 1
    assert open_("safe") == 1


@pytest.mark.parametrize("header", ["picture", "sidecar", "both"])
def test_the_record_goes_where_it_is_asked_for(header):
    save("a.png")
    assert hide("a.png", header=header) == 0
    assert Path("safe/a.png.keyveil").exists() == (header != "picture")
    assert (read_photo(Found(Path("safe/a.png"), "a")).record is not None) == (header != "sidecar")
    assert open_("safe", method="toy.yaml") == 0


def test_a_method_without_a_key_needs_no_secret_and_cannot_be_undone_unless_sealed(monkeypatch, capsys):
    monkeypatch.delenv("KEYVEIL_SECRET")
    save("a.png")
    assert hide("a.png", method="blackbox") == 0
    assert hide("a.png", method="blackbox", out="sealed", seal="original") == 1
    monkeypatch.setenv("KEYVEIL_SECRET", SECRET)
    assert open_("safe/a.png") == 1
    assert "cannot be undone" in capsys.readouterr().err
    assert hide("a.png", method="blackbox", out="sealed", seal="original") == 0
    assert open_("sealed/a.png") == 0
    assert (pixels("back/a.png") == pixels("a.png")).all()


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_a_wrong_secret_is_refused_in_verify_mode(monkeypatch, capsys):
    save("a.png")
    assert hide("a.png") == 0
    monkeypatch.setenv("KEYVEIL_SECRET", "another")
    assert open_("safe", method="toy.yaml") == 1
    assert "a.png: wrong secret" in capsys.readouterr().err
    assert files("back") == ["manifest.jsonl"]


def test_a_wrong_secret_gives_another_face_in_decoy_mode(monkeypatch):
    monkeypatch.setattr("lightning_modules.callbacks.paste_back.TRIES", 16)  # one of the toy's keys changes nothing
    for seed in range(4):  # the toy has eight keys
        save(f"in/{seed}.png", faces=4, seed=seed)
    assert hide("in", mode="decoy") == 0
    found = record("safe/0.png")
    assert found.header.decoy
    assert found.mac is None
    assert all("similarity" not in entry for entry in entries())
    assert open_("safe", method="toy.yaml") == 0
    monkeypatch.setenv("KEYVEIL_SECRET", "another")
    assert open_("safe", out="wrong", method="toy.yaml") == 0
    off = [np.abs(pixels(f"{folder}/0.png") - pixels("in/0.png")).mean() for folder in ("back", "wrong")]
    assert off[0] < 0.3 * off[1]


def test_nothing_of_the_secret_is_stored_in_decoy_mode(capsys):
    save("a.png")
    assert hide("a.png", mode="decoy", seal="original") == 1
    assert "--seal needs --mode verify" in capsys.readouterr().err
    assert not Path("safe").exists()


def test_the_secret_reaches_no_file_no_output_and_no_command_line(capfd, monkeypatch):
    save("in/a.png")
    save("in/b.jpg", faces=0)
    assert hide("in", seal="original") == 1
    assert open_("safe") == 0
    monkeypatch.delenv("KEYVEIL_SECRET")
    Path("secret.txt").write_text(SECRET + "\n")
    assert open_("safe", out="back2", secret_file="secret.txt") == 0
    Path("secret.txt").unlink()
    assert main(["anonymize", "in", "--secret", SECRET, "--out", "x"]) == 1
    assert main(["recover", "safe", f"--password={SECRET}", "--out", "x"]) == 1
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    for path in Path().rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_a_changed_record_or_seal_is_refused(capsys):
    save("a.png")
    assert hide("a.png", seal="original") == 0
    photo = read_photo(Found(Path("safe/a.png"), "a.png"))
    for number, change in enumerate(
        [
            lambda r: r["faces"][0]["box"].__setitem__(0, 1.0),
            lambda r: r["faces"][0].__setitem__("seal", "A" + r["faces"][0]["seal"][1:-4] + "AAAA"),
            lambda r: r.pop("mac"),
            lambda r: r["header"].pop("check"),
            lambda r: r.clear(),
        ]
    ):
        found = json.loads(photo.record)
        change(found)
        Path("bent.png").write_bytes(encode_photo(photo, photo.pixels, json.dumps(found))[0])
        assert open_("bent.png", out=f"bent{number}") == 1
        assert files(f"bent{number}") == ["manifest.jsonl"]
        assert capsys.readouterr().err.count("bent.png:") == 1


def test_a_cropped_picture_and_one_without_a_record_are_refused(capsys):
    save("a.png")
    assert hide("a.png") == 0
    photo = read_photo(Found(Path("safe/a.png"), "a.png"))
    Path("small.png").write_bytes(encode_photo(photo, photo.pixels[1:], photo.record)[0])
    assert open_("small.png", "a.png", method="toy.yaml") == 1
    said = capsys.readouterr().err
    assert "cropped, turned or resized" in said
    assert "holds no record" in said


# -- the check --------------------------------------------------------------------------------------------------------


def test_a_face_that_is_still_known_is_hidden_anew():
    for seed in range(6):
        save(f"in/{seed}.png", faces=5, seed=seed)
    assert hide("in") == 0  # of the toy's keys one in eight leaves a face as it is
    assert max(after for e in entries() for _, after in e.get("similarity", [])) <= 0.9


class Missing(ToyDetector):
    """Finds the face of a crop elsewhere, as often as it is asked, after it found it where it is."""

    def __init__(self, times):
        self.times, self.asked = times, 0

    def detect(self, picture):
        if picture.shape[:2] != (64, 64):
            return super().detect(picture)
        self.asked += 1
        away = self.asked % 2 == 0 and self.asked <= 2 * self.times
        box = np.array([0, 0, 9, 9] if away else [16, 16, 48, 48], np.float32)
        return [Detection(box, 0.9, np.zeros((5, 2), np.float32))]


@pytest.mark.parametrize(("times", "tried", "misplaced"), [(0, 1, 0), (1, 2, 0), (9, 4, 1)])
def test_a_face_that_is_not_where_it_was_gets_another_key(monkeypatch, times, tried, misplaced):
    detector = Missing(times)
    monkeypatch.setattr("experiments.photos.default_detector", lambda: detector)
    monkeypatch.setattr("experiments.photos.Gate", lambda: Gate(ToyJudge(), 1.1))
    save("in/a.png")
    assert hide("in") == 0  # it is written all the same: nobody is known in it
    assert detector.asked == 2 * tried
    assert entries()[0]["faces"].get("misplaced", 0) == misplaced
    assert files("safe") == ["a.png", "manifest.jsonl"]


def test_a_picture_in_which_a_face_stays_known_is_not_written(capsys):
    save("in/a.png", faces=2)
    assert hide("in", method="untouched.yaml") == 1
    assert "2 of its 2 faces are still recognized" in capsys.readouterr().err
    assert files("safe") == ["manifest.jsonl"]
    assert entries()[0]["status"] == "failed"


@pytest.mark.parametrize(("choice", "code", "written"), [("fail", 1, []), ("skip", 0, []), ("copy", 0, ["b.png"])])
def test_a_picture_without_a_face_is_not_passed_on_unless_asked(choice, code, written, capsys):
    save("in/a.png")
    save("in/b.png", faces=0, comment="x")
    assert hide("in", on_no_face=choice) == code
    assert files("safe") == ["a.png", *written, "manifest.jsonl"]
    assert ("in/b.png: no face was found" in capsys.readouterr().err) == bool(code)
    if written:
        assert (pixels("safe/b.png") == pixels("in/b.png")).all()
        assert open_("safe", method="toy.yaml") == 0


def test_small_faces_of_a_large_picture_are_found_once():
    need("centerface")
    group = Image.open(Path(__file__).parent.parent / "docs/results/photos/group.jpg")
    for scale, canvas in ((1.0, group.size), (0.4, (2400, 1800)), (4.0, (4000, 1680))):
        large = Image.new("RGB", canvas, (120, 130, 110))
        large.paste(group.resize([round(side * scale) for side in group.size]), (0, 0))
        found = find_faces(np.asarray(large), default_detector())
        assert len(found) == 5, scale
        # detectors are as sure of these faces turned, and put their landmarks anywhere then
        assert max(map(misfit, found)) < ODD, scale


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_faces_that_lie_have_their_landmarks_where_they_are(quarters):
    need("centerface")
    group = np.asarray(Image.open(Path(__file__).parent.parent / "docs/results/photos/group.jpg").convert("RGB"))
    upright = find_faces(group, default_detector())
    lying = find_faces(np.ascontiguousarray(np.rot90(group, quarters)), default_detector())
    assert len(lying) == 5
    back = [_turned_back(face, quarters, group) for face in lying]
    for face in upright:
        nearest = min(back, key=lambda other: np.abs(other.landmarks - face.landmarks).max())
        eyes = np.linalg.norm(face.landmarks[0] - face.landmarks[1])
        assert np.abs(nearest.landmarks - face.landmarks).max() < 0.25 * eyes


def test_only_the_largest_face_is_changed_if_asked():
    save("a.png", faces=3)
    assert hide("a.png", faces="largest") == 0
    assert entries()[0]["faces"] == {"found": 3, "changed": 1, "left": 2}


# -- faults -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_and_the_others_done(capsys):
    good = save("in/good.png")
    Path("in/none.png").write_bytes(b"")
    Path("in/text.png").write_text("dear diary")
    Path("in/cut.png").write_bytes(good.read_bytes()[:500])
    save("in/one.png")
    Image.new("RGB", (1, 1)).save("in/one.png")
    assert hide("in") == 1
    assert files("safe") == ["good.png", "manifest.jsonl"]
    said = capsys.readouterr().err
    for name in ("none", "text", "cut", "one"):
        assert said.count(f"in/{name}.png: ") == 1
    assert "Traceback" not in said
    assert entries()[-1] == {"pictures": 5, "counts": {"anonymized": 1, "failed": 4}}


def test_shards_are_hidden_as_their_folders_would_be_and_once(capsys):
    for number in range(2):
        pictures = [save(f"in/{number}/{name}.png", 1 + number, seed) for seed, name in enumerate("ab")]
        with tarfile.open(f"{number}.tar", "w") as bundle:
            for path in pictures:
                bundle.add(path, path.name)
                bundle.addfile(tarfile.TarInfo(f"{path.stem}.json"))
    assert hide("0.tar", "1.tar", out="sharded") == 0
    assert "4 other files" in capsys.readouterr().err
    assert hide("in", out="plain") == 0
    names = sorted(path.relative_to("plain") for path in Path("plain").rglob("*.png"))
    assert names == sorted(path.relative_to("sharded") for path in Path("sharded").rglob("*.png"))
    assert open_("sharded", method="toy.yaml") == 0
    for name in names:
        original = pixels(f"in/{name}")
        hidden, back = (np.abs(pixels(f"{folder}/{name}") - original).mean() for folder in ("sharded", "back"))
        assert back < 0.1 * hidden
    written = {name: Path("sharded", name).stat().st_mtime_ns for name in names}
    Path("sharded/1/b.png").unlink()
    assert hide("0.tar", "1.tar", out="sharded") == 0
    assert "3 done before" in capsys.readouterr().err
    kept = [name for name in names if Path("sharded", name).stat().st_mtime_ns == written[name]]
    assert len(kept) == 3
    assert main(["verify", "sharded"]) == 0


def test_a_second_run_goes_on_where_the_first_was_stopped(monkeypatch, capsys):
    for seed in range(4):
        save(f"in/{seed}.png", seed=seed)
    write, count = experiments.photo_jobs.write_whole, []

    def stop(path, data):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr("experiments.photo_jobs.write_whole", stop)
    with pytest.raises(SystemExit):
        sys.exit(hide("in") or 1)
    monkeypatch.setattr("experiments.photo_jobs.write_whole", write)
    with Path("safe/manifest.jsonl").open("ab") as file:
        file.write(b'{"entry": {"pict')  # as a kill leaves it
    Path("safe/.2.png.123.part").write_bytes(b"half")
    assert main(["verify", "safe"]) == 1
    first = {name: Path("safe", name).stat().st_mtime_ns for name in ("0.png", "1.png")}
    assert hide("in") == 0
    assert "2 done before, 2 anonymized" in " ".join(capsys.readouterr().err.split())
    assert first == {name: Path("safe", name).stat().st_mtime_ns for name in first}
    assert not Path("safe/.2.png.123.part").exists()
    assert main(["verify", "safe"]) == 0
    assert hide("in") == 0
    assert entries()[-1] == {"pictures": 4, "counts": {"done before": 4}}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pictures_read_ahead_come_in_order_and_so_do_their_failures(workers, capsys):
    for seed in range(5):
        save(f"in/{seed}.png", seed=seed)
    Path("in/2.png").write_bytes(b"no picture")
    assert hide("in", workers=workers, batch_size=1) == 1
    assert "2.png: it is not a picture" in " ".join(capsys.readouterr().err.split())
    told = [line["picture"] for line in entries() if line.get("status") == "anonymized"]
    assert told == ["0.png", "1.png", "3.png", "4.png"]
    assert hide("in", workers=workers, batch_size=1) == 1
    assert entries()[-1]["counts"] == {"done before": 4, "failed": 1}
    assert files("safe") == ["0.png", "1.png", "3.png", "4.png", "manifest.jsonl"]


def test_workers_are_none_or_more(capsys):
    save("in/0.png")
    assert hide("in", workers=-1) == 1
    assert "workers 0" in capsys.readouterr().err


def test_a_killed_run_goes_on():
    for seed in range(3):
        save(f"in/{seed}.png", seed=seed)
    room = Path(__file__).parent
    code = f"""
import os, sys
sys.path[:0] = [{str(room)!r}, {str(room.parent)!r}]
import experiments.anonymizing, experiments.photo_jobs, experiments.photos
from toy_photos import ToyDetector, ToyJudge
from experiments.cli import main
from lightning_modules.callbacks.paste_back import Gate
from lightning_modules.keys import Cost
experiments.photos.default_detector = ToyDetector
experiments.photos.Gate = lambda: Gate(ToyJudge(), 0.9)
experiments.anonymizing.Cost = lambda: Cost(1, 64, 1)
replace = os.replace
os.replace = lambda a, b: os.kill(os.getpid(), 9) if str(b).endswith("1.png") else replace(a, b)
main(["anonymize", "in", "--out", "safe", "--method", "toy.yaml", "--accelerator=cpu"])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert files("safe") == ["0.png", "manifest.jsonl"]
    assert list(Path("safe").glob(".1.png.*.part"))
    assert hide("in") == 0
    assert entries()[-1] == {"pictures": 3, "counts": {"done before": 1, "anonymized": 2}}
    assert not list(Path("safe").glob(".*.part"))
    assert main(["verify", "safe"]) == 0


@pytest.mark.slow
def test_a_trainer_file_names_the_machines_and_each_process_does_its_share():
    for seed in range(5):
        save(f"in/{seed}.png", seed=seed)
    room = Path(__file__).parent
    Path("several.py").write_text(f"""
import random, sys
sys.path[:0] = [{str(room)!r}, {str(room.parent)!r}]
import experiments.anonymizing, experiments.photos, lightning_modules.callbacks.paste_back as gate
from toy_photos import ToyDetector, ToyJudge
from experiments.cli import main
from lightning_modules.callbacks.paste_back import Gate
from lightning_modules.keys import Cost
experiments.photos.default_detector = ToyDetector
experiments.photos.Gate = lambda: Gate(ToyJudge(), 0.9)
experiments.anonymizing.Cost = lambda: Cost(1, 64, 1)
gate.TRIES = 16
sys.exit(main())
""")
    machines = "trainer: {accelerator: cpu, devices: 2, strategy: ddp, max_steps: 5, precision: bf16-mixed}"
    Path("two.yaml").write_text(machines)
    for verb, given, out in (("anonymize", "in", "safe"), ("recover", "safe", "back")):
        command = [sys.executable, "several.py", verb, given, "--out", out, "--method", "toy.yaml"]
        done = subprocess.run([*command, "--trainer", "two.yaml"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert files(out) == [*(f"{seed}.png" for seed in range(5)), "manifest.jsonl"]
        assert main(["verify", out]) == 0
        assert sorted(entry["pictures"] for entry in entries(out) if "pictures" in entry) == [2, 3]
        assert sorted(entry["picture"] for entry in entries(out) if "picture" in entry) == files(given)[:5]
    for seed in range(5):
        before, safe, back = (
            np.array(Image.open(f"{folder}/{seed}.png")).astype(float) for folder in ("in", "safe", "back")
        )
        assert abs(back - before).mean() < 0.2 * abs(safe - before).mean()


def test_a_trainer_file_must_name_a_trainer(capsys):
    save("a.png")
    Path("none.yaml").write_text("model: {}")
    assert hide("a.png", trainer="none.yaml") == hide("a.png", trainer="missing.yaml") == 1
    told = capsys.readouterr().err
    assert "none.yaml has no trainer" in told
    assert "no configuration at missing.yaml" in told


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        ({}, ""),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, ""),
        ({"LOCAL_RANK": "3"}, "3"),
        ({"LOCAL_RANK": "0", "NODE_RANK": "2"}, "2-0"),
        ({"RANK": "9", "LOCAL_RANK": "1"}, "9"),
        ({"SLURM_PROCID": "0"}, ""),
        ({"SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, "4"),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, "1"),
    ],
)
def test_each_process_of_a_cluster_has_a_manifest_of_its_own(told, rank, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert rank_of_process() == rank


def test_manifests_of_several_processes_become_one_when_the_last_has_ended(monkeypatch):
    """And what others are writing stays as it is."""
    save("in/a.png")
    save("in/b.png", seed=1)
    assert hide("in") == 0
    Path("safe/.b.png.77.part").write_text("another process is writing this")
    with OutputFolder(Path("safe")):
        assert not Path("safe/.b.png.77.part").exists()
        Path("safe/.b.png.78.part").write_text("and this")
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "4")
        with OutputFolder(Path("safe")) as manifest:
            manifest.add({"picture": "c.png", "status": "skipped"})
            manifest.add({"pictures": 1, "counts": {"skipped": 1}})
        assert files("safe")[2:] == ["manifest.3.jsonl", "manifest.jsonl"]  # the first is not done
    assert files("safe")[2:] == ["manifest.jsonl"]
    assert entries()[-2:] == [{"picture": "c.png", "status": "skipped"}, {"pictures": 1, "counts": {"skipped": 1}}]
    assert main(["verify", "safe"]) == 0
    with OutputFolder(Path("safe")) as manifest:  # killed before its end
        manifest.add({"picture": "d.png", "status": "skipped"})
    assert files("safe")[2:] == ["manifest.3.jsonl", "manifest.jsonl"]
    monkeypatch.setenv("RANK", "0")
    with OutputFolder(Path("safe")):
        assert Path("safe/.b.png.78.part").exists()
    monkeypatch.delenv("WORLD_SIZE")
    with OutputFolder(Path("safe")):
        assert not Path("safe/.b.png.78.part").exists()


def test_what_a_killed_process_left_does_not_disturb_the_runs_after_it(monkeypatch):
    """Its lines stay apart until a run has finished them, and newer ones of the same pictures count."""
    save("in/a.png")
    save("in/b.png", seed=1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with OutputFolder(Path("safe")) as manifest:
        manifest.add({"picture": "b.png", "input": "0", "status": "anonymized", "files": {"b.png": "0" * 64}})
    with Path("safe/manifest.1.jsonl").open("ab") as file:
        file.write(b'{"entry": {"pic')
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    Path("safe/b.png").unlink(missing_ok=True)
    assert hide("in") == 0
    assert files("safe") == ["a.png", "b.png", "manifest.1.jsonl", "manifest.jsonl"]
    part = Path("safe/manifest.1.jsonl")
    monkeypatch.setenv("RANK", "1")
    with OutputFolder(Path("safe")) as manifest:  # goes on, and finds nothing to do
        before = part.read_bytes()
        manifest.add({"pictures": 0, "counts": {}})
        whole = part.read_bytes()
    assert whole.startswith(before)
    assert files("safe") == ["a.png", "b.png", "manifest.jsonl"]
    assert main(["verify", "safe"]) == 0
    lines = len(entries())
    part.write_bytes(whole)  # stopped between merging and removing
    with OutputFolder(Path("safe")):
        pass
    assert files("safe") == ["a.png", "b.png", "manifest.jsonl"]
    assert len(entries()) == lines
    monkeypatch.delenv("RANK")
    assert hide("in") == 0
    assert entries()[-1]["counts"] == {"done before": 2}


def test_another_secret_or_other_options_are_not_taken_for_done(monkeypatch):
    save("a.png")
    assert hide("a.png") == hide("a.png", seal="original") == 0
    assert entries()[-1]["counts"] == {"anonymized": 1}
    monkeypatch.setenv("KEYVEIL_SECRET", "another")
    assert hide("a.png", seal="original") == 0
    assert entries()[-1]["counts"] == {"anonymized": 1}
    assert open_("safe") == 0


def test_what_keyveil_did_not_write_is_not_overwritten(capsys):
    save("in/a.png")
    other = save("safe/a.png", seed=9).read_bytes()
    assert hide("in") == 1
    assert "not made of this picture" in capsys.readouterr().err
    assert Path("safe/a.png").read_bytes() == other


def test_two_pictures_of_one_name_do_not_replace_each_other(capsys):
    save("in/a.png")
    save("other/a.png", seed=1)
    assert hide("in") == 0
    first = Path("safe/a.png").read_bytes()
    assert hide("other") == 1
    assert Path("safe/a.png").read_bytes() == first
    assert hide("in", seal="original") == 0  # the same picture may be done anew
    Image.fromarray(picture(1)).save("in/x.gif")
    save("in/x.gif.png", seed=3)
    assert hide("in", out="both") == 1
    assert files("both") == ["a.png", "manifest.jsonl", "x.gif.png"]


def test_a_name_is_only_a_name():
    names = ["a, [b] {c}: 'd'.png", 'quote".png', "-dash.png", "null.png", "1e3.png", "$HOME ${x}.png", "x\n\ty.png"]
    for name in names:
        save(f"in/{name}")
    os.chdir("in")
    assert main(["anonymize", *names[:2], *names[3:], "--out", "../safe", "--method=../toy.yaml", "--", names[2]]) == 0
    os.chdir("..")
    assert files("safe") == sorted([*names, "manifest.jsonl"])


def test_an_anonymized_picture_is_not_anonymized_again(capsys):
    save("a.png")
    assert hide("a.png") == 0
    assert hide("safe", out="twice") == 1
    assert "already" in capsys.readouterr().err


def test_the_output_may_lie_inside_the_input():
    save("in/a.png")
    assert hide("in", out="in/safe") == 0
    assert hide("in", out="in/safe") == 0
    assert files("in/safe") == ["a.png", "manifest.jsonl"]


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, capsys):
    save("in/a.png")
    save("in/b.png", seed=1)
    replace = os.replace

    def full(source, target):
        if str(target).endswith("a.png"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert hide("in") == 1
    assert files("safe") == ["b.png", "manifest.jsonl"]
    assert not list(Path("safe").glob(".*.part"))
    assert "in/a.png: No space left" in capsys.readouterr().err
    assert main(["verify", "safe"]) == 0
    monkeypatch.setattr(os, "replace", replace)
    assert hide("in") == 0
    assert entries()[-1]["counts"] == {"anonymized": 1, "done before": 1}
    monkeypatch.setattr(os, "replace", full)
    assert hide("in", seal="original") == 1  # the older one stays
    assert main(["verify", "safe"]) == 0


def test_a_place_that_cannot_be_written_is_told_at_once(capsys):
    save("a.png")
    Path("file").write_text("x")
    assert hide("a.png", out="file/safe") == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["anonymize", "--out", "x"], "name the pictures"),
        (["anonymize", "a.png"], "--out"),
        (["anonymize", "gone.png", "--out", "x"], "there is no picture or folder"),
        (["anonymize", "a.png", "--out", "x", "--method", "magic"], "expected a method of"),
        (["anonymize", "a.png", "--out", "x", "--seal", "code", "--method", "blur"], "no code of a face"),
        (["anonymize", "a.png", "--out", "x", "--faces", "except", "--method", "toy.yaml"], "go together"),
        (["inspect", "a.png"], "holds no record"),
        (["verify", "."], "there is no manifest"),
    ],
)
def test_mistakes_end_in_one_sentence(words, told, capsys):
    save("a.png")
    assert main(words) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


# -- records and manifests --------------------------------------------------------------------------------------------


def test_a_picture_says_what_it_is_without_a_secret(capsys):
    save("a.png", faces=2)
    assert hide("a.png", seal="original") == 0
    capsys.readouterr()
    assert main(["inspect", "safe/a.png"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["mode"], told["size"], len(told["faces"])) == ("toy", "verify", [200, 120], 2)


def test_a_manifest_notices_what_was_altered_removed_or_signed_by_others(capsys, monkeypatch):
    for seed in range(3):
        save(f"in/{seed}.png", seed=seed)
    assert hide("in") == 0
    assert main(["verify", "safe"]) == 0
    path = Path("safe/manifest.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    for bent in (
        lines[1:],
        lines[:1] + lines[2:],
        lines[:-1],
        [lines[0].replace('"failed"', '"x"').replace('"anonymized"', '"copied"'), *lines[1:]],
        ["[" * 50_000 + "\n", *lines],
        [],
    ):
        path.write_text("".join(bent))
        assert main(["verify", "safe"]) == 1
    path.write_text("".join(lines))
    data = Path("safe/1.png").read_bytes()
    Path("safe/1.png").write_bytes(data[:-1] + b"x")
    assert main(["verify", "safe"]) == 1
    assert "1.png: it was altered" in capsys.readouterr().err
    Path("safe/1.png").write_bytes(data)
    signer = json.loads(lines[0])["signer"]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path("others").resolve()))
    assert main(["verify", "safe"]) == 1
    assert "--signer" in capsys.readouterr().err
    assert main(["verify", "safe", "--signer", signer]) == 0


def test_pictures_do_not_pile_up_in_memory(monkeypatch):
    for seed in range(12):
        save(f"in/{seed}.png", seed=seed)
    most, row = [], experiments.photos.Photos.predict_dataloader
    seen = []

    def watched(photos):
        seen.append(photos)
        return row(photos)

    finish = experiments.photos.PasteBack._finish

    def counted(self, opened, photos, step):
        most.append(len({id(one) for one, _ in photos.open.values()}))
        return finish(self, opened, photos, step)

    monkeypatch.setattr(experiments.photos.Photos, "predict_dataloader", watched)
    monkeypatch.setattr(experiments.photos.PasteBack, "_finish", counted)
    assert hide("in", batch_size=2) == 0
    assert max(most) <= 4  # this batch and the next
    assert not seen[0].open


def test_opacity_of_the_input_is_kept():
    four = np.dstack([picture(1), np.full((120, 100), 77, np.uint8)])
    Image.fromarray(four).save("a.png")
    assert hide("a.png", seal="original") == open_("safe") == 0
    assert (np.asarray(Image.open("back/a.png")) == four).all()


def test_metadata_is_stripped():
    exif = Image.Exif()
    exif[0x010F] = "PRIVATE"
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).save(buffer, "JPEG", exif=exif)
    Path("a.jpg").write_bytes(buffer.getvalue())
    assert hide("a.jpg") == 0
    assert b"PRIVATE" not in Path("safe/a.jpg").read_bytes()
    assert main(["anonymize", "a.jpg", "--out", "kept", "--method", "toy.yaml", "--keep-metadata"]) == 0
    assert b"PRIVATE" in Path("kept/a.jpg").read_bytes()


# -- what a review found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_face_that_lies_or_hangs_is_found_where_it_is(quarters):
    class OneFace:
        """Knows the red, green and blue spots of a face that stands upright."""

        name = "spots"

        def detect(self, picture):
            spots = [np.argwhere(picture[..., channel] == 255).mean(0)[::-1] for channel in range(3)]
            if not (spots[0][0] < spots[1][0] and spots[2][1] > spots[0][1]):  # left eye, right eye, mouth below
                return []
            nose, side = (spots[0] + spots[1]) / 4 + spots[2] / 2, (spots[1] - spots[0]) / 2.3
            points = np.array([spots[0], spots[1], nose, spots[2] - side, spots[2] + side], np.float32)
            return [Detection(np.concatenate([points.min(0), points.max(0)]), 0.9, points)]

    upright = np.zeros((60, 90, 3), np.uint8)
    for channel, (x, y) in enumerate([(20, 10), (40, 10), (30, 30)]):
        upright[y, x, channel] = 255
    lying = np.ascontiguousarray(np.rot90(upright, quarters))
    found = find_faces(lying, OneFace())
    assert len(found) == 1
    for channel in range(2):
        x, y = found[0].landmarks[channel].round().astype(int)
        assert lying[y, x, channel] == 255
    x, y = found[0].landmarks[3:].mean(0).round().astype(int)
    assert lying[y, x, 2] == 255
    assert (found[0].box[2:] >= found[0].box[:2]).all()


def test_one_damaged_picture_does_not_stop_the_others(monkeypatch, capsys):
    save("in/a.png")
    save("in/c.png")
    Path("in/b.tif").write_bytes(b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\xff\xff\0\0\0\0\0\0")
    assert hide("in") == 1
    assert files("safe") == ["a.png", "c.png", "manifest.jsonl"]
    assert "b.tif" in capsys.readouterr().err


def test_a_file_of_a_format_that_runs_programs_is_no_picture(capsys):
    Path("beach.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert hide("beach.jpg") == 1
    assert "not a picture" in capsys.readouterr().err


def test_metadata_asked_for_once_is_not_kept_the_next_time():
    notes = Image.Exif()
    notes[0x0110] = "camera of somebody"
    save("a.jpg", exif=notes)
    assert hide("a.jpg", keep_metadata="true") == 0
    assert b"camera of somebody" in Path("safe/a.jpg").read_bytes()
    assert hide("a.jpg") == 0
    assert b"camera of somebody" not in Path("safe/a.jpg").read_bytes()


def test_a_picture_that_no_run_wrote_is_told_by_verify(capsys):
    save("a.png")
    assert hide("a.png") == 0
    shutil.copy("a.png", "safe/planted.png")
    assert main(["verify", "safe"]) == 1
    assert "planted.png" in capsys.readouterr().err


def test_the_record_of_a_moved_picture_is_not_overwritten(capsys):
    save("one/a.png", seed=1)
    save("two/a.png", seed=2)
    assert hide("one", header="sidecar", seal="original") == 0
    kept = Path("safe/a.png.keyveil").read_bytes()
    shutil.move("safe/a.png", "archive.png")
    assert hide("two") == 1
    assert Path("safe/a.png.keyveil").read_bytes() == kept


def test_a_wrong_secret_is_refused_where_the_right_one_was_before(monkeypatch, capsys):
    save("a.png")
    assert hide("a.png") == open_("safe", method="toy.yaml") == 0
    back = Path("back/a.png").read_bytes()
    monkeypatch.setenv("KEYVEIL_SECRET", "another one")
    assert open_("safe", method="toy.yaml") == 1
    assert "wrong secret" in capsys.readouterr().err
    assert Path("back/a.png").read_bytes() == back


def test_recovered_decoys_leave_no_hash_by_which_a_secret_could_be_guessed():
    save("a.png")
    assert hide("a.png", mode="decoy") == open_("safe", method="toy.yaml") == 0
    noted = [entry["files"] for entry in entries("back") if "files" in entry]
    assert noted == [{"a.png": None}]
    assert open_("safe", method="toy.yaml") == 0  # again, over itself
    assert main(["verify", "back"]) == 0


# -- the manifest ------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_half_line_in_the_manifest(tmp_path, monkeypatch):
    manifest = Manifest(tmp_path / "manifest.jsonl", signing_key())
    manifest.add({"picture": "a", "files": {"a": "1"}})
    whole = manifest.path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr("lightning_modules.manifest.os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            manifest.add({"picture": "b", "files": {"b": "2"}})
    assert manifest.path.read_bytes() == whole
    manifest.add({"picture": "c", "files": {"c": "3"}})
    assert sorted(Manifest(manifest.path, signing_key()).entries) == ["a", "c"]


def test_the_signing_key_is_there_whole_or_not_at_all_and_its_owners_alone(tmp_path):
    key = signing_key()
    assert signer(key) == signer(signing_key())
    (file,) = (tmp_path / "config" / "keyveil").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_size == 32

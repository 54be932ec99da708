"""Pictures as people keep them: each is read upright or refused in one sentence, and nothing private is written."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from datamodules.photo_files import encode_photo, read_photo
from datamodules.photo_search import Found, find_photos

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(PIXELS)).save(path, **options)
    return Found(path, path.name)


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(OSError, match=".") as told:
        read_photo(Found(path, path.name))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_folders_are_mirrored_and_links_followed_once(tmp_path):
    out = tmp_path / "in" / "out"
    for name in ("b.PNG", "deep/ä ö/日本.png", "out/old.png", ".hidden.png", "deep/.secret/x.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    found, others = find_photos([tmp_path / "in"], out)
    assert [one.name for one in found] == ["b.PNG", "deep/ä ö/日本.png"]
    assert others == 1


def test_nothing_is_written_over_an_input_or_another_output(tmp_path):
    save(tmp_path / "a" / "x.png")
    save(tmp_path / "b" / "x.png")
    with pytest.raises(ValueError, match="over itself"):
        find_photos([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(ValueError, match="both be written"):
        find_photos([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"], tmp_path / "out")
    assert len(find_photos([tmp_path / "a", tmp_path / "a" / "x.png"], tmp_path / "out")[0]) == 1
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        find_photos([tmp_path / "c"], tmp_path / "out")


def shard(path, names, kind=tarfile.REGTYPE, open_as="w"):
    """A tar of PNGs, and of a text that belongs to none."""
    picture = io.BytesIO()
    Image.fromarray(PIXELS).save(picture, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, open_as) as bundle:
        for name in [*names, "notes.json"]:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(picture.getvalue()) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd"
            bundle.addfile(member, io.BytesIO(picture.getvalue()))
    return path


def test_a_shard_is_a_folder_whose_pictures_are_read_where_they_lie(tmp_path):
    path = shard(tmp_path / "in" / "deep" / "0.tar", ["b.png", "people/ä ö.png", ".hidden.png", "people/.x/y.png"])
    found, others = find_photos([tmp_path / "in"], tmp_path / "out", shards=True)
    assert [one.name for one in found] == ["deep/0/b.png", "deep/0/people/ä ö.png"]
    assert others == 3
    for one in found:
        np.testing.assert_array_equal(read_photo(one).pixels, PIXELS)
    assert [one.name for one in find_photos([path], tmp_path / "out", shards=True)[0]] == [
        "0/b.png",
        "0/people/ä ö.png",
    ]
    with pytest.raises(FileNotFoundError, match=r"no picture in .* \(1 other files\)"):
        find_photos([tmp_path / "in"], tmp_path / "out")
    save(tmp_path / "0" / "b.png")
    with pytest.raises(ValueError, match="both be written to 0/b.png"):
        find_photos([path, tmp_path], tmp_path / "out", shards=True)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match="ends before it"):
        read_photo(found[1])


def test_shards_that_are_damaged_or_would_write_elsewhere_are_refused(tmp_path):
    path, out = tmp_path / "0.tar", tmp_path / "out"
    for name in ("../x.png", "/x.png", "a/../../x.png"):
        with pytest.raises(OSError, match="would leave the output folder"):
            find_photos([shard(path, [name])], out, shards=True)
    shard(path, ["x.png"], tarfile.SYMTYPE)
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        find_photos([path], out, shards=True)
    whole = shard(path, ["x.png", "y.png"]).read_bytes()
    for cut in (100, 700, 1000 + whole.index(b"y.png")):
        path.write_bytes(whole[:cut])
        with pytest.raises(OSError, match=r"0\.tar") as told:
            find_photos([path], out, shards=True)
        assert "\n" not in str(told.value)
    shard(path, ["x.png"], open_as="w:gz")
    with pytest.raises(OSError, match="an uncompressed tar archive"):
        find_photos([path], out, shards=True)


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.kron(PIXELS, np.ones((9, 9, 1), np.uint8))).save(good, "JPEG")
    assert "damaged" in refused(tmp_path / "cut.jpg", good.getvalue()[: len(good.getvalue()) // 2])
    assert refused(tmp_path / "none.jpg", b"") == "it is empty"
    assert "not a picture" in refused(tmp_path / "text.png", b"dear diary\n" * 9)
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG")
    for cut in range(8, len(png.getvalue()) - 12, 97):
        refused(tmp_path / "cut.png", png.getvalue()[:cut])
    with pytest.raises(OSError, match="cannot be read"):
        read_photo(Found(tmp_path / "gone.png", "gone.png"))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_are_refused(tmp_path, kind):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    found = save(tmp_path / f"x.{kind}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(OSError, match="several pictures"):
        read_photo(found)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_as_they_are_looked_at(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo = read_photo(save(tmp_path / "x.png", exif=exif))
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    assert (photo.pixels == turn(PIXELS)).all()
    assert not Image.open(io.BytesIO(encode_photo(photo, photo.pixels)[0])).getexif()


def test_every_kind_of_pixels_becomes_rgb_of_8_bits(tmp_path):
    grey = PIXELS[..., 0]
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    kinds = {
        "grey.png": Image.fromarray(grey),
        "sixteen.png": sixteen,
        "sixteen.tif": sixteen,
        "cmyk.jpg": Image.fromarray(PIXELS).convert("CMYK"),
        "palette.png": Image.fromarray(PIXELS).quantize(16),
        "still.gif": Image.fromarray(PIXELS),
        "one.png": Image.fromarray(PIXELS[:1, :1]),
        "bits.png": Image.fromarray(grey).convert("1"),
    }
    for name, image in kinds.items():
        photo = read_photo(save(tmp_path / name, image))
        assert photo.pixels.dtype == np.uint8
        assert photo.pixels.shape == (image.height, image.width, 3)
        assert photo.output == (name if name.endswith((".png", ".jpg")) else name + ".png")
        if name.startswith(("grey", "sixteen")):
            assert (photo.pixels == grey[..., None]).all()


def test_a_picture_of_a_telephone_becomes_a_png(tmp_path):
    """HEIC, which is lossy: colours are near."""
    smooth = np.kron(np.arange(0, 240, 40, dtype=np.uint8)[:, None, None], np.ones((16, 96, 3), np.uint8))
    photo = read_photo(save(tmp_path / "a.heic", Image.fromarray(smooth), quality=95))
    assert np.abs(photo.pixels.astype(int) - smooth).mean() < 3
    assert (photo.format, photo.output) == ("PNG", "a.heic.png")
    data, _ = encode_photo(photo, photo.pixels, None)
    assert data.startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_opacity_and_profile_are_kept_bit_for_bit(tmp_path, suffix):
    four = np.dstack([PIXELS, np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)])
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    photo = read_photo(save(tmp_path / f"x.{suffix}", Image.fromarray(four), icc_profile=icc, **options))
    data, _ = encode_photo(photo, photo.pixels)
    again = read_photo(Found(tmp_path / "y", "y"), data=data)
    assert (again.pixels == PIXELS).all()
    assert (again.alpha == four[..., 3]).all()
    assert again.icc == icc


def full_of_metadata():
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Camera 1"
    exif[ExifTags.Base.Copyright] = "Somebody"
    exif[ExifTags.Base.Artist] = "PRIVATE artist"
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {ExifTags.Base.DateTimeOriginal: "2020:01:02 03:04:05", ExifTags.Base.BodySerialNumber: "PRIVATE serial"}
    )
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSAreaInformation] = b"PRIVATE place"
    return exif


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("keep", [False, True])
def test_what_a_camera_says_is_stripped_and_a_safe_part_kept_if_asked(tmp_path, suffix, keep):
    options = {"exif": full_of_metadata(), "xmp": b"<x>PRIVATE xmp</x>", "comment": b"PRIVATE comment"}
    if suffix == "png":
        notes = PngImagePlugin.PngInfo()
        notes.add_text("Author", "PRIVATE author")
        options = {"exif": options["exif"], "pnginfo": notes}
    found = save(tmp_path / f"x.{suffix}", **options)
    assert b"PRIVATE" in found.path.read_bytes()
    photo = read_photo(found, keep_metadata=keep)
    data, _ = encode_photo(photo, photo.pixels, "{}")
    assert b"PRIVATE" not in data
    kept = Image.open(io.BytesIO(data)).getexif()
    exposure = kept.get_ifd(ExifTags.IFD.Exif)
    assert kept.get(ExifTags.Base.Model) == ("Camera 1" if keep else None)
    assert exposure.get(ExifTags.Base.DateTimeOriginal) == ("2020:01:02 03:04:05" if keep else None)
    assert not kept.get_ifd(ExifTags.IFD.GPSInfo)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_record_travels_in_the_picture_or_is_told_not_to_fit(tmp_path, suffix):
    photo = read_photo(save(tmp_path / f"x.{suffix}"))
    data, fits = encode_photo(photo, photo.pixels, '{"text": "<&é>"}')
    assert fits
    assert read_photo(Found(tmp_path / "y", "y"), data=data).record == '{"text": "<&é>"}'
    data, fits = encode_photo(photo, photo.pixels, "x" * 70_000)
    assert fits == (suffix != "jpg")
    assert (read_photo(Found(tmp_path / "y", "y"), data=data).record is not None) == fits


def test_far_too_many_pixels_are_refused(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, "PNG")
    assert "pixels" in refused(tmp_path / "bomb.png", bomb.getvalue())
    assert os.listdir(tmp_path) == ["bomb.png"]

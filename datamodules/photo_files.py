"""What people keep as pictures: read with suspicion, written without what a camera says of them."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape
from zlib import crc32

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from datamodules.photo_search import SIDECAR, SUFFIXES, Found

with suppress(ImportError):  # HEIC, the extra `heic`
    from pillow_heif import register_heif_opener

    register_heif_opener()

SEGMENT = 65_000  # bytes that a comment of a JPEG may hold, a little below the format's 65,533

# Date, camera and exposure; no place, no thumbnail, no serial number, no name of an owner but in the copyright.
_SAFE = {ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.DateTime, ExifTags.Base.Copyright}
_SAFE_EXPOSURE = {
    ExifTags.Base.DateTimeOriginal,
    ExifTags.Base.ExposureTime,
    ExifTags.Base.FNumber,
    ExifTags.Base.ISOSpeedRatings,
    ExifTags.Base.FocalLength,
}
_XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><keyveil:record xmlns:keyveil="urn:keyveil">{}</keyveil:record></x:xmpmeta>'


@dataclass
class Photo:
    """A picture as it was read, upright.

    Attributes:
        found: Where it came from.
        digest: SHA-256 of its file, hexadecimal.
        pixels: RGB ``(h, w, 3)`` uint8.
        alpha: Opacity ``(h, w)`` uint8, or ``None``.
        format: What it is written as: ``PNG``, ``JPEG`` or ``WEBP``.
        lossless: Whether its file lost nothing; so will the one that is written.
        icc: Its colour profile.
        exif: What is kept of its EXIF, ready to be written.
        record: Text that keyveil put into it; ``None`` where there is none.
    """

    found: Found
    digest: str
    pixels: UInt8[ndarray, "h w 3"]
    alpha: UInt8[ndarray, "h w"] | None = None
    format: str = "PNG"
    lossless: bool = True
    icc: bytes | None = None
    exif: bytes | None = None
    record: str | None = None

    @property
    def output(self) -> str:
        """Name of the file to write: the input's, with a suffix more where another format is written."""
        name = self.found.name
        suffix = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}[self.format]
        return name if SUFFIXES.get(Path(name).suffix.lower()) == self.format else name + suffix


def formats() -> list[str]:
    """Pillow's names of what is read, whatever a file is called: no format that runs programs, such as EPS."""
    Image.init()
    return [name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "HEIF", "AVIF") if name in Image.OPEN]


def read_photo(found: Found, keep_metadata: bool = False, data: bytes | None = None) -> Photo:
    """Read a picture: upright, 8 bits, RGB.

    Grey and 16-bit pictures are brought to RGB and 8 bits, CMYK to sRGB. Opacity and the colour profile are kept;
    of EXIF, where it is asked for, date, camera, exposure and copyright.

    Args:
        found: Which.
        keep_metadata: Whether to keep that part of EXIF.
        data: The file's bytes, where they are at hand.

    Raises:
        OSError: It cannot be read, is damaged or no picture, or moves.
    """
    try:
        data = found.read() if data is None else data
    except OSError as error:
        raise OSError(f"it cannot be read ({error.strerror or error})") from error
    if not data:
        raise OSError("it is empty")
    digest = sha256(data).hexdigest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata and of many pixels; far too many are an error
        try:
            image = Image.open(io.BytesIO(data), formats=formats())
        except Image.UnidentifiedImageError:
            raise OSError("it is not a picture of a known format, or a damaged one") from None
        except Exception as error:  # readers of damaged files raise almost anything
            raise OSError(f"it cannot be read as a picture ({_told(error)})") from error
        try:
            several = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
            if not several:
                image.load()
                exif = _safe_exif(image) if keep_metadata else None
                record = read_text(image)
                pixels, alpha, icc = _to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:
            raise OSError(f"it is damaged, or of a kind that cannot be read ({_told(error)})") from error
        if several:
            raise OSError("it holds several pictures (an animation or pages); only single pictures are taken")
    format = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}.get(str(image.format), "PNG")
    lossless = format == "PNG" or (format == "WEBP" and _lossless_webp(data))
    return Photo(found, digest, pixels, alpha, format, lossless, icc, exif, record)


def _lossless_webp(data: bytes) -> bool:
    """Whether a WebP's picture lies in a chunk VP8L, not VP8; a profile and other chunks may come before it."""
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] in (b"VP8L", b"VP8 "):
            return data[at : at + 4] == b"VP8L"
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    return False


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _to_rgb(image: Image.Image) -> tuple[ndarray, ndarray | None, bytes | None]:
    """RGB pixels, opacity and the colour profile that fits them."""
    icc = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits, grey
        levels = np.asarray(image).astype(np.float64)
        grey = (levels / (257 if levels.max(initial=0) > 255 else 1)).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2), None, None
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode in ("CMYK", "LAB", "YCbCr", "L", "LA", "1") and icc:
        icc = None  # it describes other channels than those that are written
        if image.mode == "CMYK":
            with suppress(ImageCms.PyCMSError, OSError):
                profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
                image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        four = np.asarray(image.convert("RGBA"))
        return np.ascontiguousarray(four[..., :3]), np.ascontiguousarray(four[..., 3]), icc
    return np.array(image.convert("RGB")), None, icc


def _safe_exif(image: Image.Image) -> bytes | None:
    """Date, camera, exposure and copyright as EXIF of their own; ``None`` where there are none."""
    given, kept = image.getexif(), Image.Exif()

    def fits(value: Any) -> bool:
        return not isinstance(value, str | bytes | tuple) or (isinstance(value, str) and len(value) <= 200)

    for tag in _SAFE & given.keys():
        if fits(given[tag]):
            kept[tag] = given[tag]
    exposure = given.get_ifd(ExifTags.IFD.Exif)
    chosen = {tag: exposure[tag] for tag in _SAFE_EXPOSURE & exposure.keys() if fits(exposure[tag])}
    if chosen:
        kept.get_ifd(ExifTags.IFD.Exif).update(chosen)
    return kept.tobytes() if len(kept) or chosen else None


def read_text(image: Image.Image) -> str | None:
    """The record that keyveil put into a picture, unread; ``None`` where there is none."""
    if image.format == "PNG":
        text = image.info.get("keyveil")
        return str(text) if text is not None else None
    if image.format == "WEBP":
        raw = image.info.get("xmp", b"")
        found = re.search(rb"<keyveil:record[^>]*>([^<]*)</keyveil:record>", raw if isinstance(raw, bytes) else b"")
        return unescape(found.group(1).decode("utf-8", "replace")) if found else None
    raw = image.info.get("comment", b"")
    raw = raw if isinstance(raw, bytes) else str(raw).encode()
    return raw[8:].decode("utf-8", "replace") if raw.startswith(b"keyveil ") else None


def peek(path: str | Path) -> str | None:
    """The record in a file, without reading its pixels; ``None`` where there is none, or no picture."""
    with suppress(Exception), warnings.catch_warnings():  # what is damaged is told when it is read whole
        warnings.simplefilter("ignore")
        with Image.open(path, formats=formats()) as image:
            return read_text(image)
    return None


def encode_photo(photo: Photo, pixels: UInt8[ndarray, "h w 3"], record: str | None = None) -> tuple[bytes, bool]:
    """The file of a picture with other pixels: its opacity, profile and kept EXIF, and nothing else of the input.

    JPEG is written at quality 95 without chroma subsampling, WebP losslessly or at quality 95, as it came.

    Args:
        photo: What is written.
        pixels: Its new pixels.
        record: Text to put into it.

    Returns:
        The bytes, and whether the record is in them: a JPEG's comment holds 65,000 bytes, a WebP's file 16 MiB.
    """
    made = pixels if photo.alpha is None else np.dstack([pixels, photo.alpha])
    options: dict[str, Any] = {"icc_profile": photo.icc} if photo.icc else {}
    if photo.exif:
        options["exif"] = photo.exif
    text, fits = (record or "").encode(), record is not None
    if photo.format == "JPEG":
        made = pixels
        options |= {"quality": 95, "subsampling": 0}
        fits = fits and len(text) + 8 <= SEGMENT
        if fits:
            options["comment"] = b"keyveil " + text
    elif photo.format == "WEBP":
        options |= {"lossless": photo.lossless, "quality": 95, "exact": True}
        fits = fits and len(text) <= 1 << 24
        if fits:
            options["xmp"] = _XMP.format(escape(record or "")).encode()
    elif fits:
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("keyveil", record or "")
        options["pnginfo"] = notes
        fits = len(text) <= 1 << 25  # readers bound the text of a PNG
        if not fits:
            del options["pnginfo"]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(made)).save(file, photo.format, **options)
    return file.getvalue(), fits


def with_record(data: bytes, record: str) -> bytes:
    """A PNG, JPEG or WebP file with another record in the place of its own; no pixel is written anew.

    Raises:
        ValueError: It holds none, or the other one does not fit.
    """
    text, out, done = record.encode(), bytearray(), 0
    if data.startswith(b"\x89PNG"):
        out += data[:8]
        for at, length in _chunks(data, 8, ">", 12):
            kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
            if kind == b"iTXt" and body.startswith(b"keyveil\0"):
                body, done = b"keyveil" + bytes(5) + text, done + 1
            out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))
    elif data.startswith(b"RIFF"):
        for at, length in _chunks(data, 12, "<", 8):
            kind, body = data[at : at + 4], data[at + 8 : at + 8 + length]
            if kind == b"XMP " and b"<keyveil:record" in body:
                body, done = _XMP.format(escape(record)).encode(), done + 1
            out += kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
        out = bytearray(b"RIFF" + struct.pack("<I", len(out) + 4) + b"WEBP") + out
    elif data.startswith(b"\xff\xd8"):
        at, out = 2, bytearray(data[:2])
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the pixels
            (length,) = struct.unpack(">H", data[at + 2 : at + 4])
            segment, at = data[at : at + 2 + length], at + 2 + length
            if segment[1:2] == b"\xfe" and segment[4:].startswith(b"keyveil "):
                if len(text) + 8 > SEGMENT:
                    raise ValueError("its record has become too long for a JPEG")
                segment, done = b"\xff\xfe" + struct.pack(">H", len(text) + 10) + b"keyveil " + text, done + 1
            out += segment
        out += data[at:]
    if done != 1:
        raise ValueError("it holds no record that could be replaced")
    return bytes(out)


def _chunks(data: bytes, at: int, order: str, around: int) -> Iterator[tuple[int, int]]:
    """Where each chunk of a PNG (``>``) or RIFF (``<``) file begins, and how long its body is."""
    while at + 8 <= len(data):
        (length,) = struct.unpack(f"{order}I", data[at : at + 4] if order == ">" else data[at + 4 : at + 8])
        yield at, length
        at += around + length + (length % 2 if order == "<" else 0)


def sidecar(path: str | Path) -> Path:
    """The file beside a picture that holds its record."""
    return Path(f"{path}{SIDECAR}")


def clear_parts(folder: Path) -> None:
    """Remove what a killed run left half-written: ``.NAME.PID.part``."""
    for part in folder.rglob(".*.part"):
        if re.fullmatch(r"\..+\.\d+\.part", part.name):
            part.unlink(missing_ok=True)

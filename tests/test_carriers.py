"""What is saved is what is read: exact or near as the carrier says, and refused where it cannot be."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from lightning_modules.carriers import (
    FILE_CARRIERS,
    decode,
    encode,
    from_pixels,
    quantize,
    read_picture,
    send_straight,
    through_file,
    to_pixels,
    write_picture,
)


def picture(height=64, width=64, seed=0):
    """A smooth picture, as faces are, with values off the 8-bit grid."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)[0]


def levels(a, b):
    """Largest difference in grey levels."""
    return float((a - b).abs().max() * 127.5)


def test_png_is_exact_on_the_grid():
    image = quantize(picture())
    assert torch.equal(decode(encode(image, "png")), image)


def test_every_grey_level_survives():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(to_pixels(from_pixels(pixels)), pixels)


def test_saving_twice_changes_nothing_more():
    once = through_file(picture()[None], "png")
    assert torch.equal(through_file(once, "png"), once)


def test_noise_is_one_grey_level_everywhere_and_the_same_each_time():
    image = quantize(picture() * 0.9)
    noisy = through_file(image[None], "noise1")[0]
    assert torch.allclose((noisy - image).abs() * 127.5, torch.ones_like(image), atol=1e-3)
    assert torch.equal(through_file(image[None], "noise1")[0], noisy)


def test_noise_stays_in_range():
    white = through_file(torch.ones(1, 3, 8, 8), "noise1")
    assert white.max() <= 1
    assert levels(white, torch.ones(1)) <= 1.001


@pytest.mark.parametrize("carrier", FILE_CARRIERS)
def test_every_carrier_keeps_size_range_and_the_look(carrier):
    images = torch.stack([picture(63, 50), picture(63, 50, seed=1)])
    read = through_file(images, carrier)
    assert read.shape == images.shape
    assert read.dtype == torch.float32
    assert read.abs().max() <= 1
    assert torch.equal(quantize(read), read)
    assert (read - images).abs().mean() < 0.05


def test_each_picture_travels_alone():
    images = torch.stack([picture(), picture(seed=1)])
    for carrier in FILE_CARRIERS:
        assert torch.equal(through_file(images, carrier)[1:], through_file(images[1:], carrier))


def test_jpeg_is_the_worse_the_lower_its_quality():
    generator = torch.Generator().manual_seed(0)
    image = (picture() + 0.2 * torch.randn(3, 64, 64, generator=generator)).clamp(-1, 1)[None]
    errors = [float((through_file(image, name) - image).square().mean()) for name in ("jpeg95", "jpeg75", "jpeg50")]
    assert errors == sorted(errors)
    assert errors[0] < errors[2]


def test_colours_keep_their_order():
    red = torch.full((3, 8, 8), -1.0)
    red[0] = 1
    assert torch.equal(decode(encode(red, "png")), red)
    assert encode(red, "png").startswith(b"\x89PNG")


def test_half_sends_a_quarter_of_the_pixels():
    assert decode(encode(picture(64, 48), "half")).shape == (3, 32, 24)


@pytest.mark.parametrize("carrier", ["photo", "latent", "sealed", "gif"])
def test_what_is_no_file_format_is_refused(carrier):
    with pytest.raises(ValueError, match=f"unknown file carrier '{carrier}'; expected one of png"):
        encode(picture(), carrier)


def test_a_diverged_picture_is_not_saved():
    with pytest.raises(ValueError, match="not numbers"):
        encode(torch.full((3, 4, 4), float("nan")))


@pytest.mark.parametrize("data", [b"", b"no picture", encode(picture())[:30]])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(ValueError, match="not a picture"):
        decode(data)


def test_the_gradient_of_quantize_is_the_identity():
    image = (picture()[None] * 1.2).requires_grad_()
    weight = torch.randn(image.shape)
    (quantize(image) * weight).sum().backward()
    assert torch.equal(image.grad, weight)


def test_quantize_is_what_saving_does():
    image = picture()[None] * 1.2
    assert torch.equal(quantize(image), through_file(image, "png"))


def test_quantize_keeps_the_dtype_of_gradients():
    image = picture()[None].bfloat16().requires_grad_()
    quantize(image).sum().backward()
    assert image.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_a_written_picture_is_read_back(tmp_path, suffix):
    path = tmp_path / "new folder" / f"Gesicht ü{suffix}"
    write_picture(path, picture())
    assert levels(read_picture(path), picture()) <= (0.51 if suffix == ".png" else 30)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "face.png"
    write_picture(path, picture())

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="cannot write the picture .*face.png: No space left on device"):
        write_picture(path, picture(seed=1))
    monkeypatch.undo()
    assert levels(read_picture(path), picture()) <= 0.51
    assert [file.name for file in tmp_path.iterdir()] == ["face.png"]


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a name ending in \.png"):
        write_picture(tmp_path / "face.tiff", picture())


def test_unreadable_files_say_which_and_why(tmp_path):
    with pytest.raises(OSError, match="cannot read the picture .*none.png: No such file"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(OSError, match="cannot read the picture .*text.png: these 5 bytes are not a picture"):
        read_picture(tmp_path / "text.png")


def test_a_grey_picture_and_one_with_alpha_become_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((5, 7), 255, np.uint8))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.full((5, 7, 4), 255, np.uint8))
    for name in ("grey.png", "alpha.png"):
        assert torch.equal(read_picture(tmp_path / name), torch.ones(3, 5, 7))


@pytest.mark.parametrize(("jpeg", "least", "most"), [(0.0, 0.0, 1.01 / 255), (1.0, 0.1, 2.0)])
def test_training_sends_8_bits_or_a_jpeg_and_the_gradient_passes(jpeg, least, most):
    image = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    sent = send_straight(image, jpeg, step=0)
    assert least <= (sent - image).abs().max() <= most
    sent.sum().backward()
    torch.testing.assert_close(image.grad, torch.ones_like(image))


def test_a_share_of_the_steps_sends_jpegs():
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = send_straight(image, 0.0, 0)
    jpegs = sum(not torch.equal(send_straight(image, 0.5, step), plain) for step in range(40))
    assert 10 <= jpegs <= 30

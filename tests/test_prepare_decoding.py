"""Images: the reference's transform bit for bit, and files of every kind and state."""

import concurrent.futures
import dataclasses
import io
import threading
import time

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image, ImageOps

from microdit_jax.files import image_files
from microdit_jax.prepare import decoding, pixels
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.pixels import decode, resize_and_crop, to_float
from microdit_jax.prepare.sources.listed_images import SourceImage

RNG = np.random.default_rng(0)
IMAGE = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8))


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_equal_to_torchvision():
    """Golden: Resize(bicubic), CenterCrop, ToTensor, Normalize(0.5, 0.5) of torchvision 0.29.1."""
    with np.load(GOLDEN / "image_transform.npz") as golden:
        names = [name for name in golden.files if "_" in name]
        assert len(names) == 12
        for name in names:
            size, resolution = name.split("_")
            found = to_float(resize_and_crop(Image.fromarray(golden[size]), int(resolution)))
            np.testing.assert_array_equal(found, golden[name], strict=True)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
def test_modes_are_converted(mode):
    format = "TIFF" if mode == "YCbCr" else "JPEG" if mode == "CMYK" else "PNG"
    image = IMAGE.convert(mode)
    found = decode(encoded(image, format))
    assert found.mode == "RGB" and found.size == (60, 40)
    if format != "JPEG":
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))
    assert np.asarray(found).std() > 20


def test_transparent_pixels_turn_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0] = (255, 0, 0, 255)
    pixels[1] = (255, 0, 0, 128)
    for mode in ("RGBA", "LA", "PA", "P"):
        image = Image.fromarray(pixels).convert("RGBA" if mode == "P" else mode)
        if mode == "P":
            image = image.quantize(8, Image.Quantize.FASTOCTREE)
        found = np.asarray(decode(encoded(image, "TIFF" if mode == "PA" else "PNG")))
        assert (found[2:] == 255).all() and not (found[0] == 255).all()


def test_sixteen_bit_grey_keeps_its_range():
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = np.asarray(decode(encoded(Image.fromarray(pixels), "PNG")))[..., 0]
    np.testing.assert_array_equal(found, pixels >> 8)


def test_animations_give_their_first_image():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        file = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(decode(file))[0, 0].tolist()
        assert red > 240 and green < 10 and blue < 10


def test_enormous_images_are_refused_before_they_take_memory():
    start = time.monotonic()
    huge = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ValueError, match="more than 100 megapixels"):
        decode(huge)
    assert time.monotonic() - start < 10
    wide = decode(encoded(Image.new("L", (20_000, 300)), "PNG"))
    assert resize_and_crop(wide, 256).shape == (256, 256, 3)
    with pytest.raises(ValueError, match="a strip of 3000000x1 pixels"):
        resize_and_crop(Image.new("RGB", (3_000_000, 1)), 256)
    with pytest.raises(ValueError, match="more than 0 megapixels"):
        decode(IMAGE, max_pixels=100)


def test_damaged_files_give_short_reasons():
    with pytest.raises(ValueError, match="not an image"):
        decode(b"")
    with pytest.raises(ValueError, match="floating point"):
        decode(encoded(IMAGE.convert("F"), "TIFF"))
    whole = {format: encoded(IMAGE, format) for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP")}
    refused = 0
    for trial in range(400):
        rng = np.random.default_rng(trial)
        data = bytearray(whole[list(whole)[trial % 5]])
        if trial % 2:
            data = data[: rng.integers(len(data))]
        else:
            for _ in range(5):
                data[rng.integers(min(len(data), 200))] ^= 1 << rng.integers(8)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 100
            refused += 1
    assert refused > 150


def test_bytes_become_minus_one_to_one():
    found = to_float(np.array([[[0, 255, 128]]], np.uint8))
    np.testing.assert_allclose(found, [[[-1, 1, 1 / 255]]], atol=1e-7)
    assert pixels.MAX_PIXELS == 100_000_000


def test_threads_share_a_number_of_pixels():
    limit, lock, held, most = decoding.PixelLimit(100), threading.Lock(), [0], [0]

    def decode_one(pixels):
        with limit.hold(pixels):
            with lock:
                held[0] += pixels
                most[0] = max(most[0], held[0] if pixels <= 100 else 0)
                assert pixels <= 100 or held[0] == pixels  # alone
            time.sleep(0.002)
            with lock:
                held[0] -= pixels

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_one, [60, 30, 50, 250, 10, 10, 80] * 5))
    assert 60 <= most[0] <= 100 and held == [0]


def test_a_large_image_is_not_overtaken_by_small_ones():
    limit, order = decoding.PixelLimit(100), []

    def decode_one(pixels):
        with limit.hold(pixels):
            order.append(pixels)

    with limit.hold(60):
        large = threading.Thread(target=decode_one, args=(250,))
        large.start()
        while not limit._turn.locked():  # until it waits for the 60 pixels
            time.sleep(0.001)
        small = [threading.Thread(target=decode_one, args=(pixels,)) for pixels in (10, 20)]
        for thread in small:
            thread.start()
        time.sleep(0.05)  # there is room for both, but they come after the large one
        assert not order
    for thread in [large, *small]:
        thread.join(30)
    assert order[0] == 250 and sorted(order) == [10, 20, 250]


def test_files_of_other_formats_scans_and_strips_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="not an image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for format in ("PPM", "TGA", "ICO", "JPEG2000", "PCX", "EPS"):
        with pytest.raises(ValueError, match="not an image"):
            decode(encoded(IMAGE, format))
    whole = encoded(IMAGE, "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    many = whole[:last] + whole[last:-2] * 100 + whole[-2:]
    with pytest.raises(ValueError, match="a JPEG of 109 scans"):
        decode(many)
    # Only what belongs to the image counts: not a thumbnail, nor what follows the end
    thumbnail = b"\xff\xe1" + (2 + 200).to_bytes(2, "big") + b"\xff\xda" * 100
    decode(whole[:2] + thumbnail + whole[2:] + b"\xff\xda" * 1000)
    monkeypatch.setattr(image_files, "_MAX_STRIPS", 3)
    for options in ({"tiffinfo": {278: 4}}, {"tiffinfo": {278: 4}, "big_tiff": True}):
        with pytest.raises(ValueError, match="a TIFF of 10 strips"):
            decode(encoded(IMAGE, "TIFF", **options))


def test_a_pixel_column_without_pixels_is_refused():
    for size in ((0, 0), (0, 7)):
        with pytest.raises(ValueError, match="no pixels"):
            decode(Image.new("RGB", size))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied_where_asked(orientation):
    pixels = np.random.default_rng(orientation).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    options = PrepareOptions(resolutions=(16,), min_size=16, seed=0, batch=1)
    expected = {False: Image.fromarray(pixels)}
    expected[True] = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    for exif_on, upright in expected.items():
        asked = dataclasses.replace(options, exif=exif_on)
        image = SourceImage("x", "words", file.getvalue)
        (found,) = decoding._decode_one(image, asked, decoding.PixelLimit()).crops
        np.testing.assert_array_equal(found, decoding.resize_and_crop(upright, 16))

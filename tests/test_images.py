"""PNGs with their settings, and sheets of them."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from microdit_jax import images
from microdit_jax.errors import UserError
from microdit_jax.images import grid

IMAGE = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
SETTINGS = {"seed": 7, "prompt": "ein Bär 🐻"}
OLD = {
    "model": "instant", "vae": None, "text_encoder": "clip", "ema": True, "dtype": "float32",
    "num_inference_steps": 30, "guidance_scale": 3, "seed": 2024, "noise": "jax", "of": 24,
    "made_with": "the instant model", "prompt": "ein Bär 🐻", "index": 23,
}  # fmt: skip
SAMPLER = {
    "solver": "ab3", "schedule": "log", "guidance": "interval", "guidance_interval": (0.5, 2.0),
    "guidance_rescale": 0.5, "apg": None, "negative_prompt": "", "evaluations": 16,
    "network_passes": 22,
}  # fmt: skip
EDIT = {
    "churn": (40.0, 0.05, 50.0, 1.003), "strength": 0.5, "weaker": "400", "image": "a.png",
    "image_sha256": "0a", "mask": None, "mask_sha256": None, "ema_length": 0.07,
}  # fmt: skip
GOOD = OLD | SAMPLER | EDIT


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_every_format_carries_the_settings(tmp_path, form):
    fields = dataclasses.asdict(images.ImageSettings.from_dict(GOOD))
    path = tmp_path / images.file_name(3, "Ein Bär!", form)
    assert path.name == "0003_ein-bär" + {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}[form]
    smooth = np.tile(np.linspace(0.2, 0.8, 32, dtype=np.float32)[:, None, None], (1, 32, 3))
    images.save_image(path, smooth, fields, form)
    assert images.is_made_so(path, fields) and not images.is_made_so(path, fields | {"seed": 1})
    assert images.ImageSettings.from_dict(images.read_settings(path)).prompt == "ein Bär 🐻"
    with Image.open(path) as image:
        assert image.format == form.upper()
    np.testing.assert_allclose(images.read_png(path), smooth, atol=0.02)


def test_settings_that_no_jpeg_holds_are_refused():
    with pytest.raises(UserError, match="at most 65000 bytes in a jpeg file, .* shorter prompt"):
        images.encode_image(IMAGE, {"prompt": "a" * 70_000}, "jpeg")


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("An elegant  squirrel!", "0000_an-elegant-squirrel.png"),
        ("Красное яблоко", "0000_красное-яблоко.png"),
        ("../../etc/passwd\x00\n", "0000_etc-passwd.png"),
        ("\udc80 \x1b[2J a\u202eb", "0000_2j-a-b.png"),
        ("cafe\u0301", "0000_café.png"),
        ("!!!", "0000_.png"),
        ("猫" * 100, "0000_" + "猫" * 60 + ".png"),
        ("𐐨" * 100, "0000_" + "𐐨" * 45 + ".png"),
    ],
)
def test_names_keep_the_letters_of_any_script(tmp_path, prompt, name):
    assert images.file_name(0, prompt) == name
    longest = images.file_name(10**9, prompt, "webp", 2**32 - 1)
    (tmp_path / longest).touch()


def test_the_seed_is_in_the_name_where_there_are_several():
    assert images.file_name(0, "a", "webp", 7) == "0000_a_seed-7.webp"


def test_a_png_from_before_there_were_solvers():
    """Guidance of 1 or less was none then, whatever the PNG says."""
    for asked, meant in ((3, 3.0), (1, 1.0), (0.5, 1.0), (0, 1.0), (-5, 1.0)):
        taken = images.ImageSettings.from_dict(OLD | {"guidance_scale": asked})
        assert (taken.guidance_scale, taken.solver, taken.guidance) == (meant, "heun", "cfg")
    now = images.ImageSettings.from_dict(OLD | {"solver": "heun", "guidance_scale": 0})
    assert now.guidance_scale == 0


def test_settings_of_the_sampler_go_through_a_png(tmp_path):
    settings = images.ImageSettings.from_dict(GOOD)
    fields = dataclasses.asdict(settings)
    images.save_png(tmp_path / "x.png", IMAGE, fields)
    assert images.is_made_so(tmp_path / "x.png", fields)
    assert images.ImageSettings.from_dict(images.read_settings(tmp_path / "x.png")) == settings
    assert settings.guidance_interval == (0.5, 2.0) and settings.network_passes == 22


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"solver": 3}, "solver in an image's settings to be a short name, found 3"),
        ({"schedule": "x" * 50}, "schedule .* a short name"),
        ({"guidance": None}, "guidance .* a short name, found None"),
        ({"guidance_interval": [1.0]}, "to be 2 finite numbers"),
        ({"guidance_interval": [1.0, "2"]}, "to be 2 finite numbers"),
        ({"guidance_interval": "12"}, "to be 2 finite numbers"),
        ({"apg": [1, 2, float("nan")]}, "to be 3 finite numbers"),
        ({"guidance_rescale": True}, "a finite number, found True"),
        ({"negative_prompt": None}, "a text, found None"),
        ({"evaluations": 0}, "a whole number"),
        ({"network_passes": 10**9}, "a whole number"),
    ],
)
def test_settings_of_the_sampler_that_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        images.ImageSettings.from_dict(GOOD | wrong)


def test_bytes_are_rounded_as_in_a_png():
    values = np.array([-0.1, 0.0, 0.5, 0.9999, 1.2]).reshape(1, 5, 1, 1).repeat(3, axis=-1)
    assert images.to_uint8(values)[0, :, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_images_carry_their_settings(tmp_path):
    file = tmp_path / "a" / "x.png"
    images.save_png(file, IMAGE, SETTINGS)
    with Image.open(file) as image:
        assert json.loads(image.text["microdit_jax"]) == SETTINGS
        np.testing.assert_array_equal(np.asarray(image), np.round(IMAGE * 255))
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert images.read_settings(file) == SETTINGS
    np.testing.assert_allclose(images.read_png(file), IMAGE, atol=0.5 / 255)
    assert images.is_made_so(file, SETTINGS)
    assert not images.is_made_so(file, SETTINGS | {"seed": 8})


def test_a_torn_image_is_made_again(tmp_path):
    file = tmp_path / "x.png"
    images.save_png(file, np.zeros((64, 64, 3), np.float32), SETTINGS)
    file.write_bytes(file.read_bytes()[:-30])
    assert not images.is_made_so(file, SETTINGS)
    assert not images.is_made_so(tmp_path / "none.png", SETTINGS)


def test_images_of_others_are_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "other.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "other.jpg")
    for name in ("other.png", "other.jpg", "none.png"):
        with pytest.raises(UserError, match="expected a PNG made by sample_main.py"):
            images.read_settings(tmp_path / name)


def test_settings_of_an_image_come_back(tmp_path):
    expected = images.ImageSettings.from_dict(GOOD)
    assert dataclasses.asdict(expected) == GOOD
    images.save_png(tmp_path / "x.png", IMAGE, GOOD | {"later": "a key of a later version"})
    assert images.ImageSettings.from_dict(images.read_settings(tmp_path / "x.png")) == expected


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"index": 99}, "index in an image's settings to be a whole number from 0 to 23, found 99"),
        ({"index": -1}, "found -1"),
        ({"index": True}, "found True"),
        ({"index": 1.0}, "found 1.0"),
        ({"of": 0}, "of in an image's settings to be a whole number from 1"),
        ({"of": 10**30}, "expected of in"),
        ({"of": "24"}, "found '24'"),
        ({"seed": 2**64}, "from 0 to 18446744073709551615"),
        ({"seed": None}, "found None"),
        ({"num_inference_steps": 10**9}, "from 1 to 100000, found 1000000000"),
        ({"guidance_scale": float("nan")}, "a finite number, found nan"),
        ({"guidance_scale": float("inf")}, "a finite number"),
        ({"guidance_scale": 10**400}, "a finite number"),
        ({"guidance_scale": "3"}, "a finite number"),
        ({"ema_length": "0.1"}, "expected ema_length in an image's settings to be a finite number"),
        ({"noise": "torch"}, "one of jax, torch_cpu, torch_cuda"),
        ({"noise": ["jax"]}, "one of jax, torch_cpu, torch_cuda"),
        ({"dtype": "int8"}, "one of None, float32, bfloat16"),
        ({"dtype": {}}, "one of None, float32"),
        ({"ema": 1}, "true or false"),
        ({"model": None}, "a text, found None"),
        ({"vae": 3}, "a text, found 3"),
        ({"churn": [1, 2, 3]}, "to be 4 finite numbers"),
        ({"strength": "1"}, "a finite number, found '1'"),
        ({"image": 3}, "image in an image's settings to be a text, found 3"),
        ({"mask_sha256": []}, "a text, found"),
        ({"prompt": " "}, "a text, found ' '"),
        ({"prompt": "\ud800"}, "found '.ud800'"),
        ({"prompt": ["x" * 10**6]}, r"xxx\.\.\.; give"),
    ],
)
def test_settings_of_strangers_are_refused(wrong, message):
    with pytest.raises(UserError, match=message) as error:
        images.ImageSettings.from_dict(GOOD | wrong)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


# Hypothesis builds its table of characters first, which takes seconds on a busy machine.
@settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(GOOD)), JSON, max_size=3))
def test_any_settings_are_taken_or_refused_in_one_line(changed):
    try:
        taken = images.ImageSettings.from_dict(GOOD | changed)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isascii()
    else:
        asked = GOOD | changed
        asked["guidance_scale"] = float(asked["guidance_scale"])
        for name in images.settings.NUMBERS:  # lists in a PNG
            if asked[name] is not None:
                asked[name] = tuple(map(float, asked[name]))
        assert dataclasses.asdict(taken) == asked
        json.dumps(asked, ensure_ascii=False).encode()


def test_a_grid_is_not_the_png_of_one_image():
    with pytest.raises(UserError, match="one that does not say index, prompt; take one from"):
        images.ImageSettings.from_dict({k: GOOD[k] for k in GOOD if k not in ("prompt", "index")})


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "x.png"
    images.save_png(file, IMAGE, GOOD)
    whole = file.read_bytes()
    for text in (b"[1, 2]", b'"text"', b"[" * 100_000, b"{"):
        info = PngImagePlugin.PngInfo()
        info.add_itxt(images.files.KEY, text.decode())
        Image.new("RGB", (2, 2)).save(file, pnginfo=info)
        with pytest.raises(UserError, match="expected a PNG made by sample_main.py"):
            images.read_settings(file)
    for i in range(0, len(whole), 7):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :])
        try:
            images.read_settings(file)
        except UserError as error:
            assert "expected a PNG made by sample_main.py" in str(error)


def test_an_image_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        images.save_png(tmp_path / "x.png", IMAGE, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_grid_puts_images_side_by_side():
    red, blue = np.zeros((2, 2, 8, 8, 3), np.float32)
    red[..., 0], blue[..., 2] = 1, 1
    grid = images.captioned_grid([red, blue], ["one", "two"], columns=2, min_side=8)
    np.testing.assert_array_equal(grid[8, 8], [1, 0, 0])
    np.testing.assert_array_equal(grid[8, 8 + 8], [0, 0, 1])


def test_captions_of_any_script_are_seen():
    font = grid.caption_font(12)
    for text in ("red apple", "Красное яблоко", "crème brûlée", "γάτα"):
        assert grid.shown_by(font, text) == text
    assert grid.shown_by(font, "猫\ta") == "▯ a"
    white = np.ones((2, 8, 8, 3), np.float32)
    one, other = (images.captioned_grid([white], [text, ""], columns=2) for text in "яж")
    assert (one != other).any()

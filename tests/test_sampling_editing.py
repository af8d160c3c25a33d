"""Image-to-image and inpainting: how given images are fitted, and what stays of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2
from PIL import Image
from support.tiny_pipeline import OPTIONS, pipeline

from microdit_jax.errors import UserError
from microdit_jax.sampling import editing, solvers

SIDE = 16  # pixels of the tiny pipeline's images: 8 latents of 2 pixels
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(20, 24, 3)).astype(np.float32)
MASK = np.zeros((20, 24), bool)
MASK[:, 12:] = True


def test_any_size_is_fitted_to_the_models():
    """The middle square: of 40 x 20 pixels at 10 a side, columns 5 to 15 of 20 after resizing."""
    columns = np.repeat(np.arange(40, dtype=np.uint8)[None], 20, axis=0)
    found = np.asarray(editing.fitted(Image.fromarray(columns), 10, Image.Resampling.BOX))
    means = columns[0, 10:30].reshape(10, 2).mean(axis=1)
    np.testing.assert_array_equal(found[0], np.floor(means + 0.5))
    assert editing.fitted(Image.new("L", (3, 7)), 10, Image.Resampling.BICUBIC).size == (10, 10)


def test_an_image_becomes_its_latents_and_a_mask_the_free_ones():
    pipe = pipeline()
    edit = pipe.edit((IMAGE * 255).round().astype(np.uint8), MASK)
    fitted = editing.fitted(
        Image.fromarray((IMAGE * 255).round().astype(np.uint8)), SIDE, Image.Resampling.BICUBIC
    )
    expected = pipe.codec.encode(np.asarray(fitted, np.float32)[None] / 127.5 - 1)[0]
    assert relative_l2(edit.latents, expected * pipe.codec.scaling_factor) < 1e-6
    # Columns 2 to 22 of 24 are taken, so that white begins at half of the square.
    np.testing.assert_array_equal(edit.free[..., 0], np.repeat([[0] * 4 + [1] * 4], 8, axis=0))
    assert relative_l2(pipe.edit(IMAGE).latents, edit.latents) < 1e-6
    assert pipe.edit(Image.fromarray((IMAGE * 255).round().astype(np.uint8))).free is None


def test_a_latent_with_one_white_pixel_is_free():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[5, 2] = 255
    free = pipeline().edit(np.zeros((SIDE, SIDE, 3), np.uint8), mask).free[..., 0]
    assert free.sum() == 1 and free[2, 1] == 1


@pytest.mark.parametrize("name", [n for n in solvers.SOLVERS if n != solvers.STUDENT])
def test_what_the_mask_keeps_stays(name):
    pipe = pipeline()
    options = {"solver": name, "num_inference_steps": 6, "strength": 1.0, "guidance_scale": 2.0}
    edit = pipe.edit(IMAGE, MASK)
    found = pipe.denoise(
        pipe.encode(["a", "dog"]), RNG.normal(size=(2, 8, 8, 4)), edit=edit, **options
    )
    kept = edit.free[..., 0] == 0
    assert relative_l2(found[:, kept], np.stack([edit.latents[kept]] * 2)) < 1e-4
    assert relative_l2(found[0][~kept], edit.latents[~kept]) > 0.1
    assert relative_l2(found[0][~kept], found[1][~kept]) > 0.01


def test_strength_is_the_share_of_the_steps_that_are_taken():
    pipe, noise = pipeline(), RNG.normal(size=(1, 8, 8, 4)).astype(np.float32)
    edit, y = pipe.edit(IMAGE), pipe.encode(["dog"])
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "solver": "euler"}
    plan = pipe.settings(options | {"strength": 0.3}, edit).plan(pipe.edm)
    assert len(plan) == 3
    found = pipe.denoise(y, noise, edit=edit, strength=0.3, **options)
    levels = pipe.settings(options, None).levels(pipe.edm)[7:]
    x = edit.latents[None] + np.float32(levels[0]) * noise
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        c_skip, c_out = 0.81 / (now**2 + 0.81), now * 0.9 / np.sqrt(now**2 + 0.81)
        F = pipe.model.apply(
            {"params": pipe.params},
            jnp.asarray(x / np.sqrt(now**2 + 0.81), jnp.float32),
            jnp.full(1, np.log(now) / 4, jnp.float32),
            jnp.asarray(y),
        )[0]
        D = c_skip * x + c_out * np.asarray(F)
        x = x + (following - now) * (x - D) / now
    assert relative_l2(found, x) < 1e-5


def test_images_of_any_batches_are_the_same():
    pipe = pipeline()
    options = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 2.0, "seed": 3}
    edit, prompts = pipe.edit(IMAGE, MASK), ["a", "dog", "cat"]
    one, two = (
        np.concatenate([b.images for b in pipe.sample(prompts, edit=edit, batch_size=n, **options)])
        for n in (1, 3)
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    "image, mask, message",
    [
        (IMAGE, MASK[:10], "a mask of the image's size, 24x20, found 24x10"),
        (IMAGE, np.zeros_like(MASK), "found one that is all black$"),
        (IMAGE, np.ones_like(MASK), "all white; leave it out to change the whole image"),
        (IMAGE, np.arange(24) < np.full((20, 1), 1), "all black in the square that the model"),
        (None, MASK, "a mask goes with an image"),
        (IMAGE * 300, None, r"floats in \[0, 1\], found others"),
        (IMAGE.astype(np.int64), None, "found int64"),
        (np.zeros((3, 4, 5, 6)), None, r"\(H, W, 3\), found \(3, 4, 5, 6\)"),
        (np.zeros((0, 4, 3)), None, r"found \(0, 4, 3\)"),
        (np.zeros((1, 10_000_000)), None, "a strip of 10000000x1 pixels"),
    ],
)
def test_what_cannot_be_edited(image, mask, message):
    with pytest.raises(UserError, match=message):
        pipeline().edit(image, mask)


@pytest.mark.parametrize("change", [{"strength": 0.5}, {"image": IMAGE}])
def test_an_image_and_a_strength_go_together(change):
    with pytest.raises(UserError, match="goes with a strength, found"):
        pipeline().generate("dog", **OPTIONS, **change)

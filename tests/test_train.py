"""The real training loop and the real pipeline on a shrunken demo, killed and resumed."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import demo
from microdit_jax import assets, run_checkpoint, sample
from microdit_jax.encoders.tokenizers import ClipTokenizer
from microdit_jax.errors import UserError
from microdit_jax.train import load_data, model_config, train


def tiny_config(folder, stage="pretrain", **changes):
    config = demo.get_config(stage)
    config.data.folder = str(folder / "data")
    config.model.options.update(
        dim=16, depth=2, head_dim=8, multiple_of=8, patch_mixer_dim=8, num_experts=2,
        qkv_multipliers=(1.0,), ffn_multipliers=(1.0,), patch_mixer_mlp_ratio=1.0,
    )  # fmt: skip
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=2, eval_every=100)
    config.eval.update(draws=1, num_samples=2, num_inference_steps=2)
    config.ema.start_step = 1
    config.train.update(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps without interruption."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, train(tiny_config(folder), folder / "whole")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_leaves_what_it_promises(trained):
    folder, state = trained
    run = folder / "whole"
    assert int(state.step) == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert 0 < lines[0]["loss"] < 10 and {"right", "shuffled", "ratio"} == set(lines[-1]["heldout"])
    with Image.open(run / "samples" / "step_0000004.png") as image:
        assert image.width > 300
    assert run_checkpoint.read_run_metadata(run)["has_ema"]


def test_resuming_is_bit_exact(trained):
    folder, state = trained
    train(tiny_config(folder, steps=2), folder / "resumed")
    same(train(tiny_config(folder), folder / "resumed"), state)


def test_done_runs_return_at_once(trained, capsys):
    folder, state = trained
    same(train(tiny_config(folder), folder / "whole"), state)
    assert "done already" in capsys.readouterr().out


def test_the_next_stage_goes_on_from_the_first(trained, capsys):
    folder, _ = trained
    config = tiny_config(folder, "finetune", steps=5)
    config.init_from = str(folder / "whole")
    assert int(train(config, folder / "second").step) == 5
    assert "step 4 of 5" in capsys.readouterr().out


def test_the_average_is_what_is_sampled(trained):
    folder, state = trained
    model = assets.load_model(str(folder / "whole"))
    same(model.params, state.ema)
    same(assets.load_model(str(folder / "whole"), ema=False).params, state.params)
    assert "moving average" in model.description


def test_generate(trained):
    folder, _ = trained
    pipe = sample.create_latent_diffusion(checkpoint=str(folder / "whole"), dtype="float32")
    prompts = ["red apple", "dog face", "woman mechanic dark skin tone"]
    options = {"num_inference_steps": 2, "seed": 3, "guidance_scale": 2.0}
    images = pipe.generate(prompts, **options)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.float32
    assert 0 <= images.min() and images.max() <= 1
    # The same picture for the same (seed, prompt), whatever the batch.
    in_twos = pipe.generate(prompts, batch_size=2, **options)
    np.testing.assert_allclose(in_twos, images, atol=1e-4)
    latents = pipe.generate(prompts, return_only_latents=True, **options)
    np.testing.assert_allclose(pipe.decode(latents), images, atol=1e-6)
    other = pipe.generate(prompts, **options | {"seed": 4})
    assert np.abs(other - images).max() > 0.05
    ids = ClipTokenizer(context_length=16)(prompts)
    from_ids = pipe.generate(tokenized_prompts=ids, **options)
    np.testing.assert_array_equal(from_ids, images)
    with pytest.raises(UserError, match="at least one prompt"):
        pipe.generate([])
    with pytest.raises(UserError, match="either prompt or tokenized_prompts"):
        pipe.generate()


def test_not_finite_latents_are_refused(trained):
    folder, _ = trained
    pipe = sample.create_latent_diffusion(checkpoint=str(folder / "whole"), dtype="float32")
    broken = jax.tree.map(lambda p: p * np.float32(np.nan), pipe.params)
    pipe = sample.LatentDiffusion(pipe.model, broken, pipe.edm, pipe.text_encoder, pipe.codec)
    with pytest.raises(UserError, match="finite latents"):
        pipe.generate(["dog"], num_inference_steps=2, guidance_scale=2.0)


def test_pictures_carry_their_settings(tmp_path):
    image = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    sample.save_png(tmp_path / "a" / "x.png", image, {"seed": 7})
    with Image.open(tmp_path / "a" / "x.png") as file:
        assert json.loads(file.text["microdit_jax"]) == {"seed": 7}
        np.testing.assert_array_equal(np.asarray(file), np.round(image * 255))
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_grid_puts_pictures_side_by_side():
    red, blue = np.zeros((2, 2, 8, 8, 3), np.float32)
    red[..., 0], blue[..., 2] = 1, 1
    grid = sample.captioned_grid([red, blue], ["one", "two"], columns=2, min_side=8)
    np.testing.assert_array_equal(grid[8, 8], [1, 0, 0])
    np.testing.assert_array_equal(grid[8, 8 + 8], [0, 0, 1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 3}, "found .*in the data; set model.options.input_size"),
        ({"caption_channels": 8}, "set model.options.caption_channels"),
    ],
)
def test_data_that_do_not_fit_are_refused(trained, change, message):
    folder, _ = trained
    config = tiny_config(folder)
    config.model.options.update(change)
    with pytest.raises(UserError, match=message):
        train(config, folder / "never")


def test_another_config_in_the_same_workdir_is_refused(trained):
    folder, _ = trained
    config = tiny_config(folder, steps=9)
    config.model.options.dim = 24
    with pytest.raises(UserError, match="does not fit this config"):
        train(config, folder / "whole")


def test_unknown_names_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    config.model.arch = "UNet"
    with pytest.raises(UserError, match="model.arch must be one of"):
        model_config(config)
    config = tiny_config(tmp_path)
    config.data.source = "laion"
    with pytest.raises(UserError, match="data.source must be twemoji"):
        load_data(config)
    with pytest.raises(AttributeError):
        config.train.mask_ration = 0.5

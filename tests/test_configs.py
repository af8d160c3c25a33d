"""The four stages to the last constant, their variants, and what they refuse."""

import importlib

import pytest
from ml_collections import ConfigDict

from configs import (
    demo,
    recipe,
    res_256_finetune,
    res_256_pretrain,
    res_512_finetune,
    res_512_pretrain,
)
from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.models import masking
from microdit_jax.training import defaults
from microdit_jax.training.config import (
    check,
    make_optimizer,
    model_config,
    num_micro_batches,
)

STAGES = {
    "res_256_pretrain": res_256_pretrain,
    "res_256_finetune": res_256_finetune,
    "res_512_pretrain": res_512_pretrain,
    "res_512_finetune": res_512_finetune,
}
# REFERENCE of the recipe: latent side, mask, P_mean, P_std, clip, last step, micro-batch on each of
# 8 GPUs, steps between evaluations, EMA (smoothing, start), datasets
EXPECTED = {
    "res_256_pretrain": (32, 0.75, -0.6, 1.2, 0.25, 250_000, 256, 2500, None, 5),
    "res_256_finetune": (32, 0.0, -0.6, 1.2, 0.25, 280_000, 64, 2500, None, 5),
    "res_512_pretrain": (64, 0.75, 0.0, 0.6, 0.5, 50_000, 32, 2500, (0.99975, 25_000), 4),
    "res_512_finetune": (64, 0.0, 0.0, 0.6, 0.5, 55_000, 16, 500, (0.9975, 1000), 4),
}


@pytest.mark.parametrize("stage", STAGES)
def test_constants(stage):
    config = STAGES[stage].get_config()
    ema, edm, train = config.ema, config.edm, config.train
    assert EXPECTED[stage] == (
        config.model.options.input_size, train.mask_ratio, edm.P_mean, edm.P_std,
        config.optim.clip_norm, train.steps, train.micro_batch_size, train.eval_every,
        (ema.smoothing, ema.start_step) if ema.enabled else None, len(config.data.datasets),
    )  # fmt: skip
    assert config.model.options.pos_interp_scale == config.model.options.input_size / 32
    assert config.data.resolution == 8 * config.model.options.input_size
    assert (train.batch_size, config.seed, config.data.caption_drop) == (2048, 18, 0.1)
    assert (edm.sigma_data, config.optim.weight_decay, config.optim.expert_multiplier) == (
        0.9, 0.1, 1.0,
    )  # fmt: skip
    assert config.model.options.dtype == "bfloat16" and config.model.arch == "MicroDiT_XL_2"
    assert len(set(config.eval.prompts)) == 16 == config.eval.num_samples
    assert (config.eval.guidance_scale, config.eval.num_inference_steps) == (5.0, 30)
    assert all(entry["source"] == "latents" for entry in config.data.datasets)
    assert "coco2014" in config.data.heldout.folder
    diffusion_db = [entry for entry in config.data.datasets if "diffdb" in entry["folder"]]
    assert len(diffusion_db) == (config.data.resolution == 256)


def test_what_each_stage_starts_from():
    starts = [
        (stage.get_config().init_from, stage.get_config().init_weights_from)
        for stage in STAGES.values()
    ]
    assert starts == [
        ("", ""),
        ("{workdir}/../res_256_pretrain", ""),
        ("", "{workdir}/../res_256_finetune"),
        ("{workdir}/../res_512_pretrain", ""),
    ]


def test_learning_rates():
    rates = {stage: make_optimizer(STAGES[stage].get_config())[1] for stage in STAGES}
    first = rates["res_256_pretrain"]
    assert first(1250) == pytest.approx(1.2e-4) and first(2500) == pytest.approx(2.4e-4)
    assert first(250_000) == pytest.approx(0.33 * 2.4e-4)
    assert rates["res_256_finetune"](250_000) == pytest.approx(8e-5)
    assert rates["res_512_pretrain"](250) == pytest.approx(4e-5)
    assert rates["res_512_pretrain"](500) == rates["res_512_pretrain"](50_000)
    assert rates["res_512_pretrain"](500) == pytest.approx(8e-5)
    assert rates["res_512_finetune"](50_000) == pytest.approx(8e-5)


@pytest.mark.parametrize("variants", ["runlocal", "arch=Tiny_2,mesh=2x-1x2,runlocal"])
def test_runlocal_keeps_the_form_of_each_stage(variants):
    config = recipe.get_config(variants)
    assert config.stages == tuple(STAGES)
    check(config)
    mesh = sharding.make_mesh(2, 2, 2)
    sides = []
    for name, stage in STAGES.items():
        small, full = config[name], stage.get_config()
        cfg = model_config(small)
        sides.append(cfg.input_size)
        assert masking.num_kept(cfg.num_tokens, small.train.mask_ratio) >= 4
        assert cfg.num_tokens * 16 == model_config(full).num_tokens
        assert cfg.mixer_projects == ("Tiny" not in variants)
        assert small.train.steps <= 300 and num_micro_batches(small, mesh) >= 1
        assert small.optim.decay_steps in (0, small.train.steps)
        assert not small.ema.enabled or 0 < small.ema.start_step < small.train.steps
        for same in ("init_from", "init_weights_from", "edm"):
            assert small[same] == full[same]
        assert small.train.mask_ratio == full.train.mask_ratio
        assert small.data.vae == config.res_256_pretrain.data.vae  # one codec for both
    assert sides == [8, 8, 16, 16]
    if "mesh" in variants:
        assert config.res_512_finetune.mesh.to_dict() == {"data": 2, "fsdp": -1, "expert": 2}


@pytest.mark.parametrize("config", ["demo", "instant", "recipe", *STAGES])
def test_what_we_ship_can_be_run(config):
    check(importlib.import_module(f"configs.{config}").get_config())


def test_arch_and_micro_batches():
    config = res_256_finetune.get_config("arch=Tiny_2")
    assert model_config(config).dim == 512
    mesh = sharding.make_mesh(-1, 1, 1)
    assert num_micro_batches(config, mesh) == 4
    assert num_micro_batches(res_256_pretrain.get_config(), mesh) == 1
    assert num_micro_batches(res_512_finetune.get_config(), mesh) == 16
    config.train.micro_batch_size = 100
    with pytest.raises(UserError, match="must divide the 256 images of each device, found 100"):
        num_micro_batches(config, mesh)
    config.train.batch_size = 100
    with pytest.raises(UserError, match="multiple of the 8 devices, found 100"):
        num_micro_batches(config, mesh)


@pytest.mark.parametrize(
    "variants, message",
    [
        ("arch=B_2", "arch must be one of XL_2, Tiny_2, found 'B_2'"),
        ("mesh=8", "mesh must be like 2x2x2, found '8'"),
        ("runlocale", "config variants are .* found runlocale"),
        ("runlocal=1", "runlocal takes no value"),
    ],
)
def test_unknown_variants_are_refused(variants, message):
    with pytest.raises(UserError, match=message):
        res_256_pretrain.get_config(variants)


def test_unknown_keys_are_errors():
    for config in (defaults.base(), demo.get_config("finetune"), recipe.get_config("runlocal")):
        with pytest.raises((AttributeError, KeyError)):
            config.mask_ration = 0.5
    with pytest.raises((AttributeError, KeyError)):
        recipe.get_config().res_256_pretrain.train.mask_ration = 0.5


def test_the_demo_is_a_chain_too():
    config = demo.get_config()
    assert config.stages == ("pretrain", "finetune")
    assert isinstance(config.finetune, ConfigDict)
    assert config.finetune.init_from == "{workdir}/../pretrain"
    with pytest.raises(UserError, match="stages pretrain and finetune, found 'third'"):
        demo.get_config("third")

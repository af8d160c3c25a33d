"""From a run configuration to network and data: stored latents, and what is refused."""

import math

import numpy as np
import pytest

from configs import demo, instant, recipe
from microdit_jax import sharding
from microdit_jax.data import twemoji
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_writer import MdsWriter
from microdit_jax.training import defaults
from microdit_jax.training.config import chained, check, missing_folders, model_config
from microdit_jax.training.data import check_data, load_data

MESH = sharding.make_mesh()
COLUMNS = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes"}


def write_dataset(folder, count, *, vae="vae", tokens=7, width=6):
    """An MDS dataset of stored latents whose first value is the record's index."""
    with MdsWriter(folder, COLUMNS) as writer:
        for i in range(count):
            latents = np.full((4, 32, 32), i, np.float16)
            captions = np.ones((tokens, width), np.float16)
            sample = (f"caption {i}".encode(), captions.tobytes(), latents.tobytes())
            writer.write(dict(zip(COLUMNS, sample, strict=True)))
    info = LatentInfo(vae, "text", {256: (4, 32, 32)}, (tokens, width), attribution="CC-BY 4.0")
    (folder / SIDECAR).write_text(info.to_json())
    return str(folder)


def stored_config(tmp_path, **second):
    folders = [
        write_dataset(tmp_path / "a", 3),
        write_dataset(tmp_path / "b", 2, **second),
        write_dataset(tmp_path / "heldout", 4),
    ]
    config = defaults.base()
    config.data.datasets = defaults.latents(*folders[:2])
    config.data.datasets[1]["weight"] = 3.0
    config.data.heldout.update(source="latents", folder=folders[2])
    config.data.update(vae="vae", text_encoder="text")
    config.model.options.caption_channels = 6
    return config


def test_stored_latents(tmp_path):
    config = stored_config(tmp_path)
    data = load_data(config, MESH)
    assert [len(source) for source in data.sources] == [3, 2] and data.weights == [3, 6]
    record = data.sources[1][1]
    assert set(record) == {"latents", "caption_latents", "index", "source"}
    assert record["source"] == 1 and record["index"] == 1 and record["latents"][0, 0, 0] == 1
    assert data.names[1].endswith("/b") and data.codec is None
    assert data.made_by == {"vae": "vae", "text_encoder": "text"}
    assert data.attribution == "CC-BY 4.0" and data.heldout_caption(3) == "caption 3"
    assert check_data(model_config(config), data) == 7


def test_batches_follow_the_config(tmp_path):
    config = stored_config(tmp_path)
    config.train.batch_size = 8
    config.data.threads = 0
    data = load_data(config, MESH)

    def batches(start=0, count=40, **changes):
        part = config.copy_and_resolve_references()
        part.update_from_flattened_dict(changes)
        stream = data.batches(part, start)
        return [next(stream) for _ in range(count)]

    found = batches()
    assert batches(start=3, count=1)[0]["index"].tolist() == found[3]["index"].tolist()
    # Three records, and two that are seen three times as often each
    sources = np.concatenate([batch["source"] for batch in found])
    assert 0.6 < sources.mean() < 0.73  # 6 / 9; by their sizes alone 2 / 5
    other = batches(seed=config.seed + 1)
    assert [b["index"].tolist() for b in other] != [b["index"].tolist() for b in found]
    kept = np.concatenate([batch["keep_caption"] for batch in found])
    assert 0.8 < kept.mean() < 0.97
    all_dropped = batches(count=4, **{"data.caption_drop": 1.0})
    assert not np.any([batch["keep_caption"] for batch in all_dropped])


@pytest.mark.parametrize(
    "second, message",
    [
        ({"vae": "other"}, "made with the VAE vae, found data made with other"),
        ({"tokens": 8}, r"captions of the same length, found \[7, 8\] tokens"),
        ({"width": 5}, "embeddings 6 wide, found 5 in .*/b; set model.options.caption_channels"),
    ],
)
def test_datasets_that_do_not_belong_together(tmp_path, second, message):
    config = stored_config(tmp_path, **second)
    with pytest.raises(UserError, match=message):
        check_data(model_config(config), load_data(config, MESH))


def test_the_instant_model_sees_a_thing_three_times_as_often_as_a_person_of_some_tone(
    tmp_path, monkeypatch
):
    images = [*twemoji.list_images()[:20], *twemoji.list_images()[1000:1120]]
    monkeypatch.setattr(twemoji, "list_images", lambda: images)
    config = instant.get_config("stage1")
    for entry in (*config.data.datasets, config.data.heldout):
        entry["folder"] = str(tmp_path / "data")
    data = load_data(config, MESH)
    both, untoned = data.sources
    assert 0 < len(untoned) < len(both) and data.weights == [len(both), 2 * len(untoned)]
    captions = [p.caption for p in images]
    kept_out = twemoji.heldout_mask(captions)
    shown = [p for p, out in zip(images, kept_out, strict=True) if not out]
    things = [i for i, p in enumerate(shown) if "skin tone" not in p.caption]
    for i, thing in enumerate(things):
        np.testing.assert_array_equal(untoned[i]["latents"], both[thing]["latents"])
    assert len(untoned) == len(things) and check_data(model_config(config), data) == 16


def test_latents_of_another_size_are_refused(tmp_path):
    config = stored_config(tmp_path)
    config.model.options.input_size = 64
    with pytest.raises(UserError, match=r"takes latents \(64, 64, 4\), found \(32, 32, 4\)"):
        check_data(model_config(config), load_data(config, MESH))


def test_networks_that_do_not_exist():
    config = defaults.base()
    config.model.arch = "UNet"
    with pytest.raises(UserError, match="model.arch must be one of"):
        model_config(config)
    config = defaults.base()
    with config.model.options.unlocked():
        config.model.options.widht = 3
    with pytest.raises(UserError, match="found widht; known are"):
        model_config(config)


# ------------------------------------------------------------------ what is refused, and when
def changed(config, changes):
    """The config with values that its own types may forbid, as a file that builds its own has."""
    for name, value in changes.items():
        *parts, key = name.split(".")
        node = config
        for part in parts:
            node = node[part]
        # On the dictionary below, which checks neither keys nor types
        node._fields[key] = value
    return config


NOT_A_NUMBER, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    "changes, message",
    [
        # counts
        ({"train.steps": 0}, "train.steps must be at least 1, found 0"),
        ({"train.log_every": 0}, "train.log_every must be at least 1, found 0"),
        ({"train.keep_last": 0}, "train.keep_last must be at least 1, found 0"),
        ({"train.keep_every": -1}, "train.keep_every must be at least 0, found -1"),
        ({"train.micro_batch_size": -1}, "train.micro_batch_size must be at least 0, found -1"),
        ({"eval.draws": 0}, "eval.draws must be at least 1, found 0"),
        ({"eval.num_samples": -1}, "eval.num_samples must be at least 0, found -1"),
        ({"data.threads": -1}, "data.threads must be at least 0, found -1"),
        ({"optim.warmup_steps": -1}, "optim.warmup_steps must be at least 0, found -1"),
        ({"ema.start_step": -1}, "ema.start_step must be at least 0, found -1"),
        ({"profile.start": 0}, "profile.start must be at least 1, found 0"),
        ({"seed": -1}, "seed must be at least 0 and at most 4294967295, found -1"),
        ({"seed": 2**32}, "seed must be at least 0 and at most 4294967295, found 4294967296"),
        # numbers
        (
            {"optim.learning_rate": NOT_A_NUMBER},
            "learning_rate must be finite and at least 0, found nan",
        ),
        (
            {"optim.learning_rate": INFINITY},
            "learning_rate must be finite and at least 0, found inf",
        ),
        ({"optim.learning_rate": -1e-4}, "learning_rate must be at least 0, found -0.0001"),
        ({"optim.final_ratio": INFINITY}, "final_ratio must be finite and at least 0, found inf"),
        (
            {"optim.weight_decay": NOT_A_NUMBER},
            "weight_decay must be finite and at least 0, found nan",
        ),
        ({"optim.expert_multiplier": -1.0}, "expert_multiplier must be at least 0, found -1"),
        ({"optim.clip_norm": 0.0}, "optim.clip_norm must be above 0, found 0"),
        ({"optim.clip_norm": NOT_A_NUMBER}, "optim.clip_norm must be above 0, found nan"),
        ({"optim.decay_steps": 3, "optim.warmup_steps": 3}, r"must exceed warmup_steps \(3\)"),
        ({"ema.smoothing": 1.0}, "ema.smoothing must be at least 0 and below 1, found 1"),
        ({"ema.smoothing": NOT_A_NUMBER}, "ema.smoothing must be finite and at least 0 and below"),
        ({"edm.P_std": 0.0}, "edm.P_std must be above 0, found 0"),
        ({"edm.P_mean": NOT_A_NUMBER}, "edm.P_mean must be a finite number, found nan"),
        ({"edm.sigma_data": -0.5}, "edm.sigma_data must be above 0, found -0.5"),
        ({"train.mask_ratio": 1.0}, "train.mask_ratio must be at least 0 and below 1, found 1"),
        ({"train.mask_ratio": NOT_A_NUMBER}, "train.mask_ratio must be finite and at least 0"),
        ({"data.caption_drop": 1.1}, "caption_drop must be at least 0 and at most 1, found 1.1"),
        ({"eval.guidance_scale": INFINITY}, "eval.guidance_scale must be finite and at least 0"),
        ({"eval.guidance_scale": -2.0}, "eval.guidance_scale must be at least 0, found -2"),
        # what goes together
        ({"train.batch_size": 12}, "train.batch_size must be a multiple of the 8 devices"),
        ({"train.micro_batch_size": 3}, "must divide the 8 images of each device, found 3"),
        ({"train.mask_ratio": 0.99}, "mask_ratio 0.99 keeps none of 16 tokens"),
        ({"model.options.expert_capacity": 0.1}, "experts that take a token or more, found 4"),
        ({"mesh.data": 3}, "takes 3 devices, found 8"),
        ({"mesh.expert": 8}, "mesh.expert must divide the 4 experts, found 8"),
        ({"init_from": "a", "init_weights_from": "b"}, "give one of config.init_from and"),
        # names
        ({"model.arch": "UNet"}, "model.arch must be one of MicroDiT_XL_2"),
        ({"model.options.dtype": "float8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"model.options.attention": "flash"}, "attention must be one of xla,.*found 'flash'"),
        ({"model.options.moe_dispatch": "sort"}, "moe_dispatch must be one of gather, onehot"),
        ({"train.gradient_dtype": "float16"}, "gradient_dtype must be one of float32, bfloat16"),
        ({"model.options.remat": "all"}, "remat must be one of none, block, dots, found 'all'"),
        ({"model.options.dim": "wide"}, "model.options cannot be used: .*'wide'"),
        ({"data.captions": "words"}, "data.captions must be one of embeddings, tokens"),
        ({"eval.evaluators": ("loss",)}, "eval.evaluators takes heldout_loss, .*, found loss"),
        # data
        ({"data.datasets": ()}, "at least one dataset, found none"),
        ({"data.datasets": ({"source": "twemoji"},)}, "dictionary of folder, source, weight"),
        (
            {"data.datasets": ({"source": "laion", "folder": "x", "weight": 1.0},)},
            "must be one of latents, twemoji, twemoji_untoned, twemoji_things, .*, found 'laion'",
        ),
        (
            {"data.datasets": ({"source": "twemoji", "folder": "", "weight": 1.0},)},
            "folder must be a path or a URL, found ''",
        ),
        ({"data.heldout.source": ""}, "must be one of latents, .*, found ''"),
        ({"data.vae": "sdxl"}, "must be like patch_pca:.*found 'sdxl'"),
        ({"data.captions": "tokens"}, "twemoji stores embeddings, found data.captions='tokens'"),
        *(
            (
                {"data.datasets": ({"source": "twemoji", "folder": "x", "weight": weight},)},
                f"weight must be a finite number above 0, found {weight!r} for x",
            )
            for weight in (0, -1.0, NOT_A_NUMBER, INFINITY, "1", True)
        ),
        # prompts
        ({"eval.prompts": ("a cat", " ")}, "eval.prompts must be texts that are not empty"),
        ({"eval.prompts": ("a cat",)}, "at most the 1 eval.prompts, found 24; give more"),
        ({"eval.score_images": 3, "eval.score_prompts": "no.txt"}, "no.txt, could not read them"),
        ({"eval.score_images": 3, "eval.score_reference": "no.npz"}, "found nothing at 'no.npz'"),
        # types and keys
        ({"train.steps": "9"}, "train.steps must be an integer, found '9'"),
        ({"train.steps": True}, "train.steps must be an integer, found True"),
        ({"optim.learning_rate": "1e-3"}, "optim.learning_rate must be a number, found '1e-3'"),
        ({"ema.enabled": 1}, "ema.enabled must be True or False, found 1"),
        ({"eval.prompts": "a cat"}, "eval.prompts must be a tuple, found 'a cat'"),
        ({"train.stepss": 9}, "unknown config key train.stepss"),
        ({"log.wandb": None}, "log.wandb must be a string, found None"),
    ],
)
def test_a_config_is_checked_whole(changes, message):
    config = demo.get_config("pretrain")
    check(config, sharding.make_mesh(**config.mesh))
    config = changed(config, changes)
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_key_that_is_not_there():
    config = demo.get_config("pretrain")
    del config.train._fields["log_every"]
    with pytest.raises(UserError, match="expected the config key train.log_every, found none"):
        check(config)


def test_no_limit_to_the_gradient_may_be_wanted():
    config = demo.get_config("pretrain")
    config.optim.clip_norm = INFINITY
    check(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"res_512_finetune.train.micro_batch_size": 5}, "stage res_512_finetune: .*must divide"),
        ({"res_512_pretrain.optim.learning_rate": NOT_A_NUMBER}, "stage res_512_pretrain: optim"),
        ({"res_256_finetune.train.steps": 200}, "stage res_256_finetune: train.steps counts from "
         "the start of res_256_pretrain, which ends at step 200, found 200"),
        ({"res_512_pretrain.model.options.dim": 64}, "must have the weights of stage "
         "res_256_finetune, found another dim"),
        ({"res_256_pretrain.init_from": "{workdir}/../res_512_finetune"}, "stage res_256_pretrain: "
         "config.init_from must be an earlier stage, found res_512_finetune"),
        ({"stages": ()}, "config.stages must name one stage or more, found none"),
        ({"stages": ("res_256_pretrain",) * 2}, "a stage once, found res_256_pretrain twice"),
        ({"stages": ("stage1",)}, "names stage1, found no such stage in the config"),
    ],
)  # fmt: skip
def test_every_stage_of_a_chain_is_checked(changes, message):
    config = recipe.get_config("runlocal")
    check(config)
    with pytest.raises(UserError, match=message):
        check(changed(config, changes))


def test_the_stage_that_a_path_names():
    assert chained("{workdir}/../first", "second") == "first"
    assert chained("runs/first", "second") is None
    assert chained("", "second") is None
    assert chained("{workdir}/../../first", "second") is None


def test_folders_that_are_not_there_yet(tmp_path):
    config = stored_config(tmp_path)
    assert missing_folders(config) == []
    missing = f"{tmp_path}/none"
    config.data.datasets = (*config.data.datasets, *defaults.latents(missing, "s3://bucket/a"))
    config.data.heldout.folder = missing
    assert missing_folders(config) == [missing]
    assert missing_folders(demo.get_config("pretrain")) == []

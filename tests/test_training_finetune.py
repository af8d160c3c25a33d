"""Going on with a trained network on one folder: what is taken over, what is held out, adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_l2, tiny_model
from safetensors.numpy import load_file
from support.convert_command import fails as convert_fails
from support.convert_command import run as convert
from test_train import tiny_config

from configs import finetune
from microdit_jax import sharding
from microdit_jax.assets import load
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.diffusion import EdmConfig
from microdit_jax.errors import UserError
from microdit_jax.models import dit
from microdit_jax.models.dit import DiT
from microdit_jax.models.lora import Adapted, Lora
from microdit_jax.prepare.mds_writer import MdsWriter
from microdit_jax.train import train
from microdit_jax.training import source
from microdit_jax.training import step as train_step
from microdit_jax.training.config import check
from microdit_jax.training.data import load_data
from microdit_jax.trees import flatten

RNG = np.random.default_rng(0)
LORA = Lora(2, 3.0, ("attn", "cross_attn", "mlp"))


def tiny_network():
    """A network whose weights are none zero, and adapters that change it."""
    model = DiT(dataclasses.replace(tiny_model().config, depth=1))

    def random(tree):
        return jax.tree.map(lambda s: jnp.asarray(RNG.normal(0, 0.1, s.shape), s.dtype), tree)

    params = random(dit.abstract_params(model.config))
    return model, params, random(LORA.init(params, jax.random.key(0)))


# ------------------------------------------------------------------ adapters
def test_adapters_are_low_rank_sums():
    _, params, adapters = tiny_network()
    merged = flatten(LORA.merge(params, adapters))
    changed = set(LORA.paths(params))
    assert changed and all(path.endswith("/kernel") for path in changed)
    assert not any("adaLN" in path or "embed" in path.split("/")[0] for path in changed)
    for path, weight in flatten(params).items():
        if path in changed:
            low = flatten(adapters)
            a, b = (np.asarray(low[f"{path}/{name}"], np.float64) for name in "ab")
            assert a.shape[1] == b.shape[0] == 2
            weight = np.asarray(weight, np.float64) + 3.0 / 2 * a @ b
        np.testing.assert_allclose(merged[path], weight, rtol=1e-5, atol=1e-6)


def test_new_adapters_change_nothing_and_learn_at_once():
    model, params, _ = tiny_network()
    adapters = LORA.init(params, jax.random.key(1))
    for path, weight in flatten(LORA.merge(params, adapters)).items():
        np.testing.assert_array_equal(weight, flatten(params)[path])
    assert any(np.any(leaf) for path, leaf in flatten(adapters).items() if path.endswith("/a"))


BATCH = {
    "latents": jnp.asarray(RNG.normal(size=(8, 8, 8, 4)), jnp.float32),
    "caption_latents": jnp.asarray(RNG.normal(size=(8, 5, 24)), jnp.float32),
}


def gradients_of(model, mesh=None, parts=1):
    gradients = train_step.make_gradients(
        model, edm=EdmConfig(), mask_ratio=0.0, mesh=mesh, micro_batches=parts,
        frozen_loss=source.LoraLoss(LORA, EdmConfig(), 0.0), replicate_below=8,
    )  # fmt: skip
    return jax.jit(gradients)


def test_gradients_of_adapters_are_those_of_the_merged_weights():
    """dA = s dW B^T and dB = s A^T dW, of the gradient dW of the weights themselves."""
    model, params, adapters = tiny_network()
    key = jax.random.key(3)
    found = gradients_of(model)(adapters, BATCH, key, params)
    whole = train_step.make_gradients(model, edm=EdmConfig(), mask_ratio=0.0)
    expected = jax.jit(whole)(LORA.merge(params, adapters), BATCH, key)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    low, grads, dense = flatten(adapters), flatten(found.grads), flatten(expected.grads)
    for path in LORA.paths(params):
        a, b, d = low[f"{path}/a"], low[f"{path}/b"], 1.5 * dense[path]
        assert relative_l2(grads[f"{path}/a"], d @ b.T) < 1e-4
        assert relative_l2(grads[f"{path}/b"], a.T @ d) < 1e-4


def test_sharded_adapters_equal_single():
    model, params, adapters = tiny_network()
    key = jax.random.key(3)
    expected = gradients_of(model)(adapters, BATCH, key, params)
    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)

    def put(tree):
        shapes = jax.eval_shape(lambda t: t, tree)
        placed = sharding.with_shardings(shapes, mesh, replicate_below=8)
        return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, placed)

    batch = sharding.put_batch({k: np.asarray(v) for k, v in BATCH.items()}, mesh)
    found = gradients_of(model, mesh)(put(adapters), batch, key, put(params))
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
    for path, grad in flatten(found.grads).items():
        assert relative_l2(grad, flatten(expected.grads)[path]) < 1e-4, path


@pytest.mark.parametrize(
    "lora, words",
    [
        (Lora(2, 1.0, ("attn", "atn")), "modules with a matrix, found 'atn'; there are .*attn"),
        (Lora(10_000, 1.0, ("attn",)), "lora.rank must be at most the sides of each matrix"),
    ],
)
def test_adapters_that_cannot_be(lora, words):
    _, params, _ = tiny_network()
    with pytest.raises(UserError, match=words):
        lora.paths(params)


@pytest.mark.parametrize("found", [1, {}, {"lora": {"rank": "x"}}, {"lora": {"rank": 0}}, [[]]])
def test_records_that_are_none(found):
    with pytest.raises(UserError, match="expected adapters' base, weights, rank, alpha"):
        Adapted.from_dict(found, "config.json")


# ------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps, and a folder of 20 records that its towers could have made."""
    folder = tmp_path_factory.mktemp("finetune")
    config = tiny_config(folder)
    config.train.steps = 2
    train(config, folder / "base")
    made_by = read_run_metadata(folder / "base", "vae", "text_encoder")
    info = LatentInfo(made_by["vae"], made_by["text_encoder"], {32: (8, 8, 8)}, (16, 256))
    columns = {"caption": "str", "id": "str", "caption_latents": "bytes", "latents_32": "bytes"}
    with MdsWriter(folder / "latents", columns, size_limit=100_000) as writer:
        for i in range(20):
            rng = np.random.default_rng(i)
            shapes = {"latents_32": (8, 8, 8), "caption_latents": (16, 256)}
            values = {k: rng.normal(size=v).astype(np.float16) for k, v in shapes.items()}
            texts = {"caption": f"thing {i}".encode(), "id": f"{i}".encode()}
            writer.write(texts | {name: value.tobytes() for name, value in values.items()})
    (folder / "latents" / SIDECAR).write_text(info.to_json())
    return folder


def finetune_config(base, **lora):
    config = finetune.get_config()
    config.init_weights_from = str(base / "base")
    config.data.folder = str(base / "latents")
    config.train.update(steps=4, batch_size=8, eval_every=4, checkpoint_every=2, log_every=1)
    config.eval.update(num_samples=2, num_inference_steps=2, draws=1, batch_size=8)
    config.optim.update(warmup_steps=0, decay_steps=0, learning_rate=1e-2)
    config.ema.smoothing = 0.5
    config.log.tensorboard = False
    config.lora.update(lora)
    return config


def test_a_source_fills_in_what_is_left_open(base):
    config = source.filled_in(finetune_config(base))
    about = read_run_metadata(base / "base", "dit", "edm")
    assert config.model.arch == "DiT" and config.model.options.dim == about["dit"]["dim"] == 16
    assert config.model.options.dtype == "float32" and config.model.options.attention == "xla"
    assert config.edm.P_mean == about["edm"]["P_mean"]
    assert config.data.resolution == 32 and config.data.vae == str(base / "base" / "vae")
    check(config)
    # A tenth is held out, spread over the folder, the same each time; nothing is in both parts.
    data = load_data(config, sharding.make_mesh(data=-1, fsdp=1, expert=1))
    held = [data.heldout[i]["id"] for i in range(len(data.heldout))]
    latents = {data.heldout[i]["latents"].tobytes() for i in range(2)}
    assert held == ["6", "12"] and len(data.sources[0]) == 18
    assert not latents & {data.sources[0][i]["latents"].tobytes() for i in range(18)}
    assert data.codec == base / "base" / "vae"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_weights_from": ""}, "takes its sizes from config.init_weights_from, found none"),
        ({"init_weights_from": "/nothing"}, "found nothing at /nothing"),
        ({"data.heldout_share": 0.01}, "must hold out one record or more of .* 0.01 of 20"),
        ({"data.folder": "/nothing"}, "/nothing"),
        ({"lora.targets": ("attention",)}, "found 'attention'; there are"),
        ({"lora.rank": 2, "init_from": "x"}, "found none, or an init_from or a teacher"),
    ],
)
def test_what_cannot_be_gone_on_with(base, tmp_path, changes, words):
    config = finetune_config(base, rank=2)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run")


def test_all_weights_go_on_and_the_run_keeps_its_codec(base, tmp_path):
    state = train(finetune_config(base), tmp_path / "run")
    before, after = (load.load_model(str(p)).params for p in (base / "base", tmp_path / "run"))
    assert all(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    assert int(state.step) == 4 and (tmp_path / "run" / "vae" / "codec.json").is_file()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("heldout") for line in lines)


def test_adapters_as_a_run(base, tmp_path, capsys):
    config = finetune_config(base, rank=2)
    whole = train(config, tmp_path / "whole")
    assert set(flatten(whole.params)) == {
        f"{path}/{name}"
        for path in Lora(2, 16.0, tuple(config.lora.targets)).paths(
            load.load_model(str(base / "base")).params
        )
        for name in "ab"
    }
    config.train.steps = 2
    train(config, tmp_path / "parts")
    config.train.steps = 4
    parts = train(config, tmp_path / "parts")
    for path, leaf in flatten(whole).items():
        np.testing.assert_array_equal(leaf, flatten(parts)[path])

    # The average of the adapters, merged into the weights; a base by its path must be asked for.
    run, network = str(tmp_path / "whole"), str(base / "base")
    with pytest.raises(UserError, match="released models alone.*--base="):
        load.load_model(run)
    merged = load.load_model(run, base=network)
    frozen = load.load_model(network).params
    lora = Lora(2, 16.0, tuple(config.lora.targets))
    for path, leaf in flatten(lora.merge(frozen, jax.tree.map(np.asarray, whole.ema))).items():
        np.testing.assert_allclose(flatten(merged.params)[path], leaf, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="found other weights at .*; give the network"):
        load.load_model(run, base="instant")
    # Exported: merged, and the adapters alone, as (out, in) matrices of PyTorch's.
    convert(
        "--to=torch", f"--input={run}", f"--base={network}", f"--output={tmp_path}/all.safetensors"
    )
    convert("--to=lora", f"--input={run}", f"--output={tmp_path}/low.safetensors")
    whole_file = load_file(tmp_path / "all.safetensors")
    low = load_file(tmp_path / "low.safetensors")
    name = "blocks.0.attn.proj"
    expected = np.asarray(flatten(merged.params)["blocks_0/attn/proj/kernel"]).T
    np.testing.assert_allclose(whole_file[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    a, b = (low[f"blocks_0.attn.proj.lora_{letter}.weight"] for letter in "AB")
    before = np.asarray(flatten(frozen)["blocks_0/attn/proj/kernel"]).T
    np.testing.assert_allclose(before + 16.0 / 2 * b @ a, expected, rtol=1e-4, atol=1e-5)
    assert "--base" in convert_fails(capsys, "--to=torch", f"--input={run}", "--output=x.pt")
    said = convert_fails(capsys, "--to=lora", f"--input={network}", "--output=x.safetensors")
    assert "expected a run that trained adapters" in said
    config.lora.rank = 0
    with pytest.raises(UserError, match="does not fit this config"):
        train(config, tmp_path / "parts")

"""Token ids embedded in the train step: the same run as from stored embeddings."""

import dataclasses

import jax
import numpy as np
import pytest
from support import tiny_config

from microdit_jax import sharding
from microdit_jax.assets import load
from microdit_jax.checkpoints.model_folder import save_model
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.encoders.clip_text import ClipText, ClipTextConfig
from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_writer import MdsWriter
from microdit_jax.train import train
from microdit_jax.training.data import load_data
from microdit_jax.training.metric_writer import read_metrics

LENGTH, WIDTH = 8, 16
COLUMNS = {"caption": "str", "caption_latents": "bytes", "caption_tokens": "bytes"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small CLIP as a model folder; datasets of embeddings, one with ids as well."""
    folder = tmp_path_factory.mktemp("stored")
    config = ClipTextConfig(width=WIDTH, layers=1, heads=2, context_length=LENGTH)
    ids = np.zeros((1, LENGTH), np.int32)
    params = jax.jit(ClipText(config).init)(jax.random.key(0), ids)["params"]
    about = {"kind": "clip_text", "clip_text": dataclasses.asdict(config)}
    save_model(folder / "tower", jax.device_get(params), about)
    encoder = load.load_text_encoder(str(folder / "tower"))
    captions = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in "abcdefghijkl"]
    ids = encoder.tokenizer(captions)
    latents = np.random.default_rng(0).normal(size=(len(captions), 8, 8, 8)).astype(np.float16)
    for name, columns in (("data", COLUMNS), ("old", dict(list(COLUMNS.items())[:2]))):
        rows = zip(captions, encoder.encode(ids).astype(np.float16), ids, latents, strict=True)
        with MdsWriter(folder / name, columns | {"latents_32": "bytes"}) as writer:
            for caption, embedding, tokens, latent in rows:
                values = (caption.encode(), embedding.tobytes(), tokens.tobytes())
                kept = dict(zip(COLUMNS, values, strict=True))
                sample = {key: kept[key] for key in columns} | {"latents_32": latent.tobytes()}
                writer.write(sample)
        shapes = {"captions": (LENGTH, WIDTH), "tokens": LENGTH if name == "data" else None}
        info = LatentInfo("vae", encoder.name, {32: (8, 8, 8)}, **shapes)
        (folder / name / SIDECAR).write_text(info.to_json())
    return folder, encoder.name


def config_of(folder, name, captions, text_encoder, **train_changes):
    config = tiny_config.get_config("")
    dataset = {"source": "latents", "folder": str(folder / name)}
    config.data.datasets = (dataset | {"weight": 1.0},)
    config.data.heldout.update(dataset)
    config.data.update(vae="vae", text_encoder=text_encoder, captions=captions, resolution=32)
    config.model.options.caption_channels = WIDTH
    config.train.update(steps=3, eval_every=3, checkpoint_every=3, **train_changes)
    return config


def records(folder):
    """Reads a run's metrics, without the clock."""
    return [{k: v for k, v in line.items() if k != "speed"} for line in read_metrics(folder)]


def test_ids_train_as_stored_embeddings_do(stored, tmp_path):
    """On eight devices, held-out losses included."""
    folder, name = stored
    tower = str(folder / "tower")
    train(config_of(folder, "data", "embeddings", name), tmp_path / "embeddings")
    expected = records(tmp_path / "embeddings")
    assert len(expected) == 5  # three steps, the held-out loss before and after
    train(config_of(folder, "data", "tokens", tower), tmp_path / "tokens")
    found = records(tmp_path / "tokens")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), found, expected)


def test_ids_are_made_where_none_are_stored(stored):
    folder, _ = stored
    mesh, batches = sharding.make_mesh(), []
    for name in ("data", "old"):
        config = config_of(folder, name, "tokens", str(folder / "tower"))
        batches.append(next(load_data(config, mesh).batches(config, 0)))
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_what_cannot_be_embedded_is_refused(stored):
    folder, name = stored
    tower, mesh = str(folder / "tower"), sharding.make_mesh()
    with pytest.raises(UserError, match="takes a CLIP, T5 or BERT .*found table:"):
        load_data(config_of(folder, "data", "tokens", "table:width=16,tokens=8,seed=0"), mesh)
    config = config_of(folder, "data", "tokens", tower)
    data = load_data(config, mesh)
    batch = next(data.batches(config, 0))
    data.check_batch(batch)
    batch["tokens"][2, 3] = 49_408
    with pytest.raises(UserError, match="expected token ids 0 to 49407, found 0 to 49408"):
        data.check_batch(batch)

"""From a run configuration to network and data: stored latents, and what is refused."""

import numpy as np
import pytest

from configs import demo, instant
from microdit_jax import sharding
from microdit_jax.data import twemoji
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_writer import MdsWriter
from microdit_jax.training import defaults
from microdit_jax.training.config import check_counts, model_config
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
    pictures = [*twemoji.list_images()[:20], *twemoji.list_images()[1000:1120]]
    monkeypatch.setattr(twemoji, "list_images", lambda: pictures)
    config = instant.get_config("stage1")
    for entry in (*config.data.datasets, config.data.heldout):
        entry["folder"] = str(tmp_path / "data")
    data = load_data(config, MESH)
    both, untoned = data.sources
    assert 0 < len(untoned) < len(both) and data.weights == [len(both), 2 * len(untoned)]
    captions = [p.caption for p in pictures]
    kept_out = twemoji.heldout_mask(captions)
    shown = [p for p, out in zip(pictures, kept_out, strict=True) if not out]
    things = [i for i, p in enumerate(shown) if "skin tone" not in p.caption]
    for i, thing in enumerate(things):
        np.testing.assert_array_equal(untoned[i]["latents"], both[thing]["latents"])
    assert len(untoned) == len(things) and check_data(model_config(config), data) == 16


def test_latents_of_another_size_are_refused(tmp_path):
    config = stored_config(tmp_path)
    config.model.options.input_size = 64
    with pytest.raises(UserError, match=r"takes latents \(64, 64, 4\), found \(32, 32, 4\)"):
        check_data(model_config(config), load_data(config, MESH))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"datasets": ()}, "at least one dataset, found none"),
        ({"datasets": ({"source": "twemoji"},)}, "dictionary of folder, source, weight"),
        (
            {"datasets": ({"source": "laion", "folder": "x", "weight": 1.0},)},
            "must be one of latents, twemoji, twemoji_untoned, found 'laion'",
        ),
        ({"vae": "sdxl"}, "must be like patch_pca:.*found 'sdxl'"),
    ],
)
def test_data_that_cannot_be_opened(change, message):
    config = demo.get_config("pretrain")
    config.data.update(change)
    with pytest.raises(UserError, match=message):
        load_data(config, MESH)


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


@pytest.mark.parametrize(
    "name, least",
    [("train.log_every", 1), ("eval.draws", 1), ("eval.num_samples", 0), ("data.threads", 0)],
)
def test_counts_below_their_least_are_refused(name, least):
    config = defaults.base()
    check_counts(config)
    config.update_from_flattened_dict({name: least - 1})
    with pytest.raises(UserError, match=f"{name} must be at least {least}, found {least - 1}"):
        check_counts(config)

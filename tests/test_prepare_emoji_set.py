"""Prepared data: made once, whole or not at all, and tied to what made them."""

import dataclasses
import json

import numpy as np
import pytest

from microdit_jax.data import latents as data
from microdit_jax.data import twemoji
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.errors import UserError
from microdit_jax.prepare.emoji_set import prepare_emoji_set

TEXT_ENCODER = TokenTable(width=8, max_tokens=24, seed=0)
IMAGES, SIGNS = twemoji.list_images()[1000:1120], twemoji.list_images()[:120]


@pytest.fixture
def counted(monkeypatch):
    """A few images instead of all, and how often they were read."""
    reads = []
    read = twemoji.read_images
    monkeypatch.setattr(twemoji, "list_images", lambda: IMAGES)
    monkeypatch.setattr(
        twemoji, "read_images", lambda *a, **k: (reads.append(a[1]), read(*a, **k))[1]
    )
    return reads


def prepare(
    folder, *, resolution=16, channels=6, text_encoder=TEXT_ENCODER, fit=PatchPCA.fit, **options
):
    return prepare_emoji_set(
        folder,
        resolution=resolution,
        fit_codec=fit,
        codec_settings={"patch": 4, "channels": channels},
        text_encoder=text_encoder,
        progress=False,
        **options,
    )


def test_prepared_data_are_the_images_and_their_captions(counted, tmp_path):
    folder = prepare(tmp_path / "data")
    train, heldout, codec, meta = data.load_prepared(folder, PatchPCA.load)
    assert len(train) + len(heldout) == len(IMAGES) and len(heldout) > 0
    kept_out = twemoji.heldout_mask([image.caption for image in IMAGES])
    assert [p.caption for p, out in zip(IMAGES, kept_out, strict=True) if out] == list(
        heldout.captions
    )
    assert not set(heldout.captions) & set(train.captions)
    assert meta["vae"] == codec.name == train.vae == heldout.vae
    assert meta["text_encoder"] == TEXT_ENCODER.name
    assert meta["images"] == {"train": len(train), "heldout": len(heldout)}
    assert "CC-BY 4.0" in meta["attribution"]

    record = heldout[1]
    assert record["latents"].shape == (4, 4, 6) and record["latents"].dtype == np.float32
    assert record["caption_latents"].shape == (24, 8)
    assert record["caption_latents"].dtype == np.float16
    assert record["index"] == 1 and record["index"].dtype == np.int32
    (image,) = (p for p in IMAGES if p.caption == heldout.captions[1])
    scaled = codec.encode(twemoji.read_images([image], 16))[0] * codec.scaling_factor
    np.testing.assert_allclose(record["latents"], scaled, atol=1e-5)
    embedded = TEXT_ENCODER.encode_text([image.caption])[0]
    np.testing.assert_allclose(record["caption_latents"], embedded, atol=2e-3)  # float16 on disk
    assert np.sqrt(np.mean(train.latents**2)) == pytest.approx(0.9, rel=1e-3)


def test_the_codec_sees_training_images_only(counted, tmp_path):
    seen = []

    def fit(images, **settings):
        seen.append(len(images))
        return PatchPCA.fit(images, **settings)

    train, *_ = data.load_prepared(prepare(tmp_path / "data", fit=fit), PatchPCA.load)
    assert seen == [len(train)]


def test_two_resolutions_share_a_codec(counted, tmp_path):
    small, large = (
        data.load_prepared(
            prepare_emoji_set(
                tmp_path / str(resolution),
                resolution=resolution,
                fit_codec=PatchPCA.fit,
                codec_settings={"patch": 4, "channels": 6},
                text_encoder=TEXT_ENCODER,
                codec_resolution=16,
                progress=False,
            ),
            PatchPCA.load,
        )
        for resolution in (16, 32)
    )
    assert small.codec.name == large.codec.name
    np.testing.assert_array_equal(small.codec.basis, large.codec.basis)
    assert small.train[0]["latents"].shape == (4, 4, 6)
    assert large.train[0]["latents"].shape == (8, 8, 6)


def test_held_out_by_another_rule(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(twemoji, "list_images", lambda: SIGNS)
    folder = prepare(tmp_path / "data", heldout="things")
    captions = [image.caption for image in SIGNS]
    kept_out = twemoji.heldout_things_mask(captions)
    found = data.load_prepared(folder, PatchPCA.load)
    assert list(found.heldout.captions) == list(np.array(captions)[kept_out])
    assert 0 < len(found.heldout) == len(SIGNS) - len(found.train)


def test_scenes_of_the_training_images(counted, tmp_path, monkeypatch):
    listed = [dataclasses.replace(image, caption=f"thing {i}") for i, image in enumerate(SIGNS)]
    monkeypatch.setattr(twemoji, "list_images", lambda: listed)
    things = data.load_prepared(prepare(tmp_path / "things", heldout="things"), PatchPCA.load)
    found = data.load_prepared(prepare(tmp_path / "scenes", heldout="scenes"), PatchPCA.load)
    assert found.heldout.captions == things.heldout.captions and found.codec.name
    np.testing.assert_array_equal(found.heldout.latents, things.heldout.latents)
    np.testing.assert_array_equal(found.codec.basis, things.codec.basis)
    pairs = [caption.split(" and ") for caption in found.train.captions if " and " in caption]
    assert len(pairs) == len(things.train)
    assert {name for pair in pairs for name in pair} <= set(things.train.captions)
    assert found.train.latents.shape[1:] == things.train.latents.shape[1:]


def test_same_settings_are_reused_and_others_made_anew(counted, tmp_path):
    folder = tmp_path / "data"
    for settings, reads in (
        ({}, 1),
        ({}, 1),
        ({"channels": 7}, 2),
        ({"channels": 7}, 2),
        ({"channels": 7, "resolution": 32}, 3),
        ({"text_encoder": TokenTable(width=8, max_tokens=24, seed=1)}, 4),
        ({"heldout": "things"}, 5),
        ({"heldout": "things"}, 5),
        ({}, 6),
    ):
        prepare(folder, **settings)
        assert len(counted) == reads
    assert json.loads((folder / "meta.json").read_text())["codec"]["channels"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing half-written


def test_an_interrupted_run_leaves_nothing_that_looks_finished(counted, tmp_path):
    folder = tmp_path / "data"
    prepare(folder)

    class Interrupted(Exception):
        pass

    class Stops(TokenTable):
        def encode_text(self, texts):
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(folder, text_encoder=Stops(8, 6, seed=1))
    assert data.load_prepared(folder, PatchPCA.load).meta["text_encoder"] == TEXT_ENCODER.name
    with pytest.raises(Interrupted):
        prepare(tmp_path / "new", text_encoder=Stops(8, 6, seed=1))
    with pytest.raises(UserError, match="found no such folder"):
        data.load_prepared(tmp_path / "new", PatchPCA.load)
    prepare(tmp_path / "new")
    assert data.load_prepared(tmp_path / "new", PatchPCA.load).train.captions


def test_a_run_beside_another_one_leaves_its_work_alone(counted, tmp_path):
    folder = tmp_path / "data"

    class Slow(TokenTable):
        """A tower during whose work another process prepares the same, from start to end."""

        def encode_text(self, texts):
            prepare(folder)
            (folder / "first").touch()
            return TEXT_ENCODER.encode_text(texts)

    assert prepare(folder, text_encoder=Slow(**dataclasses.asdict(TEXT_ENCODER))) == folder
    assert (folder / "first").exists() and len(counted) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_place_that_may_not_be_written_is_named(counted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write .*file/data: Not a directory; choose"):
        prepare(tmp_path / "file/data")


def test_other_peoples_folders_are_left_alone(counted, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else there"):
        prepare(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine" and not counted


@pytest.mark.parametrize("file", ["train.npz", "heldout.npz", "captions.json"])
def test_damaged_data_are_refused(counted, tmp_path, file):
    folder = prepare(tmp_path / "data")
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(UserError, match="whole prepared data"):
        data.load_prepared(folder, PatchPCA.load)


def test_an_older_version_is_refused_and_made_anew(counted, tmp_path):
    folder = prepare(tmp_path / "data")
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(UserError, match="version 2, in .* found data of version 1"):
        data.load_prepared(folder, PatchPCA.load)
    prepare(folder)
    assert len(counted) == 2 and data.load_prepared(folder, PatchPCA.load).train.captions


def test_latents_of_another_vae_are_an_error():
    arrays = np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 5, 8), np.float16)
    source = data.LatentSource(*arrays, ["a", "b"], vae="sdxl", text_encoder="clip")
    source.check_made_by(vae="sdxl", text_encoder="clip")
    with pytest.raises(UserError, match="with the VAE ostris, found data made with sdxl"):
        source.check_made_by(vae="ostris", text_encoder="clip")
    with pytest.raises(UserError, match="with the text encoder t5, found data made with clip"):
        source.check_made_by(vae="sdxl", text_encoder="t5")
    with pytest.raises(UserError, match="found 2 latents, 2 caption embeddings and 1 captions"):
        data.LatentSource(*arrays, ["a"], vae="sdxl", text_encoder="clip")

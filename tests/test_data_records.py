"""Stored latents as records: the same from MDS and ArrayRecord, and tied to what made them."""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from support.latent_datasets import (
    COLUMNS,
    INFO,
    TEXT_ENCODER,
    VAE,
    arrays,
    sample,
    write_array_record,
    write_mds,
)

from microdit_jax.data import stores
from microdit_jax.data.mds import MdsReader
from microdit_jax.data.pipeline import batches, make_dataset
from microdit_jax.data.records import SIDECAR, LatentInfo, StoredLatents
from microdit_jax.data.stores import open_latents
from microdit_jax.encoders.tokenizers import ClipTokenizer
from microdit_jax.errors import UserError
from microdit_jax.prepare import arrayrecord_writer


@pytest.fixture(params=[write_mds, write_array_record])
def folder(request, tmp_path):
    return request.param(tmp_path / "data")


def test_records_are_the_same_from_either_format(folder):
    for resolution, side in ((256, 32), (512, 64)):
        source = open_latents(folder, resolution=resolution)
        assert len(source) == 6 and source.info == INFO
        for index in (0, 5, 2):
            record, expected = source[index], arrays(index)
            assert set(record) == {"latents", "caption_latents", "caption", "id", "index"}
            assert record["latents"].shape == (side, side, 4)
            np.testing.assert_array_equal(
                record["latents"],
                np.moveaxis(expected[f"latents_{resolution}"], 0, -1).astype(np.float32),
                strict=True,
            )
            np.testing.assert_array_equal(
                record["caption_latents"], expected["caption_latents"], strict=True
            )
            assert record["caption"] == f"naïve {index}" and record["id"] == f"a/{index}"
            assert record["index"] == index and record["index"].dtype == np.int32
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source[index]


def test_token_ids_stand_in_for_embeddings(folder, tmp_path):
    record = open_latents(folder, resolution=256, captions="tokens")[3]
    assert set(record) == {"latents", "tokens", "caption", "id", "index"}
    np.testing.assert_array_equal(record["tokens"], arrays(3)["caption_tokens"], strict=True)

    columns = {k: v for k, v in COLUMNS.items() if k != "caption_tokens"}
    info = LatentInfo(VAE, TEXT_ENCODER, INFO.latents, INFO.captions)
    write_mds(tmp_path / "none", columns=columns, info=info)
    with pytest.raises(UserError, match="expected token ids of captions, found none"):
        open_latents(tmp_path / "none", resolution=256, captions="tokens")

    tokenizer = ClipTokenizer(6)
    made = open_latents(tmp_path / "none", resolution=256, captions="tokens", tokenizer=tokenizer)
    np.testing.assert_array_equal(made[3]["tokens"], tokenizer(["naïve 3"])[0], strict=True)

    columns = {k: v for k, v in COLUMNS.items() if k != "caption_latents"}
    info = LatentInfo(VAE, TEXT_ENCODER, INFO.latents, None, 7)
    write_mds(tmp_path / "tokens", columns=columns, info=info)
    with pytest.raises(UserError, match="expected caption embeddings, found token ids alone"):
        open_latents(tmp_path / "tokens", resolution=256)
    with pytest.raises(UserError, match="captions must be embeddings or tokens, found 'text'"):
        open_latents(tmp_path / "tokens", resolution=256, captions="text")


def test_the_pipeline_batches_them(folder):
    sources = [open_latents(folder, resolution=256), open_latents(folder, resolution=256)]
    dataset = make_dataset(sources, [1, 2], seed=0, batch_size=4, caption_drop=0.1)
    iterator = batches(dataset, 3, threads=2)
    batch = next(iterator)
    iterator.close()
    assert batch["latents"].shape == (4, 32, 32, 4) and batch["caption_latents"].shape == (4, 7, 6)
    for row, index in enumerate(batch["index"]):
        assert batch["caption"][row] == f"naïve {index}" and batch["id"][row] == f"a/{index}"


def test_latents_of_another_vae_are_an_error(folder):
    source = open_latents(folder, resolution=256, vae=VAE, text_encoder=TEXT_ENCODER)
    source.check_made_by(vae=VAE, text_encoder=TEXT_ENCODER)
    with pytest.raises(UserError, match="with the VAE ostris, found data made with sdxl"):
        source.check_made_by(vae="ostris", text_encoder=TEXT_ENCODER)
    with pytest.raises(UserError, match="with the VAE ostris"):
        open_latents(folder, resolution=256, vae="ostris")
    with pytest.raises(UserError, match="with the text encoder t5"):
        open_latents(folder, resolution=256, text_encoder="t5")
    with pytest.raises(UserError, match="expected latents of 128 px, found those of 256, 512 px"):
        open_latents(folder, resolution=128)


def test_the_references_datasets_need_to_be_told(tmp_path):
    """They have four columns and no sidecar; shapes follow from byte counts."""
    columns = {k: v for k, v in COLUMNS.items() if k not in ("id", "caption_tokens")}
    write_mds(tmp_path / "ref", columns=columns, info=None)
    with pytest.raises(UserError, match="state the VAE and the text encoder"):
        open_latents(tmp_path / "ref", resolution=256)
    told = {"vae": VAE, "text_encoder": TEXT_ENCODER}
    source = open_latents(tmp_path / "ref", resolution=512, caption_tokens=7, **told)
    assert source.info == LatentInfo(VAE, TEXT_ENCODER, INFO.latents, (7, 6))
    assert source[4]["latents"].shape == (64, 64, 4) and source[4]["id"] == "4"
    with pytest.raises(UserError, match="caption tokens must be at least 1, found 0"):
        open_latents(tmp_path / "ref", resolution=512, caption_tokens=0, **told)
    with pytest.raises(UserError, match="multiples of 154 bytes of caption_latents .*found 84"):
        open_latents(tmp_path / "ref", resolution=512, **told)


def test_damaged_records_are_named(tmp_path):
    nan = arrays(1)
    nan["latents_256"][1, 2, 3] = np.nan
    nan["caption_latents"][0, 0] = np.inf
    changes = {
        1: {"latents_256": nan["latents_256"].tobytes()},
        2: {"caption_latents": nan["caption_latents"].tobytes()},
        3: {"latents_256": bytes(100)},
        4: {"caption": b"\xff\xfe"},
    }
    write_mds(tmp_path / "data", changes=changes)
    source = open_latents(tmp_path / "data", resolution=256)
    for index, message in (
        (1, "expected finite latents_256 in sample 1 of .*shard.00000.mds, found NaN or infinity"),
        (2, "expected finite caption_latents in sample 0 of .*shard.00001.mds"),
        (3, r"expected 8192 bytes of latents_256 \(4, 32, 32\) in sample 1 of .*, found 100"),
    ):
        with pytest.raises(UserError, match=message):
            source[index]
    assert source[4]["caption"] == "\ufffd\ufffd"
    assert open_latents(tmp_path / "data", resolution=512)[1]["latents"].shape == (64, 64, 4)


def test_damaged_array_records_are_named(tmp_path):
    folder = write_array_record(tmp_path / "data")
    path = arrayrecord_writer.shard_path(folder, 1, 2)
    whole = path.read_bytes()
    at = whole.index(sample(4)["caption_latents"])
    path.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
    source = open_latents(folder, resolution=256)
    assert source[3]["id"] == "a/3"
    with pytest.raises(UserError, match="expected a record in record 4 of .*copy the dataset"):
        source[4]
    path.write_bytes(whole[:-70_000])
    with pytest.raises(UserError, match="copy the dataset again"):
        open_latents(folder, resolution=256)[4]
    path.unlink()
    with pytest.raises(UserError, match="expected records in .*00001-of-00002, found none"):
        open_latents(folder, resolution=256)


def test_what_is_no_dataset_of_latents_is_said(tmp_path):
    with pytest.raises(UserError, match="found neither index.json .* nor dataset_info.json"):
        open_latents(tmp_path, resolution=256)
    with pytest.raises(UserError, match="found an empty dataset"):
        open_latents(GOLDEN / "mds/empty", resolution=256, vae="a", text_encoder="b")
    with pytest.raises(UserError, match="expected the columns .* found caption, number"):
        StoredLatents(MdsReader(GOLDEN / "mds/br", cache=tmp_path), INFO, resolution=256)
    with pytest.raises(UserError, match="cache is for MDS datasets"):
        open_latents(write_array_record(tmp_path / "ar"), resolution=256, cache=str(tmp_path))
    with pytest.raises(UserError, match="expected a TFDS dataset with a split 'train'"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / stores.ARRAY_RECORD).write_text("{")
        open_latents(tmp_path / "broken", resolution=256)


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"version": 9}, {"latents": {"256": [4, 0, 2]}}, {"extra": 1}]
)
def test_a_wrong_sidecar_is_refused(tmp_path, change):
    write_mds(tmp_path / "data")
    text = json.dumps(json.loads(INFO.to_json()) | change)
    (tmp_path / "data" / SIDECAR).write_text(text)
    with pytest.raises(UserError, match="expected microdit_jax latents, version 1, in .*latents"):
        open_latents(tmp_path / "data", resolution=256)

"""TFDS folders are read as data: no module that they name is imported, no file outside is read."""

import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from google.protobuf import json_format
from support.hostile import ROOT, assert_refused, run_hostile
from support.latent_datasets import write_array_record

from microdit_jax.data import tfds_folder
from microdit_jax.data.tfds_folder import Feature, open_records, read_features
from microdit_jax.errors import UserError

OWN = "tensorflow_datasets.core.features."
TEXT = {"pythonClassName": f"{OWN}text_feature.Text", "text": {}}


def features_of(tmp_path, described):
    (tmp_path / "features.json").write_text(json.dumps(described))
    return read_features(tmp_path)


def test_every_form_of_the_description_is_read(tmp_path):
    names = tfds.features
    made = names.FeaturesDict(
        {
            "image": names.Image(),
            "captions": names.Sequence({"id": np.int64, "text": names.Text()}),
            "latents": names.Tensor(
                shape=(4, None), dtype=np.float16, encoding=names.Encoding.BYTES
            ),
            "label": names.ClassLabel(num_classes=3),
            "box": names.BBoxFeature(),
            "texts": names.Sequence(names.Text()),
            "spoken": names.Translation(["en", "de"]),
        }
    )
    newest = json_format.MessageToDict(made.to_proto())
    found = features_of(tmp_path, newest)
    assert found["image"] == Feature("Image", "uint8", (-1, -1, 3), "none", {})
    assert found["latents"] == Feature("Tensor", "float16", (4, -1), "bytes", {})
    assert found["captions"].children[""].children["text"].kind == "Text"
    assert found["texts"].children == {"": Feature("Text", "", (), "none", {})}
    assert features_of(tmp_path, made.to_json()) == found  # TFDS 4.4
    as_text = made.to_json() | {"content": json.dumps(newest["featuresDict"])}
    assert features_of(tmp_path, as_text) == found
    image = {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": "png"}
    oldest = {
        "image": {"type": f"{OWN}image_feature.Image", "content": image},
        "captions": {
            "type": f"{OWN}sequence_feature.Sequence",
            "content": {
                "feature": {"type": f"{OWN}text_feature.Text", "content": {}},
                "length": None,
            },
        },
    }
    oldest = {"type": f"{OWN}features_dict.FeaturesDict", "content": oldest}
    restored = features_of(tmp_path, oldest)
    assert restored["image"] == found["image"] and restored["captions"] == found["texts"]


def dictionary(**features):
    return {
        "pythonClassName": f"{OWN}features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


EVIL = {"pythonClassName": "evil.Feature", "text": {}}
OLD = {"type": "evil.Feature", "content": {}}
SEQUENCE = f"{OWN}sequence_feature.Sequence"
STRANGE = {
    "at the top": EVIL,
    "in a dictionary": dictionary(caption=TEXT, image=EVIL),
    "in a sequence": dictionary(
        caption={"pythonClassName": SEQUENCE, "sequence": {"feature": EVIL}}
    ),
    "in a text of JSON": dictionary(
        caption={
            "pythonClassName": SEQUENCE,
            "jsonFeature": {"json": json.dumps({"feature": OLD, "length": None})},
        }
    ),
    "in the old form": {"type": f"{OWN}features_dict.FeaturesDict", "content": {"caption": OLD}},
    "between both": {
        "type": f"{OWN}features_dict.FeaturesDict",
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"caption": EVIL}}),
    },
    "no name": {"featuresDict": {"features": {}}},
    "a list for a name": {"pythonClassName": [], "featuresDict": {"features": {}}},
    "a list": [1],
    "a text": dictionary(caption="x"),
    "an escape": dictionary(caption={"pythonClassName": "e\x1b[2J\u202e.F"}),
    "a shape of text": dictionary(
        t={"pythonClassName": f"{OWN}tensor_feature.Tensor", "tensor": {"shape": "x"}}
    ),
    "a shape of infinity": dictionary(
        t={"pythonClassName": f"{OWN}tensor_feature.Tensor", "tensor": {"shape": [1e999]}}
    ),
}


@pytest.fixture
def dataset(tmp_path):
    """A whole dataset of latents, beside a module that leaves a trace when it is imported."""
    (tmp_path / "evil.py").write_text("open('imported', 'w')\n")
    return write_array_record(tmp_path / "data")


@pytest.mark.parametrize("where", STRANGE)
def test_descriptions_that_name_anything_else_are_refused(dataset, where, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    monkeypatch.syspath_prepend(dataset.parent)
    (dataset / "features.json").write_text(json.dumps(STRANGE[where]))
    with pytest.raises(UserError, match="expected .*features.json") as caught:
        read_features(dataset)
    assert str(caught.value).isprintable()
    assert not (dataset.parent / "imported").exists()


def test_deep_descriptions_are_refused(tmp_path):
    deep = TEXT
    for _ in range(100):
        deep = {"pythonClassName": SEQUENCE, "sequence": {"feature": deep}}
    with pytest.raises(UserError, match="nested too deep"):
        features_of(tmp_path, dictionary(caption=deep))
    (tmp_path / "features.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deep"):
        read_features(tmp_path)


def change_info(dataset, change):
    path = dataset / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def test_files_outside_and_counts_beyond_the_bytes_are_refused(dataset, tmp_path):
    outside = tmp_path / "outside.array_record"
    outside.write_bytes(b"secret")
    for template in (str(outside), "../outside.array_record", "../../{DATASET}"):
        change_info(dataset, lambda i, t=template: i["splits"][0].update(filepathTemplate=t))
        with pytest.raises(UserError, match="which leads out|found none"):
            open_records(dataset, "train")
    change_info(dataset, lambda i: i["splits"][0].pop("filepathTemplate"))
    assert len(open_records(dataset, "train")) == 6
    assert len(open_records(dataset, "train[:50%]")) == 3
    for lengths in (["1000000000000", "3"], ["-5", "3"], ["3"]):
        change_info(dataset, lambda i, n=lengths: i["splits"][0].update(shardLengths=n))
        with pytest.raises(UserError, match="could not open it|found none"):
            open_records(dataset, "train")
    change_info(dataset, lambda i: i["splits"][0].update(shardLengths=["3", "3"]))
    shard = next(dataset.glob("*00000-of*"))
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(UserError, match="which leads out"):
        open_records(dataset, "train")
    change_info(dataset, lambda i: i.update(fileFormat="tfrecord"))
    with pytest.raises(UserError, match="files of the format tfrecord"):
        open_records(dataset, "train")
    assert tfds_folder.INFO == "dataset_info.json"


def test_the_command_imports_and_reads_nothing_that_a_folder_names(dataset, tmp_path):
    """Through `prepare` and through `reformat`, which opens latents as training does."""
    commands = (
        ["microdit_jax.prepare", "--source=tfds", "--output=out"],
        ["microdit_jax.prepare.reformat", "--to=mds", "--output=out"],
    )
    (dataset / "features.json").write_text(json.dumps(STRANGE["in a dictionary"]))
    change_info(dataset, lambda info: info.update(features=EVIL, moduleName="evil"))
    for command in commands:
        done = run_hostile(
            ["-m", *command, "--input=data"], tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}"
        )
        assert "'evil.Feature'" in assert_refused(done)
        assert not (tmp_path / "imported").exists() and not (tmp_path / "out").exists()
    (dataset / "features.json").unlink()
    os.mkfifo(dataset / "features.json")
    assert "pipe or device" in assert_refused(
        run_hostile(["-m", *commands[0], "--input=data"], tmp_path)
    )

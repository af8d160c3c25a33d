import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from support.evaluation import ask, make_subject, references
from support.inception import NARROW, synthetic_tensors
from support.processes import finish, free_port, start
from support.small_clip import openclip_config, small_tensors

from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.data import twemoji
from microdit_jax.errors import UserError
from microdit_jax.evaluate import protocol
from microdit_jax.evaluate.prompts import read_prompts
from microdit_jax.evaluate.reference import crop_to, get_reference
from microdit_jax.evaluate.request import EvaluationRequest
from microdit_jax.evaluate.scores import feature_scores, over_seeds
from microdit_jax.metrics.features import small_features
from microdit_jax.metrics.frechet import Statistics
from microdit_jax.metrics.statistics import Reference, save_reference


def test_prompts_of_all_kinds(tmp_path):
    texts = ["a cat, grey", "a dog", "two hens"]
    (tmp_path / "a.txt").write_text("a cat, grey\n\na dog\ntwo hens\n")
    (tmp_path / "a.csv").write_text('id,caption\n1,"a cat, grey"\n2,a dog\n3,two hens\n')
    (tmp_path / "a.tsv").write_text("prompt\tx\na cat, grey\t1\na dog\t2\ntwo hens\t3\n")
    annotations = [
        {"id": 9, "image_id": 1, "caption": "a later caption"},
        {"id": 2, "image_id": 5, "caption": "a dog"},
        {"id": 3, "image_id": 7, "caption": "two hens"},
        {"id": 1, "image_id": 1, "caption": "a cat, grey"},
    ]
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": annotations}))
    found = [read_prompts(str(tmp_path / f)) for f in ("a.txt", "a.csv", "a.tsv", "coco.json")]
    assert all(prompts.texts == texts and not prompts.metadata for prompts in found)
    assert len({prompts.digest for prompts in found}) == 1
    some = read_prompts(str(tmp_path / "a.txt"), 2)
    assert some.texts == [texts[0], texts[2]] and some.digest != found[0].digest


def test_captions_of_the_embedded_images():
    train, heldout = read_prompts("train"), read_prompts("heldout")
    assert not set(train.texts) & set(heldout.texts)
    assert len(train.texts) + len(heldout.texts) == len(twemoji.list_images())
    more = read_prompts("heldout", len(heldout.texts) + 3)
    assert more.texts == heldout.texts + heldout.texts[:3]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "expected prompts in .*found none"),
        ("a.csv", "id,name\n1,x\n", "a column caption or prompt or text in .*found id, name"),
        ("a.csv", "caption\nx\n  \n", "found none or an empty one"),
        ("a.csv", "id,caption\n1,x\n2\n", "found none or an empty one"),
        ("a.csv", "caption\n" + 10_000_001 * "x" + "\n", "could not read them .*field larger"),
        ("a.json", '{"annotations": [{"id": 1, "image_id": 1, "caption": null}]}', "an empty one"),
        ("a.json", "[]", "could not read them"),
        ("a.jsonl", '{"tag": "x"}\n', "found line 1"),
        ("a.jsonl", '{"tag": "colors", "prompt": null}\n', "found line 1"),
    ],
)
def test_bad_prompts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / name))
    with pytest.raises(UserError, match="none.txt, could not read them"):
        read_prompts(str(tmp_path / "none.txt"))


def test_more_prompts_than_a_benchmark_has(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\n")
    with pytest.raises(UserError, match="expected 3 prompts in .*found 2; ask for at most"):
        read_prompts(str(tmp_path / "a.txt"), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("lpips",)}, "--metrics takes fid, .*found lpips"),
        ({"metrics": ()}, "found none"),
        ({"metrics": ("fid",)}, "--inception is needed for fid, found none; or take frechet_small"),
        ({"metrics": ("clip_score",)}, "--clip is needed for clip_score"),
        ({"metrics": ("fid", "frechet_small"), "inception": "x"}, "goes without fid"),
        ({"metrics": ("geneval",)}, "geneval needs --geneval_prompts to sample"),
        ({"metrics": ("geneval",), "geneval_results": "x", "seeds": (1, 2)}, "found 2 sets"),
        ({"clip": "x"}, "--clip is for --metrics=clip_score, found --metrics=frechet_small; ask"),
        ({"inception": "x"}, "--inception is for --metrics=fid,kid,precision_recall, found"),
        ({"geneval_prompts": "x"}, "leave --geneval_prompts out"),
        ({"metrics": ("clip_score",), "clip": "x", "reference": "x"}, "--reference is for"),
        ({"guidance_scales": (2.0, float("nan"))}, "takes finite numbers, found 2.0,nan"),
        ({"seeds": ()}, "expected a guidance scale and a seed"),
    ],
)
def test_bad_requests(changes, message):
    with pytest.raises(UserError, match=message):
        EvaluationRequest(**changes)


def test_a_model_that_is_no_run_needs_a_reference(tmp_path):
    with pytest.raises(UserError, match="expected --reference, found none"):
        protocol.evaluate(make_subject(), ask(tmp_path), tmp_path / "out")


def test_a_network_that_is_not_there(tmp_path):
    missing = str(tmp_path / "inception.pth")
    asked = ask(tmp_path, metrics=("fid",), inception=missing, reference="x.npz")
    with pytest.raises(UserError, match="kind inception in --inception, found nothing at .*pth"):
        protocol.evaluate(make_subject(), asked, tmp_path / "out")


def test_a_reference_is_computed_once_and_known_by_its_inputs(tmp_path):
    network, calls = small_features(), []
    apply = network._prepare
    network._prepare = lambda images: calls.append(len(images)) or apply(images)
    folder, kept = references(tmp_path), tmp_path / "kept"
    first = get_reference(str(folder), network, kept, resolution=32)
    assert first.about["count"] == 12 and sum(calls) == 12
    again = get_reference(str(folder), network, kept, resolution=32)
    assert again.digest == first.digest and sum(calls) == 12
    cropped = get_reference(str(folder), network, kept, resolution=32, side=16)
    assert cropped.digest != first.digest and sum(calls) == 24
    path = folder / "0.png"
    Image.new("RGB", (40, 40), "red").save(path)
    changed = get_reference(str(folder), network, kept, resolution=32)
    assert changed.about["inputs"] != first.about["inputs"] and changed.digest != first.digest
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"expected an image in .*0\.png, could not read it"):
        get_reference(str(folder), network, kept, resolution=32)
    with pytest.raises(UserError, match="found 0 images in"):
        get_reference(str(tmp_path / "nowhere"), network, kept, resolution=32)


def test_the_embedded_images_as_reference(tmp_path):
    network = small_features()
    found = get_reference("heldout", network, tmp_path, resolution=32)
    emoji = twemoji.images_of("heldout")
    expected = network(list(np.round(
        (twemoji.read_images(emoji, 32) / 2 + 0.5) * 255).astype(np.uint8)))  # fmt: skip
    np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)
    sets = {"heldout": ("twemoji_things",)}
    things = get_reference("heldout", network, tmp_path, resolution=32, emoji=sets)
    assert len(things.features) == len(twemoji.images_of("heldout", "things"))
    # A file of another network's statistics is refused.
    save_reference(tmp_path / "x.npz", np.eye(112, dtype=np.float32), name="other", inputs="")
    with pytest.raises(UserError, match="statistics of small_random_network:v1, 112 wide, found"):
        get_reference(str(tmp_path / "x.npz"), network, tmp_path, resolution=32)


def test_the_centre_square():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, 5:15] = 200
    assert (crop_to(image, 4) == 200).all()
    np.testing.assert_array_equal(crop_to(image[:, 5:15], 10), image[:, 5:15])


def test_values_over_seeds_by_hand():
    found = over_seeds({1: 12.0, 2: 13.0, 3: 14.0})
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert found["interval_95"] == pytest.approx([13 - 2.484138, 13 + 2.484138], abs=1e-6)
    assert found["mean"] == 13 and found["per_seed"] == {"1": 12.0, "2": 13.0, "3": 14.0}
    assert over_seeds({5: 1.5})["interval_95"] is None


def test_statistics_alone_give_no_recall():
    rng = np.random.default_rng(0)
    real, sampled = (rng.standard_normal((40, 4)).astype(np.float32) for _ in range(2))
    alone = Reference(Statistics.of(real), None, {})
    assert feature_scores(["fid"], sampled, alone).keys() == {"fid"}
    with pytest.raises(UserError, match="for kid, precision_recall expected the features"):
        feature_scores(["fid", "kid", "precision_recall"], sampled, alone)
    whole = Reference(Statistics.of(real), real, {})
    found = feature_scores(["kid", "precision_recall"], sampled, whole)
    assert found.keys() == {"kid", "precision", "recall"} and 0 < found["recall"] <= 1


def test_fid_and_clip_score_from_converted_files(tmp_path, monkeypatch):
    """Narrow networks in the public layouts, through the cache of conversions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with np.load(GOLDEN / "clip_small.npz") as file:
        golden = {"config": file["config"]}
    clip = tmp_path / "clip"
    clip.mkdir()
    # The tokenizer's vocabulary is CLIP's own.
    tensors = small_tensors()
    table = np.random.default_rng(0).standard_normal((49408, 16)).astype(np.float32)
    write_safetensors(
        clip / "open_clip_model.safetensors", tensors | {"token_embedding.weight": table}
    )
    config = openclip_config(golden, "gelu")
    config["model_cfg"]["text_cfg"]["vocab_size"] = 49408
    (clip / "open_clip_config.json").write_text(json.dumps(config))
    write_torch(tmp_path / "inception.pth", synthetic_tensors(NARROW))
    asked = ask(
        tmp_path, metrics=("fid", "kid", "precision_recall", "clip_score"), clip=str(clip),
        inception=str(tmp_path / "inception.pth"), reference=str(references(tmp_path)),
        guidance_scales=(2.0,), seeds=(1,),
    )  # fmt: skip
    result, files = protocol.evaluate(make_subject(), asked, tmp_path / "out")
    scores = result["results"][0]["scores"]
    assert scores.keys() == {"fid", "kid", "precision", "recall", "clip_score"}
    assert scores["fid"]["mean"] > 0 and 0 <= scores["clip_score"]["mean"] <= 100
    assert not result["features"]["comparable_with_published_fid"]
    assert any("not hold the public weights of 2015" in note for note in result["notes"])
    assert result["clip"].startswith("clip:weights=")
    assert "| 12.66 |" in (tmp_path / "out/result.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=nowhere"], "error: --model must be a training run, .*found nothing at nowhere"),
        (["--metrics=fid", "--model=x"], "error: --inception is needed for fid, found none"),
    ],
)
def test_the_commands_one_line(flags, message, tmp_path):
    # In a process of its own: absl's flags are global, and other commands have some of these.
    result = subprocess.run(
        [sys.executable, "-m", "microdit_jax.evaluate", f"--out={tmp_path}", *flags],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.returncode == 2 and re.match(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_processes_that_measure_differently_end_before_the_model_is_read(tmp_path):
    program = 'boundary.run_command("microdit_jax.evaluate.__main__")'
    address = f"localhost:{free_port()}"
    results = finish([
        start(
            program, "--model=none", f"--seeds={number}", f"--out={tmp_path}", "--num_processes=2",
            f"--coordinator_address={address}", f"--process_id={number}", devices=1,
        )
        for number in range(2)
    ])  # fmt: skip
    for status, _, text in results:
        assert status == 2, results
        assert "error: process 0 (" in text and "found seeds [0] on process 0 (" in text
        assert ") and [1] on process 1 (" in text
    assert list(tmp_path.iterdir()) == []

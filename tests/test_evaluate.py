"""Sets of samples that resume, and the whole protocol on a tiny pipeline."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from support.evaluation import (
    PROMPTS,
    SAMPLER,
    STEPS,
    ask,
    make_pipe,
    make_subject,
    mean_colours,
    measured,
    references,
)

from microdit_jax.checkpoints.weights import weights_digest
from microdit_jax.errors import UserError
from microdit_jax.evaluate import protocol, results, sample_set
from microdit_jax.evaluate.sample_set import SampleSet
from microdit_jax.images import read_png, save_png
from microdit_jax.metrics import geneval
from microdit_jax.metrics.frechet import Statistics, frechet_distance
from microdit_jax.metrics.statistics import load_reference
from microdit_jax.sampling.pipeline import LatentDiffusion


def image_path(folder, i):
    return folder / "images" / f"{i}.png"


def test_a_killed_set_goes_on_to_the_same_images(tmp_path, capsys):
    unbroken = measured(tmp_path / "a")["colours"]
    assert unbroken.shape == (9, 3) and len(np.unique(unbroken, axis=0)) == 9
    calls = []

    def killed(images, texts):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return mean_colours(images, texts)

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "b", {"colours": killed})
    assert len(list((tmp_path / "b/features").iterdir())) == 1
    resumed = measured(tmp_path / "b", {"colours": killed})["colours"]
    assert "4 of 9 images are there already" in capsys.readouterr().out
    np.testing.assert_array_equal(resumed, unbroken)
    assert [len(texts) for texts in calls] == [4, 4, 4, 1]
    # A damaged chunk is sampled again; another chunk size gives the same images.
    (tmp_path / "b/features/000004.npz").write_bytes(b"PK cut")
    np.testing.assert_array_equal(measured(tmp_path / "b")["colours"], unbroken)
    other = measured(tmp_path / "b", chunk_size=3)["colours"]
    np.testing.assert_allclose(other, unbroken, atol=0.5)


def test_the_settings_of_a_set_reach_its_sampler(tmp_path):
    """Each image as `generate` makes it: its own prompt, noise of (seed, index), steps, scale."""
    found = measured(tmp_path, chunk_size=5)["colours"]
    images = make_pipe().generate(
        PROMPTS.texts, seed=7, guidance_scale=2.0, num_inference_steps=2, batch_size=4
    )
    expected = np.round(np.clip(images, 0, 1) * 255).mean((1, 2))
    np.testing.assert_allclose(found, expected, atol=0.5)


def test_kept_images_are_what_was_measured(tmp_path, monkeypatch):
    found = measured(tmp_path, image_path=image_path)["colours"]
    for i in range(9):
        pixels = np.round(read_png(image_path(tmp_path, i)) * 255)
        np.testing.assert_allclose(pixels.mean((0, 1)), found[i], rtol=1e-5)
    # Another measure is taken of the kept images; nothing is sampled again.
    monkeypatch.setattr(LatentDiffusion, "sample", None)
    both = {"colours": mean_colours, "twice": lambda images, texts: 2 * mean_colours(images, texts)}
    again = measured(tmp_path, both, image_path=image_path)
    np.testing.assert_allclose(again["twice"], 2 * found)


def test_a_kept_image_of_another_prompt_is_not_measured(tmp_path):
    found = measured(tmp_path, image_path=image_path)["colours"]
    with Image.open(image_path(tmp_path, 1)) as image:
        settings = json.loads(image.text["microdit_jax"])
    black = np.zeros((32, 32, 3), np.float32)
    save_png(image_path(tmp_path, 1), black, settings | {"prompt": "a black square"})
    again = measured(tmp_path, {"red": mean_colours}, image_path=image_path)["red"]
    np.testing.assert_allclose(again, found, atol=0.5)
    save_png(image_path(tmp_path, 1), black, settings)  # one of this set is taken as it is
    assert not measured(tmp_path, {"blue": mean_colours}, image_path=image_path)["blue"][1].any()


def test_another_measure_leaves_the_first_ones(tmp_path, monkeypatch):
    found = measured(tmp_path)["colours"]
    other = measured(tmp_path, {"red": mean_colours})
    np.testing.assert_allclose(other["red"], found, atol=0.5)
    monkeypatch.setattr(LatentDiffusion, "sample", None)
    np.testing.assert_array_equal(measured(tmp_path)["colours"], found)


def test_processes_deal_from_one_list(tmp_path, monkeypatch):
    """The second comes when the first has sampled a chunk, which that one's list still had."""
    monkeypatch.setattr(
        SampleSet, "_sample", lambda self, chunk: np.zeros((len(chunk.prompts), 2, 2, 3), np.uint8)
    )
    measured(tmp_path)
    for start in (4, 8):
        (tmp_path / f"features/{start:06d}.npz").unlink()

    def from_first(name, function):
        return function() if name == "open the set" else [0, 4, 8]

    monkeypatch.setattr(sample_set.hosts, "from_first", from_first)
    monkeypatch.setattr(sample_set.hosts, "barrier", lambda *_, **__: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="1 rows of colours in .*000008"):  # the first one's chunk
        measured(tmp_path)
    assert (tmp_path / "features/000004.npz").exists()


def test_another_set_is_not_mixed_in(tmp_path):
    measured(tmp_path)
    other = sample_set.SamplerSettings(7, dataclasses.replace(STEPS, num_inference_steps=3), 4)
    with pytest.raises(UserError, match=r"differing: num_inference_steps, weights\)"):
        measured(tmp_path, {}, sampler=other, made_by={"weights": "b"})
    assert SAMPLER.sampler.steps != other.sampler.steps


def test_the_whole_protocol(tmp_path, monkeypatch):
    subject = make_subject()
    out = tmp_path / "out"
    asked = ask(tmp_path, reference=str(references(tmp_path)), side=32)
    result, files = protocol.evaluate(subject, asked, out)
    assert [path.name for path in files] == ["result.json", "result.md", "sweep.svg"]
    stored = json.loads((out / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["model"]["weights"] == weights_digest(subject.pipe.params)
    assert stored["prompts"]["count"] == 9 and stored["seeds"] == [1, 2]
    assert stored["reference"]["count"] == 12 and stored["versions"]["jax"] == jax.__version__
    assert not stored["features"]["comparable_with_published_fid"]
    # The numbers, from the features that were kept.
    (npz,) = (out / "references").iterdir()
    real = load_reference(npz)
    assert stored["reference"]["statistics_sha256"] == real.digest
    for row in stored["results"]:
        score = row["scores"]["frechet_small"]
        for seed, value in score["per_seed"].items():
            folder = out / f"guidance_{row['guidance_scale']:g}" / f"seed_{seed}" / "features"
            parts = [np.load(path) for path in sorted(folder.iterdir())]
            name = next(key for key in parts[0] if key != "count")
            features = np.concatenate([part[name] for part in parts])
            expected = frechet_distance(Statistics.of(features), real.statistics)
            assert value == pytest.approx(expected, rel=1e-6)
        low, high = score["interval_95"]
        assert low < score["mean"] < high
    table = (out / "result.md").read_text()
    assert table.count("| tiny |") == 2 and "not comparable with FID" in table
    # The same again samples and reads nothing.
    monkeypatch.setattr(SampleSet, "_sample", None)
    again, _ = protocol.evaluate(subject, asked, out)
    assert again == result
    # A further seed is sampled beside the others, which are not sampled again.
    monkeypatch.setattr(SampleSet, "_sample", lambda self, chunk: np.full(
        (len(chunk.prompts), 32, 32, 3), 20 * self._sampler.seed, np.uint8))  # fmt: skip
    more, _ = protocol.evaluate(subject, ask(tmp_path, reference=asked.reference, side=32,
                                             seeds=(1, 2, 3)), out)  # fmt: skip
    for before, after in zip(result["results"], more["results"], strict=True):
        seeds = after["scores"]["frechet_small"]["per_seed"]
        assert list(seeds) == ["1", "2", "3"]
        assert before["scores"]["frechet_small"]["per_seed"].items() <= seeds.items()


def test_geneval_is_sampled_then_scored(tmp_path):
    subject = make_subject()
    lines = [{"tag": "colors", "include": [], "prompt": "a red cat"},
             {"tag": "counting", "include": [], "prompt": "two dogs"}]  # fmt: skip
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"metrics": ("geneval",), "seeds": (1,), "guidance_scales": (2.0,)}
    asked = ask(tmp_path, geneval_prompts=str(prompts), **options)
    result, _ = protocol.evaluate(subject, asked, tmp_path / "out")
    images = tmp_path / "out/guidance_2/seed_1/geneval/images"
    assert any(f"detector over {images}" in note for note in result["notes"])
    assert json.loads((images / "00001/metadata.jsonl").read_text()) == lines[1]
    samples = [read_png(images / f"00001/samples/{i:04d}.png") for i in range(4)]
    assert all(np.abs(a - samples[0]).max() > 0.01 for a in samples[1:])  # four, all different
    results = tmp_path / "results.jsonl"
    results.write_text("".join(
        json.dumps({"tag": line["tag"], "correct": i % 2 == 0, "metadata": json.dumps(line)}) + "\n"
        for line in lines for i in range(geneval.SAMPLES + (line["tag"] == "colors"))
    ))  # fmt: skip
    asked = ask(tmp_path, geneval_results=str(results), **options)
    result, _ = protocol.evaluate(subject, asked, tmp_path / "out")
    assert result["geneval"]["tasks"] == {"counting": 0.5, "colors": 0.6}
    assert result["results"][0]["scores"]["geneval"]["mean"] == 0.55
    assert any("without the tasks single_object, two_object" in n for n in result["notes"])
    text = (tmp_path / "out/result.md").read_text()
    # All images that the detector saw; the published row does not claim FID's 30,000.
    assert f"| {2 * geneval.SAMPLES + 1} |" in text and "30000" not in text
    assert "| published: dit_4_channel_37M" in text and "| counting | 0.5 |" in text


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "out"
    for write in (
        lambda: measured(place),
        lambda: geneval.write_metadata(place, [{"tag": "colors", "prompt": "a red cat"}]),
        lambda: results.write(place, {"results": [], "model": {"name": ""}, "sampler":
                                     {"num_inference_steps": 1}}),
    ):  # fmt: skip
        with pytest.raises(UserError, match="could not write .*choose a place you may write to"):
            write()


def test_weights_are_told_apart():
    pipe = make_pipe()
    digest = weights_digest(pipe.params)
    assert digest == weights_digest(jax.tree.map(np.asarray, pipe.params))
    first, *rest = jax.tree.leaves(pipe.params)
    changed = jax.tree.unflatten(jax.tree.structure(pipe.params), [first + 1e-6, *rest])
    assert digest != weights_digest(changed)


def test_the_published_row_and_the_plot():
    def row(scale, fid, clip):
        return {"guidance_scale": scale, "images": 30000, "scores": {
            "fid": {"mean": fid, "interval_95": [fid - 0.1, fid + 0.1], "per_seed": {}},
            "clip_score": {"mean": clip, "interval_95": None, "per_seed": {}}}}  # fmt: skip

    rows = [row(5.0, 14.5, 29.0), row(2.0, 12.7, 27.5)]
    result = {
        "model": {"name": "x/dit_16_channel_37M_real_and_synthetic_data.pt", "description": "ours"},
        "sampler": {"num_inference_steps": 30}, "seeds": [1, 2], "results": rows,
    }  # fmt: skip
    lines = results.markdown(result).splitlines()
    assert lines[0].endswith("| FID | CLIP score |")
    assert lines[2] == "| ours | 5 | 30 | 30000 | 2 | 14.5 (14.4 to 14.6) | 29 |"
    assert lines[4].endswith("| published: dit_16_channel_37M_real_and_synthetic_data | - | - | "
                             "30000 | - | 13.04 | - |".removeprefix("| "))  # fmt: skip
    svg = results.sweep(rows)
    centres = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    (x2, y2), (x5, y5) = [tuple(map(float, centre)) for centre in centres]  # by rising guidance
    assert x2 < x5 and y2 > y5  # higher CLIP score to the right, higher FID above
    assert 'text-anchor="middle">CLIP score<' in svg and ">2</text>" in svg

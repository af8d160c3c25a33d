import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image

from configs import demo
from microdit_jax import sharding
from microdit_jax.assets.load import Model
from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.data.latents import LatentSource
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.errors import UserError
from microdit_jax.evaluate import generation, protocol, report
from microdit_jax.evaluate.generation import Settings, draw_set
from microdit_jax.evaluate.in_training import TrainingScores
from microdit_jax.evaluate.prompts import PromptSet
from microdit_jax.images import read_png
from microdit_jax.metrics import geneval
from microdit_jax.metrics.features import small_features
from microdit_jax.metrics.frechet import Statistics, frechet_distance
from microdit_jax.metrics.statistics import load_reference
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.training.data import RunData
from microdit_jax.training.evaluation import Evaluation
from microdit_jax.training.step import TrainState

SETTINGS = Settings(7, 2.0, 2, 4, {"weights": "a"})
PROMPTS = PromptSet(
    "p", [f"a {word}" for word in "cat dog cow hen owl bat elk fox ape".split()], []
)


@pytest.fixture(scope="module")
def pipe():
    """An untrained pipeline of 32 px pictures, quick enough to draw with."""
    model, rng = tiny_model(), np.random.default_rng(0)
    cfg = model.config
    x = jnp.zeros((1, 8, 8, 4))
    params = jax.jit(model.init)(jax.random.key(1), x, jnp.zeros(1), jnp.zeros((1, 1, 24)))
    # Away from the initialisation, where the network's output is zero.
    params = jax.tree.map(
        lambda p: p + jnp.asarray(0.05 * rng.standard_normal(p.shape), p.dtype), params["params"]
    )
    images = rng.uniform(-1, 1, (8, 32, 32, 3))
    codec = PatchPCA.fit(images, patch=4, channels=cfg.in_channels)
    text = TokenTable.from_name("table:width=24,tokens=6,seed=0")
    return LatentDiffusion(model, params, EdmConfig(), text, codec, "tiny")


@pytest.fixture
def subject(pipe):
    model = Model(pipe.model.config, pipe.params, pipe.edm, "vae", "text", None, "tiny")
    return protocol.Subject("tiny", model, pipe)


def mean_colours(images, texts):
    assert len(images) == len(texts) and images[0].dtype == np.uint8
    return np.array([image.mean((0, 1)) for image in images], np.float32)


def draw(pipe, folder, **changes):
    options = {"chunk_size": 4, "measures": {"colours": mean_colours}} | changes
    return draw_set(pipe, PROMPTS, SETTINGS, folder, **options)["colours"]


def test_a_killed_drawing_goes_on_to_the_same_set(pipe, tmp_path, capsys):
    unbroken = draw(pipe, tmp_path / "a")
    assert unbroken.shape == (9, 3) and len(np.unique(unbroken, axis=0)) == 9
    calls = []

    def killed(images, texts):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return mean_colours(images, texts)

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, tmp_path / "b", measures={"colours": killed})
    assert len(list((tmp_path / "b/features").iterdir())) == 1
    resumed = draw(pipe, tmp_path / "b", measures={"colours": killed})
    assert "4 of 9 pictures are there already" in capsys.readouterr().out
    np.testing.assert_array_equal(resumed, unbroken)
    assert [len(texts) for texts in calls] == [4, 4, 4, 1]
    # A damaged chunk is drawn again; another chunk size gives the same pictures.
    (tmp_path / "b/features/000004.npz").write_bytes(b"PK cut")
    np.testing.assert_array_equal(draw(pipe, tmp_path / "b"), unbroken)
    np.testing.assert_allclose(draw(pipe, tmp_path / "b", chunk_size=3), unbroken, atol=0.5)


def test_kept_pictures_are_what_was_measured(pipe, tmp_path, monkeypatch):
    def path(i):
        return tmp_path / "images" / f"{i}.png"

    found = draw(pipe, tmp_path, picture_path=path)
    for i in range(9):
        pixels = np.round(read_png(path(i)) * 255)
        np.testing.assert_allclose(pixels.mean((0, 1)), found[i], rtol=1e-5)
    # Another measure is taken of the kept pictures; nothing is drawn again.
    monkeypatch.setattr(generation, "_draw", None)
    both = {"colours": mean_colours, "twice": lambda images, texts: 2 * mean_colours(images, texts)}
    again = draw_set(
        pipe, PROMPTS, SETTINGS, tmp_path, both, chunk_size=4, picture_path=path
    )  # fmt: skip
    np.testing.assert_allclose(again["twice"], 2 * found)


def test_another_measure_leaves_the_first_ones(pipe, tmp_path, monkeypatch):
    found = draw(pipe, tmp_path)
    other = draw_set(pipe, PROMPTS, SETTINGS, tmp_path, {"red": mean_colours}, chunk_size=4)
    np.testing.assert_allclose(other["red"], found, atol=0.5)
    monkeypatch.setattr(generation, "_draw", None)
    np.testing.assert_array_equal(draw(pipe, tmp_path), found)


def test_processes_deal_from_one_list(pipe, tmp_path, monkeypatch):
    """The second comes when the first has drawn a chunk, which that one's list still had."""
    monkeypatch.setattr(
        generation, "_draw", lambda pipe, texts, *_: np.zeros((len(texts), 2, 2, 3))
    )
    draw(pipe, tmp_path)
    for start in (4, 8):
        (tmp_path / f"features/{start:06d}.npz").unlink()

    def from_first(name, function):
        return function() if name == "open the set" else [0, 4, 8]

    monkeypatch.setattr(generation.hosts, "from_first", from_first)
    monkeypatch.setattr(generation.hosts, "barrier", lambda *_, **__: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="expected colours in .*000008"):  # the first one's to draw
        draw(pipe, tmp_path)
    assert (tmp_path / "features/000004.npz").exists()


def test_another_set_is_not_mixed_in(pipe, tmp_path):
    draw(pipe, tmp_path)
    other = SETTINGS._replace(asked={"weights": "b"}, num_inference_steps=3)
    with pytest.raises(UserError, match=r"differing: num_inference_steps, weights\)"):
        draw_set(pipe, PROMPTS, other, tmp_path, {}, chunk_size=4)


def references(tmp_path, n=12):
    """A folder of pictures, some below, of two sizes."""
    rng, folder = np.random.default_rng(3), tmp_path / "real"
    (folder / "more").mkdir(parents=True)
    for i in range(n):
        image = rng.integers(0, 256, (40, 32 + 8 * (i % 2), 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / ("more" if i % 3 else ".") / f"{i}.png")
    return folder


def ask(tmp_path, **changes) -> protocol.Request:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS.texts) + "\n")
    defaults = {
        "prompts": str(prompts), "num_inference_steps": 2, "batch_size": 4, "chunk_size": 8,
        "guidance_scales": (1.0, 2.0), "seeds": (1, 2),
    }  # fmt: skip
    return protocol.Request(**defaults | changes)


def test_the_whole_protocol(subject, tmp_path, monkeypatch):
    out = tmp_path / "out"
    asked = ask(tmp_path, reference=str(references(tmp_path)), side=32)
    result, files = protocol.evaluate(subject, asked, out)
    assert [path.name for path in files] == ["result.json", "result.md", "sweep.svg"]
    stored = json.loads((out / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["model"]["weights"] == generation.weights_digest(subject.pipe.params)
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
    # The same again draws and reads nothing.
    monkeypatch.setattr(generation, "_draw", None)
    again, _ = protocol.evaluate(subject, asked, out)
    assert again == result
    # A further seed is drawn beside the others, which are not drawn again.
    monkeypatch.setattr(generation, "_draw", lambda pipe, texts, first, settings: np.full(
        (len(texts), 32, 32, 3), settings.seed / 10 + first / 100, np.float32))  # fmt: skip
    more, _ = protocol.evaluate(subject, ask(tmp_path, reference=asked.reference, side=32,
                                             seeds=(1, 2, 3)), out)  # fmt: skip
    for before, after in zip(result["results"], more["results"], strict=True):
        seeds = after["scores"]["frechet_small"]["per_seed"]
        assert list(seeds) == ["1", "2", "3"]
        assert before["scores"]["frechet_small"]["per_seed"].items() <= seeds.items()


def test_geneval_is_drawn_then_scored(subject, tmp_path):
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
    pictures = [read_png(images / f"00001/samples/{i:04d}.png") for i in range(4)]
    assert all(np.abs(a - pictures[0]).max() > 0.01 for a in pictures[1:])  # four, all different
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
    # All pictures that the detector saw; of the published one's, FID's 30,000 are not meant.
    assert f"| {2 * geneval.SAMPLES + 1} |" in text and "30000" not in text
    assert "| published: dit_4_channel_37M" in text and "| counting | 0.5 |" in text


def test_scores_in_training(pipe, tmp_path):
    folder = references(tmp_path)
    scores = TrainingScores(
        PROMPTS.texts, str(folder), tmp_path, resolution=32, num_inference_steps=2, batch_size=4
    )
    found = scores(pipe)
    assert found.keys() == {"frechet_small"} and scores(pipe) == found
    worse = LatentDiffusion(
        pipe.model, jax.tree.map(lambda p: 1.5 * p, pipe.params), pipe.edm, pipe.text_encoder,
        pipe.codec,
    )  # fmt: skip
    assert scores(worse) != found
    # The same code as the whole evaluation's.
    noise = generation.initial_noise("jax", 0, 9, 8, 8, 4)
    images = pipe.generate(
        PROMPTS.texts, noise=noise, guidance_scale=3.0, num_inference_steps=2, batch_size=4
    )
    network = small_features()
    features = network(list(generation.to_uint8(images)))
    (npz,) = tmp_path.glob("reference_*.npz")
    expected = frechet_distance(Statistics.of(features), load_reference(npz).statistics)
    assert found["frechet_small"] == pytest.approx(expected, rel=1e-5)


def test_a_place_that_may_not_be_written(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "out"
    for write in (
        lambda: draw(pipe, place),
        lambda: geneval.write_metadata(place, [{"tag": "colors", "prompt": "a red cat"}]),
        lambda: report.write(place, {"results": [], "model": {"name": ""}, "sampler":
                                     {"num_inference_steps": 1}}),
    ):  # fmt: skip
        with pytest.raises(UserError, match="could not write .*choose a place you may write to"):
            write()


def test_weights_are_told_apart(pipe):
    digest = generation.weights_digest(pipe.params)
    assert digest == generation.weights_digest(jax.tree.map(np.asarray, pipe.params))
    first, *rest = jax.tree.leaves(pipe.params)
    changed = jax.tree.unflatten(jax.tree.structure(pipe.params), [first + 1e-6, *rest])
    assert digest != generation.weights_digest(changed)


def test_the_published_row_and_the_plot():
    def row(scale, fid, clip):
        return {"guidance_scale": scale, "pictures": 30000, "scores": {
            "fid": {"mean": fid, "interval_95": [fid - 0.1, fid + 0.1], "per_seed": {}},
            "clip_score": {"mean": clip, "interval_95": None, "per_seed": {}}}}  # fmt: skip

    rows = [row(5.0, 14.5, 29.0), row(2.0, 12.7, 27.5)]
    result = {
        "model": {"name": "x/dit_16_channel_37M_real_and_synthetic_data.pt", "description": "ours"},
        "sampler": {"num_inference_steps": 30}, "seeds": [1, 2], "results": rows,
    }  # fmt: skip
    lines = report.markdown(result).splitlines()
    assert lines[0].endswith("| FID | CLIP score |")
    assert lines[2] == "| ours | 5 | 30 | 30000 | 2 | 14.5 (14.4 to 14.6) | 29 |"
    assert lines[4].endswith("| published: dit_16_channel_37M_real_and_synthetic_data | - | - | "
                             "30000 | - | 13.04 | - |".removeprefix("| "))  # fmt: skip
    svg = report.sweep(rows)
    centres = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    (x2, y2), (x5, y5) = [tuple(map(float, centre)) for centre in centres]  # by rising guidance
    assert x2 < x5 and y2 > y5  # higher CLIP score to the right, higher FID above
    assert 'text-anchor="middle">CLIP score<' in svg and ">2</text>" in svg


def test_samples_are_scored_at_evaluations(pipe, tmp_path):
    config = demo.get_config("pretrain")
    config.data.text_encoder = pipe.text_encoder.name
    config.eval.update(
        num_samples=0, num_images=2, batch_size=8, score_images=6, num_inference_steps=2,
        score_reference=str(references(tmp_path)),
    )  # fmt: skip
    pipe.codec.save(tmp_path / "codec")
    captions = ("a cat", "a dog")
    heldout = LatentSource(
        np.zeros((2, 8, 8, 4), np.float32), np.zeros((2, 6, 24), np.float32), captions,
        vae="v", text_encoder="t",
    )  # fmt: skip
    data = RunData([], [], [], heldout, {}, None, tmp_path / "codec", "")
    said, written = [], []
    writer = types.SimpleNamespace(write=lambda step, values: written.append((step, values)))
    mesh = sharding.make_mesh()
    evaluation = Evaluation(
        pipe.model, pipe.edm, mesh, data, config, tmp_path, None, said.append
    )  # fmt: skip
    evaluation._writer = writer
    write_run_metadata(tmp_path, {"config": config.to_dict()})
    (tmp_path / "metrics.jsonl").write_text("")
    state = TrainState(step=5, params=pipe.params, opt_state=(), ema=None, skipped=0)
    evaluation.grid(5, state)
    ((step, values),) = written
    assert step == 5 and values["samples"]["frechet_small"] > 0
    assert said == [
        f"step 5: samples against real pictures: frechet_small "
        f"{values['samples']['frechet_small']:.4g}"
    ]

"""Each cell of docs/scaling.md's table that works, on both stores: make test-buckets."""

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest
from support import bucket_inputs, stores
from support.train_command import ROOT

FAST = ("--num_inference_steps=2",)


@pytest.fixture(scope="module")
def inputs(store, tmp_path_factory):
    """The environment, the URL of all small inputs, and the local folder that they came from."""
    name, env = store
    folder = tmp_path_factory.mktemp("inputs") / "all"
    bucket_inputs.write(folder)
    bucket_inputs.geneval_results(folder)
    url = f"{name}://{stores.BUCKET}/inputs"
    stores.upload(env, folder, url)
    stores.upload(env, ROOT / "microdit_jax/assets/instant/model", f"{url}/model")
    return env, url, folder


def test_sample(inputs):
    env, url, _ = inputs
    sample = ("sample_main.py", *FAST)
    model = f"--model={url}/model"
    stores.command(env, *sample, model, f"--prompts={url}/prompts.txt", f"--out={url}/sampled")
    found = stores.objects(env, f"{url}/sampled")
    assert found == ["images/0000_an-apple.png", "images/0001_a-dog.png", "samples.png"]
    stores.command(env, *sample, model, "--prompt=a cat", "--strength=0.6",
                   f"--image={url}/image.png", f"--mask={url}/mask.png",
                   f"--out={url}/edited")  # fmt: skip
    assert "images/0000_a-cat.png" in stores.objects(env, f"{url}/edited")
    text = stores.command(env, "sample_main.py", f"--again={url}/sampled/{found[0]}",
                          model,                           f"--out={url}/again")  # fmt: skip
    assert f"{url}/again" in text


def test_evaluate(inputs):
    env, url, _ = inputs
    evaluate = ("-m", "microdit_jax.evaluate", *FAST, f"--model={url}/model")
    stores.command(env, *evaluate, f"--prompts={url}/prompts.txt", f"--reference={url}/photos",
                   "--metrics=fid,clip_score,geneval", f"--inception={url}/inception.pth",
                   f"--clip={url}/clip", f"--geneval_prompts={url}/geneval.jsonl", "--side=32",
                   f"--out={url}/scores")  # fmt: skip
    found = stores.objects(env, f"{url}/scores")
    assert "result.json" in found
    (statistics,) = [name for name in found if name.startswith("references/")]
    text = stores.command(
        env, *evaluate, f"--prompts={url}/prompts.txt", f"--reference={url}/scores/{statistics}",
        "--metrics=fid,geneval", f"--inception={url}/inception.pth", "--side=32",
        f"--geneval_prompts={url}/geneval.jsonl", f"--geneval_results={url}/results.jsonl",
        f"--out={url}/scores")  # fmt: skip
    assert f"{url}/scores/result.json" in text


def test_app(inputs):
    env, url, _ = inputs
    more = env | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "microdit_jax.app", f"--model={url}/model", "--port=0"],
        env=os.environ | more, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            lines = []
            for line in server.stdout:
                lines.append(line)
                if address := re.search(r"http://[\w.:]+", line):
                    break
            else:
                pytest.fail("".join(lines))
            with contextlib.closing(urllib.request.urlopen(address[0], timeout=60)) as page:
                assert page.status == 200
        finally:
            server.kill()


def test_convert_and_parity(inputs):
    env, url, _ = inputs
    stores.command(env, "-m", "convert", "--kind=dit", f"--input={url}/dit.pt",
                   f"--config={url}/dit.json", f"--output={url}/converted")  # fmt: skip
    assert "manifest.json" in stores.objects(env, f"{url}/converted")
    stores.command(env, "-m", "convert.parity", f"--input={url}/dit.pt",
                   f"--activations={url}/recorded.npz", f"--config={url}/dit.json",
                   f"--json={url}/parity/parity.json")  # fmt: skip
    assert stores.objects(env, f"{url}/parity") == ["parity.json"]


def test_the_lab(inputs):
    env, url, folder = inputs
    stores.command(env, "-m", "microdit_jax.xla.plot", f"--reports={url}/aot.json",
                   f"--reports={folder / 'aot.json'}", f"--out={url}/lab/plot.png")  # fmt: skip
    stores.command(env, "-m", "microdit_jax.xla.bench", "--what=moe", "--repeats=1",
                   "--warm_up=0", "--batch_size=1", f"--report={url}/lab/bench.json",
                   f"--dump={url}/lab/dump")  # fmt: skip
    found = stores.objects(env, f"{url}/lab")
    assert {"plot.png", "bench.json", "bench.png"} < set(found)
    assert any(name.startswith("dump/") for name in found)


def test_train_from_data_and_runs_of_a_bucket_and_report(inputs, data, tmp_path):
    env, url, _ = inputs
    tower = "table:width=256,tokens=16,seed=0"
    prepare = ("-m", "microdit_jax.prepare", "--resolutions=32", f"--vae={data / 'codec'}",
               f"--text_encoder={tower}")  # fmt: skip
    stores.command(env, *prepare, "--source=folder", f"--input={url}/photos",
                   f"--captions={url}/captions.jsonl", f"--output={url}/latents")  # fmt: skip
    assert {"index.json", "latents.json"} < set(stores.objects(env, f"{url}/latents"))
    config = tmp_path / "config.py"
    text = (ROOT / "tests/support/tiny_config.py").read_text()
    config.write_text(text.replace(
        "    return config",
        f"    config.data.update(datasets=({{'source': 'latents', 'folder': '{url}/latents',"
        f" 'weight': 1.0}},), vae={str(data / 'codec')!r}, text_encoder={tower!r})\n"
        f"    config.data.heldout.update(source='latents', folder='{url}/latents')\n"
        "    config.train.update(batch_size=4, checkpoint_every=2)\n"
        "    config.eval.update(num_images=4, batch_size=4)\n    return config",
    ))  # fmt: skip
    train = ("train_main.py", f"--config={config}:{data}")
    first = stores.command(env, *train, f"--workdir={tmp_path / 'a'}", "--config.train.steps=2")
    assert f"{url}/latents: 6 records" in first and "single records are read" in first
    stores.upload(env, tmp_path / "a", f"{url}/run")
    for key, steps in (("init_from", 4), ("init_weights_from", 2)):
        text = stores.command(
            env, *train, f"--workdir={tmp_path / key}", f"--config.train.steps={steps}",
            f"--config.{key}={url}/run", f"--config.data.cache={tmp_path / 'cache'}",
        )  # fmt: skip
        assert f"{url}/run" in text and "kept in the cache" in text
    stores.command(env, "-m", "microdit_jax.xla.aot", f"--config={config}:{data}",
                   f"--config.init_from={url}/run", "--topology=cpu:2",
                   f"--report={url}/aot/report.json", f"--dump={url}/aot/dump")  # fmt: skip
    found = stores.objects(env, f"{url}/aot")
    assert {"report.json", "report.txt"} < set(found) and found[0].startswith("dump/")
    stores.command(env, "-m", "microdit_jax.training.report", f"--runs={url}/run",
                   f"--runs={tmp_path / 'a'}", f"--out={url}/report/report.html")  # fmt: skip
    assert stores.objects(env, f"{url}/report") == ["report.html"]
    lines = (tmp_path / "init_from" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 4

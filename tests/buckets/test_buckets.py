"""Commands on object stores of this machine; a run on gs:// that is killed: make test-buckets."""

import json
import signal
import time

import numpy as np
from support import stores
from support.train_command import state_of

from microdit_jax.checkpoints.fetch import local_model

KILLS = 3
SAMPLE = ("sample_main.py", "--prompt=hot pepper", "--num_inference_steps=2")
MODEL = "microdit_jax/assets/instant/model"


def test_sample_convert_and_evaluate(store, tmp_path):
    name, env = store
    url = f"{name}://{stores.BUCKET}"
    stores.command(
        env, "-m", "convert", "--to=torch", f"--input={MODEL}", f"--output={url}/m/x.safetensors"
    )
    again = ("-m", "convert", f"--input={url}/m/x.safetensors", f"--output={url}/m/folder")
    assert f"{url}/m/folder" in stores.command(env, *again)
    assert "nothing to do" in stores.command(env, *again)
    stores.command(env, "-m", "convert", "--to=torch", f"--input={url}/m/folder",
        f"--output={tmp_path / 'y.safetensors'}")  # fmt: skip
    text = stores.command(env, *SAMPLE, f"--out={url}/out")
    assert f"grid in {url}/out/samples.png" in text
    assert "1 of 1 images are there already" in stores.command(env, *SAMPLE, f"--out={url}/out")
    assert stores.objects(env, f"{url}/out") == ["images/0000_hot-pepper.png", "samples.png"]
    stores.command(env, "-m", "microdit_jax.evaluate", "--num_images=4", "--num_inference_steps=2",
        "--model=instant", f"--out={url}/scores")  # fmt: skip
    assert "result.json" in stores.objects(env, f"{url}/scores")


def test_prepare_and_reformat(store, data, tmp_path):
    name, env = store
    url = f"{name}://{stores.BUCKET}"
    settings = ("-m", "microdit_jax.prepare", "--source=emoji", "--resolutions=32",
                "--fraction=0.05", f"--vae={data / 'codec'}",
                "--text_encoder=table:width=256,tokens=16,seed=0")  # fmt: skip
    stores.command(env, *settings, f"--output={tmp_path / 'local'}")
    for _ in range(2):
        stores.command(env, *settings, f"--output={url}/latents")
    found = stores.objects(env, f"{url}/latents")
    local = tmp_path / "local"
    expected = [path for path in local.rglob("*") if path.is_file() and ".lock" not in path.name]
    assert sorted(found) == sorted(path.relative_to(local).as_posix() for path in expected)
    reformat = ("-m", "microdit_jax.prepare.reformat", f"--cache={tmp_path / 'cache'}")
    stores.command(env, *reformat, f"--input={url}/latents", f"--output={url}/mds", "--to=mds")
    assert "index.json" in stores.objects(env, f"{url}/mds")
    stores.command(
        env, *reformat, f"--input={url}/latents", f"--output={url}/records", "--to=arrayrecord"
    )
    text = stores.command(
        env, *reformat, f"--input={url}/records", f"--output={url}/x", "--to=mds", status=2
    )
    assert "found ArrayRecord files" in text and text.count("\n") == 1


def test_a_workdir_on_s3_is_refused_in_one_line(data):
    text = stores.command({}, "train_main.py", f"--config=tests/support/tiny_config.py:{data}",
               "--workdir=s3://bucket/run", status=2)  # fmt: skip
    assert "Orbax writes checkpoints to no other store" in text and text.count("\n") == 1


def test_a_run_on_gs_that_is_killed_ends_as_one_on_a_disk(unbroken, tmp_path, monkeypatch):
    with stores.run_on_gs(tmp_path, monkeypatch) as (url, kept, _):
        for kill in range(KILLS):
            process = unbroken.start(url)
            # While a later checkpoint is on its way: its folder is there, what commits it is not.
            step = unbroken.every * (kill + 1)
            while process.poll() is None and not (kept / f"checkpoints/{step}").exists():
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        stores.command({}, *unbroken.arguments(url))
        local = local_model(url)
    ours, theirs = (state_of(folder, unbroken.steps) for folder in (local, unbroken.workdir))
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, path)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (local, unbroken.workdir)]
    steps = [[json.loads(line)["step"] for line in text.splitlines()] for text in texts]
    assert set(steps[1]) <= set(steps[0])

"""Commands on object stores of this machine; a run on gs:// that is killed: make test-buckets."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import stores
from support.train_command import ROOT, prepare_emoji, state_of

from microdit_jax.checkpoints.fetch import local_model

STEPS, EVERY, KILLS = 30, 6, 3
SAMPLE = ("sample_main.py", "--prompt=hot pepper", "--num_inference_steps=2")
MODEL = "microdit_jax/assets/instant/model"


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request, tmp_path_factory):
    """A store's name and the environment that leads to its server."""
    folder = tmp_path_factory.mktemp("store")
    with stores.gcs(folder / "gcs") if request.param == "gs" else stores.s3() as environment:
        yield request.param, environment | {"XDG_CACHE_HOME": str(folder / "cache")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_emoji(tmp_path_factory.mktemp("data"))


def run(environment, *arguments, status=0):
    flag = "--xla_force_host_platform_device_count"
    more = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{flag}=2", "JAX_PLATFORMS": "cpu"}
    done = stores.run(list(map(str, arguments)), environment | more, ROOT, timeout=400)
    assert done.returncode == status, done.stdout + done.stderr
    assert not [name for name in os.listdir(ROOT) if name.endswith(":")]
    return done.stdout + done.stderr


def objects(environment, url):
    code = f"from microdit_jax.files.bucket import Bucket; print(*Bucket('{url}').objects())"
    return run(environment, "-c", code).split()


def test_sample_convert_and_evaluate(store, tmp_path):
    name, env = store
    url = f"{name}://{stores.BUCKET}"
    run(env, "-m", "convert", "--to=torch", f"--input={MODEL}", f"--output={url}/m/x.safetensors")
    again = ("-m", "convert", f"--input={url}/m/x.safetensors", f"--output={url}/m/folder")
    assert f"{url}/m/folder" in run(env, *again)
    assert "nothing to do" in run(env, *again)
    run(env, "-m", "convert", "--to=torch", f"--input={url}/m/folder",
        f"--output={tmp_path / 'y.safetensors'}")  # fmt: skip
    text = run(env, *SAMPLE, f"--out={url}/out")
    assert f"grid in {url}/out/samples.png" in text
    assert "1 of 1 images are there already" in run(env, *SAMPLE, f"--out={url}/out")
    assert objects(env, f"{url}/out") == ["images/0000_hot-pepper.png", "samples.png"]
    run(env, "-m", "microdit_jax.evaluate", "--num_images=4", "--num_inference_steps=2",
        "--model=instant", f"--out={url}/scores")  # fmt: skip
    assert "result.json" in objects(env, f"{url}/scores")


def test_prepare_and_reformat(store, data, tmp_path):
    name, env = store
    url = f"{name}://{stores.BUCKET}"
    settings = ("-m", "microdit_jax.prepare", "--source=emoji", "--resolutions=32",
                "--fraction=0.05", f"--vae={data / 'codec'}",
                "--text_encoder=table:width=256,tokens=16,seed=0")  # fmt: skip
    run(env, *settings, f"--output={tmp_path / 'local'}")
    for _ in range(2):
        run(env, *settings, f"--output={url}/latents")
    found = objects(env, f"{url}/latents")
    local = tmp_path / "local"
    expected = [path for path in local.rglob("*") if path.is_file() and ".lock" not in path.name]
    assert sorted(found) == sorted(path.relative_to(local).as_posix() for path in expected)
    reformat = ("-m", "microdit_jax.prepare.reformat", f"--cache={tmp_path / 'cache'}")
    run(env, *reformat, f"--input={url}/latents", f"--output={url}/mds", "--to=mds")
    assert "index.json" in objects(env, f"{url}/mds")
    run(env, *reformat, f"--input={url}/latents", f"--output={url}/records", "--to=arrayrecord")
    text = run(env, *reformat, f"--input={url}/records", f"--output={url}/x", "--to=mds", status=2)
    assert "found ArrayRecord files" in text and text.count("\n") == 1


def test_errors_are_told_apart(store):
    name, env = store
    url = f"{name}://{stores.BUCKET}"
    assert "found none" in run(env, *SAMPLE, f"--model={url}/none", status=2)
    away = env | dict.fromkeys(
        ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "AWS_ENDPOINT_URL"),
        "http://127.0.0.1:9",
    )
    code = (
        f"from microdit_jax.files.bucket import Bucket\nBucket('{url}', seconds=2).write('x', b'')"
    )
    assert "no connection" in run(away, "-c", code, status=1)
    missing = "from microdit_jax.files.bucket import Bucket\nBucket('{}://no-such').write('x', b'')"
    text = run(env, "-c", missing.format(name), status=1)
    assert "no such bucket" in text or "no such object" in text


def test_a_workdir_on_s3_is_refused_in_one_line(data):
    text = run({}, "train_main.py", f"--config=tests/support/tiny_config.py:{data}",
               "--workdir=s3://bucket/run", status=2)  # fmt: skip
    assert "Orbax writes checkpoints to no other store" in text and text.count("\n") == 1


def test_a_run_on_gs_that_is_killed_ends_as_one_on_a_disk(data, tmp_path, monkeypatch):
    def command(workdir):
        return ["train_main.py", f"--config=tests/support/tiny_config.py:{data}",
                f"--workdir={workdir}", f"--config.train.steps={STEPS}",
                f"--config.train.checkpoint_every={EVERY}"]  # fmt: skip

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run({}, *command(tmp_path / "local"))
    kept = tmp_path / "gcs" / stores.BUCKET / "runs" / "a"
    with stores.gcs(tmp_path / "gcs") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = f"gs://{stores.BUCKET}/runs/a"
        for kill in range(KILLS):
            process = subprocess.Popen(
                [sys.executable, *command(url)], cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                                  "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            )  # fmt: skip
            # While a later checkpoint is on its way: its folder is there, what commits it is not.
            step = EVERY * (kill + 1)
            while process.poll() is None and not (kept / f"checkpoints/{step}").exists():
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        run({}, *command(url))
        local = local_model(url)
    ours, theirs = state_of(local, STEPS), state_of(tmp_path / "local", STEPS)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, path)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (local, tmp_path / "local")]
    steps = [[json.loads(line)["step"] for line in text.splitlines()] for text in texts]
    assert set(steps[1]) <= set(steps[0])
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(pathlib.Path(tmp_path / "cache"))

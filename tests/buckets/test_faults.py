"""Stores that refuse, told apart in one line each, and that are away for a while."""

import os
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from support import stores
from support.proxy import Proxy
from support.train_command import ROOT, state_of

from microdit_jax.checkpoints.fetch import local_model
from microdit_jax.xla.bench import loader

OUTAGE = 5.0  # seconds
SAMPLE = ("sample_main.py", "--prompt=hot pepper", "--num_inference_steps=2")
# Reads by ranges, and says whether all batches are those of a disk.
READ = """
import sys, numpy as np
from microdit_jax.data import pipeline
from microdit_jax.data.stores import open_latents
url, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
sources = open_latents(url, resolution=256, shuffled=True), open_latents(folder, resolution=256)
streams = [pipeline.batches(pipeline.make_dataset([source], seed=1, batch_size=16, caption_drop=0),
                            0, threads=2) for source in sources]
for step in range(count):
    far, near = map(next, streams)
    assert all(np.array_equal(far[name], near[name]) for name in near), step
    print(step, flush=True)
"""


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ("gs401", "no right to it"),
        ("gs403", "no right to it"),
        ("gs404", "there is no such bucket"),
        ("s3403", "no right to it"),
        ("s3404", "there is no such bucket"),
        ("s3301", "the bucket is in another region (eu-central-1)"),
        ("s3400", "the bucket is in another region (eu-central-1)"),
        ("gs", "found none; check the path"),
        ("s3", "found none; check the path"),
    ],
)
def test_refusals_are_one_line_each(tmp_path, refusal, words):
    url = f"{refusal[:2]}://bucket/none"
    with stores.loopback(tmp_path) as server:
        environment = stores.leading_to(server) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        urllib.request.urlopen(f"{server}/refuse/{refusal if refusal[2:] else 'none'}").close()
        text = stores.command(environment, *SAMPLE, f"--model={url}", status=2)
        assert words in text and text.count("\n") == 1 and len(text) < 400
        code = (
            "from microdit_jax.data.stores import open_latents\n"
            f"open_latents('{url}', resolution=8)"
        )
        text = stores.command(environment, "-c", code, status=1).splitlines()[-1]
        assert (words if refusal[2:] else "found neither index.json (MDS)") in text


@pytest.mark.parametrize("name", ["gs", "s3"])
def test_a_store_that_is_away_is_named(name, tmp_path):
    code = (
        "from microdit_jax.files.bucket import Bucket\n"
        f"Bucket('{name}://{stores.BUCKET}', seconds=2).write('x', b'')"
    )
    text = stores.command(stores.leading_to("http://127.0.0.1:9"), "-c", code, status=1)
    assert "no connection" in text


@pytest.mark.parametrize("name", ["gs", "s3"])
def test_records_are_read_over_an_outage(name, tmp_path):
    loader.make(tmp_path / "data" / "latents", 64)
    proxy = Proxy()
    with stores.loopback(tmp_path / "data", seconds=0.02) as server:
        url = f"http://127.0.0.1:{proxy.lead_to(int(server.rpartition(':')[2]))}"
        with subprocess.Popen(
            [sys.executable, "-c", READ, f"{name}://bucket/latents",
             str(tmp_path / "data" / "latents"), "300"],
            env=os.environ | stores.leading_to(url) | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as reader:  # fmt: skip
            assert reader.stdout is not None
            while (line := reader.stdout.readline()) != "20\n":
                assert line, reader.communicate()[1]
            proxy.cut()
            time.sleep(OUTAGE)
            proxy.mend()
            out, said = reader.communicate(timeout=300)
    assert reader.returncode == 0 and out.endswith("\n299\n"), said
    assert "tried again for" in said or "no answer for 3 s" in said


def test_a_run_outlives_an_outage(unbroken, tmp_path, monkeypatch):
    kept = tmp_path / "gcs" / stores.BUCKET / "runs" / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    proxy = Proxy()
    with stores.gcs(tmp_path / "gcs", through=proxy.lead_to) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = f"gs://{stores.BUCKET}/runs/a"
        process = unbroken.start(url, stderr=subprocess.PIPE)
        while process.poll() is None and not (kept / "checkpoints/6").exists():
            time.sleep(0.005)
        proxy.cut()  # while the first checkpoint is on its way
        time.sleep(OUTAGE)
        proxy.mend()
        said = process.communicate(timeout=400)[1]
        assert process.returncode == 0, said
        ours = state_of(local_model(url), unbroken.steps)
    theirs = state_of(unbroken.workdir, unbroken.steps)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, path)
    assert "tried again for" in said or "no answer for 3 s" in said

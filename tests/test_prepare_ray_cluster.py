"""Ray itself: two nodes on this machine, of which one is killed in the middle (make test-ray).

Also 279 images and ten of no use in the layout of every source, by both engines.
"""

import io
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from support.carriers import CARRIERS, captioned, outcome, write_carriers
from support.latent_datasets import contents

from microdit_jax.encoders.patch_pca import PatchPCA

ray = pytest.importorskip("ray")
ROOT = pathlib.Path(__file__).parent.parent
PARTS, IMAGES = 8, 250


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tars of images, each a part, and a codec."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for part in range(PARTS):
        with tarfile.open(folder / f"in/{part:05}.tar", "w") as tar:
            for i in range(IMAGES):
                file = io.BytesIO()
                pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                for end, raw in (("png", file.getvalue()), ("txt", f"no. {i}".encode())):
                    member = tarfile.TarInfo(f"{part}_{i}.{end}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    images = rng.uniform(-1, 1, (4, 64, 64, 3)).astype(np.float32)
    PatchPCA.fit(images, patch=8, channels=4).save(folder / "codec")
    return folder


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    # Actors import the package from here, whatever folder their node was started in.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    yield cluster
    cluster.shutdown()


def command(data, output, *flags, source="webdataset", input=None):
    return [
        sys.executable, "-m", "microdit_jax.prepare", f"--source={source}",
        f"--input={input or data / 'in'}", f"--output={output}", f"--vae={data / 'codec'}",
        "--text_encoder=table:width=8,tokens=6,seed=0", "--resolutions=64", "--threads=2", *flags,
    ]  # fmt: skip


def done(output):
    return len(list(output.glob("[0-9]*")))


def test_a_killed_node_loses_nothing(data, cluster, tmp_path):
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    began = time.monotonic()
    run = subprocess.Popen(
        command(data, tmp_path / "ray", "--engine=ray", f"--ray_address={cluster.address}"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while done(tmp_path / "ray") < 2 and run.poll() is None:
        time.sleep(0.005)
    at_kill = done(tmp_path / "ray")
    cluster.remove_node(nodes[0], allow_graceful=False)
    said, _ = run.communicate(timeout=300)
    seconds = time.monotonic() - began
    assert run.returncode == 0, said
    lost = re.findall(r"is gone .*; part (\d{6}) runs again elsewhere", said)
    assert len(lost) == 1 and at_kill < PARTS, said
    print(f"{PARTS * IMAGES} images, {at_kill} of {PARTS} parts at the kill, lost {lost}, "
          f"{seconds:.0f} s")  # fmt: skip
    local = subprocess.run(
        command(data, tmp_path / "local"), cwd=ROOT, capture_output=True, text=True
    )
    assert local.returncode == 0, local.stderr
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert f'"records": {PARTS * IMAGES}' in said


def test_one_line_and_the_same_command_goes_on(data, cluster, tmp_path):
    """Stopped by SIGTERM, finished without Ray: both engines work on the same folder."""
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    line = command(data, tmp_path / "out", "--engine=ray", f"--ray_address={cluster.address}")
    small = subprocess.run([*line, "--ray_cpus=9"], cwd=ROOT, capture_output=True, text=True)
    assert small.returncode == 2
    assert "error: expected a node with 9 CPUs and 0 GPUs, found 1 CPUs and 0 GPUs" in small.stderr
    run = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not done(tmp_path / "out") and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143 and "stopped; the same command goes on" in said, said
    assert "Traceback" not in said and not (tmp_path / "out" / "index.json").exists()
    for flags, folder in (((), "out"), ((), "local")):
        again = command(data, tmp_path / folder, *flags)
        assert subprocess.run(again, cwd=ROOT, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


GOOD, BAD, SIDE = 279, 10, 64


@pytest.fixture(scope="module")
def carriers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carriers")
    return write_carriers(folder, captioned(GOOD, BAD, scale=3))


@pytest.mark.parametrize("name", CARRIERS)
def test_both_engines_of_every_source(data, carriers, cluster, tmp_path, name):
    """The same counts and the same latents, whichever source carried the images."""
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    engines = {"ray": ("--engine=ray", f"--ray_address={cluster.address}"), "local": ()}
    source, path = carriers[name]
    for engine, flags in engines.items():
        line = command(data, tmp_path / engine, *flags, source=source, input=path)
        run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    found = outcome(tmp_path / "ray", SIDE)
    assert (found["records"], found["skipped"], len(found)) == (GOOD, BAD, 3 + GOOD)
    first = SEEN.setdefault("first", found)
    assert found == first


SEEN: dict[str, dict] = {}  # what came of the first source

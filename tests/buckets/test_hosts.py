"""Two hosts that share a bucket: killed and resumed, they end as one host with a disk does."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
from support import stores
from support.train_command import ROOT, state_of

from microdit_jax.checkpoints.fetch import local_model


def start(run, url, folder, environment):
    """Starts both processes, each with a device and a cache folder of its own, as two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for number in range(2):
        more = {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "XDG_CACHE_HOME": str(folder / f"cache{number}"),
        }  # fmt: skip
        with open(folder / f"{number}.txt", "a") as output:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        *run.arguments(url),
                        f"--process_id={number}",
                        "--num_processes=2",
                        f"--coordinator_address=127.0.0.1:{port}",
                    ],
                    cwd=ROOT,
                    env=os.environ | environment | more,
                    stdout=output,
                    stderr=output,
                )  # fmt: skip
            )
    return processes


def test_two_hosts_killed_and_resumed_on_gs(unbroken, tmp_path, monkeypatch):
    with stores.run_on_gs(tmp_path, monkeypatch) as (url, kept, environment):
        for killed in (1, 0):  # in turn, while a later checkpoint is on its way
            processes = start(unbroken, url, tmp_path, environment)
            step = unbroken.every * (2 - killed)
            while (
                None in [p.poll() for p in processes]
                and not (kept / f"checkpoints/{step}").exists()
            ):
                time.sleep(0.005)
            processes[killed].send_signal(signal.SIGKILL)
            statuses = [process.wait(120) for process in processes]
            texts = [(tmp_path / f"{n}.txt").read_text() for n in range(2)]
            assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] == 75, texts
        processes = start(unbroken, url, tmp_path, environment)
        statuses = [process.wait(400) for process in processes]
        texts = [(tmp_path / f"{n}.txt").read_text() for n in range(2)]
        assert statuses == [0, 0], texts
        ours = state_of(local_model(url), unbroken.steps)
    theirs = state_of(unbroken.workdir, unbroken.steps)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, path)


def test_parts_are_claimed_in_a_bucket_and_those_of_a_killed_host_done(data, tmp_path):
    tower = "--text_encoder=table:width=256,tokens=16,seed=0"
    prepare = ("-m", "microdit_jax.prepare", "--source=emoji", "--resolutions=32",
               f"--vae={data / 'codec'}", tower)  # fmt: skip
    stores.command({}, *prepare, f"--output={tmp_path / 'local'}")
    kept, url = tmp_path / "gcs" / stores.BUCKET / "latents", f"gs://{stores.BUCKET}/latents"
    with stores.gcs(tmp_path / "gcs") as environment:
        caches = [{"XDG_CACHE_HOME": str(tmp_path / f"cache{number}")} for number in range(2)]
        more = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        first = subprocess.Popen(
            [sys.executable, *prepare, f"--output={url}"], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | environment | more | caches[0],
        )  # fmt: skip
        while first.poll() is None and not list((kept / ".claims").glob("*/.lock")):
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        first.wait()
        others = [
            subprocess.Popen(
                [
                    sys.executable,
                    *prepare,
                    f"--output={url}",
                    f"--process_index={number}",
                    "--process_count=2",
                ],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | more | caches[number],
            )  # fmt: skip
            for number in range(2)
        ]
        said = [process.communicate(timeout=300)[0] for process in others]
        assert [process.returncode for process in others] == [0, 0], said
        found = stores.objects(environment, url)
    local = tmp_path / "local"
    files = [path for path in local.rglob("*") if path.is_file() and ".lock" not in path.name]
    assert sorted(found) == sorted(path.relative_to(local).as_posix() for path in files)
    assert [p for p in files if p.read_bytes() != (kept / p.relative_to(local)).read_bytes()] == []

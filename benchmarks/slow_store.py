"""Reading latents for training from a store whose every answer comes 20 ms late, on loopback.

  python -m benchmarks.slow_store --stores=gs,s3

A dataset of full-size records (198,656 bytes of arrays, 64 MB shards) lies behind a server of its
own process, which speaks GCS and S3. The loader reads it as training does: the pipeline of shuffled
batches, so many threads, float32 latents. "records" reads single records, as for a dataset larger
than the cache; "shards" keeps whole ones in a cache that holds a quarter of them, which is what
happens to compressed datasets. Told are records/s, bytes fetched over bytes used, and the processor
time of the loader and of the server, since both share this machine's cores.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("benchmarks.slow_store")

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from microdit_jax.commands.cli import absl_command
from microdit_jax.data import pipeline
from microdit_jax.data.records import StoredLatents
from microdit_jax.data.stores import open_latents
from microdit_jax.xla.bench import loader

STORES = flags.DEFINE_list("stores", ["gs", "s3"], "gs and s3, with their packages.")
WAYS = flags.DEFINE_list("ways", ["records", "shards"], "records, shards.")
RECORDS = flags.DEFINE_integer("records", 4000, "Of the dataset.", lower_bound=100)
BATCH = flags.DEFINE_integer("batch_size", 256, "Records of a batch.", lower_bound=1)
THREADS = flags.DEFINE_list("threads", ["2"], "Values of data.threads.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "To measure each figure for.", lower_bound=0.1)
LATENCY = flags.DEFINE_float("latency", 0.02, "Seconds that each answer is late.", lower_bound=0)
BYTES = 198_656 + 65  # of a record: arrays, sizes and caption
SERVER = Path(__file__).parents[1] / "tests" / "support" / "loopback_store.py"


class Server(NamedTuple):
    """The server's address and process."""

    url: str
    process: int

    def count(self) -> dict[str, int]:
        """Returns the reads of contents so far, and their bytes."""
        with urllib.request.urlopen(f"{self.url}/count") as answer:
            return json.load(answer)

    def processor_seconds(self) -> float:
        """Returns the processor time that it has used (Linux)."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def served(folder: Path, seconds: float) -> Iterator[Server]:
    """Runs the server on a folder."""
    command = [sys.executable, str(SERVER), str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        os.environ |= {
            "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "eu-west-1",
        }  # fmt: skip
        try:
            yield Server(url, process.pid)
        finally:
            process.kill()


class Counted:
    """A source that counts the records which are read of it, also those ahead of need."""

    def __init__(self, source: StoredLatents):
        self._source, self._lock, self.read = source, threading.Lock(), 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> pipeline.Record:
        return self._source[index]

    def records(self, indices: np.ndarray) -> list[pipeline.Record]:
        records = self._source.records(indices)
        with self._lock:
            self.read += len(indices)
        names = ("latents", "caption_latents", "index")
        return [{name: record[name] for name in names} for record in records]


def measure(server: Server, store: str, way: str, readers: int, cache: Path) -> dict[str, Any]:
    """Reads batches for some seconds, after the first; returns the figures."""
    options: dict[str, Any] = {"cache": None, "shuffled": True}
    if way == "shards":
        size = RECORDS.value * BYTES // 4
        options = {"cache": cache / store, "cache_bytes": size, "shuffled": False}
    source = Counted(open_latents(f"{store}://bucket/latents", resolution=512, **options))
    numbers = pipeline.make_dataset([source], seed=0, batch_size=BATCH.value, caption_drop=0.1)
    before, start = server.count()["bytes"], time.perf_counter()
    with contextlib.closing(pipeline.batches(numbers, 0, threads=readers)) as batches:
        next(batches)
        first, read = time.perf_counter() - start, 0
        busy, serving, start = time.process_time(), server.processor_seconds(), time.perf_counter()
        while time.perf_counter() < start + SECONDS.value:
            read += len(next(batches)["index"])
        seconds = time.perf_counter() - start
        busy, serving = time.process_time() - busy, server.processor_seconds() - serving
    time.sleep(2)  # the threads end what they are at
    fetched = server.count()["bytes"] - before
    figures = {
        "seconds to the first batch": first,
        "records/s": read / seconds,
        "MB/s": read * BYTES / seconds / 1e6,
        "bytes fetched over used": fetched / (source.read * BYTES),
        "loader's processor us/record": 1e6 * busy / read,
        "server's processor us/record": 1e6 * serving / read,
    }
    told = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return {"store": store, "way": way, "threads": readers} | told


@absl_command()
def main() -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        loader.make(folder / "data" / "latents", RECORDS.value)
        server = stack.enter_context(served(folder / "data", LATENCY.value))
        for store in STORES.value:
            for way in WAYS.value:
                for readers in map(int, THREADS.value):
                    found = measure(server, store, way, readers, folder / "cache")
                    print(json.dumps(found), flush=True)

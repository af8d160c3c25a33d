"""Times reading latents, by format and number of threads, and how long a training step would wait.

Without an input, a dataset of full-size records (198,656 bytes) is written to a temporary folder in
both formats. MosaicML's own reader, from another environment, can be timed on the same shards. The
data is in the page cache, unless `cold` (Linux) drops it from there.
"""

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from microdit_jax.data.mds import MdsReader
from microdit_jax.data.pipeline import MAX_IN_MEMORY, batches, make_dataset
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.data.stores import open_latents, open_store
from microdit_jax.errors import UserError
from microdit_jax.prepare.mds_writer import MdsWriter
from microdit_jax.prepare.reformat import reformat

INFO = LatentInfo("sdxl", "clip", {256: (4, 32, 32), 512: (4, 64, 64)}, (77, 1024))
_LIBRARY = """
import json, sys, time
import numpy as np
from streaming import StreamingDataset
data = StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1)
seconds, count = float(sys.argv[2]), 0
order = np.random.default_rng(0).integers(0, len(data), 1_000_000).tolist()
end = time.perf_counter() + 0.5
while time.perf_counter() < end:
    data[order[count]]; count += 1
start, first = time.perf_counter(), count
while time.perf_counter() < start + seconds:
    sample = data[order[count]]
    np.frombuffer(sample["caption_latents"], np.float16)
    count += 1
print(json.dumps({"rate": (count - first) / (time.perf_counter() - start)}))
"""


class LoaderOptions(NamedTuple):
    """Flags of microdit_jax.xla.bench about the loader."""

    input: str | None
    records: int
    resolution: int
    batch_size: int
    threads: tuple[int, ...]
    seconds: float
    images_per_second: float | None
    cold: bool
    library_python: str | None


def make(folder: Path, records: int) -> None:
    """Writes random records of the size that the reference's have."""
    columns = dict.fromkeys(INFO.arrays, "bytes")
    rng = np.random.default_rng(0)
    with MdsWriter(folder, columns | {"caption": "str"}, size_limit=1 << 26) as writer:
        for i in range(records):
            record = {
                name: rng.standard_normal(column.shape, np.float32).astype(column.dtype).tobytes()
                for name, column in INFO.arrays.items()
            }
            writer.write(record | {"caption": f"a caption of a usual length, number {i}"})
    (folder / SIDECAR).write_text(INFO.to_json())


def rate(read: Callable[[], int], seconds: float) -> float:
    """Times a function that returns how many records it read; records/s after half a second."""
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        read()
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        count += read()
    return count / passed


def forget_cached(folder: Path) -> None:
    """Drops a dataset's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait_share(found: Iterator, batch_size: int, images_per_second: float, seconds: float) -> float:
    """Returns the share of time for which training steps of a given speed wait for their batch."""
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        begin = time.perf_counter()
        next(found)
        waited += time.perf_counter() - begin
        time.sleep(batch_size / images_per_second)
    return waited / (time.perf_counter() - start)


def measure(folder: Path, args: LoaderOptions) -> Iterator[tuple[str, float]]:
    """Yields (what is measured, figure) for a dataset."""
    store, _ = open_store(folder)
    source = open_latents(folder, resolution=args.resolution)
    order = itertools.cycle(np.random.default_rng(0).integers(0, len(store), 100_000).tolist())
    if args.cold:
        forget_cached(folder)
    yield (
        "stored bytes of random records, records/s",
        rate(lambda: bool(store.raw(next(order))), args.seconds),
    )
    if isinstance(store, MdsReader):
        yield (
            "decoded random records, records/s",
            rate(lambda: bool(store[next(order)]), args.seconds),
        )
    yield (
        "random records for training, records/s",
        rate(lambda: bool(source[next(order)]), args.seconds),
    )
    nbytes = sum(memoryview(value).nbytes for value in store.raw(0).values())
    for threads in args.threads:
        dataset = make_dataset([source], seed=0, batch_size=args.batch_size, caption_drop=0.1)
        with contextlib.closing(batches(dataset, 0, threads=threads)) as found:
            speed = rate(lambda found=found: len(next(found)["latents"]), args.seconds)
            yield f"pipeline, {threads} threads, records/s", speed
            yield f"pipeline, {threads} threads, MB/s of disk", speed * nbytes / 1e6
            if args.images_per_second:
                share = wait_share(found, args.batch_size, args.images_per_second, args.seconds)
                yield f"data wait at {args.images_per_second:.0f} images/s, percent", 100 * share


class _Numbers:
    """A source that costs nothing to read, as large as the embedded emoji set."""

    def __len__(self) -> int:
        return 3563

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"index": np.asarray(index)}

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"index": indices}


def measure_order(batch_size: int, seconds: float) -> Iterator[tuple[str, float]]:
    """Yields (what, figure) of ordering the records alone, in memory and by Grain."""
    for name, most in (("in memory", MAX_IN_MEMORY), ("by Grain", 0)):
        dataset = make_dataset(
            [_Numbers()], seed=0, batch_size=batch_size, caption_drop=0.1, max_in_memory=most
        )
        with contextlib.closing(batches(dataset, 0, threads=0)) as found:
            speed = rate(lambda found=found: bool(next(found)), seconds)
        yield f"3,563 records {name}, batches of {batch_size}/s", speed


def measure_all(args: LoaderOptions) -> dict[str, dict[str, float]]:
    """Prints every figure and returns them by dataset.

    Raises:
      UserError: the input is no dataset, or the library's reader does not run.
    """
    if args.input and args.library_python:
        raise UserError(
            f"--library_python reads the data that is made here, found --input={args.input} too; "
            "leave one out"
        )
    figures: dict[str, dict[str, float]] = {}

    def say(name: str, what: str, figure: float) -> None:
        figures.setdefault(name, {})[what] = figure
        print(f"{name:12} {what:50} {figure:10,.1f}", flush=True)

    with contextlib.ExitStack() as stack:
        if args.input:
            folders = {"input": Path(args.input)}
        else:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folders = {"MDS": root / "mds", "ArrayRecord": root / "array_record"}
            make(folders["MDS"], args.records)
            reformat(str(folders["MDS"]), folders["ArrayRecord"], to="arrayrecord", progress=False)
        for name, folder in folders.items():
            for what, figure in measure(folder, args):
                say(name, what, figure)
        for what, figure in measure_order(args.batch_size, args.seconds):
            say("order alone", what, figure)
        if args.library_python:
            found = _library_rate(args.library_python, folders["MDS"], args.seconds)
            say("library", "random records, records/s", found)
    return figures


def _library_rate(python: str, folder: Path, seconds: float) -> float:
    command = [python, "-c", _LIBRARY, str(folder), str(seconds)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise UserError(
            f"--library_python must be a Python with mosaicml-streaming, found {python}: {reason}"
        ) from error
    return json.loads(run.stdout.splitlines()[-1])["rate"]

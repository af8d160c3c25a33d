"""Prepares a dataset: decodes, encodes and writes the images of a source, part by part.

Every part of the source makes a folder of its own, and a record depends on its own image alone, so
the output is the same for any number of processes and devices and however often the job was killed.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.errors import UserError, visible
from microdit_jax.files import OutputFolder, atomic_folder, read_json, write_text
from microdit_jax.prepare import claims, job_folder
from microdit_jax.prepare.bucket_parts import BucketParts, parts_in_bucket
from microdit_jax.prepare.decoding import decode_parts
from microdit_jax.prepare.encoding import DeviceTowers, Record, SkippedImage, encode_parts
from microdit_jax.prepare.listing import LISTING, agree
from microdit_jax.prepare.mds_writer import MdsWriter, merge_index
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.sources.listed_images import ChosenParts, ImageSource, SourceImage

REPORT, SKIPPED = "report.json", "skipped.jsonl"
_PART_REPORT = "part.json"
_SHARD_BYTES = 1 << 28
_MAX_REPORT = 1 << 32  # bytes of part.json, which lists every skipped image of a part


def run(
    source: ImageSource,
    towers: Sequence[DeviceTowers],
    output: Path,
    options: PrepareOptions,
    *,
    request: dict[str, Any],
    into: OutputFolder | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    append: bool = False,
    progress: bool = True,
) -> None:
    """Writes an MDS dataset of latents; the same call again goes on where it was.

    Several processes may do so at once. Each claims one part after the other, those of processes
    that are gone too, and returns when all parts are done.

    Args:
      towers: the same ones on each device that is to work.
      output: a folder that all processes share. At the end it holds index.json, latents.json,
        report.json (counts), skipped.jsonl (ids and reasons), and a folder for each part.
      request: what else decides the output (the source's options), kept in job.json.
      into: the folder of a bucket that `output` stands for, if it does.
      process_index, process_count: this process begins with every process_count-th part.
      threads: that decode.
      append: new parts are made of what the source has more than when the job began.
    Raises:
      UserError: another job's folder, a source that changed, a full disk, or no usable image.
    """
    job_folder.check_counts(process_index, process_count, threads=threads)
    alone = process_count == 1 and into is None
    with begun(
        source, towers[0], output, options, request=request, append=append, alone=alone
    ) as source:
        names = part_names(source)
        writer = PartWriter(source, towers, output, options, threads=threads, progress=progress)
        bucket = None if into is None else parts_in_bucket(into, names)
        with claims.Claims(
            output,
            names,
            process_index=process_index,
            process_count=process_count,
            bucket=bucket,
        ) as claimed:
            while True:
                for number, _ in writer.write(claimed.available()):
                    claimed.release(number)
                # Only now: what is claimed must be written before one waits for others.
                if not claimed.left():
                    break
                claims.wait_a_moment()
        if bucket is not None:
            bucket.fetch(names)
        finish(output, source, towers[0], bucket)


@contextlib.contextmanager
def begun(
    source: ImageSource,
    towers: DeviceTowers,
    output: Path,
    options: PrepareOptions,
    *,
    request: dict[str, Any],
    append: bool = False,
    alone: bool = True,
) -> Iterator[ImageSource]:
    """Begins the job, or goes on with it; gives the source with the job's parts.

    A job that fails without a record lets its folder go, for other settings or sources.

    Args:
      towers: any that it is done with.
      alone: no other process may be at work there, unless it holds a claim.
    Raises:
      UserError: another job's folder, or a source that changed.
    """
    job_folder.begin(
        output,
        request
        | dataclasses.asdict(options)
        | {"vae": towers.codec.name, "text_encoder": towers.text_encoder.name}
        | {"job": "prepare"},
    )
    try:
        yield agree(output, source, append=append)
    except BaseException:
        if alone and not claims.others_at_work(output) and not count_records(output):
            job_folder.let_go(output, LISTING, _PART_REPORT)
        raise


def part_names(source: ImageSource) -> list[str]:
    """Returns the names of the parts' folders in the output."""
    return [f"{number:06}" for number in range(len(source.parts))]


class PartReport(NamedTuple):
    """Counts of a part.

    Attributes:
      records: images that became one.
      skipped: images that did not.
    """

    records: int
    skipped: int


class PartWriter:
    """Decodes, encodes and writes parts of a source.

    Args:
      source: with the parts of the job.
      output: the folder of the job.
      threads: that decode.
      progress: shows the images that are encoded.
    """

    def __init__(
        self,
        source: ImageSource,
        towers: Sequence[DeviceTowers],
        output: Path,
        options: PrepareOptions,
        *,
        threads: int,
        progress: bool = False,
    ):
        self._source, self._towers, self._options = _Counted(source), towers, options
        self._folders = [output / name for name in part_names(source)]
        self._threads, self._progress = threads, progress
        self._images = 0  # that the progress line counts

    def write(self, parts: Iterable[int]) -> Iterator[tuple[int, PartReport]]:
        """Writes parts, and yields the number and the counts of each once it is done.

        Args:
          parts: asked for the next one while some of those before are still at work.
        """
        threads, options = self._threads, self._options
        with (
            ThreadPoolExecutor(threads) as decoders,
            ThreadPoolExecutor(len(self._towers)) as encoders,
            tqdm.tqdm(
                desc="encoding", unit=" images", initial=self._images, disable=not self._progress
            ) as bar,
        ):
            ahead = 2 * threads + options.batch
            decoded = decode_parts(self._source, parts, options, decoders, ahead=ahead)
            encoded = encode_parts(decoded, self._towers, options, encoders)
            for number, items in itertools.groupby(encoded, key=lambda item: item[0]):
                yield number, self._write_part(number, (item for _, item in items), bar)
            self._images = bar.n

    def _write_part(
        self, number: int, items: Iterable[Record | SkippedImage | None], bar: tqdm.tqdm
    ) -> PartReport:
        folder, columns = self._folders[number], self._options.columns
        skipped, shapes, count = [], {}, 0
        with (
            # Another process may write the same part, if it took this one for gone.
            atomic_folder(folder, keep=folder.exists) as partial,
            MdsWriter(partial, columns, size_limit=_SHARD_BYTES) as writer,
        ):
            for item in items:
                if isinstance(item, SkippedImage):
                    skipped.append(item._asdict())
                elif item is not None:
                    shapes = {k: v.shape for k, v in item.items() if isinstance(v, np.ndarray)}
                    writer.write({k: v.tobytes() if k in shapes else v for k, v in item.items()})
                    count += 1
                    bar.update()
            # Nothing vanishes uncounted: what the source gave is a record or has a reason
            seen = self._source.seen[number]
            if count + len(skipped) != seen:
                raise RuntimeError(
                    f"{seen} images of {folder.name} became {count} records, {len(skipped)} skipped"
                )
            report = {"records": count, "shapes": shapes, "skipped": skipped}
            write_text(partial / _PART_REPORT, json.dumps(report))
        return PartReport(count, len(skipped))


class _Counted(ChosenParts):
    """A source that counts the images which it gives.

    Attributes:
      seen: number of images by part.
    """

    def __init__(self, source: ImageSource):
        super().__init__(source, range(len(source.parts)))
        self.seen: collections.Counter[int] = collections.Counter()

    def read(self, part: int) -> Iterator[SourceImage]:
        """Yields the images of one part."""
        self.seen[part] = 0
        for image in super().read(part):
            self.seen[part] += 1
            yield image


def _json_line(value: dict[str, Any]) -> str:
    """Returns JSON that a terminal shows as it is: names as they are, but no hidden effects."""
    text = json.dumps(value, ensure_ascii=False)
    shown = (c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return (text if text.isprintable() else "".join(shown)) + "\n"


def finish(
    output: Path, source: ImageSource, towers: DeviceTowers, bucket: BucketParts | None = None
) -> None:
    """Merges the parts; every process that finds them all done writes the same.

    Raises:
      UserError: no usable image in any part.
    """
    claims.remove_leftovers(output, bucket)
    folders = [output / name for name in part_names(source)]
    reasons: collections.Counter = collections.Counter()
    lines, shapes, count = [], {}, 0
    for folder, part in zip(folders, source.parts, strict=True):
        report = read_json(folder / _PART_REPORT, _MAX_REPORT)
        count += report["records"]
        shapes = report["shapes"] or shapes
        for entry in report["skipped"]:
            reasons[entry["reason"]] += 1
            lines.append(_json_line({"part": part, **entry}))
    write_text(output / SKIPPED, "".join(lines))
    if not count:
        raise UserError(
            f"expected usable images, found {len(lines)} that are not, such as: "
            f"{', '.join(f'{visible(reason)} ({n})' for reason, n in reasons.most_common(3))}; see "
            f"{output / SKIPPED}"
        )
    info = LatentInfo(
        towers.codec.name,
        towers.text_encoder.name,
        {
            int(name.removeprefix("latents_")): tuple(shape)
            for name, shape in shapes.items()
            if name.startswith("latents_")
        },
        tuple(shapes["caption_latents"]) if "caption_latents" in shapes else None,
        shapes["caption_tokens"][0] if "caption_tokens" in shapes else None,
        towers.scaling_factor,
        source.attribution,
    )
    report = {
        "records": count,
        "skipped": len(lines),
        "reasons": dict(sorted(reasons.items())),
        "parts": len(folders),
        "attribution": source.attribution,
    }
    write_text(output / SIDECAR, info.to_json())
    write_text(output / REPORT, json.dumps(report, indent=2) + "\n")
    merge_index(output)


def count_records(output: Path) -> int:
    """Counts the records in the finished parts of an output, by any process."""
    reports = output.glob(f"[0-9]*[0-9]/{_PART_REPORT}")
    return sum(read_json(path, _MAX_REPORT)["records"] for path in reports)

"""Prepares a dataset: decodes, encodes and writes the images of a source, part by part.

Every part of the source makes a folder of its own, and a record depends on its own image alone, so
the output is the same for any number of processes and devices and however often the job was killed.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.errors import UserError, visible
from microdit_jax.files import atomic_folder, read_json, write_text
from microdit_jax.prepare import job_folder
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
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    append: bool = False,
    progress: bool = True,
) -> bool:
    """Writes an MDS dataset of latents; the same call again goes on where it was.

    Args:
      towers: the same ones on each device that is to work.
      output: a folder that all processes share. At the end it holds index.json, latents.json,
        report.json (counts), skipped.jsonl (ids and reasons), and a folder for each part.
      request: what else decides the output (the source's options), kept in job.json.
      process_index, process_count: this process takes every process_count-th part.
      threads: that decode.
      append: new parts are made of what the source has more than when the job began.
    Returns:
      True if the output is complete; False while other processes still work.
    Raises:
      UserError: another job's folder, a source that changed, a full disk, or no usable image.
    """
    job_folder.check_counts(process_index, process_count, threads=threads)
    codec, text_encoder = towers[0].codec, towers[0].text_encoder
    job_folder.begin(
        output,
        request
        | dataclasses.asdict(options)
        | {"vae": codec.name, "text_encoder": text_encoder.name}
        | {"job": "prepare"},
    )
    with _let_go_unless_begun(output, alone=process_count == 1):
        source = agree(output, source, append=append)
        return _run_parts(
            source,
            towers,
            output,
            options,
            own=range(process_index, len(source.parts), process_count),
            threads=threads,
            progress=progress,
        )


def _run_parts(
    source: ImageSource,
    towers: Sequence[DeviceTowers],
    output: Path,
    options: PrepareOptions,
    *,
    own: range,
    threads: int,
    progress: bool,
) -> bool:
    source = _Counted(source)
    folders = [output / f"{number:06}" for number in range(len(source.parts))]
    own_parts = [number for number in own if not folders[number].exists()]
    with (
        ThreadPoolExecutor(threads) as decoders,
        ThreadPoolExecutor(len(towers)) as encoders,
        tqdm.tqdm(desc="encoding", unit=" images", disable=not progress) as bar,
    ):
        ahead = 2 * threads + options.batch
        decoded = decode_parts(source, own_parts, options, decoders, ahead=ahead)
        encoded = encode_parts(decoded, towers, options, encoders)
        for number, items in itertools.groupby(encoded, key=lambda item: item[0]):
            seen = functools.partial(source.seen.__getitem__, number)
            _write_part(folders[number], (item for _, item in items), options, bar, seen)
    complete = all(folder.exists() for folder in folders)
    if complete:
        _finish(output, folders, source, towers[0])
    return complete


def _write_part(
    folder: Path,
    items: Iterable[Record | SkippedImage | None],
    options: PrepareOptions,
    bar: tqdm.tqdm,
    seen: Callable[[], int],
) -> None:
    skipped, shapes, count = [], {}, 0
    with (
        atomic_folder(folder) as partial,
        MdsWriter(partial, options.columns, size_limit=_SHARD_BYTES) as writer,
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
        if count + len(skipped) != seen():
            raise RuntimeError(
                f"{seen()} images of {folder.name} became {count} records, {len(skipped)} skipped"
            )
        report = {"records": count, "shapes": shapes, "skipped": skipped}
        write_text(partial / _PART_REPORT, json.dumps(report))


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


@contextlib.contextmanager
def _let_go_unless_begun(output: Path, *, alone: bool) -> Iterator[None]:
    """Frees the folder of a run that fails without a record, for other settings or sources.

    Args:
      alone: no other process may be at work there.
    """
    try:
        yield
    except BaseException:
        if alone and not count_records(output):
            job_folder.let_go(output, LISTING, _PART_REPORT)
        raise


def _json_line(value: dict[str, Any]) -> str:
    """Returns JSON that a terminal shows as it is: names as they are, but no hidden effects."""
    text = json.dumps(value, ensure_ascii=False)
    shown = (c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return (text if text.isprintable() else "".join(shown)) + "\n"


def _finish(
    output: Path, folders: Sequence[Path], source: ImageSource, towers: DeviceTowers
) -> None:
    """Merges the parts; every process that finds them all done writes the same."""
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

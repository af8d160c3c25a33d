"""Pictures of a source to shards of latents: decode, encode, write, part by part.

Every record depends on its own picture, caption and id alone, and every part of the source makes
a folder of its own, so the output is the same for any number of processes and devices and however
often the job was killed. The VAE and the text tower are handed in.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Float32

from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_folder, write_text
from microdit_jax.prepare import cropping, parts
from microdit_jax.prepare.decoding import Prepared, Settings, prepare
from microdit_jax.prepare.mds_writer import MdsWriter, merge_index
from microdit_jax.prepare.sources.pictures import Pictures

REPORT, SKIPPED = "report.json", "skipped.jsonl"
_PART_REPORT = "part.json"
_SHARD_BYTES = 1 << 28


class Towers(NamedTuple):
    """A VAE and a text tower on one device.

    encode: pictures (n, side, side, 3) in [-1, 1] and their ids -> latents (n, h, w, c), sampled
      and multiplied by scaling_factor.
    embed: texts -> embeddings (n, l, width). tokenize: texts -> ids (n, l) int32.
    """

    vae: str
    text_encoder: str
    scaling_factor: float
    encode: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    embed: Callable[[Sequence[str]], np.ndarray]
    tokenize: Callable[[Sequence[str]], np.ndarray]


def noise(seed: int, id: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Standard normal numbers that depend on these arguments alone, to sample a latent with."""
    digest = hashlib.sha256(f"{seed}/{shape}/{id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal(shape, np.float32)


def run(
    source: Pictures,
    towers: Sequence[Towers],
    output: Path,
    settings: Settings,
    *,
    request: dict[str, Any],
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
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
    Returns:
      whether the output is complete; not so while other processes still work.
    Raises:
      UserError: another job's folder, a full disk, or no usable picture at all.
    """
    parts.check_counts(process_index, process_count, threads=threads)
    made_by = towers[0]
    parts.begin(
        output,
        request
        | dataclasses.asdict(settings)
        | {"vae": made_by.vae, "text_encoder": made_by.text_encoder}
        | {"job": "precompute", "parts": len(source.parts), "first_part": source.parts[0]},
    )
    folders = [output / f"{number:06}" for number in range(len(source.parts))]
    mine = [
        number
        for number in range(process_index, len(folders), process_count)
        if not folders[number].exists()
    ]
    with (
        ThreadPoolExecutor(threads) as decoders,
        ThreadPoolExecutor(len(towers)) as encoders,
        tqdm.tqdm(desc="encoding", unit=" pictures", disable=not progress) as bar,
    ):
        prepared = prepare(source, mine, settings, decoders, ahead=2 * threads + settings.batch)
        encoded = _encode(prepared, towers, settings, encoders)
        for number, records in itertools.groupby(encoded, key=lambda item: item[0]):
            _write_part(folders[number], (record for _, record in records), settings, bar)
    complete = all(folder.exists() for folder in folders)
    if complete:
        _finish(output, folders, source, made_by)
    return complete


def _encode(
    prepared: Iterator[tuple[int, Prepared | None]],
    towers: Sequence[Towers],
    settings: Settings,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records {column: value}, or {"id", "reason"}, or {} at a part's end, in order."""
    free = collections.deque(towers)  # as many as threads in the pool, so one is always free
    waiting: collections.deque = collections.deque()

    def work(number: int, batch: list[Prepared]) -> tuple[int, list[dict[str, Any]]]:
        chosen = free.popleft()
        try:
            return number, _encode_batch(chosen, batch, settings)
        finally:
            free.append(chosen)

    def batches() -> Iterator[tuple[int, list[Prepared], list[dict[str, Any]]]]:
        """Full batches of one part, the last of a part smaller, with what was left out beside."""
        batch, left_out = [], []
        for number, item in prepared:
            if item is not None and item.reason is not None:
                left_out.append({"id": item.id, "reason": item.reason})
            elif item is not None:
                batch.append(item)
            if item is None or len(batch) == settings.batch:
                yield number, batch, [*left_out, *([{}] if item is None else [])]
                batch, left_out = [], []

    for number, batch, others in batches():
        waiting.append((pool.submit(work, number, batch), others))
        while len(waiting) > 2 * len(towers):
            yield from _in_order(*waiting.popleft())
    while waiting:
        yield from _in_order(*waiting.popleft())


def _in_order(future, others) -> Iterator[tuple[int, dict[str, Any]]]:
    number, records = future.result()
    for record in (*records, *others):
        yield number, record


def _encode_batch(
    towers: Towers, batch: list[Prepared], settings: Settings
) -> list[dict[str, Any]]:
    """The columns of each record of a batch."""
    if not batch:
        return []
    # The last batch of a part is filled up, so that every batch runs the same program
    filled = batch + batch[-1:] * (settings.batch - len(batch))
    ids, texts = [item.id for item in filled], [item.caption for item in filled]
    columns: dict[str, np.ndarray] = {}
    for i, side in enumerate(settings.resolutions):
        squares = cropping.to_float(np.stack([item.squares[i] for item in filled]))
        latents = towers.encode(squares, ids).astype(np.float16)
        columns[f"latents_{side}"] = np.moveaxis(latents, -1, 1)  # n c h w
    if settings.caption_store != "tokens":
        columns["caption_latents"] = towers.embed(texts).astype(np.float16)
    if settings.caption_store != "embeddings":
        columns["caption_tokens"] = towers.tokenize(texts).astype(np.int32)
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"expected {name} that float16 can hold, found NaN or infinity near {ids[0]}; use "
                "--dtype=float32, or check the towers' weights"
            )
    return [
        {"id": item.id, "caption": item.caption}
        | {name: np.ascontiguousarray(values[row]) for name, values in columns.items()}
        for row, item in enumerate(batch)
    ]


def _write_part(
    folder: Path, records: Iterator[dict[str, Any]], settings: Settings, bar: tqdm.tqdm
) -> None:
    columns = {"id": "str", "caption": "str"}
    columns |= {f"latents_{side}": "bytes" for side in settings.resolutions}
    columns |= {"caption_latents": "bytes"} if settings.caption_store != "tokens" else {}
    columns |= {"caption_tokens": "bytes"} if settings.caption_store != "embeddings" else {}
    left_out, shapes, count = [], {}, 0
    with (
        atomic_folder(folder) as partial,
        MdsWriter(partial, columns, size_limit=_SHARD_BYTES) as writer,
    ):
        for record in records:
            if "reason" in record:
                left_out.append(record)
            elif record:
                shapes = {k: v.shape for k, v in record.items() if isinstance(v, np.ndarray)}
                writer.write({k: v.tobytes() if k in shapes else v for k, v in record.items()})
                count += 1
                bar.update()
        report = {"records": count, "shapes": shapes, "skipped": left_out}
        write_text(partial / _PART_REPORT, json.dumps(report))


def _finish(output: Path, folders: Sequence[Path], source: Pictures, made_by: Towers) -> None:
    """Merges the parts; every process that finds them all done writes the same."""
    reasons: collections.Counter = collections.Counter()
    lines, shapes, count = [], {}, 0
    for folder, part in zip(folders, source.parts, strict=True):
        report = json.loads((folder / _PART_REPORT).read_text())
        count += report["records"]
        shapes = report["shapes"] or shapes
        for entry in report["skipped"]:
            reasons[entry["reason"]] += 1
            lines.append(json.dumps({"part": part, **entry}, ensure_ascii=False) + "\n")
    write_text(output / SKIPPED, "".join(lines))
    if not count:
        raise UserError(
            f"expected usable pictures, found {len(lines)} that are not, such as: "
            f"{', '.join(f'{reason} ({n})' for reason, n in reasons.most_common(3))}; see "
            f"{output / SKIPPED}"
        )
    info = LatentInfo(
        made_by.vae,
        made_by.text_encoder,
        {
            int(name.removeprefix("latents_")): tuple(shape)
            for name, shape in shapes.items()
            if name.startswith("latents_")
        },
        tuple(shapes["caption_latents"]) if "caption_latents" in shapes else None,
        shapes["caption_tokens"][0] if "caption_tokens" in shapes else None,
        made_by.scaling_factor,
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
    """Records in the finished parts of an output, by any process."""
    reports = output.glob(f"[0-9]*[0-9]/{_PART_REPORT}")
    return sum(json.loads(path.read_text())["records"] for path in reports)

"""Draws a set of pictures in chunks that survive a kill, and keeps what scores are computed from.

A set is a folder: features/NNNNNN.npz holds the features of one chunk of pictures, written whole
or not at all, and beside it images/ or GenEval's folders where pictures are kept. Every picture is
a function of the weights, its prompt, the seed and its index, so a chunk that is missing is drawn
again as it was, on whatever devices there are now.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import UInt8

from microdit_jax.errors import UserError
from microdit_jax.evaluate.prompts import PromptSet
from microdit_jax.files import write_text
from microdit_jax.images import is_made_so, read_png, save_png, to_uint8
from microdit_jax.machine import hosts
from microdit_jax.metrics.statistics import read_npz, write_npz
from microdit_jax.noise import initial_noise
from microdit_jax.sampling.pipeline import LatentDiffusion

COUNT = "count"  # of pictures, in a chunk's file beside what was measured
DRAWING_SECONDS = 7 * 86400.0  # how long a process waits for the others

# From pictures of bytes and their texts to something with a row for each.
Measure = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


class Settings(NamedTuple):
    """How a set is drawn; `asked` is what else must be the same for two sets to be one."""

    seed: int
    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    asked: dict[str, Any]

    def request(self, prompts: PromptSet) -> dict[str, Any]:
        """All that the pictures are a function of; not the batch, which changes only rounding."""
        return self.asked | {
            "prompts": prompts.digest,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
        }


def draw_set(
    pipe: LatentDiffusion,
    prompts: PromptSet,
    settings: Settings,
    folder: Path,
    measures: Mapping[str, Measure],
    *,
    chunk_size: int,
    picture_path: Callable[[int], Path] | None = None,
) -> dict[str, np.ndarray]:
    """Draws and measures what is not there yet; the same call again resumes.

    With several processes, each takes every n-th chunk; the folder must be one they share.

    Args:
      measures: by name; what they give is kept, the pictures only with `picture_path`.
      chunk_size: pictures drawn and measured at a time; a kill costs at most that many.
      picture_path: where the i-th picture is kept as a PNG; None keeps none.
    Returns:
      For each measure its rows for all pictures, in the prompts' order.
    Raises:
      UserError: the folder holds another set.
    """
    request = settings.request(prompts)
    hosts.from_first("open the set", lambda: _open(folder, request))
    starts = range(0, len(prompts.texts), chunk_size)
    counts = {start: len(prompts.texts[start : start + chunk_size]) for start in starts}
    # One list for all: a process that comes later would find some of it drawn already.
    missing = hosts.from_first(
        "see what is drawn",
        lambda: [
            s for s, n in counts.items() if not _is_done(folder, s, n, measures, picture_path)
        ],
    )
    done = len(prompts.texts) - sum(counts[start] for start in missing)
    if done:
        print(f"{folder}: {done} of {len(prompts.texts)} pictures are there already", flush=True)
    mine = missing[jax.process_index() :: jax.process_count()]
    with tqdm.tqdm(total=len(prompts.texts), initial=done, unit=" pictures") as bar:
        for start in mine:
            texts = prompts.texts[start : start + chunk_size]
            images = _kept(start, texts, request, picture_path)
            if images is None:
                images = to_uint8(_draw(pipe, texts, start, settings))
                _keep(images, start, texts, request, picture_path)
            arrays = {name: measure(list(images), texts) for name, measure in measures.items()}
            # What other metrics measured of these pictures stays.
            arrays = _read_chunk(folder, start, len(texts)) | arrays
            write_npz(_chunk(folder, start), arrays | {COUNT: np.array(len(texts))})
            bar.update(len(texts))
    hosts.barrier("draw all pictures", timeout_seconds=DRAWING_SECONDS)
    return _collect(folder, counts, measures)


def _draw(
    pipe: LatentDiffusion, texts: Sequence[str], first: int, settings: Settings
) -> np.ndarray:
    """Pictures `first`, `first` + 1, ... of the set, in [0, 1]."""
    cfg = pipe.model.config
    size = (cfg.input_size, cfg.input_size, cfg.in_channels)
    noise = initial_noise("jax", settings.seed, len(texts), *size, first=first)
    latents = pipe.denoise(
        pipe.encode(texts),
        noise,
        guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps,
        batch_size=settings.batch_size,
    )
    return pipe.decode(latents)


def _open(folder: Path, request: dict[str, Any]) -> None:
    """Writes what the folder is for, or checks that it is for this."""
    path = folder / "request.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = {}
        differing = [k for k in {**found, **request} if found.get(k) != request.get(k)]
        if differing:
            raise UserError(
                f"expected {folder} to hold pictures of this model and these prompts, found others "
                f"(differing: {', '.join(sorted(differing))}); choose another --out or remove it"
            )
        return
    write_text(path, json.dumps(request, indent=1) + "\n")


def _chunk(folder: Path, start: int) -> Path:
    return folder / "features" / f"{start:06d}.npz"


def _read_chunk(folder: Path, start: int, count: int) -> dict[str, np.ndarray]:
    """What is kept of `count` pictures; nothing where the file is none, damaged or of others."""
    try:
        arrays = read_npz(_chunk(folder, start))
    except (OSError, ValueError):
        return {}
    return arrays if arrays.get(COUNT) == count else {}


def _is_done(folder, start, count, measures, picture_path) -> bool:
    if not {COUNT, *measures} <= _read_chunk(folder, start, count).keys():
        return False
    kept = range(start, start + count) if picture_path else ()
    return all(picture_path(i).is_file() for i in kept)


def _keep(images, start, texts, request, picture_path) -> None:
    for i, (image, text) in enumerate(zip(images, texts, strict=True), start):
        if picture_path:
            save_png(picture_path(i), image / np.float32(255), _settings(request, text, i))


def _kept(start, texts, request, picture_path) -> UInt8[np.ndarray, "n H W 3"] | None:
    """The chunk's pictures, if all of them were kept."""
    if not picture_path:
        return None
    paths = [picture_path(start + i) for i in range(len(texts))]
    for i, (path, text) in enumerate(zip(paths, texts, strict=True), start):
        if not is_made_so(path, _settings(request, text, i)):
            return None
    return to_uint8(np.stack([read_png(path) for path in paths]))


def _settings(request: dict[str, Any], prompt: str, index: int) -> dict[str, Any]:
    """What a kept PNG says of itself."""
    return request | {"prompt": prompt, "index": index}


def _collect(folder, counts, measures) -> dict[str, np.ndarray]:
    rows: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for start, count in counts.items():
        arrays = _read_chunk(folder, start, count)
        for name in measures:
            if name not in arrays:
                raise UserError(
                    f"expected {name} in {_chunk(folder, start)}, found none; run the same command "
                    "again"
                )
            rows[name].append(arrays[name])
    found = {name: np.concatenate(parts) for name, parts in rows.items()}
    for name, values in found.items():
        if len(values) != sum(counts.values()):
            raise UserError(
                f"expected {sum(counts.values())} rows of {name} in {folder}, found {len(values)}"
            )
    return found


def weights_digest(params: Any) -> str:
    """sha256 over the names and values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()

"""A set of samples in a folder, made and measured in chunks that survive a kill.

The folder holds features/NNNNNN.npz, what was measured of one chunk of images, and beside it
images/ or GenEval's folders where images are kept. Every image is a function of the weights, its
prompt, the seed and its index, so a chunk that is missing is sampled again as it was, on whatever
devices there are now.
"""

import dataclasses
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
from microdit_jax.files import read_json, read_npz, write_text
from microdit_jax.images import is_made_so, read_png, save_png, to_uint8
from microdit_jax.machine import hosts
from microdit_jax.metrics.statistics import write_npz
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.settings import Sampler

COUNT = "count"  # images of a chunk, in its file beside what was measured
SAMPLING_SECONDS = 7 * 86400.0  # how long a process waits for the others

# From uint8 images and their prompts to an array with a row for each
Measure = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Seed and settings that the images of a set are sampled with."""

    seed: int
    sampler: Sampler
    batch_size: int


class Chunk(NamedTuple):
    """Consecutive images of a set, sampled and measured together."""

    start: int
    prompts: list[str]

    @property
    def indices(self) -> range:
        """Indices of the images in the set."""
        return range(self.start, self.start + len(self.prompts))


class SampleSet:
    """One image for each prompt; resumes where an earlier process of the same set stopped.

    With several processes, each takes every n-th chunk; the folder must be one they share.

    Args:
      made_by: what the images are a function of beside prompts and sampler, by name: weights,
        network, towers.
      chunk_size: images sampled and measured at a time; a kill costs at most that many.
      image_path: (folder, i) -> where the i-th image is kept as a PNG; None keeps none.
    """

    def __init__(
        self,
        pipe: LatentDiffusion,
        prompts: PromptSet,
        sampler: SamplerSettings,
        folder: Path,
        *,
        made_by: Mapping[str, Any],
        chunk_size: int,
        image_path: Callable[[Path, int], Path] | None = None,
    ):
        self._pipe, self._sampler, self._folder = pipe, sampler, folder
        self._image_path, texts = image_path, prompts.texts
        self._chunks = [
            Chunk(start, texts[start : start + chunk_size])
            for start in range(0, len(texts), chunk_size)
        ]
        self._count = len(texts)
        # Not the batch size, which changes only rounding
        self._identity = dict(made_by) | {
            "prompts": prompts.digest,
            "seed": sampler.seed,
            # As JSON, which has no tuples: it is compared with what the folder says.
            **json.loads(json.dumps(dataclasses.asdict(sampler.sampler))),
        }

    def measure(self, measures: Mapping[str, Measure]) -> dict[str, np.ndarray]:
        """Samples and measures what is missing; all processes call it.

        Args:
          measures: by name; their results are kept, the images only with `image_path`.
        Returns:
          The rows of each measure for all images, in the prompts' order.
        Raises:
          UserError: the folder holds another set.
        """
        hosts.from_first("open the set", self._open)
        # Process 0 decides what is missing: a process that looked later would count chunks that
        # another one has finished meanwhile, and take a different share.
        missing = hosts.from_first(
            "list missing chunks",
            lambda: [c.start for c in self._chunks if not self._is_done(c, measures)],
        )
        mine = set(missing[jax.process_index() :: jax.process_count()])
        done = sum(len(c.prompts) for c in self._chunks if c.start not in missing)
        if done:
            print(f"{self._folder}: {done} of {self._count} images are there already", flush=True)
        with tqdm.tqdm(total=self._count, initial=done, unit=" images") as bar:
            for chunk in self._chunks:
                if chunk.start in mine:
                    self._measure_chunk(chunk, measures)
                    bar.update(len(chunk.prompts))
        hosts.barrier("sample all images", timeout_seconds=SAMPLING_SECONDS)
        return self._collect(measures)

    # ---------------------------------------------------------------- one chunk
    def _measure_chunk(self, chunk: Chunk, measures: Mapping[str, Measure]) -> None:
        images = self._kept_images(chunk)
        if images is None:
            images = self._sample(chunk)
            self._keep_images(chunk, images)
        arrays = {name: run(list(images), chunk.prompts) for name, run in measures.items()}
        # What other metrics measured of these images stays.
        arrays = self._read(chunk) | arrays | {COUNT: np.array(len(chunk.prompts))}
        write_npz(self._file(chunk), arrays)

    def _sample(self, chunk: Chunk) -> UInt8[np.ndarray, "n H W 3"]:
        batches = self._pipe.sample(
            chunk.prompts,
            seed=self._sampler.seed,
            indices=chunk.indices,
            batch_size=self._sampler.batch_size,
            **dataclasses.asdict(self._sampler.sampler),
        )
        return to_uint8(np.concatenate([batch.images for batch in batches]))

    def _kept_images(self, chunk: Chunk) -> UInt8[np.ndarray, "n H W 3"] | None:
        """Reads the chunk's images, None unless all of them were kept."""
        if self._image_path is None:
            return None
        paths = [self._image_path(self._folder, i) for i in chunk.indices]
        settings = self._png_settings(chunk)
        if not all(is_made_so(path, made) for path, made in zip(paths, settings, strict=True)):
            return None
        return to_uint8(np.stack([read_png(path) for path in paths]))

    def _keep_images(self, chunk: Chunk, images: UInt8[np.ndarray, "n H W 3"]) -> None:
        if self._image_path is None:
            return
        settings = self._png_settings(chunk)
        for i, image, made in zip(chunk.indices, images, settings, strict=True):
            save_png(self._image_path(self._folder, i), image / np.float32(255), made)

    def _png_settings(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Returns what each kept PNG says of how it was made."""
        return [
            self._identity | {"prompt": prompt, "index": i}
            for i, prompt in zip(chunk.indices, chunk.prompts, strict=True)
        ]

    # ---------------------------------------------------------------- the folder
    def _open(self) -> None:
        """Writes which set the folder holds, or checks that it is this one."""
        path = self._folder / "request.json"
        if not path.exists():
            write_text(path, json.dumps(self._identity, indent=1) + "\n")
            return
        try:
            found = read_json(path)
        except ValueError:
            found = {}
        names = {**found, **self._identity}
        if differing := [k for k in names if found.get(k) != self._identity.get(k)]:
            raise UserError(
                f"expected {self._folder} to hold images of this model and these prompts, found "
                f"others (differing: {', '.join(sorted(differing))}); choose another --out or "
                "remove it"
            )

    def _file(self, chunk: Chunk) -> Path:
        return self._folder / "features" / f"{chunk.start:06d}.npz"

    def _read(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """Reads what is kept of a chunk; {} if its file is missing, damaged or of another size."""
        try:
            arrays = read_npz(self._file(chunk))
        except (OSError, ValueError):
            return {}
        return arrays if arrays.get(COUNT) == len(chunk.prompts) else {}

    def _is_done(self, chunk: Chunk, measures: Mapping[str, Measure]) -> bool:
        if not {COUNT, *measures} <= self._read(chunk).keys():
            return False
        path = self._image_path
        return path is None or all(path(self._folder, i).is_file() for i in chunk.indices)

    def _collect(self, measures: Mapping[str, Measure]) -> dict[str, np.ndarray]:
        rows: dict[str, list[np.ndarray]] = {name: [] for name in measures}
        for chunk in self._chunks:
            arrays = self._read(chunk)
            for name in measures:
                if name not in arrays or len(arrays[name]) != len(chunk.prompts):
                    raise UserError(
                        f"expected {len(chunk.prompts)} rows of {name} in {self._file(chunk)}, "
                        f"found {len(arrays.get(name, ()))}; run the same command again"
                    )
                rows[name].append(arrays[name])
        return {name: np.concatenate(parts) for name, parts in rows.items()}

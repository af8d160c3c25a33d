"""Small datasets of latents on disk, in both formats, and every byte of a folder."""

import numpy as np

from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.prepare import arrayrecord_writer
from microdit_jax.prepare.mds_writer import MdsWriter

VAE, TEXT_ENCODER = "sdxl", "clip"
INFO = LatentInfo(VAE, TEXT_ENCODER, {256: (4, 32, 32), 512: (4, 64, 64)}, (7, 6), 7, 0.13, "CC-BY")
COLUMNS = {
    "caption": "str", "id": "str", "caption_latents": "bytes", "caption_tokens": "bytes",
    "latents_256": "bytes", "latents_512": "bytes",
}  # fmt: skip


def arrays(index, info=INFO):
    rng = np.random.default_rng(index)
    made = {f"latents_{s}": rng.normal(size=shape) for s, shape in info.latents.items()}
    made["caption_latents"] = rng.normal(size=info.captions)
    return {k: v.astype(np.float16) for k, v in made.items()} | {
        "caption_tokens": rng.integers(0, 49408, info.tokens, np.int32)
    }


def sample(index):
    raw = {name: value.tobytes() for name, value in arrays(index).items()}
    return {"caption": f"naïve {index}".encode(), "id": f"a/{index}".encode(), **raw}


def write_mds(folder, count=6, columns=COLUMNS, info=INFO, changes=None):
    with MdsWriter(folder, columns, size_limit=100_000) as writer:
        for i in range(count):
            made = sample(i) | ((changes or {}).get(i) or {})
            writer.write({name: made[name] for name in columns})
    if info is not None:
        (folder / SIDECAR).write_text(info.to_json())
    return folder


def write_array_record(folder, count=6):
    folder.mkdir()
    half = count // 2
    for n in range(2):
        samples = map(sample, range(n * half, n * half + half))
        arrayrecord_writer.write_shard(arrayrecord_writer.shard_path(folder, n, 2), samples)
    arrayrecord_writer.write_metadata(folder, INFO, [half, half])
    return folder


def contents(folder):
    """Every file's bytes by its name, without the job's own settings."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "job.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

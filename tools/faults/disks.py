"""Rows of disks: full, read-only, not shared, moved; and of datasets in many files."""

import contextlib
import pathlib
import subprocess
import sys

from tools.faults.hosts import ROOT, Job, run
from tools.faults.rows import NOTHING, row


def lost(job: Job) -> str:
    return f"{max(0, job.step() - job.saved())} steps since step {job.saved()}"


def full(job: Job, where: str) -> str:
    """A small disk under a part of the workdir, or under the whole, is filled up."""
    disk = job.workdir / where
    disk.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=24m", "none", disk)
    try:
        job.begin(30)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**14))
        job.fault()
        job.finish()
        (disk / "filler").unlink()
        return lost(job)
    finally:
        run("umount", "-l", disk)


@row("full disk: workdir")
def full_workdir(job: Job) -> str:
    return full(job, ".")


@row("full disk: checkpoints")
def full_checkpoints(job: Job) -> str:
    return full(job, "checkpoints")


# Of a network whose weights are large enough to be divided, so that host b writes some of them.
WIDE = ["--config.mesh.fsdp=4", "--config.model.options.dim=256"]


@row("full disk on host b alone", flags=WIDE)
def full_on_b(job: Job) -> str:
    """Puts a small disk over the folder of checkpoints, for what host b writes there."""
    folder, small = job.workdir / "checkpoints", job.folder / "small"
    folder.mkdir(parents=True)
    small.mkdir()
    layers = f"lowerdir={folder},upperdir={small}/upper,workdir={small}/work"
    mount = (
        f"mount -t tmpfs -o size=100k none {small}; mkdir {small}/upper {small}/work; "
        f"mount -t overlay -o {layers} overlay {folder};"
    )
    job.start(0)
    job.start(1, mount=mount)
    job.wait_for_save()
    job.fault()
    job.finish()
    return lost(job)


@row("workdir becomes read-only")
def read_only(job: Job) -> str:
    """Tells ext4 on a disk of its own that the disk has failed: it refuses writes from then on."""
    image = job.folder / "disk"
    run("truncate", "--size=64M", image)
    run("mkfs.ext4", "-q", image)
    job.workdir.mkdir()
    run("mount", "-o", "loop", image, job.workdir)
    try:
        job.begin(30)
        run("mount", "-o", "remount,abort", job.workdir)
        job.fault()
        job.finish()
        return lost(job)
    finally:
        run("umount", "-l", job.workdir)


@row("workdir unmounted")
def unmounted(job: Job) -> str:
    job.workdir.mkdir()
    run("mount", "-t", "tmpfs", "none", job.workdir)
    job.begin(30)
    job.unmount(job.workdir)
    job.fault()
    job.finish()
    found = sorted(path.name for path in job.workdir.iterdir())
    return f"in the empty folder under it: {found or 'nothing new'}"


@row("workdir moved")
def moved(job: Job) -> str:
    job.begin(30)
    job.workdir.rename(job.folder / "elsewhere")
    job.fault()
    job.finish()
    return f"at the old place: {'made anew' if job.workdir.exists() else 'nothing new'}"


@row("disk that is not shared")
def unshared(job: Job) -> str:
    job.start(0)
    job.start(1, f"--workdir={job.folder}/other")
    job.wait_for_join()
    job.fault()
    job.finish()
    return NOTHING


# ------------------------------------------------------------------ many files
CONFIG = """
import runpy

def get_config(folder):
    config = runpy.run_path("tests/support/tiny_config.py")["get_config"](folder)
    config.data.vae = folder + "/codec"
    config.data.datasets = ({{"source": "latents", "folder": {folder!r}, "weight": 1.0}},)
    config.data.heldout.update(source="latents", folder={folder!r})
    return config
"""
PROGRAM = """
import pathlib, sys
import numpy as np
from microdit_jax.data.latents import load_prepared
from microdit_jax.data.records import SIDECAR, LatentInfo
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.prepare import arrayrecord_writer
from microdit_jax.prepare.mds_writer import MdsWriter

source = load_prepared(pathlib.Path(sys.argv[1]), PatchPCA.load)[0]
latents, captions = source.latents.transpose(0, 3, 1, 2), source.caption_latents
info = LatentInfo(source.vae, source.text_encoder, {32: latents.shape[1:]}, captions.shape[1:])
columns = dict.fromkeys(("latents_32", "caption_latents"), "bytes") | {"caption": "str"}
folder, count = pathlib.Path(sys.argv[2]), int(sys.argv[4])
samples = [
    {"latents_32": latents[i].astype(np.float16).tobytes(), "caption": b"an image", "id": b"%d" % i,
     "caption_latents": captions[i].astype(np.float16).tobytes()} for i in range(count)
]
if sys.argv[3] == "mds":
    with MdsWriter(folder, columns, size_limit=1) as writer:
        for sample in samples:
            writer.write({name: sample[name] for name in columns})
    (folder / SIDECAR).write_text(info.to_json())
else:
    folder.mkdir()
    for i, sample in enumerate(samples):
        arrayrecord_writer.write_shard(arrayrecord_writer.shard_path(folder, i, count), [sample])
    arrayrecord_writer.write_metadata(folder, info, [1] * count)
"""


def many_shards(job: Job, kind: str) -> None:
    shards, config = job.folder / "shards", job.folder / "shards_config.py"
    command = [sys.executable, "-c", PROGRAM, str(job.data), str(shards), kind, "1500"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    config.write_text(CONFIG.format(folder=str(shards)))
    job.config = pathlib.Path(config)
    job.start_both()
    job.wait_for_join()
    job.fault()


@row("1,500 one-record shards of MDS, ulimit -n 256", before=("ulimit -n 256;",) * 2, steps=200)
def many_mds(job: Job) -> str:
    many_shards(job, "mds")
    job.finish(900)
    return (
        f"nothing: all 200 steps of 8 records ({len(list(job.folder.glob('shards/*.mds')))} shards)"
    )


@row("1,500 one-record files of ArrayRecord, ulimit -n 256", before=("ulimit -n 256;",) * 2)
def many_array_records(job: Job) -> str:
    many_shards(job, "arrayrecord")
    job.finish()
    return NOTHING

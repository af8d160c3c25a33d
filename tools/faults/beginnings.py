"""Rows of jobs that cannot begin: hosts that differ, that do not come, or come twice."""

import functools
import json
import shutil
import time

from tools.faults.hosts import NAMES, ROOT, Job
from tools.faults.rows import NOTHING, ended_by_hand, goes_on, row


def differ(job: Job, *on_b: str, **how) -> str:
    job.start(0)
    job.start(1, *on_b, **how)
    job.wait_for_join()
    job.fault()
    job.finish()
    return NOTHING


DIFFERENCES = {
    "seed": "--config.seed=7", "learning rate": "--config.optim.learning_rate=1e-3",
    "batch": "--config.train.batch_size=16", "mesh": "--config.mesh.fsdp=2",
    "number of steps": "--config.train.steps=77", "network": "--config.model.options.depth=2",
}  # fmt: skip
for _what, _flag in DIFFERENCES.items():
    row(f"another {_what} on host b")(
        functools.partial(lambda job, flag: differ(job, flag), flag=_flag)
    )


@row("other code on host b")
def other_code(job: Job) -> str:
    copy = job.folder / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "golden")
    shutil.copytree(ROOT, copy, ignore=ignored)
    with (copy / "microdit_jax/diffusion.py").open("a") as file:
        file.write("# another line\n")
    return differ(job, package=copy)


@row("another version of jax on host b")
def other_jax(job: Job) -> str:
    about = job.folder / "site" / "jax-0.0.7.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.0.7\n")
    return differ(job, path=str(about.parent))


@row("other data on host b")
def other_data(job: Job) -> str:
    copy = job.folder / "data"
    shutil.copytree(job.data, copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["text_encoder"] = "table:width=256,tokens=16,seed=1"
    (copy / "meta.json").write_text(json.dumps(meta))
    return differ(job, mount=f"mount --bind {copy} {job.data};")


@row("another number of devices on host b")
def other_devices(job: Job) -> str:
    return differ(job, devices=1)


# ------------------------------------------------------------------ joining
@row("host b never comes", flags=["--join_timeout=15"])
def never_comes(job: Job) -> str:
    job.fault()
    job.start(0)
    job.finish()
    return NOTHING


@row("host b twice, a third one never", flags=["--join_timeout=60", "--num_processes=3"])
def same_number(job: Job) -> str:
    job.start(0)
    job.start(1)
    job.wait_for_call(2)
    job.fault()
    job.start(1)
    job.finish()
    return NOTHING


@row(
    "host b is killed while it waits for a third, and comes back",
    flags=["--num_processes=3", "--config.train.batch_size=12"],
)
def comes_back(job: Job) -> str:
    job.start(0)
    job.start(1)
    job.wait_for_call(2)
    job.processes.pop().kill()
    job.fault()
    job.start(1)
    time.sleep(5)
    job.start(0, "--process_id=2")
    job.wait_for_step(5)
    return ended_by_hand(job, "it began")


@row("host b is killed before it has joined, and comes back")
def killed_early(job: Job) -> str:
    job.start_both()
    time.sleep(3)
    job.processes.pop().kill()
    job.fault()
    job.start(1)
    job.wait_for_step(5)
    return ended_by_hand(job, "it began")


@row("host b is killed between calling and joining")
def between(job: Job) -> str:
    """Patches what joins, in host b alone."""
    site = job.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import jax, os, pathlib\n"
        "def die(*args, **more):\n"
        f"    pathlib.Path({str(job.folder / 'called')!r}).touch()\n"
        "    os.kill(os.getpid(), 9)\n"
        "jax.distributed.initialize = die\n"
    )
    job.start(0)
    job.start(1, path=str(site))
    job.wait((job.folder / "called").exists, "call")
    job.fault()
    job.finish()
    return NOTHING


@row("a second job on the workdir")
def second(job: Job) -> str:
    job.start_both()
    job.wait((job.workdir / ".lock").exists, "claim")
    other = Job(job.data, job.folder, job.port + 1, cache="second_")
    other.output = lambda number: job.folder / f"second_{NAMES[number]}.txt"  # type: ignore
    other.start_both()
    other.wait_for_join()
    other.fault()
    other.finish()
    went_on = all(process.poll() is None for process in job.processes)
    for process in job.processes:
        process.kill()
        process.wait()
    job.processes, job.ended, job.output = other.processes, other.ended, other.output
    return "nothing: the first went on" if went_on else "the first ended too"


@row("a job after both hosts were killed")
def again(job: Job) -> str:
    """Takes over what they have left in the workdir."""
    job.begin(30)
    for process in job.processes:
        process.kill()
        process.wait()
    job.processes, step = [], job.step()
    job.fault()
    job.start_both()
    job.wait(lambda: "resumed" in job.output(0).read_text(), "resumed run")
    job.wait(lambda: job.step() > step, "step", 300)
    return goes_on(job)

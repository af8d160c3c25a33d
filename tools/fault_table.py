"""Runs faults of a job of two hosts, one after another, and prints what became of each as a table.

Each host is a network namespace with an address and a name of its own, so only root can run this:

  python -m tools.fault_table --data=/tmp/faults/data [--rows=kill,link] [--out=table.md]

The data are made where there are none. A row takes one to three minutes, and no more than five.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tools.fault_hosts import ADDRESSES, NAMES, ROOT, Job, network, run

HEADER = (
    "| fault | seconds to the end, a / b | status, a / b | last line | what was lost |\n"
    "|---|---|---|---|---|"
)
Row = Callable[["Job"], str]
ROWS: dict[str, tuple[Row, dict]] = {}


def row(name: str, **settings) -> Callable[[Row], Row]:
    """Adds a function to the table: it causes the fault, and returns what it has found besides."""

    def add(function: Row) -> Row:
        ROWS[name] = function, settings
        return function

    return add


def shown(job: Job, name: str, found: str) -> str:
    cells = []
    for number, process in enumerate(job.processes):
        took = f"{job.ended[number]:.1f}" if number in job.ended else "not ended"
        cells += [took, str(process.returncode)]
    lines = dict.fromkeys(job.last_line(n).replace("|", "\\|")[:300] for n in range(2))
    line = "<br>".join(line.replace(str(job.folder), "") for line in lines)
    lost = found or f"{max(0, job.step() - job.saved())} steps since step {job.saved()}"
    return f"| {name} | {cells[0]} / {cells[2]} | {cells[1]} / {cells[3]} | {line} | {lost} |"


# ------------------------------------------------------------------ hosts that are gone
def kill(job: Job, number: int) -> str:
    job.begin(30)
    job.fault(number, kind=signal.SIGKILL)
    job.finish()
    return ""


def link_down(job: Job, seconds: float) -> str:
    job.begin(30)
    run("ip", "-n", "fault_b", "link", "set", "veth_b", "down")
    job.fault()
    job.look(seconds)
    run("ip", "-n", "fault_b", "link", "set", "veth_b", "up")
    return goes_on(job)


def stop(job: Job, number: int, seconds: float) -> str:
    job.begin(30)
    job.fault(number, kind=signal.SIGSTOP)
    job.look(seconds)
    job.processes[number].send_signal(signal.SIGCONT)
    return goes_on(job)


def goes_on(job: Job) -> str:
    """Waits for more steps, or for the end."""
    step = job.step()
    try:
        job.wait(lambda: job.step() > step + 5, "more steps", 60)
    except RuntimeError:
        job.finish(10)
        return ""
    if job.ended:
        job.finish(10)
        return ""
    took = time.monotonic() - job.began
    job.fault(0, kind=signal.SIGTERM)
    job.finish(30)
    return f"nothing: it went on ({took:.0f} s after the fault), until SIGTERM ended this row"


for _name, _number in (("a", 0), ("b", 1)):
    row(f"kill -9 of host {_name}")(functools.partial(kill, number=_number))
for _seconds in (5, 30, 200):
    row(f"link down for {_seconds} s")(functools.partial(link_down, seconds=_seconds))
for _seconds in (20, 60, 150):
    for _name, _number in (("a", 0), ("b", 1)):
        row(f"host {_name} stopped for {_seconds} s")(
            functools.partial(stop, number=_number, seconds=_seconds)
        )


# ------------------------------------------------------------------ SIGTERM
def terminate(job: Job, ready: Callable[[Job], None], times: int = 1) -> str:
    job.start_both()
    ready(job)
    for again in range(times):
        if again:
            time.sleep(0.3)
            job.processes[1].send_signal(signal.SIGTERM)
        else:
            job.fault(1, kind=signal.SIGTERM)
    job.finish()
    return ""


MOMENTS: dict[str, tuple[Callable[[Job], None], dict]] = {
    "at the start": (lambda job: time.sleep(4), {}),
    "while compiling": (lambda job: job.wait_for_text(0, "step 0 of"), {"compiling": True}),
    "in a step": (lambda job: job.wait_for_step(30), {}),
    "in a save": (lambda job: job.wait_for_save(), {}),
    "in an evaluation": (
        lambda job: (job.wait_for_step(20), time.sleep(2.0))[0],
        {"flags": ["--config.train.eval_every=20", "--config.eval.draws=2000"], "evaluating": True},
    ),
    "in the last step": (lambda job: job.wait_for_step(59), {"steps": 60}),
}
for _moment, (_ready, _settings) in MOMENTS.items():
    for _times, _word in ((1, ""), (2, ", twice")):
        row(f"SIGTERM on host b {_moment}{_word}", **_settings)(
            functools.partial(terminate, ready=_ready, times=_times)
        )


# ------------------------------------------------------------------ disks
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
        return f"{max(0, job.step() - job.saved())} steps since step {job.saved()}"
    finally:
        run("umount", "-l", disk)


row("full disk: workdir")(functools.partial(full, where="."))
row("full disk: checkpoints")(functools.partial(full, where="checkpoints"))


@row("full disk on host b alone", before=("", "ulimit -f 64;"))
def full_on_b(job: Job) -> str:
    job.start_both()
    job.wait_for_save()
    job.fault()
    job.finish()
    return ""


@row("workdir becomes read-only")
def read_only(job: Job) -> str:
    job.workdir.mkdir()
    run("mount", "-t", "tmpfs", "none", job.workdir)
    try:
        job.begin(30)
        run("mount", "-o", "remount,ro", job.workdir)
        job.fault()
        job.finish()
        return f"{max(0, job.step() - job.saved())} steps since step {job.saved()}"
    finally:
        run("umount", "-l", job.workdir)


@row("workdir moved")
def moved(job: Job) -> str:
    job.begin(30)
    job.workdir.rename(job.folder / "elsewhere")
    job.fault()
    job.finish()
    again = " and made anew" * job.workdir.exists()
    return f"nothing at the old place{again}"


@row("disk that is not shared")
def unshared(job: Job) -> str:
    job.fault()
    job.start(0)
    job.start(1, f"--workdir={job.folder}/other")
    job.finish()
    return "nothing: not begun"


# ------------------------------------------------------------------ hosts that differ
def differ(job: Job, on_b: str) -> str:
    job.fault()
    job.start(0)
    job.start(1, on_b)
    job.finish()
    return "nothing: not begun"


DIFFERENCES = {
    "seed": "--config.seed=7", "learning rate": "--config.optim.learning_rate=1e-3",
    "batch": "--config.train.batch_size=16", "mesh": "--config.mesh.fsdp=2",
    "steps": "--config.train.steps=77", "network": "--config.model.options.depth=2",
    "weight decay": "--config.optim.weight_decay=0.2",
}  # fmt: skip
for _what, _flag in DIFFERENCES.items():
    row(f"another {_what} on host b")(functools.partial(differ, on_b=_flag))


@row("other code on host b")
def other_code(job: Job) -> str:
    copy = job.folder / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__")
    )
    with (copy / "microdit_jax/diffusion.py").open("a") as file:
        file.write("# another line\n")
    job.fault()
    job.start(0)
    job.start(1, package=copy)
    job.finish()
    return "nothing: not begun"


@row("other data on host b")
def other_data(job: Job) -> str:
    copy = job.folder / "data"
    shutil.copytree(job.data, copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["text_encoder"] = "table:width=256,tokens=16,seed=1"
    (copy / "meta.json").write_text(json.dumps(meta))
    run("mount", "--bind", job.data, job.data)
    job.fault()
    job.start(0)
    job.start(1, mount=f"mount --bind {copy} {job.data};")
    job.finish()
    run("umount", job.data)
    return "nothing: not begun"


# ------------------------------------------------------------------ joining
@row("host b never comes", flags=["--join_timeout=10"])
def never_comes(job: Job) -> str:
    job.fault()
    job.start(0)
    job.finish()
    return "nothing: not begun"


@row("two hosts with one number", flags=["--join_timeout=20"])
def same_number(job: Job) -> str:
    job.fault()
    job.start(0)
    job.start(1, "--process_id=0", f"--coordinator_address={ADDRESSES[1]}:{job.port}")
    job.finish()
    return "nothing: not begun"


@row("host b is killed while joining, and comes back")
def comes_back(job: Job) -> str:
    job.start(1)
    time.sleep(6)
    job.processes[0].kill()
    job.processes = []
    job.fault()
    job.start_both()
    return goes_on(job)


@row("a second job on the workdir")
def second(job: Job) -> str:
    job.begin(30)
    other = Job(job.data, job.folder, job.port + 1, flags=["--config.train.log_every=1"])
    other.output = lambda number: job.folder / f"second_{NAMES[number]}.txt"  # type: ignore
    other.fault()
    other.start_both()
    other.finish()
    job.processes[0].send_signal(signal.SIGTERM)
    job.finish(60)
    job.processes, job.ended, job.output = other.processes, other.ended, other.output
    return "nothing: the first goes on"


# ------------------------------------------------------------------ main
def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/tmp/faults/data"))
    parser.add_argument("--rows", default="", help="words of the rows' names, with commas")
    parser.add_argument("--out", type=pathlib.Path, help="a file that rows are added to")
    args = parser.parse_args()
    if os.getuid():
        parser.error("network namespaces need root")
    if not args.data.exists():
        make_data(args.data)
    chosen = [n for n in ROWS if any(word in n for word in args.rows.split(","))]
    print(HEADER, flush=True)
    with network():
        for position, name in enumerate(chosen):
            function, settings = ROWS[name]
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                job = Job(args.data, pathlib.Path(folder), 9100 + 2 * position, **settings)
                try:
                    line = shown(job, name, function(job))
                except RuntimeError as error:
                    line = f"| {name} | | | not run: {error} | |"
                finally:
                    job.finish(0)
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


def make_data(folder: pathlib.Path) -> None:
    """Prepares the embedded emoji images, for the tests' tiny network."""
    program = (
        "import pathlib, sys; sys.path.insert(0, 'tests'); "
        "from support.train_command import prepare_emoji; prepare_emoji(pathlib.Path(sys.argv[1]))"
    )
    flag = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    command = [sys.executable, "-c", program, str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()

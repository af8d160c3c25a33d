"""Training that is killed and started again, by itself and on other numbers of hosts.

  python -m tools.faults.restarts loops [--faults=10] [--steps=600] [--seed=0]
  python -m tools.faults.restarts hosts [--runs="2x1 2x1,1x1,3x1,2x1"]

`loops`: two hosts, each `until train_main.py ...; do sleep 1; done`, are signalled at random
moments; the run must reach its last step by itself, and end as an unbroken one, bit for bit.
`hosts`: a run goes from 2 hosts to 1, 3 and 2 by kill -9 each; prints how far its weights end from
those of unbroken runs. Both are processes on loopback, with simulated devices, and take minutes.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from tools.faults.hosts import ROOT, make_data

LIMIT_SECONDS = 1800.0  # of a run
END = 80  # last step of a run on changing hosts
# On other numbers of devices, and with the same number of devices on other numbers of hosts.
RUNS = ("2x1 2x1 1x2 3x1 2x1,1x1,3x1,2x1", "2x3 2x3 1x6 3x2 2x3,1x6,3x2,2x3")


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Host:
    """A host's shell, which starts the command once or until it is done."""

    def __init__(self, number: int, hosts: int, devices: int, port: int, workdir: pathlib.Path,
                 flags: list[str], *, again: bool):  # fmt: skip
        self.output = workdir.with_name(f"{workdir.name}_{number}.txt")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        script = (
            'until "$@"; do echo "ended with status $?"; sleep 1; done' if again else 'exec "$@"'
        )
        self._again = again
        command = [sys.executable, "train_main.py", f"--workdir={workdir}", *flags]
        if hosts > 1:
            command += [f"--coordinator_address=localhost:{port}", f"--num_processes={hosts}",
                        f"--process_id={number}"]  # fmt: skip
        with self.output.open("a") as output:
            self.shell = subprocess.Popen(
                ["bash", "-c", script, "-", *command], cwd=ROOT, env=environment, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def pid(self) -> int | None:
        """The command's process, None between two."""
        if not self._again:
            return self.shell.pid
        with contextlib.suppress(OSError):
            path = f"/proc/{self.shell.pid}/task/{self.shell.pid}/children"
            for child in pathlib.Path(path).read_text().split():
                if b"train_main.py" in pathlib.Path("/proc", child, "cmdline").read_bytes():
                    return int(child)
        return None

    def signal(self, number: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            if (pid := self.pid()) is not None:
                os.kill(pid, number)
                return True
        return False

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGKILL)
        self.shell.wait()

    def tail(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-5:])


class Run:
    """The processes of one job."""

    def __init__(self, workdir: pathlib.Path, hosts: int, devices: int, flags: list[str], *,
                 again: bool = False):  # fmt: skip
        self.workdir, port = workdir, free_port()
        self.hosts = [
            Host(n, hosts, devices, port, workdir, flags, again=again) for n in range(hosts)
        ]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for host in self.hosts:
            host.end()

    def step(self) -> int:
        """The last step that metrics.jsonl tells."""
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            text = (self.workdir / "metrics.jsonl").read_text()
            return json.loads(text[: text.rindex("\n")].splitlines()[-1])["step"]
        return 0

    def saved(self) -> int:
        folder = self.workdir / "checkpoints"
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)

    def is_over(self) -> bool:
        return all(host.shell.poll() is not None for host in self.hosts)

    def wait(self, ready, limit: float = LIMIT_SECONDS) -> None:
        until = time.monotonic() + limit
        while not ready():
            if time.monotonic() > until:
                raise SystemExit("no end:\n" + "\n\n".join(host.tail() for host in self.hosts))
            time.sleep(0.02)

    def finish(self) -> None:
        """Waits for the end of all, which must be the run's."""
        self.wait(self.is_over)
        if any(host.shell.returncode for host in self.hosts):
            raise SystemExit("failed:\n" + "\n\n".join(host.tail() for host in self.hosts))


def settings(data: pathlib.Path, steps: int, *more: str) -> list[str]:
    return [
        f"--config=tests/support/tiny_config.py:{data}", f"--config.train.steps={steps}",
        "--config.train.checkpoint_every=20", "--config.train.eval_every=150",
        "--config.eval.evaluators=('heldout_loss',)", *more,
    ]  # fmt: skip


def state_of(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a run's checkpoint."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.train_command import state_of  # pyright: ignore[reportMissingImports]

    return state_of(workdir, step)


def logged(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "speed"} for line in found]


# ------------------------------------------------------------------ loops
def loops(data: pathlib.Path, folder: pathlib.Path, faults: int, steps: int, seed: int) -> None:
    flags, rng = settings(data, steps), random.Random(seed)
    began = time.monotonic()
    with Run(folder / "unbroken", 2, 1, flags) as run:
        run.finish()
    print(f"unbroken run of {steps} steps: {time.monotonic() - began:.0f} s", flush=True)
    began, redone, done = time.monotonic(), 0, 0
    with Run(folder / "loops", 2, 1, flags, again=True) as run:
        while done < faults and not run.is_over():
            host, kind = rng.randrange(2), rng.choice([signal.SIGTERM, signal.SIGKILL])
            if done % 2:  # while it trains, on a slow machine too
                goal = run.step() + rng.randint(1, 40)
                run.wait(lambda run=run, goal=goal: run.step() >= goal or run.is_over())
            else:  # at any time: while it starts, joins, compiles, ends
                time.sleep(rng.uniform(0, 25))
            if not run.hosts[host].signal(kind):
                continue  # between two starts; the next moment comes
            done += 1
            step, saved = run.step(), run.saved()
            redone += step - saved if kind == signal.SIGKILL else 0
            print(
                f"{time.monotonic() - began:5.0f} s: {kind.name} to host {host} at step {step}, "
                f"checkpoint {saved}",
                flush=True,
            )
        run.finish()
        starts = sum(h.output.read_text().count("ended with status") for h in run.hosts)
        counts = {
            status: sum(h.output.read_text().count(f"status {status}\n") for h in run.hosts)
            for status in (75, 137, 143, 2, 1)
        }
    print(f"reached its last step after {time.monotonic() - began:.0f} s and {starts} ends of a "
          f"process ({counts}), {redone} steps behind a checkpoint when killed")  # fmt: skip
    one, other = (state_of(folder / name, steps) for name in ("unbroken", "loops"))
    same = one.keys() == other.keys() and all(
        one[path].tobytes() == other[path].tobytes() for path in one
    )
    print(f"{len(one)} arrays of the state bit-equal: {same}")
    print(f"metrics.jsonl equal: {logged(folder / 'unbroken') == logged(folder / 'loops')}")
    if done < faults:
        raise SystemExit(f"only {done} of {faults} faults before the end; give more --steps")
    if not same:
        raise SystemExit(1)


# ------------------------------------------------------------------ other numbers of hosts
def hosts(data: pathlib.Path, folder: pathlib.Path, runs: Sequence[str]) -> None:
    """Compares the ends of runs with that of the first one.

    Args:
      runs: hosts x devices of each, such as 2x3; a run with commas goes on there, after a kill -9.
    """
    folder.mkdir()
    flags = settings(data, END, "--config.train.batch_size=12")

    def end_of(number: int, name: str) -> dict[str, np.ndarray]:
        workdir, parts = folder / str(number), name.split(",")
        for position, part in enumerate(parts):
            count, _, devices = part.partition("x")
            with Run(workdir, int(count), int(devices), flags) as run:
                if position == len(parts) - 1:
                    run.finish()
                else:  # it has saved steps of its own
                    goal = 20 * (position + 1)
                    run.wait(lambda run=run, goal=goal: run.saved() >= goal)
                    run.hosts[position % int(count)].signal(signal.SIGKILL)
                    run.wait(run.is_over)
                    killed = f"killed at step {run.step()}, checkpoint {run.saved()}"
                    print(f"{name}: {part} {killed}", flush=True)
        print(f"{name}: done", flush=True)
        return weights(state_of(workdir, END))

    def weights(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {path: leaf for path, leaf in state.items() if path.startswith("params")}

    first = settings(data, 1, "--config.train.batch_size=12", "--config.optim.learning_rate=0")
    with Run(folder / "start", 1, 1, first) as run:
        run.finish()
    start = weights(state_of(folder / "start", 1))
    ends = [end_of(number, name) for number, name in enumerate(runs)]
    print(f"\n| run | of {len(start)} arrays equal to those of {runs[0]} | relative L2 | "
          "share of what training changed |\n|---|---|---|---|")  # fmt: skip
    moved = distance(start, ends[0])
    for name, end in zip(runs, ends, strict=True):
        equal = sum(end[p].tobytes() == ends[0][p].tobytes() for p in end)
        far = distance(end, ends[0])
        print(f"| {name} | {equal} | {far:.1e} | {far / moved:.1e} |")


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Relative L2 distance of all arrays together."""
    difference = sum(float(np.sum((one[p].astype(float) - other[p]) ** 2)) for p in one)
    return (difference / sum(float(np.sum(other[p].astype(float) ** 2)) for p in one)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=["loops", "hosts"])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/tmp/faults/data"))
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", action="append", help="hosts x devices of each: compared")
    args = parser.parse_args()
    if not args.data.exists():
        make_data(args.data)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if args.what == "loops":
            loops(args.data, pathlib.Path(folder), args.faults, args.steps, args.seed)
        else:
            for number, runs in enumerate(args.runs or RUNS):
                hosts(args.data, pathlib.Path(folder, str(number)), runs.split())


if __name__ == "__main__":
    main()

"""Two hosts as network namespaces, and a training run of both."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[2]
ADDRESSES = ("10.123.0.1", "10.123.0.2")
NAMES = ("a", "b")
SPACES = tuple(f"fault{os.getpid()}_{name}" for name in NAMES)  # of networks
NOISE = re.compile(r"\[Gloo\]|peer ranks|^step \d+/")  # lines of libraries, and of each step


def run(*command: object, check: bool = True) -> None:
    subprocess.run([str(part) for part in command], check=check, capture_output=not check)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two hosts, joined by a cable."""
    for space in SPACES:
        run("ip", "netns", "add", space)
        names = pathlib.Path("/etc/netns", space, "hosts")  # found by ip netns exec
        names.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{address} {host}\n" for address, host in zip(ADDRESSES, NAMES, strict=True)]
        names.write_text("127.0.0.1 localhost\n" + "".join(lines))
    try:
        run("ip", "link", "add", "veth_a", "netns", SPACES[0], "type", "veth",
            "peer", "name", "veth_b", "netns", SPACES[1])  # fmt: skip
        for name, space, address in zip(NAMES, SPACES, ADDRESSES, strict=True):
            inside = ("ip", "-n", space)
            run(*inside, "addr", "add", f"{address}/24", "dev", f"veth_{name}")
            run(*inside, "link", "set", "lo", "up")
            run(*inside, "link", "set", f"veth_{name}", "up")
        yield
    finally:
        for space in SPACES:
            run("ip", "netns", "del", space, check=False)
            shutil.rmtree(f"/etc/netns/{space}", ignore_errors=True)


class Job:
    """A training run of two hosts in its own workdir."""

    def __init__(self, data: pathlib.Path, folder: pathlib.Path, port: int, *, steps: int = 10**6,
                 every: int = 20, flags: Sequence[str] = (), before: Sequence[str] = ("", ""),
                 compiling: bool = False, evaluating: bool = False, cache: str = ""):  # fmt: skip
        """
        Args:
          steps, every: of the run, and between its checkpoints.
          before: a shell's commands before each process.
          compiling: a network that takes long to compile.
          evaluating: with the loss on held-out images, which is also computed at the start.
          cache: the start of the names of cache folders, of which each host has one.
        """
        self.data, self.folder, self.port = data, folder, port
        self.workdir = folder / "run"
        self.config = ROOT / "tests/support/tiny_config.py"
        self._flags = [f"--config.train.steps={steps}", f"--config.train.checkpoint_every={every}"]
        evaluators = "('heldout_loss',)" if evaluating else "()"
        self._flags += [f"--config.eval.evaluators={evaluators}"]
        self._flags += [*flags, *(["--config.model.options.depth=12"] if compiling else [])]
        self._before, self._cache = before, cache
        self.processes: list[subprocess.Popen] = []
        self.began = 0.0  # of the fault
        self.ended: dict[int, float] = {}

    def output(self, number: int) -> pathlib.Path:
        return self.folder / f"{NAMES[number]}.txt"

    def cache(self, number: int) -> pathlib.Path:
        return self.folder / f"{self._cache}cache_{NAMES[number]}"

    def start(self, number: int, *more: str, package: pathlib.Path = ROOT, mount: str = "",
              path: str = "", devices: int = 2) -> None:  # fmt: skip
        """Starts a host's process.

        Args:
          package: the checkout that it runs.
          mount: a shell's command in a mount namespace of its own.
          path: a folder of modules before all others.
          devices: how many are simulated.
        """
        name = NAMES[number]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in a third of the time
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": f"{path}:{package}" if path else str(package),
            "XDG_CACHE_HOME": str(self.cache(number)),
        }
        script = f'hostname {name}; {mount} {self._before[number]} exec "$@"'
        unshare = ["unshare", "--uts", *(["--mount"] if mount else [])]
        command = [
            "ip", "netns", "exec", SPACES[number], *unshare, "bash", "-c", script, "-",
            sys.executable, "train_main.py", f"--config={self.config}:{self.data}",
            f"--workdir={self.workdir}", f"--coordinator_address={ADDRESSES[0]}:{self.port}",
            "--num_processes=2", f"--process_id={number}", *self._flags, *more,
        ]  # fmt: skip
        with self.output(number).open("a") as output:
            self.processes.append(
                subprocess.Popen(
                    command, cwd=package, env=environment, stdout=output, stderr=output
                )
            )

    def start_both(self) -> None:
        for number in range(2):
            self.start(number)

    def begin(self, step: int) -> None:
        """Starts both hosts and waits for a step."""
        self.start_both()
        self.wait_for_step(step)

    def step(self) -> int:
        """The last step that metrics.jsonl tells."""
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            text = (self.workdir / "metrics.jsonl").read_text()
            return json.loads(text[: text.rindex("\n")].splitlines()[-1])["step"]
        return 0

    def wait(self, ready: Callable[[], bool], what: str, limit: float = 400) -> None:
        until = time.monotonic() + limit
        while not ready():
            self.look()
            if time.monotonic() > until or all(p.poll() is not None for p in self.processes):
                raise RuntimeError(f"no {what}: {[self.last_line(n) for n in range(2)]}")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait_for_text(self, number: int, words: str) -> None:
        self.wait(lambda: words in self.output(number).read_text(), words)

    def wait_for_join(self) -> None:
        """Until the processes have joined each other: then each has a log for its libraries."""
        names = [self.cache(number) / "microdit_jax" / "logs" for number in range(2)]
        self.wait(lambda: all(any(name.glob("*.txt")) for name in names), "join")

    def wait_for_call(self, count: int) -> None:
        """Until so many sockets of host a have the coordinator's port: it listens, and is called.

        One more is of the first other host.
        """

        def sockets() -> int:
            command = ["ip", "netns", "exec", SPACES[0], "ss", "-Htna", f"sport = :{self.port}"]
            found = subprocess.run(command, capture_output=True, text=True).stdout
            return sum(state in found_line for found_line in found.splitlines()
                       for state in ("LISTEN", "ESTAB"))  # fmt: skip

        self.wait(lambda: sockets() >= count, "call")
        time.sleep(1.0)

    def terminate(self) -> None:
        """Asks the job to stop, as the fault of its row."""
        self.ended = {}
        self.fault(0, kind=signal.SIGTERM)

    def unmount(self, folder: pathlib.Path) -> None:
        """Unmounts a disk here and on both hosts, which have mount namespaces of their own."""
        run("umount", "-l", folder)
        for process in self.processes:
            inside = ("nsenter", f"--mount=/proc/{process.pid}/ns/mnt")
            # Gone already where mounts are shared.
            run(*inside, "umount", "-l", folder, check=False)
            if subprocess.run([*inside, "mountpoint", "-q", folder]).returncode == 0:
                raise RuntimeError(f"{folder} is still mounted on a host")

    def wait_for_save(self) -> None:
        """Until a checkpoint is being written."""
        partials = self.workdir / "checkpoints"
        self.wait(lambda: any(partials.glob("*.orbax-checkpoint-tmp*")), "save")

    def fault(self, *numbers: int, kind: int | None = None) -> None:
        """Notes the time of the fault, which is a signal to these processes if one is given."""
        self.began = time.monotonic()
        for number in numbers:
            assert kind is not None
            self.processes[number].send_signal(kind)

    def look(self, seconds: float = 0.0) -> None:
        """Notes who has ended, for so long."""
        until = time.monotonic() + seconds
        while True:
            for number, process in enumerate(self.processes):
                if self.began and number not in self.ended and process.poll() is not None:
                    self.ended[number] = time.monotonic() - self.began
            if time.monotonic() >= until or len(self.ended) == len(self.processes):
                return
            time.sleep(0.02)

    def finish(self, limit: float = 120) -> None:
        """Waits until all have ended, and kills those that have not."""
        self.look(limit)
        for process in self.processes:
            process.kill()
            process.wait()

    def last_line(self, number: int) -> str:
        path = self.output(number)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        said = [line for line in lines if line.strip() and not NOISE.search(line)]
        return (said or ["-"])[-1]

    def saved(self) -> int:
        folder = self.workdir / "checkpoints"
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


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

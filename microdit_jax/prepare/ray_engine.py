"""Preparing on the nodes of a Ray cluster: actors hold the towers, and write part after part.

This process claims parts like any other, and deals them out. A part that was an actor's of a lost
node runs again elsewhere; nodes that join get actors. Parts, and so the output, are those of the
local engine byte for byte.
"""

import collections
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tqdm

from microdit_jax.errors import UserError, visible
from microdit_jax.files.lock import lock_of
from microdit_jax.machine import agreement, compilation_cache
from microdit_jax.prepare import claims, job
from microdit_jax.prepare.encoding import DeviceTowers, make_towers
from microdit_jax.prepare.job import PartReport, PartWriter
from microdit_jax.prepare.listing import agree
from microdit_jax.prepare.request import PrepareRequest
from microdit_jax.prepare.sources.listed_images import ImageSource

MOST_LOSSES = 5  # of actors at one part, or one after the other before any is ready
_LOOK_SECONDS = 2.0


def import_ray() -> Any:
    """Imports the package ray; raises UserError if it is not installed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "--engine=ray needs the package ray, found none; pip install 'microdit_jax[ray]' here "
            "and on all nodes"
        ) from error
    return ray


class Actor:
    """Towers on one node, which write the parts that they are given; Ray makes it an actor."""

    def __init__(self, request: PrepareRequest):
        self._request = request
        self._writer: PartWriter | None = None

    def ready(self) -> tuple[str, dict[str, str]]:
        """Returns the node's name and the versions of what computes there."""
        return socket.gethostname(), agreement.software()

    def write(self, number: int, lock_folder: str, owner: str) -> PartReport:
        """Writes a part, unless this node sees another disk than the one that dealt it out.

        Args:
          number: of the part.
          lock_folder: folder of its claim.
          owner: text of the claim.
        Raises:
          UserError: an output that is not shared, or what `job.run` raises.
        """
        held = lock_of(Path(lock_folder)).read()
        if held is None or held.text != owner:
            raise UserError(
                f"expected {visible(self._request.output)} on a disk that all nodes share, found "
                "another folder there; mount the same disk on every node"
            )
        if self._writer is None:
            self._writer = self._make_writer()
        ((_, report),) = self._writer.write([number])
        return report

    def _make_writer(self) -> PartWriter:
        request, output = self._request, Path(self._request.output)
        compilation_cache.enable()
        source = agree(output, request.open_source())
        codec, text_encoder = request.load_towers()
        towers = make_towers(codec, text_encoder, request.options.seed)
        return PartWriter(source, towers, output, request.options, threads=request.threads)


def run(
    request: PrepareRequest,
    source: ImageSource,
    towers: DeviceTowers,
    *,
    address: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    append: bool = False,
    progress: bool = True,
) -> None:
    """Writes the job's dataset on all nodes of a Ray cluster; the same call again goes on.

    Args:
      source: the request's, opened here.
      towers: the request's, which encode nothing here.
      address: of the cluster; by default RAY_ADDRESS, or the one on this machine.
      cpus, gpus: of each actor; by default a GPU where there are any, else all CPUs of the
        smallest node.
    Raises:
      UserError: no ray, no cluster, none of that size, or what `job.run` raises, with the node.
    """
    ray = import_ray()
    request = request.with_absolute_paths()
    output = Path(request.output)
    with (
        job.begun(
            source, towers, output, request.options, request=request.settings(), append=append
        ) as source,
        _connected(ray, address),
    ):
        with (
            claims.Claims(output, job.part_names(source)) as claimed,
            tqdm.tqdm(desc="encoding", unit=" images", disable=not progress) as bar,
        ):
            _Cluster(ray, request, claimed, bar, cpus, gpus).run()
        job.finish(output, source, towers)


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connects to a cluster; signals stay the command's own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"expected a Ray cluster at {visible(address or 'this machine')}, found none that "
            f"takes this process ({visible(error, 300)}); start one with `ray start`, with this "
            "Python's version of ray, or give --ray_address"
        ) from error
    finally:
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


class _Cluster:
    """The actors of a job, and the parts that they are at."""

    def __init__(
        self,
        ray: Any,
        request: PrepareRequest,
        claimed: claims.Claims,
        bar: tqdm.tqdm,
        cpus: float | None,
        gpus: float | None,
    ):
        self._ray, self._claimed, self._bar = ray, claimed, bar
        self._request, self._size = ray.put(request), _size(ray, cpus, gpus)
        self._actor = ray.remote(num_cpus=self._size[0], num_gpus=self._size[1])(Actor)
        self._software = agreement.software()
        self._starting: dict[Any, Any] = {}  # result of `ready` -> actor
        self._idle: list[tuple[Any, str]] = []  # actors with their nodes
        self._working: dict[Any, tuple[Any, str, int]] = {}  # result -> actor, node, part
        self._again: collections.deque[int] = collections.deque()  # parts of lost actors
        self._losses: collections.Counter[int] = collections.Counter()
        self._failed_starts = 0

    def run(self) -> None:
        """Deals out parts until all are done, by this process's actors or by others."""
        parts = self._claimed.available()
        while left := self._claimed.left():
            self._start_actors(left)
            while self._idle and (number := self._next(parts)) is not None:
                self._give(number)
            if not self._working and self._idle:  # others are at work on what is left
                claims.wait_a_moment()
                parts = self._claimed.available()
                continue
            waited_for = [*self._starting, *self._working]
            ready, _ = self._ray.wait(waited_for, timeout=_LOOK_SECONDS) if waited_for else ([], [])
            for result in ready:
                self._take(result)
            self._bar.set_postfix(parts_left=left, actors=len(self._idle) + len(self._working))

    def _next(self, parts: Iterator[int]) -> int | None:
        return self._again.popleft() if self._again else next(parts, None)

    def _give(self, number: int) -> None:
        actor, node = self._idle.pop()
        folder, owner = self._claimed.claim_of(number)
        self._working[actor.write.remote(number, str(folder), owner)] = actor, node, number

    def _take(self, result: Any) -> None:
        """Takes the result of an actor, or its loss."""
        ray, number = self._ray, None
        if result in self._starting:
            actor, node = self._starting.pop(result), ""
        else:
            actor, node, number = self._working.pop(result)
        try:
            found = ray.get(result)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(f"node {node}: {error.cause}") from error
            raise
        except ray.exceptions.RayError as error:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
            self._lost(node, number, error)
            return
        if number is None:
            node, software = found
            self._check_software(node, software)
            self._failed_starts = 0
        else:
            self._claimed.release(number)
            self._bar.update(found.records)
        self._idle.append((actor, node))

    def _lost(self, node: str, number: int | None, error: Exception) -> None:
        reason = visible(str(error).strip().partition("\n")[0], 200)
        if number is None:
            self._failed_starts += 1
            if self._failed_starts >= MOST_LOSSES:
                raise UserError(
                    f"expected actors with {_shown(self._size)} to start, found {MOST_LOSSES} lost "
                    f"before that, the last one with: {reason}; look at Ray's logs"
                ) from error
            return
        self._losses[number] += 1
        if self._losses[number] >= MOST_LOSSES:
            raise UserError(
                f"expected part {number:06} to be written, found {MOST_LOSSES} actors lost at it, "
                f"the last one on {node} with: {reason}; more memory may help, or a smaller "
                "--batch or --threads"
            ) from error
        self._again.append(number)
        self._say(f"an actor on {node} is gone ({reason}); part {number:06} runs again elsewhere")

    def _start_actors(self, left: int) -> None:
        """Starts as many as there is room for, unless there are fewer parts."""
        count = len(self._starting) + len(self._idle) + len(self._working)
        for _ in range(min(_room(self._ray, self._size), left) - count):
            actor = self._actor.remote(self._request)
            self._starting[actor.ready.remote()] = actor

    def _check_software(self, node: str, found: dict[str, str]) -> None:
        for name, mine in self._software.items():
            if found.get(name) != mine:
                raise UserError(
                    f"expected the same software on all nodes, found {name} {mine} here and "
                    f"{visible(found.get(name, 'absent'))} on {visible(node)}; install the same"
                )

    def _say(self, line: str) -> None:
        self._bar.write(visible(line, 500), file=sys.stderr)


# ------------------------------------------------------------------ sizes
def _size(ray: Any, cpus: float | None, gpus: float | None) -> tuple[float, float]:
    """Returns the CPUs and GPUs of each actor.

    Raises:
      UserError: no node has as many.
    """
    if cpus is not None and cpus <= 0:
        raise UserError(f"--ray_cpus must be above 0, found {cpus:g}")
    if gpus is not None and gpus < 0:
        raise UserError(f"--ray_gpus must be at least 0, found {gpus:g}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    if cpus is None:
        counts = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
        cpus = 1.0 if gpus or not counts else float(min(counts))
    size = cpus, gpus
    if not _room(ray, size):
        most = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        found = _shown((most.get("CPU", 0.0), most.get("GPU", 0.0)))
        raise UserError(
            f"expected a node with {_shown(size)}, found {found} at most; give less by --ray_cpus "
            "and --ray_gpus"
        )
    return size


def _room(ray: Any, size: tuple[float, float]) -> int:
    """Returns how many actors of a size the nodes have room for, whoever else uses them."""
    asked = {name: count for name, count in zip(("CPU", "GPU"), size, strict=True) if count}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get(name, 0) / count + 1e-6) for name, count in asked.items())
        for node in nodes
    )


def _shown(size: tuple[float, float]) -> str:
    return f"{size[0]:g} CPUs and {size[1]:g} GPUs"

"""Fuzzes readers, by coverage where the package atheris is installed, by chance elsewhere.

Examples:
  python -m fuzz --target=pt --seconds=600
  python -m fuzz --seconds=30                      (every target, one after the other)
  python -m fuzz --target=zip --executions=1000000 --seed=7

An input that fails is written to --found, and the process ends with status 1; put it into
fuzz/corpora/TARGET once the reader is mended. New inputs of more coverage are kept in --work.
"""

import argparse
import importlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz.run import CORPORA, HANG_SECONDS, Runner
from fuzz.scratch import memory_disk
from fuzz.targets import MODULES

MEMORY_MB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", choices=list(MODULES), action="append")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--executions", type=int, default=0, help="for each target; 0: no bound")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without atheris, by chance")
    parser.add_argument("--work", type=Path, default=Path("out/fuzz/work"))
    parser.add_argument("--found", type=Path, default=Path("out/fuzz/found"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.target or list(MODULES)
    if options.inside:
        _fuzz(names[0], options)
        return
    failed = [name for name in names if not _in_a_process(name, options)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; look into {options.found}")


def _in_a_process(name: str, options: argparse.Namespace) -> bool:
    """Runs a target in a process of its own, whose end by a signal is seen; True if all is well."""
    arguments = [f"--{key}={getattr(options, key)}" for key in
                 ("seconds", "executions", "seed", "work", "found")]  # fmt: skip
    arguments += ["--plain"] if options.plain else []
    command = [sys.executable, "-m", "fuzz", "--inside", f"--target={name}", *arguments]
    start = time.monotonic()
    # The import of JAX and the corpus come before the clock of --seconds runs.
    limit = options.seconds * 1.5 + 120
    log = options.found / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONFAULTHANDLER": "1"}
    # The folder is this process's, which removes it whatever becomes of the other.
    with log.open("wb") as output, tempfile.TemporaryDirectory(dir=memory_disk()) as scratch:
        environment["TMPDIR"] = scratch
        try:
            status = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"no end after {limit:.0f} s"
    text = log.read_text(errors="backslashreplace")
    told = re.findall(r"^(?:executions|stat::number_of_executed_units): +(\d+)", text, re.MULTILINE)
    done = int(told[-1]) if told else 0
    seconds = time.monotonic() - start
    well = status == 0
    print(
        f"{name:<14}{done:>12,} executions in {seconds:6.1f} s  {'ok' if well else status}",
        flush=True,
    )
    figures = {"target": name, "executions": done, "seconds": round(seconds, 1), "status": status}
    with (options.found / "figures.jsonl").open("a") as file:
        file.write(json.dumps(figures) + "\n")
    if not well:
        print("\n".join(text.splitlines()[-40:]))
    return well


def _fuzz(name: str, options: argparse.Namespace) -> None:
    """Fuzzes one target in this process, which ends at the first failure."""
    limit = (MEMORY_MB << 20) * 2
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atheris: Any = None
    if not options.plain:
        try:
            atheris = importlib.import_module("atheris")  # it has no types
        except ImportError:
            print("atheris is not installed: inputs are mutated by chance")
    if atheris is None:
        runner = Runner(name)
        try:
            _by_chance(runner, options)
        finally:
            runner.close()
        return
    with atheris.instrument_imports(include=["microdit_jax"]):
        runner = Runner(name, watch_limits=False)  # libFuzzer does
    work, found = options.work / name, options.found / name
    for folder in (work, found):
        folder.mkdir(parents=True, exist_ok=True)
    dictionary = runner.scratch.file("words", _dictionary(runner.target.words))
    arguments = [
        f"-seed={options.seed}",
        f"-max_total_time={int(options.seconds)}",
        f"-max_len={runner.target.max_bytes}",
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={found}/",
        f"-dict={dictionary}",
        "-print_final_stats=1",
        "-len_control=20",
        *([f"-runs={options.executions}"] if options.executions else []),
        str(work),
        str(CORPORA / name),
    ]
    grammar = runner.target.grammar
    if grammar is None:
        atheris.Setup([sys.argv[0], *arguments], runner.execute)
    else:

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if chance.random() < 0.5 and (found := grammar(chance, data, runner.target.words)):
                return found[:most]
            return atheris.Mutate(data, most)

        atheris.Setup([sys.argv[0], *arguments], runner.execute, custom_mutator=mutate)
    atheris.Fuzz()


def _by_chance(runner: Runner, options: argparse.Namespace) -> None:
    chance = random.Random(options.seed)
    seeds = [file.read_bytes() for file in runner.corpus()]
    end = time.monotonic() + options.seconds
    most = options.executions or sys.maxsize
    while runner.executions < most and time.monotonic() < end:
        data = runner.mutated(chance, seeds)
        try:
            runner.execute(data)
        except BaseException:
            folder = options.found / runner.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{runner.executions}.bin").write_bytes(data)
            raise
    print(f"executions: {runner.executions}")


def _dictionary(words: tuple[bytes, ...]) -> bytes:
    shown = ["".join(f"\\x{byte:02x}" for byte in word) for word in words]
    return "".join(f'"{word}"\n' for word in shown).encode()


if __name__ == "__main__":
    main()

"""The table of faults in docs/scaling.md is whole, and every row of it as quick as it promises."""

import importlib
import pathlib
import re

from tools.faults.rows import HEADER, ROWS

for _module in ("silence", "disks", "beginnings"):
    importlib.import_module(f"tools.faults.{_module}")
TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
LIMIT_SECONDS = 30.0
# From its start, 200 steps of a run that nothing ends; and with --join_timeout=15.
LONGER = {"1,500 one-record shards of MDS, ulimit -n 256": 600.0, "host b never comes": 15.0}


def table() -> dict[str, list[str]]:
    """The cells of each row, by the fault's name."""
    lines = TEXT.partition(HEADER)[2].partition("\n\n")[0].strip().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {name: cells for name, *cells in rows}


def test_every_fault_has_its_row():
    assert sorted(table()) == sorted(ROWS)
    assert all(len(cells) == 4 and cells[3] for cells in table().values())


def test_all_hosts_end_within_half_a_minute():
    """One that was stopped: of the moment that it goes on."""
    for name, (seconds, statuses, *_) in table().items():
        stopped = re.fullmatch(r"host (.) stopped for (\d+) s", name)
        for host, took, status in zip(
            "ab", seconds.split(" / "), statuses.split(" / "), strict=True
        ):
            limit = LIMIT_SECONDS + LONGER.get(name, 0.0)
            if stopped and stopped[1] == host:
                limit += float(stopped[2])
            assert took == "-" or float(took) <= limit, (name, took)
            assert status in ("0", "2", "75", "143", "-9", "-"), (name, status)

"""The table of faults: a row is a function that causes one and waits for the end of the job."""

import time
from collections.abc import Callable

from tools.faults.hosts import Job

HEADER = (
    "| fault | seconds to the end, a / b | status, a / b | last line | what was lost |\n"
    "|---|---|---|---|---|"
)
NOTHING = "nothing: not begun"
Row = Callable[[Job], str]
ROWS: dict[str, tuple[Row, dict]] = {}


def row(name: str, **settings) -> Callable[[Row], Row]:
    """Adds a function to the table: it causes the fault, and returns what it has found besides.

    Args:
      settings: of the Job.
    """

    def add(function: Row) -> Row:
        ROWS[name] = function, settings
        return function

    return add


def shown(job: Job, name: str, found: str) -> str:
    """The table's line for a job that has ended."""
    cells = []
    for number, process in enumerate(job.processes[:2]):
        took = f"{job.ended[number]:.1f}" if number in job.ended else "not ended"
        cells += [took, str(process.returncode)]
    cells += ["-", "-"] * (2 - len(job.processes))
    said = [job.last_line(n).partition("; what libraries said:")[0] for n in range(2)]
    lines = dict.fromkeys(line.replace("|", "\\|")[:300] for line in said)
    line = "<br>".join(line.replace(str(job.folder), "") for line in lines)
    lost = found or f"{max(0, job.step() - job.saved())} steps since step {job.saved()}"
    return f"| {name} | {cells[0]} / {cells[2]} | {cells[1]} / {cells[3]} | {line} | {lost} |"


def goes_on(job: Job) -> str:
    """Waits for more steps, or for the end."""
    step = job.step()
    try:
        job.wait(lambda: job.step() > step + 5 or len(job.ended) > 1, "more steps", 200)
    except RuntimeError:
        job.finish(10)
        return ""
    if job.ended:
        job.finish(60)
        return ""
    took = time.monotonic() - job.began
    return ended_by_hand(job, f"it went on ({took:.0f} s after the fault)")


def ended_by_hand(job: Job, found: str) -> str:
    """Ends a job that is none the worse."""
    job.terminate()
    job.finish(60)
    return f"nothing: {found}, until SIGTERM ended this row"

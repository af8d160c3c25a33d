"""Checks on one NVIDIA GPU what was only compiled for it, in one run of at most eight minutes.

  python -m tools.device_check --reference=FOLDER --out=out/device_check

FOLDER is a checkout of the PyTorch reference, which holds micro_diffusion/; without it, or without
PyTorch, the parts that need them are skipped. The same command again runs the parts that are not
done. The report is OUT/report.json, the page OUT/page.md; both are written after each part.
"""

from pathlib import Path

from microdit_jax.commands.parser import Parser
from microdit_jax.errors import UserError
from tools.device_check import machine, page, run
from tools.device_check.parts import NAMES


def arguments() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser("tools.device_check", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/device_check"), help="folder for everything")
    add("--reference", type=Path, help="checkout that holds micro_diffusion/")
    add("--golden", type=Path, help="folder of golden files, if not tests/golden")
    add("--parts", default=",".join(NAMES), help="parts to run, with commas (default: all)")
    add("--seconds", type=float, default=480.0, help="time limit of the run (default: 480)")
    add("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: to try the check itself")
    add("--network", choices=("XL_2", "small"), default="XL_2", help="small: to try it")
    add("--list", action="store_true", help="print the page without figures, and run nothing")
    return parser


def main(given: list[str]) -> None:
    """Runs the command; `given` without the program's name."""
    parser = arguments()
    flags = parser.parse_args(given)
    if flags.list:
        print(page.render({}), end="")
        return
    names = flags.parts.split(",")
    if unknown := sorted(set(names) - set(NAMES)):
        raise UserError(f"--parts takes {', '.join(NAMES)}, found {', '.join(unknown)}")
    if not 10 <= flags.seconds <= 3600:
        raise UserError(f"--seconds must be 10 to 3600, found {flags.seconds:g}")
    if flags.reference and not (flags.reference / "micro_diffusion").is_dir():
        raise UserError(f"expected micro_diffusion/ in {flags.reference}, found none")
    golden = flags.golden or machine.ROOT / "tests" / "golden"
    settings = run.Settings(
        flags.out.absolute(),
        flags.platform,
        flags.network,
        flags.seconds,
        flags.reference and flags.reference.absolute(),
        golden.absolute(),
    )
    run.check(settings, names)
    print(f"written: {flags.out / run.REPORT}, {flags.out / run.PAGE}")


if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("tools.device_check.__main__")

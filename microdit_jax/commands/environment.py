"""Prints the environment variables that suit a platform, as lines for a shell."""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.commands.environment")

import shlex
import sys
from collections.abc import Sequence

from microdit_jax.commands.parser import Parser
from microdit_jax.machine import compile_options

EXAMPLE = """example:
  eval "$(python -m microdit_jax.commands.environment cuda)"
"""


def main(arguments: Sequence[str]) -> None:
    """Prints lines for a shell that set the environment."""
    parser = Parser("microdit_jax.commands.environment", __doc__, EXAMPLE)
    parser.add_argument("platform", help=", ".join(compile_options.PLATFORMS))
    platform = parser.parse_args(arguments).platform
    found = compile_options.environment(platform)
    if platform == "cpu" and "LD_PRELOAD" not in found:
        print(compile_options.WITHOUT_TCMALLOC, file=sys.stderr)
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")

"""The command python -m convert, called in this process."""

from microdit_jax.commands.boundary import outcome
from microdit_jax.convert.__main__ import main


def run(*arguments) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    """The one line on stderr of a command that ends with status 2."""
    assert outcome(lambda: run(*arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error

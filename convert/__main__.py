"""python -m convert: the converter of microdit_jax.convert, under the name it has in the docs."""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.convert.__main__")

"""python -m convert: the converter of microdit_jax.convert, under the name it has in the docs."""

from microdit_jax.convert.__main__ import main

if __name__ == "__main__":
    main()

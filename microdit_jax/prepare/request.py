"""All that a process must know to work on a job of the command, wherever it runs."""

import dataclasses
import os
from pathlib import Path

from microdit_jax.assets import load
from microdit_jax.files import fetched
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.sources import registry
from microdit_jax.prepare.sources.listed_images import ImageSource
from microdit_jax.towers import Codec, TextEncoder


@dataclasses.dataclass(frozen=True)
class PrepareRequest:
    """Source, towers and output of a job as the command line has them; texts and numbers alone.

    Attributes:
      source: one of `registry.KINDS`.
      input: its folder; None for one that has none.
      fraction: share of its parts.
      source_options: values of the flags that some sources have, by name.
      vae, text_encoder, dtype: names or paths of the towers, and the type that they compute in.
      threads: that decode.
    """

    source: str
    input: str | None
    fraction: float
    source_options: dict[str, str | None]
    vae: str
    text_encoder: str
    dtype: str
    output: str
    options: PrepareOptions
    threads: int

    def settings(self) -> dict[str, str | float | None]:
        """Returns what decides the output beside options and towers, for job.json."""
        options = {k: v for k, v in self.source_options.items() if k != "cache"}
        return options | {
            "source": self.source,
            "input": self.input,
            "fraction": self.fraction,
            "dtype": self.dtype,
        }

    def open_source(self) -> ImageSource:
        """Opens the source, before the job's listing decides its parts.

        Raises:
          UserError: no such source, or an option that it does not take.
        """
        # Only MDS is read shard by shard through a cache; all else is fetched whole.
        path = self.input
        if path is not None and self.source != "mds":
            path = str(fetched(path))
        return registry.open_source(
            self.source,
            path,
            fraction=self.fraction,
            seed=self.options.seed,
            **self.source_options,
        )

    def load_towers(self) -> tuple[Codec, TextEncoder]:
        """Loads the codec and the text encoder.

        Raises:
          UserError: there are none, or they are damaged.
        """
        codec = load.load_codec(self.vae, dtype=self.dtype)
        return codec, load.load_text_encoder(self.text_encoder, dtype=self.dtype)

    def with_absolute_paths(self) -> "PrepareRequest":
        """Returns the same for processes that were started in other folders."""
        paths = {name: _absolute(getattr(self, name)) for name in ("input", "vae", "text_encoder")}
        options = {k: _absolute(v) for k, v in self.source_options.items()}
        output = str(Path(self.output).absolute())
        return dataclasses.replace(self, **paths, source_options=options, output=output)


def _absolute(name: str | None) -> str | None:
    """Returns a name as an absolute path if it is one of a file or folder here."""
    return os.path.abspath(name) if name and os.path.exists(name) else name

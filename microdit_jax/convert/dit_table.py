"""The rename table of MicroDiT: the reference's names and layouts for each of our parameters."""

import functools
from collections.abc import Sequence

from microdit_jax.convert.keymap import LINEAR, SAME, Entry, Rule, build_table, patch_conv
from microdit_jax.models.dit import DiTConfig, abstract_params


def rules(config: DiTConfig) -> list[Rule]:
    """Rules for the names and layouts of the parameters in the reference."""
    return [
        Rule(
            r"x_embedder/proj/kernel",
            "x_embedder.proj.weight",
            patch_conv(config.in_channels, config.patch_size),
        ),
        Rule(r"(.*/mlp/w[12])", r"\1", SAME),  # the experts' weights, (e, d, f) and (e, f, d)
        Rule(r"(.*)/kernel", r"\1.weight", LINEAR),
        Rule(r"(.*)/scale", r"\1.weight", SAME),
        Rule(r"(.*)/bias", r"\1.bias", SAME),
    ]


@functools.lru_cache(maxsize=32)
def rename_table(config: DiTConfig) -> Sequence[Entry]:
    """Every parameter of the network with its torch name, both shapes and the transform."""
    return tuple(build_table(rules(config), abstract_params(config)))


def buffer_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the reference's constants, which its state dict holds beside the parameters."""
    values = config.patch_size**2 * config.in_channels
    return {"pos_embed": (1, config.num_tokens, config.dim), "mask_token": (1, 1, values)}

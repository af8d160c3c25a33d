"""Files whose names and shapes no model has: refused in one line, whatever they would build."""

import re
import time

import numpy as np
import pytest
from support import model_files
from support.golden_vae import load_vae

from microdit_jax.convert.arguments import count_blocks
from microdit_jax.convert.kinds import get_kind
from microdit_jax.errors import UserError

CLIP_CONFIG = {"width": 24, "heads": 2, "layers": 1, "context_length": 12, "vocab_size": 49408}
SHAPES = {
    "number": (),
    "empty": (0,),
    "none wide": (0, 10**9),
    "many of none": (10**6, 4, 0, 2),
    "four axes of none": (0, 4, 10**5, 10**5),
    "wide": (10**8, 1),
    "long": (1, 10**4, 10**4),
    "ones": (1, 1, 1, 1),
}
# What no shape tells of a network that is not one of the paper's.
OPTIONS = {"dit": {"head_dim": 16, "expert_capacity": 2.0}}
NUMBERS = ("1000000000", "9" * 5000, "70000", "\u0663")


def configs() -> dict[str, dict | None]:
    return {
        "dit": None,
        "clip_text": {"model_cfg": {"embed_dim": 24, "text_cfg": CLIP_CONFIG}},
        "vae": load_vae("vae_small").config_json,
    }


def refused(name: str, tensors: dict[str, np.ndarray]) -> bool:
    """Tries to convert; anything else than one line for a person fails the test."""
    kind, start = get_kind(name), time.monotonic()
    try:
        chosen = kind.select(tensors).tensors
        kind.from_torch(chosen, kind.make_config(chosen, configs()[name], OPTIONS.get(name, {})))
    except UserError as error:
        assert time.monotonic() - start < 20
        assert len(str(error)) <= 10_000
        return True
    return False


def one_of_each(tensors: dict[str, np.ndarray]) -> list[str]:
    """The first name of each kind, whatever the blocks' numbers are."""
    firsts = {re.sub(r"\d+", "N", name): name for name in reversed(tensors)}
    return list(firsts.values())


@pytest.mark.parametrize("name", ["dit", "clip_text", "vae"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_no_model_has(name, shape):
    tensors = model_files.tensors()[name]
    assert not refused(name, dict(tensors))
    repeated = np.broadcast_to(np.zeros((), np.float32), SHAPES[shape])
    for tensor in one_of_each(tensors)[:12]:
        if tensors[tensor].shape != SHAPES[shape]:
            assert refused(name, dict(tensors) | {tensor: repeated}), tensor


@pytest.mark.parametrize("name", ["dit", "clip_text"])
@pytest.mark.parametrize("number", NUMBERS)
def test_blocks_of_any_number(name, number):
    """A name alone would build a network of a thousand million blocks."""
    tensors = model_files.tensors()[name]
    for tensor in one_of_each(tensors):
        moved = re.sub(r"\d+", number, tensor, count=1)
        if moved != tensor:
            assert refused(name, dict(tensors) | {moved: tensors[tensor]}), moved


def test_a_file_has_a_tensor_for_each_block():
    assert count_blocks({"a.0.x": 0, "a.1.x": 0, "b.9.x": 0}, "a") == 2
    with pytest.raises(
        UserError, match="at most 2 blocks in a file of 2 tensors, found .* 2 under"
    ):
        count_blocks({"a.0.x": 0, "a.2.x": 0}, "a")

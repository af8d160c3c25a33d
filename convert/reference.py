"""Runs the PyTorch reference from a checkout that the user brings: the only file that needs torch.

The reference's network needs torch and einops alone, but its modules import more. While they are
imported, text encoders and metrics (never used here, slow to import and particular about versions)
are replaced by empty classes, and timm's patch embedding, where absent, by the strided convolution
it is.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
import unittest.mock
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiTConfig

UNUSED = ("open_clip", "torchmetrics", "transformers")
MODULE = "micro_diffusion.models.dit"
# Fields of how ours is computed and initialised; the constructor of the reference lacks them.
OURS_ONLY = ("dtype", "param_dtype", "attention", "moe_dispatch", "remat", "init_std")


def reference_arguments(config: DiTConfig) -> dict[str, Any]:
    """The arguments of the reference's constructor for the same network."""
    fields = {k: v for k, v in vars(config).items() if k not in OURS_ONLY}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def run_reference(
    folder: Path,
    config: DiTConfig,
    state_dict: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    mask_ratio: float = 0.0,
) -> dict[str, np.ndarray]:
    """One forward pass of the reference in float32.

    Args:
      folder: a checkout, holding micro_diffusion/models/dit.py.
      state_dict: the reference's names; loaded strictly, without a copy where float32.
      inputs: channels-first x (n, C, H, W), t (n,), y (n, 1, l, caption), and mask_noise (n, t) if
        mask_ratio > 0.
    Returns:
      sample; activation/NAME, the output of every sub-module; routing/NAME (n, e, k), the tokens
      that each expert of block NAME took.
    Raises:
      UserError: no torch, or no checkout in the folder.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "expected PyTorch for a comparison with the reference, found none; install it "
            "(pip install torch einops) or compare with a recorded file: --activations"
        )
    import torch

    module = _import_reference(folder)
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        model = module.DiT(**reference_arguments(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the mapped file is read-only; so are we
        tensors = {
            name: torch.from_numpy(np.asarray(tensor, np.float32))
            for name, tensor in state_dict.items()
        }
    model.load_state_dict(tensors, strict=True, assign=True)
    model.eval()

    outputs: dict[str, np.ndarray] = {}

    def record(name: str):
        def hook(_module, _inputs, output):
            outputs[f"activation/{name}"] = output.detach().clone().numpy()

        return hook

    def record_routing(name: str, capacity: float):
        def hook(_module, _inputs, scores):  # (n, t, e), before the softmax over experts
            slots = int(capacity * scores.shape[1] / scores.shape[2])
            chosen = scores.softmax(dim=-1).transpose(1, 2).topk(slots, dim=-1).indices
            outputs[f"routing/{name}"] = chosen.numpy().astype(np.int32)

        return hook

    for name, child in _sub_modules(model):
        child.register_forward_hook(record(name))
        if hasattr(getattr(child, "mlp", None), "gate"):
            child.mlp.gate.register_forward_hook(record_routing(name, config.expert_capacity))

    arguments = {name: torch.from_numpy(np.array(inputs[name])) for name in ("x", "t", "y")}
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if mask_ratio:
            # The reference draws its masking noise inside; this is its only draw.
            noise = torch.from_numpy(np.array(inputs["mask_noise"]))
            stack.enter_context(unittest.mock.patch.object(torch, "rand", return_value=noise))
        outputs["sample"] = model(**arguments, mask_ratio=mask_ratio)["sample"].numpy()
    return outputs


def _sub_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Every child with parameters, and every block of the two lists of blocks."""
    for name, child in model.named_children():
        if name in ("blocks", "patch_mixer"):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(child))
        elif not name.startswith("patch_mixer_map"):
            yield name, child


def _import_reference(folder: Path) -> types.ModuleType:
    if not (folder / "micro_diffusion" / "models" / "dit.py").is_file():
        raise UserError(
            f"expected micro_diffusion/models/dit.py in {folder}, found none; give --reference the "
            "folder of a checkout of the PyTorch reference"
        )
    stand_ins = {name: _empty_module(name) for name in UNUSED}
    try:
        import timm.models.vision_transformer  # noqa: F401
    except ImportError:  # absent, or without the torchvision it needs
        names = ("timm", "timm.models", "timm.models.vision_transformer")
        stand_ins |= {name: types.ModuleType(name) for name in names}
        stand_ins[names[-1]].PatchEmbed = _patch_embed_class()
    with (
        unittest.mock.patch.dict(sys.modules, stand_ins),
        unittest.mock.patch.object(sys, "path", [str(folder.absolute()), *sys.path]),
    ):
        return importlib.import_module(MODULE)


def _empty_module(name: str) -> types.ModuleType:
    """A module that has any class one asks for, with nothing in it."""

    def make_class(attribute: str) -> type:
        if attribute.startswith("__"):  # what Python itself looks for, such as __file__
            raise AttributeError(attribute)
        return type(attribute, (), {})

    module = types.ModuleType(name)
    module.__getattr__ = make_class
    return module


def _patch_embed_class() -> type:
    import torch

    class PatchEmbed(torch.nn.Module):
        """(n, C, H, W) -> (n, t, d) by a convolution whose stride is its size."""

        def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias):
            super().__init__()
            self.patch_size = (patch_size, patch_size)
            self.num_patches = (img_size // patch_size) ** 2
            self.proj = torch.nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    return PatchEmbed

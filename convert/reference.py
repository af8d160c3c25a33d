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
from jaxtyping import Float

from microdit_jax.errors import UserError
from microdit_jax.models.dit import DiTConfig

UNUSED = ("open_clip", "torchmetrics", "transformers")
MODULE = "micro_diffusion.models.dit"
SIGMA_DATA = 0.9
# Fields of how ours is computed and initialised; the constructor of the reference lacks them.
OURS_ONLY = (
    *(
        "dtype",
        "param_dtype",
        "attention",
        "moe_dispatch",
        "remat",
        "residual",
        "residual_gradient",
        "unmasked_blocks",
    ),
    "init_std",
)


def reference_arguments(config: DiTConfig) -> dict[str, Any]:
    """Translates a config to the arguments of the reference's constructor."""
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
    _require_torch("; or compare with a recorded file: --activations")
    import torch  # pyright: ignore[reportMissingImports]  # an extra that only this file needs

    model = _make_model(folder, config, state_dict)
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


def _require_torch(other: str = "") -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "expected PyTorch for a comparison with the reference, found none; install it "
            f"(pip install torch einops){other}"
        )


def check(folder: Path) -> None:
    """Raises UserError where there is no torch, or no checkout in the folder."""
    _require_torch()
    _require_checkout(folder)


def _require_checkout(folder: Path) -> None:
    if not (folder / "micro_diffusion" / "models" / "dit.py").is_file():
        raise UserError(
            f"expected micro_diffusion/models/dit.py in {folder}, found none; give --reference the "
            "folder of a checkout of the PyTorch reference"
        )


def _make_model(folder: Path, config: DiTConfig, state_dict: Mapping[str, np.ndarray]) -> Any:
    import torch  # pyright: ignore[reportMissingImports]  # an extra that only this file needs

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
    return model


class ReferenceWork:
    """The reference's network, to be timed beside ours: float32 on the CPU, else autocast.

    Its training step is the recipe's: EDM loss on kept patches, the gradient's norm clipped, and
    torch.optim.AdamW as the reference's configurations name it, with PyTorch's own defaults.
    """

    def __init__(
        self,
        folder: Path,
        config: DiTConfig,
        state_dict: Mapping[str, np.ndarray],
        device: str = "cpu",
    ):
        """Loads the weights; they must be the caller's to write.

        Args:
          device: "cpu", or "cuda", where matmuls are bfloat16 as in the reference's recipe.
        Raises:
          UserError: no torch, or no checkout in the folder.
        """
        _require_torch()
        import torch  # pyright: ignore[reportMissingImports]  # an extra that only this file needs

        self._torch, self._config = torch, config
        self._device = device
        self._model = _make_model(folder, config, state_dict).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=2.4e-4, weight_decay=0.1)

    def set_threads(self, count: int) -> None:
        """Sets the number of processor threads that PyTorch computes with."""
        self._torch.set_num_threads(count)

    def _tensors(self, *arrays: np.ndarray) -> list[Any]:
        """Converts our arrays: latents become channels-first, captions get one more axis."""
        x, *rest, y = (self._torch.from_numpy(np.array(a)).to(self._device) for a in arrays)
        return [x.movedim(-1, 1).contiguous(), *rest, y[:, None]]

    def train_step(
        self, x: Float[np.ndarray, "n h w c"], y: Float[np.ndarray, "n l d"], mask_ratio: float
    ) -> float:
        """Trains one step on latents x (n, h, w, channels) and captions y; returns the loss."""
        torch = self._torch
        latents, captions = self._tensors(x, y)
        self._model.train()
        sigma = torch.exp(torch.randn(len(latents), 1, 1, 1, device=self._device) * 1.2 - 0.6)
        noisy = latents + torch.randn_like(latents) * sigma
        out = self._denoise(noisy, sigma, captions, mask_ratio=mask_ratio)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        error = (weight * (out["sample"] - latents) ** 2).mean(dim=1)
        patches = torch.nn.functional.avg_pool2d(error, self._config.patch_size).flatten(1)
        kept = torch.ones_like(patches) if out["mask"] is None else 1 - out["mask"]
        loss = ((patches * kept).sum(dim=1) / kept.sum(dim=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 0.25)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _denoise(self, x: Any, sigma: Any, y: Any, **options: Any) -> dict[str, Any]:
        total = sigma**2 + SIGMA_DATA**2
        on_cpu = self._device == "cpu"
        with self._torch.autocast(self._device, self._torch.bfloat16, enabled=not on_cpu):
            out = self._model(x / total.sqrt(), (sigma.log() / 4).flatten(), y, **options)
        sample = SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * out["sample"]
        return out | {"sample": sample}

    def forward(
        self,
        x: Float[np.ndarray, "n h w c"],
        t: Float[np.ndarray, " n"],
        y: Float[np.ndarray, "n l d"],
    ) -> Float[np.ndarray, "n h w c"]:
        """Evaluates the network without masking: (n, h, w, channels)."""
        with self._torch.inference_mode():
            out = self._model(*self._tensors(x, t, y))["sample"]
        return out.movedim(1, -1).cpu().numpy()

    def sampler(
        self,
        x: Float[np.ndarray, "n h w c"],
        y: Float[np.ndarray, "n l d"],
        sigmas: Float[np.ndarray, " steps"],
        guidance: float,
    ) -> Float[np.ndarray, "n h w c"]:
        """Samples by Heun's method with guidance, from standard normal x (n, h, w, channels)."""
        torch = self._torch
        noise, captions = self._tensors(x, y)
        with torch.inference_mode():
            sample = noise.double() * sigmas[0]
            for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
                slope = self._slope(sample, sigma, captions, guidance)
                x_next = sample + (following - sigma) * slope
                if i < len(sigmas) - 2:
                    second = self._slope(x_next, following, captions, guidance)
                    x_next = sample + (following - sigma) * (slope + second) / 2
                sample = x_next
        return sample.movedim(1, -1).cpu().numpy()

    def _slope(self, x: Any, sigma: float, y: Any, guidance: float) -> Any:
        torch = self._torch
        level = torch.full((1, 1, 1, 1), sigma, dtype=torch.float32, device=self._device)
        D_x = self._denoise(x.float(), level, y, cfg=guidance)["sample"]
        return (x - D_x.double()) / sigma


def _sub_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields every child with parameters, and every block of the two lists of blocks."""
    for name, child in model.named_children():
        if name in ("blocks", "patch_mixer"):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(child))
        elif not name.startswith("patch_mixer_map"):
            yield name, child


def _import_reference(folder: Path) -> types.ModuleType:
    _require_checkout(folder)
    stand_ins = {name: _empty_module(name) for name in UNUSED}
    try:
        import timm.models.vision_transformer  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception:  # absent, or beside a torchvision that is none of this torch (RuntimeError)
        names = ("timm", "timm.models", "timm.models.vision_transformer")
        stand_ins |= {name: types.ModuleType(name) for name in names}
        vars(stand_ins[names[-1]])["PatchEmbed"] = _patch_embed_class()
    with (
        unittest.mock.patch.dict(sys.modules, stand_ins),
        unittest.mock.patch.object(sys, "path", [str(folder.absolute()), *sys.path]),
    ):
        return importlib.import_module(MODULE)


def _empty_module(name: str) -> types.ModuleType:
    """Makes a module in which every name is an empty class."""

    def make_class(attribute: str) -> type:
        if attribute.startswith("__"):  # Python looks for some itself, such as __file__
            raise AttributeError(attribute)
        return type(attribute, (), {})

    module = types.ModuleType(name)
    vars(module)["__getattr__"] = make_class
    return module


def _patch_embed_class() -> type:
    import torch  # pyright: ignore[reportMissingImports]  # an extra that only this file needs

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

"""Describes this machine: packages, a device, PyTorch with CUDA, the reference, golden files."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from microdit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
OLDEST_JAX = (0, 8)
# What the parts import, by the names that pip knows them by.
PACKAGES = {
    "absl": "absl-py",
    "einops": "einops",
    "flax": "flax",
    "fsspec": "fsspec",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "jaxtyping": "jaxtyping",
    "matplotlib": "matplotlib",
    "ml_collections": "ml_collections",
    "numpy": "numpy",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "safetensors": "safetensors",
}
# Why a part is skipped, for what it needs.
NEEDS = {
    "golden": "the golden files are not there",
    "torch_cuda": "no PyTorch that sees a CUDA device",
    "reference": "no checkout of the PyTorch reference; name one with --reference",
}
_DEVICE = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "kind": device.device_kind,
                  "count": jax.device_count()}))
"""
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"version": torch.__version__, "cuda": cuda,
                  "kind": torch.cuda.get_device_name(0) if cuda else ""}))
"""


def check_packages() -> dict[str, str]:
    """Returns the versions of the packages that all parts need.

    Raises:
      UserError: some are missing, all of which it names, or JAX is too old.
    """
    missing = [pip for name, pip in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"expected packages that are not on this machine: {', '.join(missing)}; pip install "
            f"{' '.join(missing)}"
        )
    version = importlib.metadata.version("jax")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_JAX:
        raise UserError(f"expected JAX 0.8 or newer, found {version}; pip install -U jax")
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def describe(platform: str, reference: Path | None, golden: Path) -> dict[str, Any]:
    """Describes the machine: its device, its PyTorch or None, and what is missing of NEEDS.

    Args:
      platform: "gpu", or "cpu" to try the check itself.
      reference: a checkout of the reference, or None.
      golden: the folder of golden files.
    Raises:
      UserError: JAX finds no such device.
    """
    device = _asked(_DEVICE, platform)
    if "platform" not in device or device["platform"] != platform:
        raise UserError(
            f"expected a {platform} that JAX can use, found "
            f"{device.get('platform') or device['error']}; install jax[cuda12] or jax[cuda13], "
            "or try the check itself with --platform=cpu --network=small"
        )
    torch = None
    if importlib.util.find_spec("torch") is not None:
        torch = _asked(_TORCH, platform)
    missing = []
    if not golden.is_dir():
        missing.append("golden")
    if torch is None or not torch.get("cuda"):
        missing.append("torch_cuda")
    if reference is None:
        missing.append("reference")
    return {"device": device, "torch": torch, "missing": missing, "commit": _commit()}


def _asked(code: str, platform: str) -> dict[str, Any]:
    """Runs code in a process of its own, so that this one opens no device."""
    from microdit_jax.files import parse_json  # needs packages, which are looked for first

    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(platform),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or ["nothing said why"])[-1][:300]}
    return parse_json(found.stdout.strip().splitlines()[-1])


def environment(platform: str) -> dict[str, str]:
    """Returns the environment of the parts' processes: this checkout, one device of a platform."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    if platform == "cpu":
        kept["JAX_PLATFORMS"] = "cpu"
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | ({} if platform == "cpu" else {"CUDA_VISIBLE_DEVICES": _first_gpu()})


def _first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def _commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"

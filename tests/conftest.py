"""Eight simulated devices, strict types and shapes, and the golden files of the reference."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Processes that tests start import this checkout, not another one that may be installed.
ROOT = pathlib.Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile hundreds of programs and run each once: less of the compile time, slower
    # code. A train step on eight devices takes 10 s of a core with the new emitters of fusions,
    # 4 s with the old ones.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
)

from jaxtyping import install_import_hook  # noqa: E402

# Before anything of ours is imported: every jaxtyping annotation is checked at run time.
install_import_hook(["microdit_jax", "convert"], "beartype.beartype")

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Programs that several tests, or the last run, compiled already.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "microdit_jax" / "tests")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def relative_l2(found, expected) -> float:
    """|found - expected| / |expected| in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class GoldenDiT:
    """One recorded reference network: config, parameters, and arrays as ours has them."""

    def __init__(self, name: str):
        from microdit_jax.models.dit import DiT, DiTConfig

        with np.load(GOLDEN / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.config = DiTConfig(**json.loads(str(self.arrays["config"])))
        self.model = DiT(self.config)
        self.params = self.tree("state_dict/")

    def tree(self, prefix: str):
        """Parameters stored under `prefix`; buffers missing there are the network's own."""
        from microdit_jax.convert.dit import from_torch

        tensors = {
            k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)
        }
        for buffer in ("pos_embed", "mask_token"):
            tensors.setdefault(buffer, self.arrays[f"state_dict/{buffer}"])
        return jax.tree.map(jnp.asarray, from_torch(tensors, self.config))

    def __getitem__(self, key: str) -> jax.Array:
        """An array; images channels last, captions without the reference's singleton axis."""
        value = self.arrays[key]
        if key == "y":
            value = value[:, 0]
        elif value.ndim == 4:
            value = np.moveaxis(value, 1, -1)
        return jnp.asarray(value)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.arrays if key.startswith(prefix)]


@functools.cache
def tiny_model():
    """A network with every part of the real one, small enough to train in a test; never changed."""
    from microdit_jax.models.dit import DiT, DiTConfig

    return DiT(
        DiTConfig(
            input_size=8, in_channels=4, dim=32, depth=2, head_dim=8, multiple_of=16,
            caption_channels=24, patch_mixer_depth=2, patch_mixer_dim=16,
            patch_mixer_mlp_ratio=2.0, use_bias=False, num_experts=4, expert_capacity=2.0,
        )
    )  # fmt: skip


@functools.cache
def load_golden(name: str) -> GoldenDiT:
    return GoldenDiT(name)


@pytest.fixture(params=["dit_small", "dit_mixer_same_dim", "dit_16ch_interp2"])
def golden(request) -> GoldenDiT:
    return load_golden(request.param)


@pytest.fixture
def golden_small() -> GoldenDiT:
    return load_golden("dit_small")


@pytest.fixture
def files(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with a tiny model's dit.pt, clip/ and vae/ as people have them, and a cache."""
    from support.model_files import write_files

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_files(tmp_path)
    return tmp_path


LARGE = 1_200_000_000  # bytes of a worker, from which it gives back what it can


@pytest.fixture(autouse=True)
def forget_programs():
    """Frees compiled programs where a worker has many: it would grow to several GB of them."""
    yield
    with contextlib.suppress(OSError, AttributeError):  # Linux with glibc alone
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > LARGE:
            jax.clear_caches()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)

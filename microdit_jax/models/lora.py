"""Low-rank adapters of a frozen network (LoRA, arXiv 2106.09685): W + alpha / rank * A @ B."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from microdit_jax.errors import UserError, visible
from microdit_jax.trees import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Lora:
    """Choice of the matrices that are adapted, and the form of their adapters.

    The experts' matrices and their gate are none of them: those are stacked and split over devices,
    and what the gate chooses stays as it was.

    Attributes:
      rank: columns of A and rows of B.
      alpha: scale of the product, over the rank.
      targets: modules whose matrices are adapted, by their names in the network, such as "attn",
        "cross_attn", "mlp", "adaLN_modulation_1".
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def paths(self, params: Any) -> list[str]:
        """Returns the paths of the adapted matrices.

        Raises:
          UserError: a target that names no matrix, or a rank that a matrix does not have.
        """
        shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
        chosen = {
            path: [target for target in self.targets if target in path.split("/")]
            for path, shape in shapes.items()
            if path.endswith("/kernel") and len(shape) == 2 and "gate" not in path.split("/")
        }
        for target in self.targets:
            if not any(target in found for found in chosen.values()):
                names = sorted({part for path in chosen for part in path.split("/")[:-1]})
                raise UserError(
                    f"lora.targets must name modules with a matrix, found {target!r}; there are "
                    f"{', '.join(names)}"
                )
        paths = [path for path, found in chosen.items() if found]
        if small := [path for path in paths if min(shapes[path]) < self.rank]:
            raise UserError(
                f"lora.rank must be at most the sides of each matrix, found {self.rank} for "
                f"{small[0]} {shapes[small[0]]}"
            )
        return paths

    def init(self, params: Any, key: PRNGKeyArray) -> dict[str, Any]:
        """Makes adapters that change nothing yet: A is random, B is zero.

        Args:
          params: the network's weights, or their shapes.
        Returns:
          A tree with {"a": (in, rank), "b": (rank, out)}, float32, in place of each matrix.
        """
        shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
        adapters = {}
        for number, path in enumerate(self.paths(params)):
            rows, columns = shapes[path]
            normal = jax.random.normal(jax.random.fold_in(key, number), (rows, self.rank))
            adapters[f"{path}/a"] = normal * rows**-0.5
            adapters[f"{path}/b"] = jnp.zeros((self.rank, columns))
        return unflatten(adapters)

    def merge(self, params: Any, adapters: Any) -> Any:
        """Returns the network's weights with the adapters' products added, each of its own type."""
        merged, low = flatten(params), flatten(adapters)
        for path in self.paths(params):
            a, b = low[f"{path}/a"], low[f"{path}/b"]
            product = jnp.matmul(a, b, preferred_element_type=jnp.float32)
            weight = merged[path].astype(jnp.float32) + self.alpha / self.rank * product
            merged[path] = weight.astype(merged[path].dtype)
        return unflatten(merged)


# Compiled once for each choice of adapters, however often a run evaluates.
merged = jax.jit(Lora.merge, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Record of the network that adapters belong to, kept beside them.

    Attributes:
      base: name or path of the network.
      weights: sha256 of its weights.
    """

    base: str
    weights: str
    lora: Lora

    @classmethod
    def from_dict(cls, found: Any, where: str) -> "Adapted | None":
        """Reads what a model's config.json says; None where it has no adapters.

        Args:
          where: the file, for errors.
        Raises:
          UserError: something else than such a record.
        """
        if found is None:
            return None
        try:
            low = found["lora"]
            targets = tuple(str(target) for target in low["targets"])
            lora = Lora(int(low["rank"]), float(low["alpha"]), targets)
            if lora.rank < 1 or not math.isfinite(lora.alpha):
                raise ValueError("a rank below 1, or an alpha that is not finite")
            return cls(str(found["base"]), str(found["weights"]), lora)
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise UserError(
                f"expected adapters' base, weights, rank, alpha and targets in {visible(where)}, "
                f"found {type(error).__name__}: {visible(error, 100)}"
            ) from error

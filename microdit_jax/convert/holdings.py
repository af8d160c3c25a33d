"""Lists the sets of weights that a checkpoint holds, and chooses the one that is asked for.

Training programs save several networks of the same names side by side: the raw weights, a moving
average (EMA), the optimiser's moments. One of them is taken, and the others are named.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from microdit_jax.convert.formats.torch_values import LeftAside
from microdit_jax.errors import UserError, visible

RAW, EMA, OPTIMISER, OTHER = "raw weights", "moving average", "optimiser's state", "other tensors"
# Where the raw weights of a model lie, the most telling place first; "" is the checkpoint itself.
RAW_PATHS = (
    *("state.model", "state_dict", "model.state_dict", "model", "module", "net.state_dict", "net"),
    *("network", "params", "generator.state_dict", "generator", "weights", ""),
)
_EMA_KEY = re.compile(r"(.*_)?(ema|swa|averaged?|shadow)(_.*|\d*)", re.IGNORECASE)
_OPTIMISER_KEY = re.compile(r"(.*_)?(optim(izers?|isers?)?|opt)(_.*)?", re.IGNORECASE)
MAX_DEPTH = 8  # of keys that lead to weights
MAX_SHOWN = 8  # sets of weights that are listed

Tensors = Mapping[str, Any]  # of arrays, and of tensors of kinds that are not supported


class Holding(NamedTuple):
    """One set of named tensors in a checkpoint.

    Attributes:
      path: the keys that lead to it, joined by dots; "" for the checkpoint itself.
      role: RAW, EMA, OPTIMISER or OTHER.
      others: keys of what stands beside its tensors and is none.
    """

    path: str
    role: str
    tensors: Tensors
    others: list[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that can be read."""
        return sum(t.nbytes for t in self.tensors.values() if isinstance(t, np.ndarray))

    @property
    def has_weights(self) -> bool:
        """True unless it is all integers or single numbers, as random states and losses are."""
        arrays = [t for t in self.tensors.values() if isinstance(t, np.ndarray)]
        floats = (a.ndim > 0 and a.dtype.kind not in "iub" for a in arrays)
        return len(arrays) < len(self.tensors) or any(floats)

    def describe(self) -> str:
        """Describes it in a few words."""
        size = self.num_bytes
        shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
        count = f"{len(self.tensors)} tensor{'s' * (len(self.tensors) != 1)}"
        return f"{visible(self.path, 100) or 'the file itself'} ({self.role}, {count}, {shown})"


def is_tensor(value: Any) -> bool:
    """Returns True for an array, and for a tensor of a kind that is not supported."""
    return isinstance(value, np.ndarray) or (isinstance(value, LeftAside) and value.is_tensor)


def find_holdings(contents: Any) -> list[Holding]:
    """Returns all sets of named tensors in a checkpoint's contents, in the order they are saved."""
    found: list[Holding] = []
    for holding in _visit(contents, ()):
        found += _split(holding)
    return found


def _visit(value: Any, path: tuple[str, ...]) -> Iterator[Holding]:
    if len(path) > MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        if path and _OPTIMISER_KEY.fullmatch(path[-1]):
            moments = dict(_tensors_below(value, ""))
            if moments:
                yield Holding(".".join(path), OPTIMISER, moments, [])
            return
        parameters, buffers = value.get("named_parameters_dict"), value.get("named_buffers_dict")
        if isinstance(parameters, Mapping):  # Composer's average: one network in two dicts
            value = {**parameters, **(buffers if isinstance(buffers, Mapping) else {})}
        tensors = {str(key): item for key, item in value.items() if is_tensor(item)}
        if tensors:
            others = [str(key) for key in value if str(key) not in tensors]
            yield Holding(".".join(path), _role(path, tensors), tensors, others)
        children: Any = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield from _visit(child, (*path, str(key)))


def _tensors_below(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if is_tensor(value):
        yield name, value
    elif isinstance(value, Mapping | list | tuple) and depth < MAX_DEPTH:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, child in items:
            yield from _tensors_below(child, f"{name}.{key}", depth + 1)


def _role(path: tuple[str, ...], tensors: Tensors) -> str:
    if any(map(_EMA_KEY.fullmatch, path)) or "n_averaged" in tensors:  # of torch's AveragedModel
        return EMA
    return RAW if ".".join(path) in RAW_PATHS else OTHER


def _split(holding: Holding) -> list[Holding]:
    """Takes an average out of a set of tensors that has it under the first part of their names."""
    tops = {name.split(".")[0] for name in holding.tensors if "." in name}
    averages = sorted(top for top in tops if _EMA_KEY.fullmatch(top))
    if holding.role not in (RAW, OTHER) or not averages:
        return [holding]
    rest = {n: t for n, t in holding.tensors.items() if n.split(".")[0] not in averages}
    parts = [holding._replace(tensors=rest)] if rest else []
    for top in averages:
        path = f"{holding.path}.{top}" if holding.path else top
        parts.append(Holding(path, EMA, _below(holding.tensors, top), []))
    return parts


def _below(tensors: Tensors, prefix: str) -> dict[str, Any]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def choose(holdings: list[Holding], weights: str | None, path: str) -> Holding | None:
    """Chooses the set of weights to convert; None if the checkpoint has no tensors by name.

    Args:
      weights: "model" for the raw weights, "ema" for their average, or keys joined by dots; None
        takes the raw weights, or the only ones there are.
      path: the checkpoint, for errors.
    Raises:
      UserError: there are none such, or several.
    """
    if not holdings:
        return None
    of_role = {role: [h for h in holdings if h.role == role] for role in (RAW, EMA, OTHER)}
    raw = sorted(of_role[RAW], key=lambda h: (not h.has_weights, RAW_PATHS.index(h.path)))
    networks = [h for h in of_role[EMA] + of_role[OTHER] if h.has_weights]
    if weights in (None, "model") and raw and (raw[0].has_weights or not networks):
        return raw[0]
    if weights is None:
        networks = networks or of_role[OTHER]
        found = [h for h in networks if not h.path] or networks  # of the file itself first
    elif weights in ("model", "ema"):
        found = of_role[EMA] if weights == "ema" else of_role[OTHER]
        found = [holding for holding in found if holding.has_weights]
    else:
        found = _at(holdings, weights)
    if len(found) == 1:
        return found[0]
    wanted = f"weights under {visible(weights, 100)}" if weights else "the weights of one network"
    raise UserError(
        f"expected {wanted} in {visible(path)}, found {list_holdings(holdings) or 'none'}; "
        "choose by python -m convert --weights=model, ema or KEY.PATH"
    )


def _at(holdings: list[Holding], keys: str) -> list[Holding]:
    """Finds the weights at a path of keys, the last of which may begin the names of tensors."""
    exact = [holding for holding in holdings if holding.path == keys]
    below = [holding for holding in holdings if holding.path.startswith(f"{keys}.")]
    within = []
    for holding in holdings:
        if not holding.path or keys.startswith(f"{holding.path}."):
            prefix = keys.removeprefix(f"{holding.path}.") if holding.path else keys
            if tensors := _below(holding.tensors, prefix):
                within.append(Holding(keys, holding.role, tensors, []))
    return exact or within or below


def list_holdings(holdings: list[Holding]) -> str:
    """Describes sets of weights, each with its size."""
    shown = [holding.describe() for holding in holdings if holding.has_weights]
    more = [f"{len(shown) - MAX_SHOWN} more"] if len(shown) > MAX_SHOWN else []
    return ", ".join(shown[:MAX_SHOWN] + more)


def describe_choice(chosen: Holding, holdings: list[Holding]) -> list[str]:
    """Says in one line which weights are taken and what else is there; nothing if that is clear."""
    others = [h for h in holdings if h is not chosen and h.path != chosen.path and h.has_weights]
    if not others and not chosen.path and chosen.role != EMA:
        return []
    rest = f"; also in the file: {list_holdings(others)}" if others else ""
    averages = sum(holding.role == EMA for holding in others)
    takes = averages == 1 and chosen.role != EMA
    hint = "; python -m convert --weights=ema takes the average" if takes else ""
    return [f"weights taken from {chosen.describe()}{rest}{hint}"]

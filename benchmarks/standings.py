"""Tables and plots of a race: intervals over the seeds, and operations until a loss is reached."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

# A run's result, as benchmarks.race.measure writes it
Result = Mapping[str, Any]
# Student's t, two-sided 95 %, by number of seeds
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds and half its 95 % confidence interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """The interval of Student's t; infinitely wide for one value."""
        mean, n = float(np.mean(values)), len(values)
        if n < 2:
            return cls(mean, math.inf)
        t = T_95.get(n, 2.3)
        return cls(mean, float(t * np.std(values, ddof=1) / n**0.5))

    def __str__(self) -> str:
        return (
            f"{self.mean:.4g} ± {self.half:.2g}" if math.isfinite(self.half) else f"{self.mean:.4g}"
        )

    def against(self, other: "Interval") -> str:
        """Says whether this is lower than another, "no difference" where the two overlap."""
        if not math.isfinite(self.half + other.half):
            return "one seed"
        if abs(self.mean - other.mean) <= self.half + other.half:
            return "no difference"
        return "lower" if self.mean < other.mean else "higher"


def reached(results: Sequence[Result], loss: float, *, own: bool = True) -> float | None:
    """Returns the operations after which the seeds' mean loss is `loss`; None if it never is.

    Between two evaluations on a straight line.

    Args:
      own: also count the optimiser's own operations.
    """
    flops_at, by_seed = curves(results, own=own)
    losses = by_seed.mean(0)
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(flops_at[0])
    part = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(flops_at[i - 1] + part * (flops_at[i] - flops_at[i - 1]))


def curves(
    results: Sequence[Result], *, own: bool = True
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, "seeds p"]]:
    """Returns the operations and the losses at each evaluation."""
    flops_at = [
        point["network_flops"] + own * point["optimizer_flops"] for point in results[0]["curve"]
    ]
    losses = [[point["right"] for point in result["curve"]] for result in results]
    return np.array(flops_at, float), np.array(losses, float)


def paired(results: Sequence[Result], others: Sequence[Result]) -> Interval:
    """The interval of the differences in final loss between runs of the same seed."""
    finals = [{each["seed"]: each["curve"][-1]["right"] for each in of} for of in (results, others)]
    seeds = finals[0].keys() & finals[1].keys()
    return Interval.of([finals[0][seed] - finals[1][seed] for seed in sorted(seeds)])


def table(found: Mapping[str, Sequence[Result]], rivals: Mapping[str, str]) -> str:
    """Returns the results as Markdown.

    Args:
      rivals: the candidate that each one is compared with; the first if that one is not there.
    """

    def of(results, *path):
        values = []
        for result in results:
            value: Any = result
            for key in path:
                value = value[key]
            values.append(value)
        return Interval.of(values)

    yardstick = next(iter(found))
    first = found[yardstick]
    figures: dict[str, tuple[str | int, ...]] = {
        "loss, right": ("curve", -1, "right"),
        "loss, shuffled": ("curve", -1, "shuffled"),
        "ratio": ("curve", -1, "ratio"),
    }
    if all("frechet_small" in result["scores"] for each in found.values() for result in each):
        figures["frechet_small"] = ("scores", "frechet_small")
    head = ["candidate", "seeds", "steps", "rate", *figures, "loss against", "of the same seed"]
    head += ["optimiser's operations", "operations to that loss", "the network's alone"]
    head.append("s a step")
    rows = [head, ["---"] * len(head)]
    for name, results in found.items():
        last = results[0]["curve"][-1]
        row = [name, str(len(results)), "+".join(map(str, results[0]["parts"]))]
        row.append(f"{results[0]['rate']:.3g}")
        row += [str(of(results, *path)) for path in figures.values()]
        rival = rivals[name] if rivals[name] in found else yardstick
        other = found[rival]
        loss, target = (of(each, "curve", -1, "right") for each in (results, other))
        same = name == rival
        row += (
            ["", ""] if same else [f"{loss.against(target)}: {rival}", str(paired(results, other))]
        )
        row.append(f"{last['optimizer_flops'] / last['network_flops']:+.0%}")
        for own in (True, False):
            needed, whole = reached(results, target.mean, own=own), curves(other, own=own)[0][-1]
            row.append("not reached" if needed is None else f"{needed / whole:.2f}x")
        row.append(f"{np.median([result['seconds_per_step'] for result in results]):.2f}")
        rows.append(row)
    levels = list(first[0]["curve"][-1]["by_sigma"])
    by_level = [["candidate", *(f"sigma {level}" for level in levels)]]
    by_level.append(["---"] * len(by_level[0]))
    for name, results in found.items():
        cells = []
        for level in levels:
            values = [result["curve"][-1]["by_sigma"][level] for result in results]
            cells.append("" if None in values else str(Interval.of(values)))
        by_level.append([name, *cells])
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in part) for part in (rows, by_level)]
    return "\n\n".join(parts) + "\n"


def plot(found: Mapping[str, Sequence[Result]]) -> bytes:
    """Returns a PNG: held-out loss against operations, with the seeds' lowest and highest."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained", dpi=110)
    panel = figure.subplots()
    for i, (name, results) in enumerate(found.items()):
        flops_at, losses = curves(results)
        color, style, at = f"C{i % 10}", "-" if i < 10 else "--", flops_at / 1e12
        panel.plot(at, losses.mean(0), marker="o", ms=3, color=color, ls=style, label=name)
        panel.fill_between(at, losses.min(0), losses.max(0), color=color, alpha=0.2)
    panel.set_xlabel("TFLOP, the optimiser's included")
    panel.set_ylabel("held-out loss, right captions")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()

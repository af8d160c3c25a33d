"""The cost of a small training step, by its HLO, must not grow by 5 % unnoticed.

After a meant change: python tests/test_xla_budget.py
"""

import json
import pathlib
import sys

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    import conftest  # noqa: F401  (eight devices)

import pytest

from configs import res_256_pretrain
from microdit_jax.xla import topologies
from microdit_jax.xla.aot import analysis

BUDGET = pathlib.Path(__file__).parent / "golden" / "xla_budget.json"
TOLERANCE = 1.05


def small_step() -> dict:
    """The report of a step with a block of each kind, on all three axes of the mesh."""
    config = res_256_pretrain.get_config("runlocal,mesh=2x2x2")
    config.model.options.update(
        depth=2, qkv_multipliers=(1.0, 1.0), ffn_multipliers=(1.0, 1.0), remat="block"
    )
    config.train.batch_size = 16
    return analysis.analyse(analysis.CompileRequest(config, topologies.get("cpu:8"), "small"))


def costs(found: dict) -> dict[str, float]:
    """Figures that are watched: operations, memory, collectives by kind."""
    collectives = {
        f"{kind} {what}": entry[what]
        for kind, entry in found["collectives"].items()
        for what in ("instructions", "bytes")
    }
    return {"flops": found["flops"], "peak bytes": found["memory"]["peak"], **collectives}


def exceeded(found: dict[str, float], budget: dict[str, float]) -> list[str]:
    """Lists the figures that are more than 5 % above their budget, or new."""
    return [
        f"{name}: {value:.0f}, budget {budget.get(name, 0):.0f}"
        for name, value in found.items()
        if value > TOLERANCE * budget.get(name, 0)
    ]


@pytest.mark.slow
def test_the_small_step_keeps_to_its_budget(record_property):
    found, budget = small_step(), json.loads(BUDGET.read_text())
    # Told and not tested: they are the machine's as much as the program's.
    for name in ("trace_seconds", "compile_seconds"):
        record_property(name, found[name])
        print(f"{name}: {found[name]:.1f}")
    assert not exceeded(costs(found), budget)
    # Of XL/2 it is 0.99 to 1; here the inputs' gradients, which nobody needs, are a larger share.
    assert 0.9 < found["flops_over_analytic"] < 1
    # Weights travel once.
    assert found["weight_communication"]["ratio"] == pytest.approx(1, abs=0.01)
    # One layer of experts: there and back; forward, again for remat, and backward.
    assert found["collectives"]["all-to-all"]["runs"] == 6


def test_five_percent_more_is_noticed():
    budget = json.loads(BUDGET.read_text())
    for name, value in budget.items():
        assert not exceeded(budget | {name: value * 1.04}, budget)
        assert exceeded(budget | {name: value * 1.06}, budget), name
    assert exceeded(budget | {"collective-permute instructions": 1}, budget)


if __name__ == "__main__":
    step = small_step()
    BUDGET.write_text(json.dumps(costs(step), indent=1) + "\n")
    print(f"traced in {step['trace_seconds']:.1f} s, compiled in {step['compile_seconds']:.1f} s")

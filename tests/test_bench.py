"""The benchmark's flags, its figures on the smallest network, and the loader's."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from conftest import tiny_model

from benchmarks.against_reference import reference_work
from microdit_jax.errors import UserError
from microdit_jax.xla.bench import __main__ as bench
from microdit_jax.xla.bench import loader, rows, timing, workloads
from microdit_jax.xla.bench.workloads import Size, Variant

CHOICES = {
    "attention": ("xla", "looped"),
    "moe_dispatch": ("gather", "onehot"),
    "remat": ("none", "block", "dots"),
    "dtype": ("float32",),
    "micro_batches": (1, 2),
    "expert": (1,),
}


def test_a_grid_has_only_what_matters():
    assert len(list(workloads.grid("train_step", CHOICES))) == 2 * 2 * 3 * 2
    assert [v.moe_dispatch for v in workloads.grid("moe", CHOICES)] == ["gather", "onehot"]
    with pytest.raises(UserError, match="--attention takes xla, looped on this cpu, found cudnn"):
        list(workloads.grid("attention", CHOICES | {"attention": ("cudnn",)}))


def test_turns_are_compared_pair_by_pair():
    """The ratio of the medians would be 0.5; the machine was busy in the second turn."""
    ours, theirs = timing.Timed(np.array([1.0, 8.0, 2.0])), timing.Timed(np.array([4.0, 8.0, 2.0]))
    over = ours.over(theirs)
    assert over == {"median": 1.0, "lowest": 0.25, "highest": 1.0, "of_lowest": 0.5}
    assert ours.summary() == {"median": 2.0, "lowest": 1.0, "spread": 1.75}
    calls = []
    found = timing.take_turns([lambda: calls.append(0), lambda: calls.append(1)], repeats=2)
    assert calls == [0, 1] * 3 and [len(timed.seconds) for timed in found] == [2, 2]


@pytest.mark.parametrize("what", workloads.NAMES)
def test_each_work_is_measured(what, tmp_path):
    size = Size(batch=16, images=8, sampler_steps=2)
    variant = Variant(attention="looped", expert=2 if what == "train_step" else 1)
    options = rows.TimingOptions(2, 1, dump=tmp_path / "dump" if what == "moe" else None)
    row = rows.measure(what, tiny_model().config, size, variant, options)
    assert row["seconds"]["lowest"] > 0 and row["compile_seconds"] > 0
    assert row["operations"] > 0 and row["memory"]["temporaries"] > 0
    assert what in rows.line(row)
    report = rows.new("Tiny_2", 8, size) | {"rows": [row]}
    assert set(report["cpu"]) == {"name", "vectors"}
    rows.write(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["what"] == what
    assert (tmp_path / "report.png").stat().st_size > 1000
    if what == "moe":
        folder = tmp_path / "dump" / "moe_gather_float32"
        assert "ENTRY" in (folder / "optimised_hlo.txt").read_text()
        assert list(folder.rglob("*.xplane.pb"))


def test_rates_are_compared_on_one_device(monkeypatch):
    """Eight devices at work for 2 s against one matmul of 1 s."""
    config, size = tiny_model().config, Size(batch=8)

    def take_turns(works, *, repeats, warm_up):
        assert (len(works), repeats, warm_up) == (3, 5, 2)
        return [timing.Timed(np.full(5, seconds)) for seconds in (2.0, 1.0, 4.0)]

    monkeypatch.setattr(timing, "take_turns", take_turns)
    monkeypatch.setattr(timing, "matmul", lambda dtype: (lambda: None, 1000))
    work = workloads.Workload(lambda: None, 8000, jax.jit(abs).lower(1.0).compile(), 3.0)
    monkeypatch.setitem(workloads.COMPILE, "attention", lambda *_: work)
    options = rows.TimingOptions(5, 2, reference=lambda *_: lambda: None)
    row = rows.measure("attention", config, size, Variant(), options)
    assert row["matmul_operations_per_second"] == 1000
    assert row["share_of_matmul"] == 0.5  # 8000 operations in 2 s on 8 devices
    assert row["seconds"]["median"] == 2 and row["reference_seconds"]["median"] == 4
    assert row["over_reference"]["median"] == 0.5


def test_the_reference_needs_a_checkout(tmp_path):
    with pytest.raises(UserError, match="expected (PyTorch|micro_diffusion/models/dit.py)"):
        reference_work(tmp_path, "forward", tiny_model().config, Size())
    assert reference_work(tmp_path, "moe", tiny_model().config, Size()) is None


def test_another_implementation_takes_turns_with_ours():
    calls = []

    def reference(what, config, size):
        return None if what == "moe" else lambda: calls.append((what, size.images))

    options = rows.TimingOptions(repeats=2, warm_up=1, reference=reference)
    size, config = Size(batch=8, images=2, sampler_steps=1), tiny_model().config
    row = rows.measure("attention", config, size, Variant(), options)
    assert calls == [("attention", 2)] * 3
    assert row["over_reference"]["median"] > 1  # nothing is quicker than an append
    assert "x reference" in rows.line(row)
    assert "over_reference" not in rows.measure("moe", config, size, Variant(), options)


def test_the_loader_says_what_a_step_waits():
    found = loader.measure_all(
        loader.LoaderOptions(None, 64, 256, 8, (1,), 0.05, 100.0, False, None)
    )
    assert all(speed > 0 for speed in found.pop("order alone").values())
    assert set(found) == {"MDS", "ArrayRecord"}
    for figures in found.values():
        assert figures["pipeline, 1 threads, records/s"] > 0
        assert 0 <= figures["data wait at 100 images/s, percent"] <= 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--what=speed"], "--what takes train_step, forward, sampler, moe, attention, loader"),
        (["--moe=ragged"], "--moe takes gather, onehot, found ragged"),
        (["--micro_batches=two"], "--micro_batches takes whole numbers, found two"),
        (["--what=sampler", "--images=4"], "--images must be a multiple of 8 devices, found 4"),
        (["--what=loader", "--input=x", "--library_python=y"], "found --input=x too; leave one"),
        (["--batch_size=9"], "--batch_size must be a multiple of 8 devices"),
        (["--what=loader", "--seconds=nan"], "--seconds must be a finite number, found nan"),
        (["--what=loader", "--seconds=0"], "--seconds must be above 0, found 0"),
        (["--what=loader", "--images_per_second=nan"], "--images_per_second must be a finite"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(arguments)
    flags.FLAGS.unparse_flags()
    names = ("what", "moe", "micro_batches", "batch_size", "images", "input", "library_python")
    for name in (*names, "seconds", "images_per_second"):
        flags.FLAGS[name].unparse()

"""Reports of compiled programs: figures, extrapolation over depth, the search, files."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from support import counted_program
from support.counted_program import CHIP, H100, SLICES

from configs import res_256_pretrain
from microdit_jax import sharding
from microdit_jax.errors import UserError
from microdit_jax.machine import compile_options
from microdit_jax.models import dit, flops
from microdit_jax.xla import plot, roofline, topologies
from microdit_jax.xla.aot import analysis, compile, figures, programs, search, shallow, table
from microdit_jax.xla.aot.programs import Program
from microdit_jax.xla.bench import rows, workloads

COUNTS = dataclasses.replace(
    counted_program.COUNTS,
    collectives=tuple(dataclasses.replace(c, times=1) for c in counted_program.COUNTS.collectives),
)
TIME = roofline.step_time(COUNTS, CHIP, SLICES)


# ------------------------------------------------------------------------------ extrapolation
@pytest.mark.parametrize("arch", [dit.MicroDiT_XL_2, dit.MicroDiT_Tiny_2])
def test_operations_extrapolate_to_the_full_depth(arch):
    cfg = arch()
    parts = shallow.terms(cfg, 0.75, 77)
    assert all(len(p.network.mixer_blocks() + p.network.backbone_blocks()) <= 7 for p in parts)
    found = shallow.extrapolate(
        parts, lambda network: {"deep": {"flops": flops.forward_flops(network, 0.75, 77)}}
    )
    expected = flops.forward_flops(cfg, 0.75, 77)
    assert found["deep"]["flops"] == pytest.approx(expected, rel=2e-3)


def test_other_patterns_of_blocks_are_refused():
    with pytest.raises(UserError, match="leave --reduced_depth out"):
        shallow.terms(dit.MicroDiT_XL_2(experts_every_n=3), 0.75, 77)


def test_a_text_tower_is_not_compiled_along():
    config = res_256_pretrain.get_config()
    config.data.captions = "tokens"
    with pytest.raises(UserError, match="data.captions must be embeddings, found 'tokens'"):
        programs.training(config, sharding.make_mesh())


# ------------------------------------------------------------------------------ search
def searched(monkeypatch, usable: float, refused: float = 1e99) -> dict:
    """Finds in a program of 1 GB and 0.7 GB an image; a compiler refuses from `refused` on."""

    def analyse(request):
        size = request.config.train.micro_batch_size
        memory = {"arguments": 1e9, "peak": 1.5e9 + size * 7e8, "usable": usable}
        if memory["peak"] > refused:
            raise compile.DoesNotFit("too large")
        return {"memory": memory | {"fits": memory["peak"] <= usable}, "size": size}

    monkeypatch.setattr(analysis, "analyse", analyse)
    request = analysis.CompileRequest(
        res_256_pretrain.get_config(), topologies.get("cpu:8"), "stage1"
    )
    found = search.find(request)
    assert request.config.train.micro_batch_size == 256  # the caller's own is as it was
    return found


def test_find_the_largest_micro_batch(monkeypatch):
    assert list(searched(monkeypatch, usable=300e9)["tried"]) == [256]
    found = searched(monkeypatch, usable=78e9)
    assert found["size"] == 64 and list(found["tried"]) == [256, 64, 128]
    found = searched(monkeypatch, usable=78e9, refused=78e9)
    assert found["size"] == 64 and found["tried"][256] is None and len(found["tried"]) <= 4
    found = searched(monkeypatch, usable=13e9, refused=50e9)
    assert found["size"] == 16 and {16, 32} <= set(found["tried"]) and len(found["tried"]) <= 4
    assert searched(monkeypatch, usable=2.3e9)["size"] == 1
    with pytest.raises(UserError, match="not even one image"):
        searched(monkeypatch, usable=2.1e9)
    with pytest.raises(UserError, match="not even one image"):
        searched(monkeypatch, usable=9e9, refused=0)


# ------------------------------------------------------------------------------ reports
def full_report() -> dict:
    program = Program(lambda: None, 2048, 2, 10**11, 3, 0.5, {"all-gather": 4e8}, 10**9, SLICES)
    found = {
        "memory": {"arguments": 2e9, "outputs": 2e9, "aliased": 2e9, "temporaries": 8e10},
        "flops": COUNTS.flops,
        "bytes_moved": COUNTS.num_bytes,
        "kernels": 5,
        "collectives": {"all-gather": {"instructions": 1, "runs": 1, "bytes": 4.5e8}},
        "received": {"inside": 9e8, "across": 1.5e8},
        "compile_seconds": 100.0,
    }
    found = figures.complete(found, program, H100, TIME, steps=86_400)
    mesh = AbstractMesh((2, 8, 1), ("data", "fsdp", "expert"))
    return figures.header("stage1", "train_step", H100, mesh) | found


def test_what_follows_from_the_counts():
    found = full_report()
    assert not found["memory"]["fits"] and found["memory"]["peak"] == 8.2e10
    assert found["images_at_once"] == 2048 / 16 / 2
    assert found["forward_passes_expected"] == 3.5
    assert found["weight_communication"]["ratio"] == pytest.approx(1.125)
    # Kernels, and the communication that they wait for
    assert found["seconds"]["lower_bound"] == pytest.approx(7e-3)
    assert found["images_per_second"] == pytest.approx(2048 / 7e-3)
    # Recomputation is no useful work: 3 passes count, not 3.5.
    assert found["mfu_bound"] == pytest.approx(3 * 10**11 * 128 / 7e-3 / 989e12)
    assert found["seconds"]["kernels"] == pytest.approx(5e-3)
    assert found["seconds"]["exposed"] == pytest.approx(2e-3)
    assert found["seconds"]["inside"] == found["seconds"]["across"] == pytest.approx(1e-3)
    assert found["seconds"]["exposed_across"] == pytest.approx(1e-3)
    assert "1.0 ms across slices, where 0.0 are hidden" in table.render(found)
    assert found["slices"] == 2
    assert found["bytes_moved"] == pytest.approx(2 * 335e6 + 3 * 3.35e9)
    assert found["days"] == pytest.approx(7e-3)
    assert found["dollars"] == pytest.approx(7e-3 * 24 * 16 * 3.79)


@pytest.mark.parametrize("peak, fits", [(78.1e9, True), (78.2e9, False)])
def test_the_runtime_keeps_its_share_of_the_memory(peak, fits):
    """An H100 has 84.9 GB, and XLA is given 92 % of it."""
    program = Program(lambda: None, 16, 1, 10**11, 3, 0.0, {}, 10**9, SLICES)
    memory = {"arguments": 0, "outputs": 0, "aliased": 0, "temporaries": peak}
    found = figures.complete(
        figures.measure(memory, {}, COUNTS, SLICES), program, H100, None, steps=None
    )
    assert found["memory"]["fits"] is fits


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler: every program is COUNTS; the labels it was asked for."""
    labels = []

    def compile_and_count(program, topology, label, dump, keep=None):
        labels.append(label)
        memory = {"arguments": 1, "outputs": 1, "aliased": 1, "temporaries": 1}
        found = figures.measure(memory, {}, COUNTS, SLICES)
        found |= {"trace_seconds": 1.0, "compile_seconds": 10.0}
        return compile.Compiled(found, TIME, [])

    monkeypatch.setattr(analysis, "compile_and_count", compile_and_count)
    return labels


def test_a_stage_is_charged_with_its_own_steps(compiled):
    config = res_256_pretrain.get_config("mesh=1x8x1")
    topology = dataclasses.replace(H100, devices=tuple(jax.devices()))
    request = analysis.CompileRequest(config, topology, "stage1", start_step=100_000)
    found = analysis.analyse(request)
    assert compiled == ["train_step"]
    assert found["steps"] == 150_000
    assert found["days"] == pytest.approx(150_000 * 7e-3 / 86_400)


def test_extrapolated_reports_say_what_was_spent(compiled):
    """Equal programs of all depths: a block costs nothing, and the figures are those of one."""
    config = res_256_pretrain.get_config("mesh=1x8x1")
    topology = dataclasses.replace(H100, devices=tuple(jax.devices()))
    request = analysis.CompileRequest(config, topology, "stage1", reduced_depth=True)
    found = analysis.analyse(request)
    assert len(compiled) == 4 and "mixer 4, backbone 3" in compiled
    assert found["flops"] == COUNTS.flops and found["compile_seconds"] == 40.0
    assert found["seconds"]["exposed"] == pytest.approx(2e-3)
    assert found["seconds"]["inside"] == found["seconds"]["across"] == pytest.approx(1e-3)
    assert found["extrapolated"]["from"].startswith("1.00 x base")


def test_the_cache_knows_what_a_program_depends_on(monkeypatch, tmp_path):
    """Another compiler, option or flag makes another program of the same text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    monkeypatch.setattr(topologies, "_version", lambda wheel: "1.0")
    paths = [compile._cache_path(lowered, H100)]
    monkeypatch.setattr(topologies, "_version", lambda wheel: "1.1")
    paths.append(compile._cache_path(lowered, H100))
    paths.append(compile._cache_path(lowered, dataclasses.replace(H100, name="h100:32")))
    monkeypatch.setitem(compile_options.COMPILE, "cuda", {"an_option": 1})
    paths.append(compile._cache_path(lowered, H100))
    monkeypatch.setenv("XLA_FLAGS", "--a_flag")
    paths.append(compile._cache_path(lowered, H100))
    paths.append(compile._cache_path(jax.jit(lambda x: x + 2).lower(1.0), H100))
    assert len(set(paths)) == 6
    assert paths[-2] == compile._cache_path(lowered, H100)


def test_what_sharding_needs_to_communicate():
    """Equals a count by hand: half of a matrix, half of half of the experts, gradients thrice."""
    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    params = {
        "proj": {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)},
        "experts": {"w1": jax.ShapeDtypeStruct((8, 256, 512), jnp.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((64,), jnp.float32)},
    }
    specs = sharding.specs(params, mesh)
    assert "fsdp" in specs["proj"]["kernel"] and "expert" in specs["experts"]["w1"]
    received = (512 * 1024 + 8 * 256 * 512 / 2) * 1 / 2 * 4
    assert programs.needed_communication(params, None, mesh, 3) == {
        "all-gather": received,
        "reduce-scatter": 3 * received,
    }


def test_written_read_and_drawn(tmp_path):
    path = tmp_path / "new" / "stage1.json"
    table.write(full_report(), path)
    assert "DOES NOT FIT" in path.with_suffix(".txt").read_text()
    assert json.loads(path.read_text())["mesh"]["fsdp"] == 8
    plot.draw(plot.read([path, path]), tmp_path / "aot.png")
    assert (tmp_path / "aot.png").stat().st_size > 5000
    with pytest.raises(UserError, match="--out must end in one of .*png.*, found aot.xyz"):
        plot.draw(plot.read([path]), "aot.xyz")
    for other, message in (
        ({}, "expected a report"),
        ({"chip": None, "topology": "cpu:8"}, "peaks are known, found cpu:8"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=message):
            plot.read([tmp_path / "other.json"])


def test_reports_take_their_names_when_they_are_whole(tmp_path):
    """Files are replaced, not written over: a hard link to the old file keeps its contents."""
    size = workloads.Size()
    row = {"what": "moe", "variant": {"dtype": "float32"}, "seconds": {"median": 1.0}}
    path, drawn = tmp_path / "a.json", tmp_path / "b.png"
    for write, files in (
        (lambda: table.write(full_report(), path), (path, path.with_suffix(".txt"))),
        (lambda: plot.draw([full_report()], drawn), (drawn,)),
        (
            lambda: rows.write(rows.new("XL_2", 32, size) | {"rows": [row]}, path),
            (path, path.with_suffix(".png")),
        ),
    ):
        for file in files:
            file.write_text("old")
            (tmp_path / "kept").unlink(missing_ok=True)
            (tmp_path / "kept").hardlink_to(file)
            write()
            assert (tmp_path / "kept").read_text() == "old" and len(file.read_bytes()) > 100


def test_a_count_far_off_is_called_doubtful():
    reports = pathlib.Path(__file__).parent.parent / "docs" / "aot"
    found = json.loads((reports / "res_256_pretrain_h100_8.json").read_text())
    assert "DOUBTFUL" not in table.render(found)
    found["flops_over_analytic"] = 0.005
    assert "DOUBTFUL: far from the analytic count" in table.render(found)


def test_kernels_that_nobody_can_count_are_named():
    memory = {"arguments": 1, "outputs": 1, "aliased": 1, "temporaries": 1}
    counts = dataclasses.replace(COUNTS, uncounted={"my_kernel": 12})
    found = figures.measure(memory, {}, counts, SLICES)
    reports = pathlib.Path(__file__).parent.parent / "docs" / "aot"
    whole = json.loads((reports / "res_256_pretrain_h100_8.json").read_text())
    assert "WITHOUT" not in table.render(whole)
    text = table.render(whole | {"uncounted": found["uncounted"]})
    assert "WITHOUT 12 runs of the kernel my_kernel" in text

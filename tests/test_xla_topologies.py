"""Names of topologies, and compilers that are absent or of another version."""

import pytest

from microdit_jax.errors import UserError
from microdit_jax.xla import topologies


@pytest.mark.parametrize(
    "name, fix",
    [
        ("a100:8", "named like h100:8, h100:8x8, v5e:4x4"),
        ("v5e", "named like"),
        ("v5e:4x4x4", "v5e:AxB"),
        ("v5p:2x2", "v5p:AxBxC"),
        ("h100:12", "multiple"),
        ("h100:0", "h100:A"),
        ("h100:2x12", "multiple"),
        ("h100:2x2x2", "h100:NODESxA"),
        ("2*cpu:8", "one slice"),
        ("0*v5e:4x4", "at least 1"),
        ("2*v5e:4", "v5e:AxB"),
    ],
)
def test_wrong_names_say_what_was_expected(name, fix):
    with pytest.raises(UserError, match=fix):
        topologies.prepare(name)


@pytest.mark.parametrize(
    "name, same, slices, devices",
    [
        ("h100:8", "h100:8", 1, 8),
        ("h100:4", "h100:4", 1, 4),
        ("h100:64", "h100:8x8", 8, 64),
        ("h100:8x8", "h100:8x8", 8, 64),
        ("2*h100:8", "h100:2x8", 2, 16),
        ("h100:1x8", "h100:8", 1, 8),
        ("h100:2x4", "h100:2x4", 2, 8),
        ("v5p:2x2x4", "v5p:2x2x4", 1, 16),
        ("2*v5e:4x4", "2*v5e:4x4", 2, 32),
    ],
)
def test_names_of_several_slices(name, same, slices, devices):
    shape = topologies.parse_name(name)
    assert (shape.name, shape.slices, shape.devices) == (same, slices, devices)


@pytest.mark.parametrize("name", ["h100:8", "v5e:4x4"])
def test_absent_compilers_say_what_to_install(name, monkeypatch):
    monkeypatch.setattr(topologies, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"found none; pip install 'microdit_jax\[aot\]'"):
        topologies.prepare(name)


def test_a_name_the_compiler_does_not_know(monkeypatch):
    def refuse(**options):
        assert options == {"platform": "tpu", "topology_name": "v5e:3x5"}
        raise RuntimeError("INVALID_ARGUMENT: no such slice")

    monkeypatch.setattr(topologies.jax_topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match="knows no topology 'v5e:3x5'.*no such slice"):
        topologies.get("v5e:3x5")


@pytest.mark.parametrize(
    "name, options",
    [
        ("h100:64", {"platform": "cuda", "topology": "8x1x8"}),
        ("h100:2x4", {"platform": "cuda", "topology": "2x1x4"}),
        ("2*v5e:4x4", {"platform": "tpu", "topology_name": "v5e:4x4", "num_slices": 2}),
    ],
)
def test_slices_are_asked_of_the_compiler(name, options, monkeypatch):
    def check(**found):
        assert found.items() >= options.items()
        raise RuntimeError("asked")

    monkeypatch.setattr(topologies.jax_topologies, "get_topology_desc", check)
    with pytest.raises(UserError, match="asked"):
        topologies.get(name)


def test_another_libtpu_is_told():
    """A newer one compiled for half an hour what jaxlib could not read."""
    wanted = ["jaxlib==0.10.2", 'libtpu==0.0.42.*; extra == "tpu"']
    assert topologies.other_libtpu(wanted, "0.0.42") == ""
    assert topologies.other_libtpu(wanted, "0.0.42.1") == ""
    assert topologies.other_libtpu(None, "0.0.52") == ""
    for version in ("0.0.52", "0.0.420", "0.0.4"):
        warning = topologies.other_libtpu(wanted, version)
        assert f"expects libtpu 0.0.42.*, found {version}" in warning and "pip install" in warning


def test_simulated_devices():
    assert len(topologies.get("cpu:4").devices) == 4
    with pytest.raises(UserError, match="device_count=99"):
        topologies.get("cpu:99")

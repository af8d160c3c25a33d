"""The check of a GPU, tried on the CPU: every part on a small network, limits, resuming."""

import json
import pathlib
import sys

import jax
import pytest

from microdit_jax.errors import UserError
from tools.device_check import __main__ as device_check
from tools.device_check import correct, kernels, machine, page, parts, run, speed
from tools.device_check.work import Setup

ROOT = pathlib.Path(__file__).parents[1]
# A CPU has no peaks, no roofline and does not tell its memory.
NOT_ON_CPUS = {
    "mfu", "bound_ms", "over_bound", "peak_gigabytes", "matmul_bound_ms", "other_bound_ms",
    "reference_ms", "ratio", "reference_images_per_second",
}  # fmt: skip
BY_NAME = {part.name: part for part in parts.PARTS}


def found_by(work, tmp_path) -> dict:
    setup = Setup(tmp_path / "figures.json", "small", ROOT / "tests" / "golden", None, {})
    work(setup)
    written = json.loads(setup.result.read_text())
    assert written == setup.figures
    return written


def missing(name: str, found: dict) -> set[str]:
    return {figure.key for figure in BY_NAME[name].figures if found.get(figure.key) is None}


@pytest.fixture
def one_device(monkeypatch):
    """The check runs on one device, and these tests have eight."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_fused_attention(tmp_path):
    found = found_by(correct.fused_attention, tmp_path)
    assert not missing("attention", found)
    assert max(value for key, value in found.items() if "error" in key) < 1e-6


def test_the_step_and_its_kernels(tmp_path, one_device):
    found = found_by(speed.step, tmp_path)
    assert missing("step", found) == NOT_ON_CPUS & {f.key for f in BY_NAME["step"].figures}
    assert found["images"] == 1 and found["refused"] == ""
    assert found["kernels_ms"] > found["matmul_ms"] > 0 and found["other_ms"] > 0
    table = BY_NAME["step"].table
    assert table is not None
    titles = table[1]
    assert found["kernels"] and all(len(row) == len(titles) for row in found["kernels"])
    entry = {"state": "done", "seconds": 3.0, "figures": found}
    assert found["kernels"][0][0] in page.render({"parts": {"step": entry}})


def test_sampling_and_a_forward_pass(tmp_path, one_device):
    found = found_by(speed.sampling, tmp_path)
    assert missing("sampling", found) == NOT_ON_CPUS & {f.key for f in BY_NAME["sampling"].figures}
    found = found_by(speed.forward, tmp_path)
    assert not missing("tuned", found)


def test_kernels_are_known_by_the_names_that_gpus_have():
    assert kernels.plain("loop_fusion.12") == "loop_fusion_12"


# ------------------------------------------------------------------------------ the run
TELL = "import sys, json; open(sys.argv[1], 'w').write(json.dumps({'images': 3}))"
CODE = {
    "golden": TELL,
    "attention": "import time; " + TELL + "; time.sleep(60)",
    "step": "raise ValueError('no such kernel')",
    "sampling": TELL,
}


def settings(tmp_path, **changes) -> run.Settings:
    golden = ROOT / "tests" / "golden"
    found = run.Settings(tmp_path, "cpu", "small", 300.0, None, golden, {"attention": 1.5})
    return found._replace(**changes)


@pytest.fixture
def small_programs(monkeypatch):
    """Programs of one line in place of the parts' own; returns the names of those that ran."""
    ran = []

    def command(part, settings, result):
        ran.append(part.name)
        return [sys.executable, "-S", "-c", CODE[part.name], str(result)]

    here = {
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "torch": None,
        "missing": ["torch_cuda", "reference"],
        "commit": "0123abc",
    }
    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(machine, "describe", lambda *_: here)
    return ran


def test_each_part_has_its_process_and_limit(small_programs, tmp_path):
    names = ("golden", "noise", "attention", "step")
    report = run.check(settings(tmp_path), names)
    states = {name: entry["state"] for name, entry in report["parts"].items()}
    assert states == {
        "golden": "done", "noise": "skipped", "attention": "ended at its limit", "step": "failed",
    }  # fmt: skip
    assert report["parts"]["attention"]["figures"] == {"images": 3}  # told before the limit
    assert report["parts"]["step"]["why"].startswith("ValueError: no such kernel")
    assert report["parts"]["noise"]["why"] == machine.NEEDS["torch_cuda"]
    assert json.loads((tmp_path / run.REPORT).read_text()) == report
    text = (tmp_path / run.PAGE).read_text()
    assert text == page.render(report) and "no such kernel" in text

    # The same command again runs what is not done; --parts adds others.
    del small_programs[:]
    CODE["step"] = TELL
    run.check(settings(tmp_path), (*names, "sampling"))
    assert small_programs == ["attention", "step", "sampling"]

    with pytest.raises(UserError, match="report of the same network in .*give another --out"):
        run.check(settings(tmp_path, network="XL_2"), names)


def test_the_whole_run_has_a_limit(small_programs, tmp_path):
    report = run.check(settings(tmp_path, seconds=0.5), ("golden",))
    assert report["parts"]["golden"]["state"] == "not reached"


def test_golden_files_in_a_process_of_their_own(tmp_path):
    report = run.check(settings(tmp_path, limits={"golden": 250.0}), ("golden",))
    entry = report["parts"]["golden"]
    assert entry["state"] == "done", (tmp_path / "golden.log").read_text()
    found = entry["figures"]
    assert {key for key in missing("golden", found) if key.startswith("dit_small")} == set()
    assert found["dit_small/float32/relative_l2"] < 5e-5
    assert 1e-4 < found["dit_small/bfloat16/median"] < 2e-2


def test_what_is_missing_is_named_before_it_starts(tmp_path, monkeypatch):
    wanted = machine.PACKAGES | {"no_such_package": "no-such", "nor_this_one": "nor-this"}
    monkeypatch.setattr(machine, "PACKAGES", wanted)
    with pytest.raises(UserError, match="not on this machine: no-such, nor-this; pip install"):
        run.check(settings(tmp_path), parts.NAMES)
    assert not list(tmp_path.iterdir())


def test_without_the_golden_folder(small_programs, tmp_path, monkeypatch):
    here = machine.describe("cpu", None, tmp_path) | {"missing": ["golden"]}
    monkeypatch.setattr(machine, "describe", lambda *_: here)
    report = run.check(settings(tmp_path, golden=tmp_path / "none"), ("golden",))
    assert report["parts"]["golden"]["why"] == "the golden files are not there"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts=golden,speed"], "--parts takes golden, .*, found speed"),
        (["--seconds=nan"], "--seconds must be a finite number"),
        (["--reference=/nowhere"], "expected micro_diffusion/ in /nowhere, found none"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        device_check.main(arguments)


# ------------------------------------------------------------------------------ the page
def test_the_page_lists_every_figure_that_it_will_fill(capsys):
    device_check.main(["--list"])
    text = capsys.readouterr().out
    assert all(figure.text in text for part in parts.PARTS for figure in part.figures)
    docs = (ROOT / "docs" / "hardware.md").read_text()
    for part in parts.PARTS:
        assert f"`{part.name}`" in docs, part.name
        for figure in part.figures:
            assert figure.text in docs, figure.text
    assert sum(len(part.figures) for part in parts.PARTS) > 50

"""From a run's files to a page and an image."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from PIL import Image

from microdit_jax.checkpoints.run import write_run_metadata
from microdit_jax.errors import UserError
from microdit_jax.training import report

ROOT = pathlib.Path(__file__).parent.parent
LOSSES = {"right": 0.7, "shuffled": 0.9, "ratio": 0.7 / 0.9, "by_sigma": {"0.1": 2.0, "1": None}}
LINES = [
    {"step": 0, "heldout": {"raw": {"right": 1.0}}},
    {"step": 5, "loss": 0.9},
    {"step": 10, "loss": None},
    {"step": 10, "heldout": {"raw": {"right": 0.8}, "ema": LOSSES}},
    {"step": 10, "skipped": 2, "speed": {"images_per_second": 1234.5, "data_wait": 0.25}},
]


def write_run(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = {"train": {"mask_ratio": 0.75}, "model": {"options": {"input_size": 8}}}
    write_run_metadata(folder, {"config": config, "attribution": "by A, B & C"})
    return folder


def test_training_imports_no_plots_and_no_commands():
    """matplotlib takes a second, and commands bring flags of their own."""
    code = "import sys, microdit_jax.train; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    imported = result.stdout.split()
    assert "microdit_jax.training.report" in imported
    assert not {"matplotlib", "microdit_jax.commands.cli"} & set(imported)


def test_flags_are_those_of_the_command_alone():
    """Training imports the module, and so does any program of a user's with an --out of its own."""
    assert report.__name__ not in flags.FLAGS.flags_by_module_dict()


def test_series():
    assert report.series(LINES) == {
        "train": [(5, 0.9)],
        "raw": [(0, 1.0), (10, 0.8)],
        "ema": [(10, 0.7)],
    }


def test_a_panel_for_each_run(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abcd"]
    report.write(runs[:2], tmp_path / "two.png")
    report.write(runs, tmp_path / "four.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "four.png") as four:
        assert four.width == 2 * two.width and four.height == two.height
        assert len(two.convert("RGB").getcolors(two.width * two.height)) > 100


def test_the_folder_of_a_chain_shows_its_stages_in_order(tmp_path):
    chain = tmp_path / "all"
    chain.mkdir()
    for name, before in (("a_last", "{workdir}/../b"), ("b", "{workdir}/../z"), ("z", "")):
        config = json.loads((write_run(chain / name) / "config.json").read_text())
        write_run_metadata(chain / name, config | {"config": config["config"] | {
            "init_from" if name == "b" else "init_weights_from": before}})  # fmt: skip
    (chain / "notes").mkdir()
    (chain / "report.html").write_text("")
    assert [run.workdir.name for run in report.read([chain])] == ["z", "b", "a_last"]
    report.main([f"--runs={chain}", f"--out={tmp_path / 'page.html'}"])
    page = (tmp_path / "page.html").read_text()
    assert "<title>z, b, a_last</title>" in page and "min-width: 900px" in page
    assert [run.workdir.name for run in report.read([chain / "b"])] == ["b"]


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match="give --runs"):
        report.write([], tmp_path / "x.png")
    with pytest.raises(UserError, match="expected a training run"):
        report.write([tmp_path], tmp_path / "x.png")
    with pytest.raises(UserError, match="ends in .html or .png"):
        report.write([tmp_path], tmp_path / "x.pdf")
    assert list(tmp_path.iterdir()) == []
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="File exists; choose a place you may write to"):
        report.write([run], run / "metrics.jsonl" / "x.png")


def test_a_page_shows_grids_and_figures(tmp_path):
    run = write_run(tmp_path / "a & b")
    (run / "samples").mkdir()
    for step in range(0, 1200, 100):
        (run / "samples" / f"step_{step:07d}.png").write_bytes(b"")
    report.write([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    grids = re.findall(r"<img src='a &amp; b/samples/step_(\d+).png'", page)
    assert len(grids) == report.NUM_GRIDS
    assert (int(grids[0]), int(grids[-1])) == (0, 1100)
    assert "<td>a &amp; b<td>10<td>0.7000<td>0.9000<td>0.7778<td>1,234<td>2" in page
    assert "Images: by A, B &amp; C" in page
    report.write([run], run / "report.html")
    assert "<img src='samples/step_0000000.png'" in (run / "report.html").read_text()


def test_loss_by_noise_is_drawn_where_there_is_one(tmp_path):
    run = write_run(tmp_path / "a")
    (_, by_sigma, speed) = report.curves(report.read([run])).axes
    assert [line.get_xydata().tolist() for line in by_sigma.lines] == [[[0.1, 2.0]]]
    assert by_sigma.get_xscale() == "log"
    assert speed.lines[0].get_xydata().tolist() == [[10, 1234.5]]
    assert "25.0%" in speed.get_title()


@pytest.mark.parametrize(
    "line",
    [
        {"step": 1, "loss": "<script>alert(1)</script>"},
        {"step": 1, "loss": 10**400},
        {"step": 1, "loss": True},
        {"step": 1, "skipped": "<b>"},
        {"step": 1, "heldout": ["raw"]},
        {"step": 1, "heldout": {"raw": {"right": "<i>"}}},
        {"step": 1, "heldout": {"raw": {"right": 1, "by_sigma": {"-1": 1}}}},
        {"step": 1, "heldout": {"raw": {"right": 1, "by_sigma": {"x": 1}}}},
        {"step": 1, "heldout": {"raw": {"right": 1, "by_sigma": {"by_sigma": {}}}}},
        {"step": 1, "heldout": {"raw": {"right": 1, "by_sigma": 5}}},
        {"step": 1, "speed": {"images_per_second": "\x1b[2J"}},
        {"step": "<script>"},
        {"step": -1},
        {"loss": 1},
        [],
    ],
)
def test_metrics_that_are_no_numbers(tmp_path, line):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="remove that line") as told:
        report.write([run], tmp_path / "report.html")
    assert "\x1b" not in str(told.value) and not (tmp_path / "report.html").exists()


def test_metrics_with_nothing_measured(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [
        {"step": 1, "loss": None, "skipped": None, "heldout": None, "speed": None},
        {"step": 2, "heldout": {"ema": None, "raw": {}}, "speed": {}},
        {"step": 3, "heldout": {"ema": {"right": None, "by_sigma": {}}}},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write([run], tmp_path / "report.html")
    assert "<td>run<td>3<td><td>" in (tmp_path / "report.html").read_text()


def test_the_page_says_what_time_was_spent_on(tmp_path):
    seconds = {"steps": 5400, "compile": 1200, "down": 600}
    sums = {"reached": 9, "until": 1e9, "restarts": 2, "seconds": seconds}
    (write_run(tmp_path / "run") / "goodput.json").write_text(json.dumps(sums))
    report.write([tmp_path / "run", write_run(tmp_path / "other")], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>run<td>2.00<td>2<td>75.0%<td>compile 16.7%, down 8.3%</tr>" in page
    assert "<td>other<td>0.00" not in page


def test_a_page_holds_no_markup_and_no_scripts_of_a_run(tmp_path):
    """Names of folders, of files and the attribution are a stranger's."""
    run = write_run(tmp_path / "javascript:alert(1)<img src=x onerror='a()'>$x^$\x1b")
    (run / "samples").mkdir()
    for name in ("step_0000001.png", "step_<script>.png", "step_٣.png", "step_.png"):
        (run / "samples" / name).write_bytes(b"")
    config = json.loads((run / "config.json").read_text())
    write_run_metadata(run, config | {"attribution": "<script>\x1b</script>"})
    report.write([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    tags = set(re.findall(r"<(\w+)", page.split("</style>")[1]))
    assert tags == {"body", "h1", "h2", "img", "table", "tr", "th", "td", "div", "figure", "a",
                    "figcaption", "p"}  # fmt: skip
    links = re.findall(r"(?:href|src)=(?:'|\")([^'\"]*)", page)
    links = [link for link in links if not link.startswith("data:image/png;base64,")]
    assert len(links) == 2 and all(link.startswith("javascript%3Aalert") for link in links)
    assert "onerror=&#x27;" in page and "\x1b" not in page

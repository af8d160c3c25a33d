"""Model folders, runs and shipped models as a stranger may make them: refused in one line each."""

import dataclasses
import hashlib
import json
import os
import shutil

import jax
import numpy as np
import pytest
from conftest import tiny_model
from support.checkpoints import restore, save_steps
from support.hostile import assert_refused, outcomes, run_hostile

from microdit_jax import files
from microdit_jax.assets import instant, load
from microdit_jax.checkpoints.model_folder import save_model
from microdit_jax.errors import UserError

LOAD = "microdit_jax.assets.load:load_model"
DEEP = '{"format": ' + "[" * 200_000 + "]" * 200_000 + "}"


def edit(path, change):
    """Changes a JSON file's contents."""
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def resign(folder):
    """Writes the checksums anew, as a stranger who made the folder would have."""
    sums = files.checksums(folder)
    del sums["manifest.json"]
    edit(folder / "manifest.json", lambda manifest: manifest["files"].update(sums))


def config(**fields):
    """Changes fields of the network."""

    def change(folder):
        edit(folder / "config.json", lambda contents: contents["dit"].update(fields))
        resign(folder)

    return change


def manifest(change):
    return lambda folder: edit(folder / "manifest.json", change)


def zarray(**fields):
    """Changes how one array is stored, with right checksums."""

    def change(folder):
        edit(min((folder / "params").rglob(".zarray")), lambda about: about.update(fields))
        resign(folder)

    return change


def link_an_array(folder):
    array = min(path for path in (folder / "params").iterdir() if path.is_dir())
    array.rename(folder.parent / f"{folder.name}.array")
    array.symlink_to(folder.parent / f"{folder.name}.array")


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def fifo(folder):
    os.mkfifo(folder / "params" / "pipe")


def listed_fifo(folder):
    fifo(folder)
    edit(folder / "manifest.json", lambda m: m["files"].update({"params/pipe": [0, "0" * 64]}))


def strange_metadata(folder):
    (folder / "params" / "_METADATA").write_text(DEEP)
    resign(folder)


def first_array(value):
    return manifest(lambda m: m["arrays"].update({min(m["arrays"]): value}))


MODELS = {
    "files empty": manifest(lambda m: m.update(files={})),
    "files a list": manifest(lambda m: m.update(files=[1, 2])),
    "files of numbers": manifest(lambda m: m.update(files={"config.json": 3})),
    "no arrays": manifest(lambda m: m.pop("arrays")),
    "up and out": manifest(lambda m: m["files"].update({"../secret": [6, "0" * 64]})),
    "absolute": manifest(lambda m: m["files"].update({"/etc/passwd": [6, "0" * 64]})),
    "kernel log": manifest(lambda m: m["files"].update({"../../../../../proc/kmsg": [0, "0"]})),
    "escapes": manifest(lambda m: m["files"].update({"\x1b[2J\nerror: all is well": [1, "0"]})),
    "an array linked": link_an_array,
    "a config linked": lambda f: ((f / "config.json").rename(f.parent / f"{f.name}.json"),
                                  (f / "config.json").symlink_to(f.parent / f"{f.name}.json")),
    "a pipe": fifo,
    "a listed pipe": listed_fifo,
    "more than is listed": write("params/more", "more"),
    "deep config": write("config.json", DEEP),
    "deep manifest": write("manifest.json", DEEP),
    "config a list": write("config.json", "[]"),
    "config not UTF-8": lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"),
    "kind a list": lambda f: edit(f / "config.json", lambda c: c.update(kind=["dit"])),
    "network a list": lambda f: edit(f / "config.json", lambda c: c.update(dit=[1])),
    "huge": config(dim=2**62),
    "past floats": config(norm_eps=10**400),
    "many tokens": config(input_size=2**22),
    "deep": config(depth=10**9),
    "text for a number": config(dim="32"),
    "no number": config(norm_eps=float("nan")),
    "zero": config(patch_size=0),
    "multipliers": config(ffn_multipliers=[4.0] * 100_000),
    "other network": config(dim=64, patch_mixer_dim=32),
    "type of an array": first_array(["O", [4]]),
    "records": first_array(["f4,(100000,)f4", [4]]),
    "shape of an array": first_array(["float32", [10**11, 4]]),
    "negative": first_array(["float32", [-1]]),
    "array's name": manifest(lambda m: m["arrays"].update({"..": ["float32", [1]]})),
    "compressed": zarray(compressor={"id": "zlib", "level": 1}),
    "one huge piece": zarray(chunks=[10**12]),
    "another version's arrays": zarray(zarr_format=7),
    "deep metadata": strange_metadata,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    network = tiny_model().config
    leaves, tree = jax.tree.flatten(load.abstract_params(network))
    params = tree.unflatten([np.ones(leaf.shape, np.float32) for leaf in leaves])
    save_model(folder, params, {"kind": "dit", "dit": dataclasses.asdict(network)})
    return folder


def test_model_folders(model, tmp_path):
    for name, harm in MODELS.items():
        shutil.copytree(model, tmp_path / name)
        harm(tmp_path / name)
    (tmp_path / "secret").write_text("secret")
    names = ["good", *MODELS]
    shutil.copytree(model, tmp_path / "good")
    results = dict(zip(names, outcomes(LOAD, names, tmp_path), strict=True))
    assert results.pop("good")[0] == 0
    for name, (status, line) in results.items():
        assert status == 2 and line.isprintable() and len(line) < 1500, (name, status, line)
    for name in ("up and out", "absolute", "kernel log"):
        assert "leads out of the folder" in results[name][1]
    for name, found in {
        "files empty": "params/_METADATA (not listed)",
        "an array linked": "(a link, or no plain file)",
        "a pipe": "params/pipe (not listed)",
        "a listed pipe": "params/pipe (a link, or no plain file)",
        "more than is listed": "params/more (not listed)",
        "other network": "found others (",
        "compressed": "expected uncompressed arrays",
        "one huge piece": "expected uncompressed arrays",
        "deep": "of at most 512",
    }.items():
        assert found in results[name][1], (name, results[name])


def test_the_command_refuses_a_model_folder(model, tmp_path):
    shutil.copytree(model, tmp_path / "linked")
    link_an_array(tmp_path / "linked")
    command = [str(files.shipped("sample_main.py")), "--model=linked", "--prompt=a"]
    line = assert_refused(run_hostile([*command, "--out=out"], tmp_path))
    assert "(a link, or no plain file)" in line and not (tmp_path / "out").exists()


def sha(path):
    return [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


def instant_with(change):
    """A change of config.json of the model in the package, with its checksum."""

    def harm(folder):
        edit(folder / "config.json", change)
        edit(
            folder / "manifest.json",
            lambda m: m.update({"config.json": sha(folder / "config.json")}),
        )

    return harm


SHIPPED = {
    "files empty": write("manifest.json", "{}"),
    "no codec listed": manifest(lambda m: [m.pop(name) for name in list(m) if "vae" in name]),
    "out": manifest(lambda m: m.update({"../good/README.md": [1473, "0"]})),
    "codec linked": lambda f: ((f / "vae").rename(f.parent / f"{f.name}.vae"),
                               (f / "vae").symlink_to(f.parent / f"{f.name}.vae")),
    "no noise levels": instant_with(lambda c: c.update(edm=[1])),
    "noise level": instant_with(lambda c: c["edm"].update(sigma_max="80")),
    "no network": instant_with(lambda c: c.pop("dit")),
    "no data": instant_with(lambda c: c["config"].pop("data")),
    "vae a list": instant_with(lambda c: c["config"]["data"].update(vae=["a"])),
    "deep": write("config.json", DEEP),
}  # fmt: skip


def test_shipped_models(tmp_path):
    names = ["good", *SHIPPED]
    for name in names:
        shutil.copytree(instant.FOLDERS["instant"], tmp_path / name)
        SHIPPED.get(name, lambda folder: None)(tmp_path / name)
    results = dict(zip(names, outcomes(LOAD, names, tmp_path), strict=True))
    assert results.pop("good")[0] == 0
    for name, (status, line) in results.items():
        assert status == 2 and line.isprintable() and len(line) < 1500, (name, status, line)


RUNS = {
    "files empty": manifest(lambda m: m.update(files={})),
    "no files": manifest(lambda m: m.pop("files")),
    "out": manifest(lambda m: m["files"].update({"../../secret": [6, "0" * 64]})),
    "deep manifest": write("manifest.json", DEEP),
    "deep metadata": lambda f: ((f / "metadata" / "metadata").write_text(DEEP), resign(f)),
    "a list": lambda f: ((f / "metadata" / "metadata").write_text("[]"), resign(f)),
    "a pipe": lambda f: os.mkfifo(f / "state" / "pipe"),
    "state linked": lambda f: ((f / "state").rename(f.parent / "state"),
                               (f / "state").symlink_to(f.parent / "state")),
    "step linked": lambda f: (f.rename(f.parent / "step"), f.symlink_to(f.parent / "step")),
    "strange digits": lambda f: f.rename(f.parent / "\N{SUPERSCRIPT TWO}"),
    "too many digits": lambda f: f.rename(f.parent / ("9" * 200)),
}  # fmt: skip


def test_checkpoints_of_runs(tmp_path):
    save_steps(tmp_path / "good", 1)
    for name, harm in RUNS.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        harm(tmp_path / name / "checkpoints" / "1")
    names = ["good", *RUNS]
    results = outcomes("microdit_jax.checkpoints.restore:good_step", names, tmp_path)
    results = dict(zip(names, results, strict=True))
    assert results.pop("good")[0] == 0
    for name, (status, line) in results.items():
        assert status == 2 and line.isprintable() and len(line) < 1500, (name, status, line)


def test_a_state_that_only_its_checksums_vouch_for(tmp_path):
    save_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    about = (folder / "state" / "_METADATA").read_text()
    for old, new in (
        ('"float32", [', '"O", ['),
        ('"packed": {', '"packed": {"a": 3, '),
        ("[4, 8, 6]", "[4, 8, -6]"),
        ("[4, 8, 6]", "[4, 8, 6000000000000]"),
        (about, DEEP),
        (about, "[]"),
    ):
        assert old in about
        (folder / "state" / "_METADATA").write_text(about.replace(old, new))
        resign(folder)
        with pytest.raises(UserError) as caught:
            restore(tmp_path)
        assert str(caught.value).isprintable()

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from microdit_jax.checkpoints.model_folder import load_model, read_metadata, save_model
from microdit_jax.errors import UserError

PARAMS = {
    "blocks_0": {
        "kernel": np.arange(64, dtype=np.float32).reshape(8, 8).T,
        "bias": np.ones(8, np.float32),
    },
    "gate": np.arange(16).astype(ml_dtypes.bfloat16),
}
METADATA = {"kind": "dit", "dit": {"dim": 8}}


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", PARAMS, METADATA)
    return tmp_path / "model"


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda a: a.dtype.name, found) == jax.tree.map(
        lambda a: a.dtype.name, expected
    )


def test_round_trip(folder):
    params, metadata = load_model(folder)
    assert_same(params, PARAMS)
    assert metadata == {"format": "microdit_jax.model", "version": 1, "parameters": 88} | METADATA
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(params)} == {1}
    assert {path.name for path in folder.iterdir()} == {"config.json", "params", "manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_loads_on_another_topology(tmp_path):
    params = {"kernel": jnp.arange(64.0).reshape(8, 8), "scale": jnp.ones(8)}
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    save_model(tmp_path / "model", jax.device_put(params, split), METADATA)
    assert_same(load_model(tmp_path / "model")[0], params)  # 4 devices -> 1
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    columns = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    found, _ = load_model(
        tmp_path / "model", sharding={"kernel": columns, "scale": everywhere}
    )  # -> 8, split along the other axis
    assert_same(found, params)
    assert found["kernel"].sharding == columns and found["scale"].sharding == everywhere
    assert load_model(tmp_path / "model", sharding=everywhere)[0]["kernel"].sharding == everywhere


def test_a_flipped_byte_is_named(folder):
    path = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    name = path.relative_to(folder).as_posix()
    with pytest.raises(UserError, match=rf"damage in {name} \(contents changed\)"):
        load_model(folder)


def test_missing_and_cut_files_are_all_named(folder):
    files = sorted(path for path in (folder / "params").rglob("*") if path.is_file())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        load_model(folder)
    for path, fault in ((files[0], "missing"), (files[1], "bytes instead of")):
        assert path.relative_to(folder).as_posix() in str(caught.value)
        assert fault in str(caught.value)


def test_changed_config_is_noticed(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dim": 8', '"dim": 9'))
    with pytest.raises(UserError, match=r"config\.json \(contents changed\)"):
        load_model(folder)
    path.write_text("{")
    with pytest.raises(UserError, match="expected JSON in"):
        load_model(folder)


def test_what_is_not_a_model_folder(tmp_path, folder):
    for path, found in ((tmp_path / "none", "nothing"), (tmp_path, "another folder")):
        with pytest.raises(UserError, match=f"expected a model folder.*found {found}"):
            load_model(path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"version": 2}))
    with pytest.raises(UserError, match="expected microdit_jax.model version 1.*version 2"):
        read_metadata(folder)


def test_an_existing_folder_is_kept(folder):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_model(folder, PARAMS, METADATA)
    assert (folder / "manifest.json").read_bytes() == before


def test_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="found 0.00 GB free"):
        save_model(tmp_path / "model", PARAMS, METADATA)
    monkeypatch.undo()

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("microdit_jax.files.integrity.sha256", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "model", PARAMS, METADATA)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / ".model.partial" / "params").mkdir(parents=True)  # left by a killed run
    save_model(tmp_path / "model", PARAMS, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

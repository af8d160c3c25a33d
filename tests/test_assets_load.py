"""Networks and towers by path: converted once, found again, refused where they do not fit."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from support.golden_vae import load_vae
from support.model_files import tensors, write_dit

import microdit_jax
from microdit_jax import create, sharding
from microdit_jax.assets import hub, load
from microdit_jax.convert import dit
from microdit_jax.convert.__main__ import main as convert_main
from microdit_jax.convert.formats.safetensors_file import write_safetensors
from microdit_jax.convert.formats.torch_file import write_torch
from microdit_jax.errors import UserError
from microdit_jax.files import checksums, read_json, write_json
from microdit_jax.models.dit import DiT, for_this_machine


def same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def pipeline(files, **options):
    model = load.load_model(str(files / "dit.pt"), **options)
    model = model._replace(vae=str(files / "vae"), text_encoder=str(files / "clip"))
    return create.from_model(model)


def test_a_pt_file_is_converted_once(files, capsys):
    model = load.load_model(str(files / "dit.pt"))
    assert (model.config.input_size, model.config.dim, model.description) == (8, 32, "dit.pt")
    same(model.params, dit.from_torch(tensors()["dit"], model.config))
    assert "converting" in capsys.readouterr().out
    (files / "dit.pt").chmod(0)  # not even read again
    again = load.load_model(str(files / "dit.pt"), dtype="bfloat16")
    same(again.params, model.params)
    assert again.config == dataclasses.replace(model.config, dtype="bfloat16")
    assert capsys.readouterr().out == ""


def test_a_replaced_file_is_converted_again(files, capsys):
    load.load_model(str(files / "dit.pt"))
    changed = {name: 2 * tensor for name, tensor in tensors()["dit"].items()}
    changed["pos_embed"] = tensors()["dit"]["pos_embed"]
    (files / "dit.pt").unlink()
    write_dit(files / "dit.pt", changed)
    model = load.load_model(str(files / "dit.pt"))
    same(model.params, dit.from_torch(changed, model.config))
    folders = [p for p in (files / "cache" / "microdit_jax" / "models").iterdir() if p.is_dir()]
    assert len(folders) == 1


def test_what_others_planted_in_a_shared_cache_is_not_taken(files, tmp_path):
    model = load.load_model(str(files / "dit.pt"))
    cache = files / "cache" / "microdit_jax" / "models"
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    cache.chmod(0o777)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    same(load.load_model(str(files / "dit.pt")).params, model.params)
    assert folder.is_dir() and not folder.is_symlink() and (tmp_path / "elsewhere").is_dir()
    assert cache.stat().st_mode & 0o022 == 0
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        load.load_model(str(files / "dit.pt"))
        assert folder.stat().st_uid == 0


def test_a_changed_config_beside_the_same_weights_is_noticed(files):
    assert load.load_codec(str(files / "vae")).scaling_factor == 0.13025
    config = load_vae("vae_small").config_json | {"scaling_factor": 0.5}
    (files / "vae" / "config.json").write_text(json.dumps(config))
    assert load.load_codec(str(files / "vae")).scaling_factor == 0.5


def test_towers_are_computed_in_the_type_asked_for(files):
    codec = load.load_codec(str(files / "vae"), dtype="bfloat16")
    encoder = load.load_text_encoder(str(files / "clip"), dtype="bfloat16")
    assert (codec.config.dtype, encoder.config.dtype) == ("bfloat16", "bfloat16")


def test_a_config_of_other_weights_is_one_line(files):
    """Their checksums fit, as they came from whoever wrote the config."""
    codec = load.converted("vae", files / "vae")
    text = (codec / "config.json").read_text()
    for change in ({"latent_channels": 8}, {"block_out_channels": [32] * 300}):
        contents = json.loads(text)
        contents["vae"].update(change)
        write_json(codec / "config.json", contents)
        manifest = read_json(codec / "manifest.json")
        manifest["files"]["config.json"] = checksums(codec)["config.json"]
        write_json(codec / "manifest.json", manifest)
        channels = contents["vae"]["latent_channels"]
        latents = np.zeros((1, 4, 4, channels), np.float32)
        with pytest.raises(UserError, match="expected the weights that a model's config.json"):
            load.load_codec(str(codec)).decode(latents)


def test_a_damaged_cache_is_noticed(files):
    load.load_model(str(files / "dit.pt"))
    (folder,) = (files / "cache" / "microdit_jax" / "models").glob("dit-*/params")
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[100] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match="contents changed"):
        load.load_model(str(files / "dit.pt"))


def test_prompt_to_picture(files):
    options = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 3.0}
    pipe = pipeline(files)
    images = pipe.generate(["an apple", "a dog"], **options)
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
    assert np.abs(images[0] - images[1]).max() > 0.01
    by_contract = microdit_jax.create_latent_diffusion(
        str(files / "vae"), str(files / "clip"), latent_res=8, dtype="float32",
        checkpoint=str(files / "dit.pt"),
    )  # fmt: skip
    again = by_contract.generate(["an apple", "a dog"], **options)
    np.testing.assert_allclose(again, images, atol=1e-5)


def test_on_a_mesh(files):
    expected = pipeline(files).generate("a dog", num_inference_steps=1, seed=0)
    pipe = pipeline(files, mesh=functools.partial(create.fitting_mesh, fsdp=2))
    assert jax.tree.leaves(pipe.params)[0].sharding.mesh.shape["fsdp"] == 2
    assert len(jax.tree.leaves(pipe.codec.params)[0].devices()) == 8
    found = pipe.generate("a dog", num_inference_steps=1, seed=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_weights_are_split_where_they_do_not_fit(monkeypatch):
    monkeypatch.setattr(create.memory, "free_bytes", lambda device: 8 * 100)
    assert create.fitting_mesh(50).shape["fsdp"] == 1
    assert create.fitting_mesh(51).shape["fsdp"] == 2
    assert create.fitting_mesh(10_000).shape["fsdp"] == 8
    assert create.fitting_mesh(50, fsdp=4).shape["fsdp"] == 4


def test_converted_folders_are_taken_as_they_are(files, capsys):
    for kind, source in (("dit", "dit.pt"), ("clip_text", "clip"), ("vae", "vae")):
        output = files / "models" / kind
        convert_main([f"--kind={kind}", f"--input={files / source}", f"--output={output}"])
    capsys.readouterr()
    model = load.load_model(str(files / "models" / "dit"))
    model = model._replace(
        vae=str(files / "models" / "vae"), text_encoder=str(files / "models" / "clip_text")
    )
    images = create.from_model(model).generate("a dog", num_inference_steps=1, seed=0)
    expected = pipeline(files).generate("a dog", num_inference_steps=1, seed=0)
    np.testing.assert_array_equal(images, expected)
    with pytest.raises(UserError, match="expected a model of kind dit .*, found vae"):
        load.load_model(str(files / "models" / "vae"))
    with pytest.raises(UserError, match="expected a text encoder at .*kind vae"):
        load.load_text_encoder(str(files / "models" / "vae"))


def test_a_released_checkpoint_by_name(files):
    folder = hub.local_folder(hub.REPOSITORY) / "ckpts"
    folder.mkdir(parents=True)
    shutil.copy(files / "dit.pt", folder / "dit_4_channel_22M_real_only_data.pt")
    model = load.load_model("dit_4_channel_22M_real_only_data")
    assert (model.vae, model.text_encoder) == (hub.SDXL_VAE, hub.DFN5B_CLIP)
    tower = hub.local_folder("apple/DFN5B-CLIP-ViT-H-14-378")
    shutil.copytree(files / "clip", tower)
    encoder = load.load_text_encoder(model.text_encoder)
    assert encoder.name == hub.DFN5B_CLIP and encoder.width == 24


def test_data_say_what_made_them_by_repository_or_checksum(files):
    """Data prepared with a tower are found to be its by whoever is given the same name or path."""
    for repository, folder in ((f"{hub.SDXL_VAE}/vae", "vae"), (hub.SDXL_VAE, "clip")):
        shutil.copytree(files / folder, hub.local_folder(repository), dirs_exist_ok=True)
    by_name = {"vae": hub.SDXL_VAE, "text_encoder": hub.OPENCLIP + hub.SDXL_VAE}
    by_path = {"vae": str(files / "vae"), "text_encoder": str(files / "clip")}
    for towers in (by_name, by_path):
        codec = load.load_codec(towers["vae"])
        encoder = load.load_text_encoder(towers["text_encoder"])
        found = load.names_in_data(towers["vae"], towers["text_encoder"])
        assert found == {"vae": codec.name, "text_encoder": encoder.name}
        assert (found == towers) == (towers is by_name)
        assert ("weights=" in codec.name) == ("weights=" in encoder.name) == (towers is by_path)


def test_a_wrong_vae_and_a_wrong_text_encoder(files):
    model = load.load_model(str(files / "dit.pt"))
    sixteen = load_vae("vae_small_16ch")
    folder = files / "other"
    folder.mkdir()
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", sixteen.tensors)
    (folder / "config.json").write_text(json.dumps(sixteen.config_json))
    wrong = model._replace(vae=str(folder), text_encoder=str(files / "clip"))
    with pytest.raises(UserError, match="latents of 4 channels, found a VAE for 16"):
        create.from_model(wrong)
    wrong = model._replace(text_encoder="table:width=16,tokens=8,seed=0")
    with pytest.raises(UserError, match="embeddings 24 wide, found 16"):
        create.from_model(wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent_res": 32}, "has latent_res 8, found 32 asked for; pass latent_res=8"),
        ({"in_channels": 16}, "pass in_channels=4"),
        ({"pos_interp_scale": 2.0}, r"pass pos_interp_scale=1\.0"),
        ({"dit_arch": "MicroDiT_Tiny_2"}, "found MicroDiT_Tiny_2 asked for; pass dit_arch='Micro"),
    ],
)
def test_sizes_that_the_checkpoint_does_not_have(files, change, message):
    with pytest.raises(UserError, match=message):
        microdit_jax.create_latent_diffusion(
            checkpoint=str(files / "dit.pt"), **{"latent_res": 8} | change
        )


def test_a_half_downloaded_file(files):
    data = (files / "dit.pt").read_bytes()
    (files / "half.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        load.load_model(str(files / "half.pt"))
    weights = files / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError):
        load.load_codec(str(files / "vae"))
    assert not list((files / "cache" / "microdit_jax" / "models").glob("*/params"))


def test_cpus_get_the_looped_attention(monkeypatch):
    def chosen(attention):
        config = dataclasses.replace(tiny_model().config, attention=attention, dtype="bfloat16")
        return for_this_machine(config).attention

    kernels = ("xla", "looped", "cudnn")
    assert list(map(chosen, kernels)) == ["looped", "looped", "cudnn"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert list(map(chosen, kernels)) == ["xla", "xla", "cudnn"]


def test_nothing_there():
    expected = "or one of instant, instant2, dit_4_channel_22M.*, found nothing at nope"
    with pytest.raises(UserError, match=expected):
        load.load_model("nope")
    with pytest.raises(UserError, match="dit_arch must be"):
        microdit_jax.create_latent_diffusion(dit_arch="DiT")


def test_untrained(files):
    config = tiny_model().config
    x, t = jnp.zeros((1, 8, 8, 4), jnp.float32), jnp.zeros(1, jnp.float32)
    y = jnp.zeros((1, 1, 24), jnp.float32)
    expected = jax.jit(DiT(config).init)(jax.random.key(0), x, t, y)["params"]
    same(load.untrained_model(config).params, expected)
    mesh = sharding.make_mesh(fsdp=8)
    leaf = jax.tree.leaves(load.untrained_model(config, mesh=mesh).params)[0]
    assert leaf.sharding.mesh == mesh


def test_which_weights_of_a_file_that_holds_several(files):
    """The raw ones, or the average by --weights=ema, each converted by itself."""
    raw = tensors()["dit"]
    half = {name: tensor * np.float32(0.5) for name, tensor in raw.items()}
    average = half | {"pos_embed": raw["pos_embed"]}
    flat = {f"model.{name}": tensor for name, tensor in raw.items()}
    flat |= {f"ema.{name}": tensor for name, tensor in average.items()}
    note = {"kind": "dit", "config": dataclasses.asdict(tiny_model().config)}
    path = files / "both.pt"
    write_torch(path, flat, notes={"extra/microdit_jax": json.dumps(note).encode()})
    models = [load.load_model(str(path), weights=which) for which in (None, "model", "ema")]
    kernels = [np.asarray(m.params["blocks_0"]["attn"]["qkv"]["kernel"]) for m in models]
    np.testing.assert_array_equal(kernels[0], raw["blocks.0.attn.qkv.weight"].T)
    np.testing.assert_array_equal(kernels[1], kernels[0])
    np.testing.assert_array_equal(kernels[2], kernels[0] * np.float32(0.5))
    with pytest.raises(UserError, match="to take the weights ema of, found instant"):
        load.load_model("instant", weights="ema")

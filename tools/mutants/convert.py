"""Faults of conversion, towers, assets and checkpoints."""

_TORCH_FILE = ("tests/test_convert_torch_file.py",)
_LOAD = ("tests/test_assets_load.py",)
_CLIP = ("tests/test_clip_image.py",)

MUTANTS = [
    {
        "name": "negative strides in a .pt are read, from before the storage",
        "file": "microdit_jax/convert/formats/torch_pickle.py",
        "old": " or min(stride, default=0) < 0",
        "new": "",
        "tests": _TORCH_FILE,
    },
    {
        "name": "negative offsets in a .pt are read from the end of the storage",
        "file": "microdit_jax/convert/formats/torch_pickle.py",
        "old": "if offset < 0 or min(size",
        "new": "if min(size",
        "tests": _TORCH_FILE,
    },
    {
        "name": "each chunk of a written tensor but the last lacks its last row",
        "file": "microdit_jax/convert/formats/file_bytes.py",
        "old": "rows[start : start + step]",
        "new": "rows[start : start + max(1, step - 1)]",
        "tests": _TORCH_FILE,
    },
    {
        "name": "a CLIP image tower's layer_norm_eps is ignored",
        "file": "microdit_jax/convert/clip.py",
        "old": '            "norm_eps": ("layer_norm_eps", 1e-5),\n',
        "new": "",
        "tests": _CLIP,
    },
    {
        "name": "a CLIP's own standard deviations of colours are ignored",
        "file": "microdit_jax/convert/clip.py",
        "old": 'for name in ("mean", "std") if name in prepare',
        "new": 'for name in ("mean",) if name in prepare',
        "tests": _CLIP,
    },
    {
        "name": "a config.json that changed beside the same weights: the old conversion is used",
        "file": "microdit_jax/assets/load.py",
        "old": '        "config": source.config,\n',
        "new": "",
        "tests": _LOAD,
    },
    {
        "name": "new weights of the same size: the old conversion is used",
        "file": "microdit_jax/assets/load.py",
        "old": "[name, stat.st_size, stat.st_mtime_ns]",
        "new": "[name, stat.st_size]",
        "tests": _LOAD,
    },
    {
        "name": "a text encoder's dtype is ignored",
        "file": "microdit_jax/assets/load.py",
        "old": "folder, given_name, dtype=dtype, sharding=_copies(mesh), batch",
        "new": "folder, given_name, sharding=_copies(mesh), batch",
        "tests": _LOAD,
    },
    {
        "name": "a codec's dtype is ignored",
        "file": "microdit_jax/assets/load.py",
        "old": "_vae_folder(path), given_name, dtype=dtype, sharding",
        "new": "_vae_folder(path), given_name, sharding",
        "tests": _LOAD,
    },
    {
        "name": "a codec copied to another device stays where it was",
        "file": "microdit_jax/encoders/vae_codec.py",
        "old": "replace(self, params=jax.device_put(self.params, sharding))",
        "new": "replace(self)",
        "tests": ("tests/test_vae.py",),
    },
    {
        "name": "a text encoder copied to another device stays where it was",
        "file": "microdit_jax/encoders/clip_text.py",
        "old": "jax.device_put(self.params, sharding)",
        "new": "self.params",
        "tests": ("tests/test_clip_text.py",),
    },
    {
        "name": "known texts give each other's embeddings",
        "file": "microdit_jax/encoders/known_texts.py",
        "old": "encoder.encode_text(different), strict",
        "new": "encoder.encode_text(different)[::-1], strict",
        "tests": ("tests/test_clip_text.py",),
    },
    {
        "name": "T5 captions are cut at 128 tokens",
        "file": "microdit_jax/encoders/t5.py",
        "old": "MAX_TOKENS = 120",
        "new": "MAX_TOKENS = 128",
        "tests": ("tests/test_t5.py",),
    },
    {
        "name": "the pipeline drops T5's attention mask",
        "file": "microdit_jax/sampling/pipeline.py",
        "old": "self.text_encoder.encode(ids, attention_mask)",
        "new": "self.text_encoder.encode(ids)",
        "tests": ("tests/test_sampling_pipeline.py",),
    },
    {
        "name": "data are said to fit a VAE with another scaling factor",
        "file": "microdit_jax/convert/arguments.py",
        "old": "scaling_factor={factor:g},weights",
        "new": "weights",
        "tests": ("tests/test_convert_vae.py",),
    },
    {
        "name": "a conversion with other options counts as done",
        "file": "microdit_jax/convert/to_folder.py",
        "old": ' or made_from.get("options") != options',
        "new": "",
        "tests": ("tests/test_convert_vae.py",),
    },
    {
        "name": "tensors of a .safetensors file may overlap or leave gaps",
        "file": "microdit_jax/convert/formats/safetensors_file.py",
        "old": "if begin != position or end - begin",
        "new": "if end - begin",
        "tests": ("tests/test_convert_formats.py",),
    },
    {
        "name": "transposed tensors are written in the order of memory",
        "file": "microdit_jax/convert/formats/file_bytes.py",
        "old": "    if tensor.flags.c_contiguous:\n        rows, step = tensor.reshape(-1)",
        "new": "    if tensor.flags.forc:\n        rows, step = tensor.ravel(order='K')",
        "tests": ("tests/test_convert_formats.py",),
    },
]

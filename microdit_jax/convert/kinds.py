"""What can be converted: one line for each kind of model.

A kind's module has PART (its name inside a larger checkpoint), infer_config(tensors, **options),
from_torch(tensors, config, check_finite=, progress=), to_torch(params, config) and
config_from_dict(fields). It may have select(tensors) -> StateDict, without what else a file holds;
describe(config) -> one line; and config_json(config) -> what belongs beside the torch weights.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from microdit_jax.errors import UserError


class Kind(NamedTuple):
    """One kind of model.

    Attributes:
      module: where it is converted.
      options: flags that go to infer_config, when given.
      config_keys: a config.json of this kind has one of them, and goes to infer_config as
        `config_json`; empty when there is no such file and --config holds the config itself.
      stems: how weights may be called, without suffix, in a model's folder, the best one first.
      subfolders: where a pipeline's folder may have that model's.
      config_files: how config.json may be called, the most telling one first.
    """

    module: str
    options: tuple[str, ...]
    config_keys: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    subfolders: tuple[str, ...] = ()
    config_files: tuple[str, ...] = ("config.json",)

    def load(self) -> ModuleType:
        """Its module, imported when it is needed."""
        return importlib.import_module(self.module)


KINDS = {
    "dit": Kind("microdit_jax.convert.dit", ("head_dim", "expert_capacity")),
    "vae": Kind(
        "microdit_jax.convert.vae",
        ("scaling_factor",),
        ("latent_channels", "scaling_factor"),
        ("diffusion_pytorch_model",),
        ("vae",),
    ),
    "clip_text": Kind(
        "microdit_jax.convert.clip_text",
        ("activation", "heads", "padding"),
        ("model_cfg", "hidden_act", "text_config"),
        ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model"),
        ("text_encoder",),
        ("open_clip_config.json", "config.json"),
    ),
    "clip": Kind(
        "microdit_jax.convert.clip",
        (),
        ("model_cfg", "vision_config", "image"),
        ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model"),
        (),
        ("open_clip_config.json", "config.json"),
    ),
    "t5": Kind(
        "microdit_jax.convert.t5",
        ("max_tokens",),
        ("d_model",),
        ("model", "pytorch_model"),
        ("text_encoder", "text_encoder_2", "text_encoder_3"),
    ),
    "inception": Kind("microdit_jax.convert.inception", ()),
}


def make_config(kind: Kind, tensors: dict, config: dict | None, options: dict[str, Any]) -> Any:
    """The config of the model with these tensors.

    Args:
      config: contents of the kind's config.json, or for a kind without one, the config's fields.
      options: values of the kind's flags; None where not given.
    """
    module = kind.load()
    given = {name: value for name, value in options.items() if value is not None}
    if kind.config_keys:
        return module.infer_config(tensors, config_json=config, **given)
    if config is None:
        return module.infer_config(tensors, **given)
    if given:
        raise UserError(
            f"expected --config alone, found --{', --'.join(given)} too; put them into the config"
        )
    return module.config_from_dict(config)

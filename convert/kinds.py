"""What can be converted: one line for each kind of model.

A kind's module has PART (its name inside a larger checkpoint), infer_config(tensors, **options),
from_torch(tensors, config, check_finite=, progress=), to_torch(params, config) and
config_from_dict(fields), and may have describe(config) -> one line, and config_json(config) -> the
config.json that belongs to the torch weights.
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
      config_key: a key of this kind's config.json, which then goes to infer_config as
        `config_json`; empty when it has none and --config holds the config itself.
      stems: how weights may be called, without suffix, in a model's folder.
      subfolder: where a pipeline's folder has that model's.
    """

    module: str
    options: tuple[str, ...]
    config_key: str = ""
    stems: tuple[str, ...] = ()
    subfolder: str = ""

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


KINDS = {
    "dit": Kind("convert.dit", ("head_dim", "expert_capacity")),
    "vae": Kind(
        "convert.vae", ("scaling_factor",), "latent_channels", ("diffusion_pytorch_model",), "vae"
    ),
}


def make_config(kind: Kind, tensors: dict, config: dict | None, options: dict[str, Any]) -> Any:
    """The config of the model with these tensors.

    Args:
      config: contents of the kind's config.json, or for a kind without one, the config's fields.
      options: values of the kind's flags; None where not given.
    """
    module = kind.load()
    given = {name: value for name, value in options.items() if value is not None}
    if kind.config_key:
        return module.infer_config(tensors, config_json=config, **given)
    if config is None:
        return module.infer_config(tensors, **given)
    if given:
        raise UserError(
            f"expected --config alone, found --{', --'.join(given)} too; put them into the config"
        )
    return module.config_from_dict(config)

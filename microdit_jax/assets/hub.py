"""Released checkpoints, and files fetched from the Hugging Face Hub.

Files put into `local_folder()` by hand are used before anything is fetched, so that a machine
without network needs nothing else. HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they
mean to huggingface_hub, which also shows progress and resumes broken downloads.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from microdit_jax.assets import minilm
from microdit_jax.convert import shipped
from microdit_jax.encoders import registry
from microdit_jax.errors import MORE, UserError, visible
from microdit_jax.files import cache_folder, disk_errors, read_json

INSTANT, INSTANTS = "instant", tuple(shipped.FOLDERS)  # in the package; see instant/__init__.py
REPOSITORY = "VSehwag24/MicroDiT"
SDXL_VAE = "stabilityai/stable-diffusion-xl-base-1.0"
OSTRIS_VAE = "ostris/vae-kl-f8-d16"
DFN5B_CLIP = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"
OPENCLIP = "openclip:hf-hub:"  # how the reference names a repository in OpenCLIP's layout
DEFAULT_VAES = {4: SDXL_VAE, 16: OSTRIS_VAE}  # by latent channels


class Released(NamedTuple):
    """A checkpoint published with the paper: a DiT's weights alone.

    fid is the zero-shot FID-30k on COCO, geneval the overall GenEval score, both as published.
    """

    channels: int
    vae: str
    resolution: int
    fid: float
    geneval: float


# Figures as https://github.com/SonyResearch/micro_diffusion states them
RELEASED = {
    "dit_4_channel_22M_real_only_data": Released(4, SDXL_VAE, 512, 12.72, 0.46),
    "dit_4_channel_37M_real_and_synthetic_data": Released(4, SDXL_VAE, 512, 12.66, 0.46),
    "dit_16_channel_37M_real_and_synthetic_data": Released(16, OSTRIS_VAE, 512, 13.04, 0.40),
    "dit_4_channel_0.5B_synthetic_data": Released(4, SDXL_VAE, 512, 13.26, 0.52),
}

_T5_FILES = (
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model",
    "pytorch_model.bin.index.json",
)  # fmt: skip


def is_known(name: str) -> bool:
    """Returns True for a name that a stranger's file may choose: one that this project knows.

    These are the models in the package, released checkpoints and their towers, MiniLM, which is a
    Python package, token tables, which have no files, and word vectors, which are in the package.
    A local path is never one of them, whatever it is called.
    """
    known = name in (*INSTANTS, SDXL_VAE, OSTRIS_VAE, DFN5B_CLIP)
    known = known or name.removesuffix(".pt") in RELEASED or registry.is_text_encoder(name)
    known = known or minilm.is_name(name)
    return known and not Path(name).exists()


def check_known(names: Mapping[str, str | None], source: object) -> None:
    """Raises UserError unless a file of unknown origin chose what it may; says which flags to give.

    Args:
      names: by flag, such as "model"; None: nothing was chosen.
      source: the file or model that chose them.
    """
    strange = {
        flag: name for flag, name in names.items() if name is not None and not is_known(name)
    }
    if strange:
        given = " ".join(f"--{flag}={shlex.quote(visible(name))}" for flag, name in strange.items())
        raise UserError(
            f"expected {visible(source)} to name released models alone, found a path or another "
            f"repository, which is only loaded if you ask for it: if you trust it, add {given}"
        )


def local_folder(repository: str) -> Path:
    """Folder into which a person may put a repository's files by hand."""
    return cache_folder() / "files" / repository


def released_checkpoint(name: str) -> Path:
    """Returns the .pt file of a released checkpoint, fetched if it is not here.

    Args:
      name: a key of RELEASED, with or without ".pt".
    """
    (file,) = fetch(REPOSITORY, f"ckpts/{name.removesuffix('.pt')}.pt")
    return file


def vae(name: str) -> Path:
    """Returns the folder of a VAE in diffusers' layout, fetched if it is not here.

    Args:
      name: a repository: one VAE (Ostris's), or a pipeline with its VAE in the folder vae/.
    """
    at = "" if name == OSTRIS_VAE else "vae/"
    weights = tuple(f"{at}diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin"))
    return fetch(name, f"{at}config.json", weights)[0].parent


def text_encoder(name: str) -> Path:
    """Returns the folder of a text tower, fetched if it is not here.

    Args:
      name: "openclip:hf-hub:" and a repository in OpenCLIP's layout, a T5 v1.1's repository, or a
        pipeline with a CLIP text tower in the folder text_encoder/.
    """
    if name.startswith(OPENCLIP):
        repository = name.removeprefix(OPENCLIP)
        weights = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return fetch(repository, "open_clip_config.json", weights)[0].parent
    if is_t5(name):
        index = fetch(name, *_T5_FILES)[-1]
        shards = _shards(index)
        return fetch(name, *_T5_FILES, *shards)[0].parent
    weights = ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin")
    return fetch(name, "text_encoder/config.json", weights)[0].parent


def _shards(index: Path) -> list[str]:
    """Returns the files that an index of weights names, all of them beside it."""
    names = read_json(index).get("weight_map")
    shards = set(map(str, names.values())) if isinstance(names, dict) else set()
    if not shards or not all(re.fullmatch(r"\w[\w.-]{0,200}", name) for name in shards):
        raise UserError(
            f"expected the names of weights beside {visible(index)} in it, found others; fetch it "
            "again"
        )
    return sorted(shards)


def is_t5(name: str) -> bool:
    """Returns True if a repository's name says that it is a T5."""
    return "t5" in name.split("/")[-1].lower()


def fetch(repository: str, *files: str | tuple[str, ...]) -> list[Path]:
    """Returns files of a Hugging Face repository, fetched if they are not here yet.

    Args:
      files: names in the repository; a tuple stands for the first of its names that exists.
    Returns:
      Their paths, all from `local_folder` if a person put all of them there.
    Raises:
      UserError: one is not here and cannot be had: no network, no such file, no permission.
    """
    choices = [(file,) if isinstance(file, str) else file for file in files]
    local = [path for names in choices if (path := _first_local(repository, names))]
    if len(local) == len(choices):
        return local
    return [_fetch_first(repository, names) for names in choices]


def _first_local(repository: str, names: Sequence[str]) -> Path | None:
    paths = [local_folder(repository) / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def _fetch_first(repository: str, names: Sequence[str]) -> Path:
    import huggingface_hub  # a second to import, and not needed where files are given by hand
    from huggingface_hub import constants, errors

    # huggingface_hub would log each attempt; the error raised below says what came of them all.
    huggingface_hub.logging.set_verbosity_error()
    why: tuple[str, Exception | None] = ("it has no such file", None)
    for name in names:
        try:
            # Says what is being waited for: without network the attempt takes half a minute.
            cached = isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str)
            if not cached and not constants.HF_HUB_OFFLINE:
                print(f"asking the Hugging Face Hub for {name} of {repository}", file=sys.stderr)
            return Path(huggingface_hub.hf_hub_download(repository, name))
        except errors.LocalEntryNotFoundError as error:
            why = ("no network, or offline mode", error)
            continue  # another of the names may be in the cache
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError as error:
            why = ("its terms must be accepted first, and HF_TOKEN be set", error)
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            why = ("there is no such repository", error)
        except OSError as error:  # the network's, the hub's own HTTP errors, or the disk's
            if error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError)):
                with disk_errors(Path(constants.HF_HUB_CACHE) / "models"):
                    raise
            why = (str(error).split("\n")[0], error)
        break
    folder = local_folder(repository)
    raise UserError(
        f"expected {' or '.join(names)} of the Hugging Face repository {visible(repository)}, "
        f"could not fetch it ({visible(why[0])}); try again, or put the repository's files into "
        f"{visible(folder)} by hand, as {visible(folder / names[0])}; {MORE}"
    ) from why[1]

"""All keys of a run configuration, with the recipe's defaults, and the variants of any of them.

A config file changes values and adds none: an unknown key is an error. Variants stand after a
colon, separated by commas:

  --config=configs/res_256_pretrain.py:arch=Tiny_2,mesh=2x2x2,runlocal

  arch=Tiny_2   the 201 M network of the paper's ablations; arch=XL_2 the 1.16 B one
  mesh=DxFxE    devices over data, fsdp and expert; -1 takes the rest
  runlocal      a minute on a CPU: a small network of the same form on the embedded emoji images
"""

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from microdit_jax.errors import UserError

# One of each kind of difficulty: counts, colours, places, writing, styles, things nobody has seen.
PROMPTS = (
    "a red bicycle leaning against a yellow wall",
    "three green apples on a wooden table, morning light",
    "a lighthouse on a cliff in a thunderstorm, oil painting",
    "a fox made of origami paper in a snowy forest",
    "portrait of an old fisherman with a grey beard, black and white photograph",
    "a bakery whose sign says 'fresh bread'",
    "an owl in a spacesuit reading a newspaper on the moon",
    "a glass teapot with a small garden growing inside, macro photograph",
    "a medieval castle built of books",
    "two cats playing chess by a fireplace, watercolour",
    "aerial view of a winding river in autumn colours",
    "a blue cube to the left of an orange sphere, studio light",
    "a steam train crossing a stone bridge over a misty valley",
    "a robot gardener watering sunflowers, children's book illustration",
    "a bowl of ramen with an egg and spring onions, seen from above",
    "a knight riding a giant snail through a desert at sunset",
)


def base() -> ConfigDict:
    """Returns the full, locked configuration."""
    from microdit_jax.diffusion import EdmConfig  # here, so that --help answers at once

    return ConfigDict(
        {
            "seed": 18,
            # Where a stage that does not resume starts from; "{workdir}" is the run's own. Another
            # run's full state (weights, optimiser, average, step), or weights alone, of whatever
            # sample_main.py takes as --model. Both empty: from scratch.
            "init_from": "",
            "init_weights_from": "",
            # A network, as sample_main.py takes --model, of which to distil a few-step student
            # (configs/distill.py); "" for ordinary training.
            "teacher": "",
            "distill": {
                # The teacher's guidance, which the student has built in, and where it acts.
                "guidance_scale": 5.0,
                "guidance_interval": (0.0, 1000.0),
                # Evaluations of the teacher for a trajectory, whose points the student learns from.
                "trajectory_steps": 8,
                # Trajectories start from noise alone, and need no images but captions.
                "from_noise": False,
            },
            # Adapters of the frozen weights that init_weights_from names, in place of all weights;
            # a rank of 0 trains the weights themselves. The scale of the product is alpha / rank.
            "lora": {"rank": 0, "alpha": 16.0, "targets": ("attn", "cross_attn", "mlp")},
            "mesh": {"data": -1, "fsdp": 1, "expert": 1},
            "model": {
                # MicroDiT_XL_2, MicroDiT_Tiny_2, DiT to set every size by hand, teacher, whose
                # sizes a student may have, or source: those of what init_weights_from names.
                "arch": "MicroDiT_XL_2",
                # Fields of microdit_jax.models.dit.DiTConfig over those of the arch.
                "options": ConfigDict(
                    {
                        "input_size": 32,
                        "in_channels": 4,
                        "caption_channels": 1024,
                        "pos_interp_scale": 1.0,
                        "dtype": "bfloat16",
                        "param_dtype": "float32",
                        "attention": "xla",
                        "moe_dispatch": "gather",
                        "remat": "none",
                        "unmasked_blocks": 0,
                    },
                    type_safe=False,
                ),
            },
            "edm": {"P_mean": -0.6, "P_std": 1.2, "sigma_data": EdmConfig().sigma_data},
            # Noise levels count by a loss that is learned beside them (docs/beyond.md).
            "loss": {"learned_uncertainty": False},
            "data": {
                # Each {"source", "folder", "weight"}. Sources: "latents", precomputed, in MDS or
                # ArrayRecord files; "twemoji", the embedded emoji images; "twemoji_untoned", those
                # of no skin tone; "twemoji_things" and "twemoji_things_untoned", the same with
                # things alone held out, new words among them; "twemoji_scenes", things of those in
                # other colours, several times or side by side. A record of a set with weight 2 is
                # seen twice as often as one of a set with weight 1.
                "datasets": (),
                # One folder of latents in their place; every so many of its records are held out.
                "folder": "",
                "heldout_share": 0.1,
                # {"source", "folder"} of images that training does not see.
                "heldout": ConfigDict({"source": "", "folder": ""}),
                "resolution": 256,  # pixels
                # Names of the towers that made latents and caption embeddings.
                "vae": "stabilityai/stable-diffusion-xl-base-1.0",
                "text_encoder": "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
                # "embeddings" as stored, or "tokens": the text tower then runs in the train step.
                "captions": "embeddings",
                # Folder for the shards of sets at a URL, which are kept whole where the set fits
                # into cache_bytes (of each process and set). Of larger ones, and without a folder,
                # single records are read and nothing is kept.
                "cache": "",
                "cache_bytes": 100 * 10**9,
                "caption_drop": 0.1,
                # Threads that read data, in each process. One is quickest from memory or a local
                # disk, 0 reads in the training thread.
                "threads": 2,
            },
            "optim": {
                # "adamw", or "muon": hidden matrices by Muon, the rest by AdamW (training/muon.py).
                "name": "adamw",
                "learning_rate": 2.4e-4,
                "warmup_steps": 0,
                # Cosine to final_ratio of the peak at this step; 0 keeps the rate constant.
                "decay_steps": 0,
                "final_ratio": 1.0,
                # The last steps before decay_steps, in which the rate falls in a straight line in
                # place of the cosine, and is constant before them; 0 for the cosine.
                "linear_steps": 0,
                "weight_decay": 0.1,
                "clip_norm": 0.25,
                # Learning rate of the experts' weights over that of all others.
                "expert_multiplier": 1.0,
            },
            "ema": {
                "enabled": False,
                "smoothing": 0.99975,
                "start_step": 0,
                # Steps between two snapshots of two more averages, out of which --ema_length makes
                # an average of any length after training (docs/beyond.md); 0 for none.
                "snapshot_every": 0,
            },
            "train": {
                # The run ends at this step, counted from where its weights began to train.
                "steps": 250_000,
                "batch_size": 2048,
                # Images that a device computes at a time, gradients being summed; 0 for all.
                "micro_batch_size": 0,
                # Type that gradients travel in between devices, where they are summed in float32:
                # float32, or bfloat16, which halves the bytes (docs/scaling.md, "Which mesh").
                "gradient_dtype": "float32",
                "mask_ratio": 0.75,
                "log_every": 50,
                "eval_every": 2500,
                "checkpoint_every": 2500,
                "keep_last": 2,  # newest checkpoints
                "keep_every": 0,  # steps whose checkpoint stays for good; 0 for none
                # Updates in a row that may be skipped for a loss or gradient that is not finite.
                "max_skipped": 20,
                "module_grad_norms": False,
                # Steps between two checks that all copies of the weights are equal on their devices
                # (training.replicas), which are also made before each save; 0 for none.
                "replica_check_every": 200,
            },
            "eval": {
                # What is measured each eval_every steps and at the end, in this order: names of
                # microdit_jax.training.evaluation.EVALUATORS. A count of 0 below leaves one out.
                "evaluators": ("heldout_loss", "sample_scores", "sample_grid", "page"),
                # Held-out images for the loss, and noise samples for each.
                "num_images": 4096,
                "batch_size": 1024,
                "draws": 1,
                # Prompts of the grid; with none, held-out captions beside their images.
                "prompts": PROMPTS,
                "num_samples": 16,  # samples of the grid; 0 for no grid
                # Samples whose distance to real images is measured, in small features (no FID); 0
                # for none. Prompts and reference as python -m microdit_jax.evaluate takes them.
                "score_images": 0,
                "score_prompts": "train",
                "score_reference": "train",
                "guidance_scale": 5.0,
                "num_inference_steps": 30,
            },
            "log": {
                "tensorboard": True,
                "wandb": "",  # project of Weights & Biases
            },
            # A trace of some steps, for XProf or Perfetto: the first, and how many; 0 for none.
            "profile": {"start": 10, "steps": 0},
        }
    ).lock()


def latents(*folders: str) -> tuple[dict, ...]:
    """Returns datasets of stored latents, all records with the same weight."""
    return tuple({"source": "latents", "folder": folder, "weight": 1.0} for folder in folders)


# ------------------------------------------------------------------ variants
def apply_variants(config: ConfigDict, variants: str) -> ConfigDict:
    """Applies what stands after the colon of --config.

    Raises:
      UserError: an unknown variant, or a value it cannot take.
    """
    chosen: dict[str, str] = {}
    for item in filter(None, variants.split(",")):
        name, _, chosen[name] = item.partition("=")
    if unknown := sorted(set(chosen) - {"arch", "mesh", "runlocal"}):
        raise UserError(
            f"config variants are arch=XL_2|Tiny_2, mesh=DxFxE and runlocal, found "
            f"{', '.join(unknown)}"
        )
    if "arch" in chosen:
        from microdit_jax.models import SHORT_ARCHES  # here, so that --help answers at once

        if chosen["arch"] not in SHORT_ARCHES:
            known = ", ".join(SHORT_ARCHES)
            raise UserError(f"arch must be one of {known}, found {chosen['arch']!r}")
        config.model.arch = SHORT_ARCHES[chosen["arch"]]
    if "mesh" in chosen:
        try:
            data, fsdp, expert = map(int, chosen["mesh"].split("x"))
        except ValueError as error:
            raise UserError(f"mesh must be like 2x2x2, found {chosen['mesh']!r}") from error
        config.mesh.update(data=data, fsdp=fsdp, expert=expert)
    if chosen.get("runlocal"):
        raise UserError(f"runlocal takes no value, found {chosen['runlocal']!r}")
    if "runlocal" in chosen:
        _runlocal(config)
    return config


def stages(**configs: ConfigDict) -> ConfigDict:
    """Chains several stages in this order, which ConfigDict's sorted keys would lose."""
    return ConfigDict({"stages": tuple(configs), **configs}).lock()


def stages_beside(recipe: str, names: Sequence[str], variants: str) -> ConfigDict:
    """Chains the stages of config files that lie beside the file `recipe`, by name, in order."""
    return stages(**{name: config_beside(recipe, name, variants) for name in names})


def config_beside(file: str, name: str, variants: str = "") -> ConfigDict:
    """Reads the config NAME.py that lies beside the config file `file`.

    It is read by its path, since installed and copied configs are not modules of any package.
    """
    return runpy.run_path(str(Path(file).with_name(f"{name}.py")))["get_config"](variants)


def use_emoji(
    config: ConfigDict, *, resolution: int, folder: str, tokens: int, width: int, channels: int = 8
) -> None:
    """Sets the data to the embedded emoji images, with a codec fitted at 32 px."""
    patch = 4
    config.data.update(
        datasets=({"source": "twemoji", "folder": folder, "weight": 1.0},),
        resolution=resolution,
        vae=f"patch_pca:patch={patch},channels={channels},resolution=32",
        text_encoder=f"table:width={width},tokens={tokens},seed=0",
        threads=0,  # all in memory
    )
    config.data.heldout.update(source="twemoji", folder=folder)
    config.model.options.update(
        input_size=resolution // patch, in_channels=channels, caption_channels=width
    )
    config.eval.prompts = ()


def set_sizes(config: ConfigDict, sizes: Mapping) -> None:
    """Replaces the architecture by a network whose sizes are all given."""
    config.model.arch = "DiT"
    with config.model.options.unlocked():
        config.model.options.update(sizes)


def set_emoji_network(
    config: ConfigDict, *, dim: int, patch_mixer_dim: int, init_std: float
) -> None:
    """Sets a network for CPUs: two mixer blocks, then four blocks, two of them with experts."""
    sizes = {
        "dtype": "float32",
        "dim": dim,
        "depth": 4,
        "head_dim": 32,
        "multiple_of": 32,
        "qkv_multipliers": (0.5, 0.75, 1.0, 1.0),
        "ffn_multipliers": (1.0, 2.0, 3.0, 4.0),
        "patch_mixer_depth": 2,
        "patch_mixer_dim": patch_mixer_dim,
        "patch_mixer_mlp_ratio": 4.0,
        "use_bias": False,
        "init_std": init_std,
        "num_experts": 4,
        "expert_capacity": 2.0,
    }
    set_sizes(config, sizes)


def _runlocal(config: ConfigDict) -> None:
    """Shrinks a stage: 32 px for 256 and 64 px for 512, all step counts by one factor."""
    depth, narrow_mixer = 4, config.model.arch == "MicroDiT_XL_2"
    use_emoji(
        config,
        resolution=config.data.resolution // 8,
        folder=f"out/data/twemoji_{config.data.resolution // 8}",
        tokens=16,
        width=128,
    )
    sizes = {
        "dim": 96,
        "depth": depth,
        "head_dim": 32,
        "multiple_of": 32,
        "qkv_multipliers": tuple(np.linspace(0.5, 1.0, depth).tolist()),
        "ffn_multipliers": tuple(np.linspace(0.5, 4.0, depth).tolist()),
        "patch_mixer_depth": 2,
        "patch_mixer_dim": 64 if narrow_mixer else 96,
        "patch_mixer_mlp_ratio": 4.0,
        "use_bias": False,
        "init_std": 0.07,
        "expert_capacity": 2.0,
        "dtype": "float32",
    }
    set_sizes(config, sizes)
    optim, ema, run = config.optim, config.ema, config.train
    # In the recipe, stages 2 and 4 are the last tenth of 280,000 and 55,000 steps; here a third.
    first = 200
    ema.start_step = round(ema.start_step * first / 50_000)
    optim.warmup_steps = 20 if optim.warmup_steps else 0
    optim.decay_steps = first if optim.decay_steps else 0
    run.steps = first if run.mask_ratio else first + 100
    # Small networks need a larger learning rate, and are stable with it.
    optim.update(learning_rate=12.5 * optim.learning_rate, clip_norm=4 * optim.clip_norm)
    ema.smoothing = 0.95 if ema.enabled else ema.smoothing
    ema.snapshot_every = 25 if ema.snapshot_every else 0
    run.update(batch_size=64, micro_batch_size=run.micro_batch_size // 4)
    run.update(log_every=10, eval_every=50, checkpoint_every=100)
    config.eval.update(
        num_images=512, batch_size=512, draws=2, num_samples=8, num_inference_steps=10,
        guidance_scale=3.0,
    )  # fmt: skip

"""Goes on with a trained network on one's own images.

  python -m microdit_jax.prepare --source=folder --input=photos --output=latents/photos \\
      --model=MODEL
  python train_main.py --config=configs/finetune.py --config.init_weights_from=MODEL \\
      --config.data.folder=latents/photos --workdir=runs/photos
  python sample_main.py --model=runs/photos --prompt=...

MODEL is what sample_main.py takes as --model: instant, a run, a released checkpoint, a .pt file.
The network has its sizes, noise levels and towers; a tenth of the folder is held out. With
--config.lora.rank=8 adapters are trained in place of all weights, in a fraction of the memory.
docs/finetune.md has the whole walk, what a GPU must have, and what to change for many images.
"""

from ml_collections import ConfigDict

from microdit_jax.training import defaults

STEPS = 500


def get_config(variants: str = ""):
    config = defaults.base()
    config.model.arch = "source"
    if any(variant.startswith("arch=") for variant in variants.split(",")):
        # To compile without a source: the recipe's last stage
        config.model = defaults.config_beside(__file__, "res_512_finetune").model
    else:
        with config.model.unlocked():  # what is empty is the source's
            config.model.options = ConfigDict(
                {"attention": "xla", "remat": "none", "dtype": "", "param_dtype": ""},
                type_safe=False,
            )
    config.data.update(vae="", text_encoder="", threads=0)
    config.optim.update(
        learning_rate=1e-4, warmup_steps=20, decay_steps=STEPS, final_ratio=0.1, clip_norm=1.0,
        weight_decay=0.0,
    )  # fmt: skip
    config.ema.update(enabled=True, smoothing=0.99)
    config.train.update(
        steps=STEPS, batch_size=16, mask_ratio=0.0, log_every=10, eval_every=250,
        checkpoint_every=250,
    )  # fmt: skip
    # Held-out captions beside their images
    config.eval.update(prompts=(), num_samples=8, draws=8, batch_size=64, guidance_scale=3.0)
    return defaults.apply_variants(config, variants)

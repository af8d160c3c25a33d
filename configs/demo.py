"""A small MicroDiT on 3,563 captioned emoji images, in minutes on two CPU cores.

Every part of the paper's recipe in miniature: patch mixer, 75 % of the patches masked and then
none, experts, dropped captions, EDM, an average of the weights. Images: Twemoji, CC-BY 4.0.

  python train_main.py --config=configs/demo.py --workdir=out/demo    # both
  python train_main.py --config=configs/demo.py:pretrain --workdir=out/demo/pretrain
  python train_main.py --config=configs/demo.py:finetune --workdir=out/demo/finetune

The second continues from the first. `make demo` runs both and draws a grid of samples.
Expected: held-out loss 0.30 with the right captions, 0.72 with shuffled ones.
"""

from microdit_jax.errors import UserError
from microdit_jax.training import defaults

PRETRAIN_STEPS, STEPS = 300, 1400


def get_config(stage: str = ""):
    """One stage, "pretrain" (masked) or "finetune" (all patches), or both."""
    if not stage:
        return defaults.stages(pretrain=get_config("pretrain"), finetune=get_config("finetune"))
    if stage not in ("pretrain", "finetune"):
        raise UserError(f"configs/demo.py has stages pretrain and finetune, found {stage!r}")
    config = defaults.base()
    # No caption has more than 17 tokens; one in a hundred has more than 15.
    defaults.use_emoji(config, resolution=32, folder="out/data/twemoji", tokens=16, width=256)
    defaults.set_emoji_network(config, dim=128, patch_mixer_dim=64, init_std=0.06)
    config.optim.update(
        learning_rate=3e-3, warmup_steps=100, decay_steps=STEPS, final_ratio=0.05, clip_norm=1.0,
        weight_decay=0.05,
    )  # fmt: skip
    config.ema.update(enabled=True, smoothing=0.99, start_step=100)
    config.train.update(batch_size=64, log_every=50, checkpoint_every=200, eval_every=700)
    config.eval.update(num_images=512, batch_size=512, draws=8, num_samples=24, guidance_scale=3.0)
    if stage == "pretrain":
        config.train.update(steps=PRETRAIN_STEPS, mask_ratio=0.75)
    else:
        config.init_from = "{workdir}/../pretrain"
        config.train.update(steps=STEPS, mask_ratio=0.0)
    return config

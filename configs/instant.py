"""The instant model: the demo's two stages, larger and longer, an hour on two CPU cores.

Its weights come with the package (docs/instant.md); this is how they were made, and how to make
better ones. Images: Twemoji, CC-BY 4.0.

  python train_main.py --config=configs/instant.py --workdir=out/instant         # both stages
  python train_main.py --config=configs/instant.py:stage2 --workdir=out/instant/stage2
  python -m tools.ship_instant --run=out/instant/stage2                          # ships them

Stage 1 sees 25 % of the patches and stage 2 all of them. The same command again resumes.
"""

from microdit_jax.errors import UserError
from microdit_jax.training import defaults

STEPS = {"stage1": 400, "stage2": 12_000}  # the second counts on from the first


def get_config(stage: str = ""):
    """One of the stages, or both."""
    if not stage:
        return defaults.stages(**{name: get_config(name) for name in STEPS})
    if stage not in STEPS:
        raise UserError(f"configs/instant.py has stages {', '.join(STEPS)}, found {stage!r}")

    config = defaults.base()
    folder = "out/data/twemoji_32_16"
    # 16 channels: held-out images are reconstructed at 28.7 dB, with the demo's 8 at 23.7 dB.
    defaults.use_emoji(config, resolution=32, folder=folder, tokens=16, width=256, channels=16)
    # A thing is seen three times as often as a person in one of five skin tones.
    config.data.datasets = (
        {"source": "twemoji", "folder": folder, "weight": 1.0},
        {"source": "twemoji_untoned", "folder": folder, "weight": 2.0},
    )
    defaults.set_emoji_network(config, dim=160, patch_mixer_dim=96, init_std=0.055)
    config.optim.update(
        learning_rate=2.5e-3, warmup_steps=100, decay_steps=STEPS["stage2"], final_ratio=0.02,
        clip_norm=1.0, weight_decay=0.02,
    )  # fmt: skip
    config.ema.update(enabled=True, start_step=100, smoothing=0.998)
    config.train.update(
        steps=STEPS[stage], batch_size=64, mask_ratio=0.75 if stage == "stage1" else 0.0,
        log_every=50, eval_every=1500, checkpoint_every=200,
    )  # fmt: skip
    config.eval.update(num_images=512, batch_size=128, draws=4, num_samples=24, guidance_scale=3.0)
    if stage == "stage2":
        config.init_from = "{workdir}/../stage1"
    return config

"""The instant model: the paper's four stages in small, an hour on two CPU cores.

Its weights come with the package (docs/instant.md); this is how they were made, and how to make
better ones. Pictures: Twemoji, CC-BY 4.0.

  python train_main.py --config=configs/instant.py --workdir=out/instant         # all four
  python train_main.py --config=configs/instant.py:stage4 --workdir=out/instant/stage4
  python -m tools.ship_instant --run=out/instant/stage4                          # ships them

Stages 1 and 2 see 32 px, 75 % masked and then whole; 3 and 4 the same at 64 px, from the weights of
stage 2. The same command again resumes.
"""

from configs import common
from microdit_jax.errors import UserError

# By pixels: masked, then whole, which counts on from the former.
STEPS = {32: (400, 9000), 64: (200, 9000)}


def get_config(stage: str = ""):
    """One of "stage1" to "stage4", or all four."""
    names = ("stage1", "stage2", "stage3", "stage4")
    if not stage:
        return common.stages(**{name: get_config(name) for name in names})
    if stage not in names:
        raise UserError(f"configs/instant.py has stages {', '.join(names)}, found {stage!r}")
    number = int(stage[-1])
    resolution, masked = (32, 64)[number > 2], number % 2 == 1
    masked_steps, steps = STEPS[resolution]

    config = common.base()
    folder = f"out/data/twemoji_{resolution}_16"
    # 16 channels: pictures of 64 px come back with 31.7 dB, of the demo's 8 with 26.5 dB.
    common.use_emoji(
        config, resolution=resolution, folder=folder, tokens=16, width=256, channels=16
    )
    # A thing is seen three times as often as a person in one of five skin tones.
    config.data.datasets = (
        {"source": "twemoji", "folder": folder, "weight": 1.0},
        {"source": "twemoji_untoned", "folder": folder, "weight": 2.0},
    )
    common.set_emoji_network(config, dim=160, patch_mixer_dim=96, init_std=0.055)
    config.model.options.pos_interp_scale = resolution / 32
    if resolution == 32:
        config.optim.update(learning_rate=2.5e-3, final_ratio=0.2)
        config.train.update(batch_size=64, eval_every=1500)
    else:
        # The recipe's shift to more noise at the higher resolution; not its narrower spread, which
        # leaves too little training to the first steps of sampling.
        config.edm.update(P_mean=0.0, P_std=1.2)
        config.optim.update(learning_rate=1.5e-3, final_ratio=0.01)
        config.train.update(batch_size=32, eval_every=1500)
    config.optim.update(warmup_steps=100, decay_steps=steps, clip_norm=1.0, weight_decay=0.02)
    config.ema.update(enabled=True, start_step=100, smoothing=0.998)
    config.train.update(
        steps=masked_steps if masked else steps, mask_ratio=0.75 if masked else 0.0,
        log_every=50, checkpoint_every=200,
    )  # fmt: skip
    config.eval.update(num_images=512, batch_size=128, draws=4, num_samples=24, guidance_scale=3.0)
    if number == 3:
        config.init_weights_from = "{workdir}/../stage2"
    elif number > 1:
        config.init_from = f"{{workdir}}/../stage{number - 1}"
    return config

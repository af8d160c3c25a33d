"""The instant model's second edition: words with meaning, and scenes (docs/instant2.md).

  python train_main.py --config=configs/instant2.py --workdir=out/instant2

The same command again resumes. All patches from the start: of 16, masking saves little. Images:
Twemoji, CC-BY 4.0.
"""

from microdit_jax.errors import UserError
from microdit_jax.training import defaults


def get_config(variants: str = ""):
    """Returns the one stage."""
    if variants:
        raise UserError(f"configs/instant2.py has one stage and no variants, found {variants!r}")
    config = defaults.base()
    folder = "out/data/twemoji_things"
    defaults.use_emoji(config, resolution=32, folder=folder, tokens=12, width=128, channels=16)
    config.data.text_encoder = "words:tokens=12"
    # A thing is seen three times as often as a person in one of five skin tones; a fifth of all
    # images are scenes.
    config.data.datasets = (
        {"source": "twemoji_things", "folder": folder, "weight": 1.0},
        {"source": "twemoji_things_untoned", "folder": folder, "weight": 2.0},
        {"source": "twemoji_scenes", "folder": f"{folder}_scenes", "weight": 0.5},
    )
    config.data.heldout.update(source="twemoji_things", folder=folder)
    defaults.set_emoji_network(config, dim=160, patch_mixer_dim=96, init_std=0.055)
    config.optim.update(
        name="muon", learning_rate=4e-3, warmup_steps=100, decay_steps=6000, linear_steps=1500,
        final_ratio=0.02, clip_norm=1.0, weight_decay=0.02,
    )  # fmt: skip
    config.ema.update(enabled=True, start_step=100, smoothing=0.996, snapshot_every=250)
    config.train.update(
        steps=6000, batch_size=128, mask_ratio=0.0, log_every=25, eval_every=500,
        checkpoint_every=100,
    )  # fmt: skip
    config.eval.update(num_images=118, batch_size=118, draws=8, num_samples=24, guidance_scale=3.0)
    return config

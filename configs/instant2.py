"""The instant model's second edition: words with meaning, and scenes (docs/instant2.md).

  python train_main.py --config=configs/instant2.py --workdir=out/instant2       # both stages
  python train_main.py --config=configs/instant2.py:stage2 --workdir=out/instant2/stage2

Stage 1 sees 25 % of the patches and stage 2 all of them. The same command again resumes. Images:
Twemoji, CC-BY 4.0.
"""

from microdit_jax.errors import UserError
from microdit_jax.training import defaults

STEPS = {"stage1": 200, "stage2": 6_000}  # the second counts on from the first


def get_config(stage: str = ""):
    """One of the stages, or both."""
    if not stage:
        return defaults.stages(**{name: get_config(name) for name in STEPS})
    if stage not in STEPS:
        raise UserError(f"configs/instant2.py has stages {', '.join(STEPS)}, found {stage!r}")

    config = defaults.base()
    folder = "out/data/twemoji_things"
    defaults.use_emoji(config, resolution=32, folder=folder, tokens=12, width=128, channels=16)
    config.data.text_encoder = "words:tokens=12"
    # A thing is seen three times as often as a person in one of five skin tones; a quarter of all
    # images are scenes.
    config.data.datasets = (
        {"source": "twemoji_things", "folder": folder, "weight": 1.0},
        {"source": "twemoji_things_untoned", "folder": folder, "weight": 2.0},
        {"source": "twemoji_scenes", "folder": f"{folder}_scenes", "weight": 0.5},
    )
    config.data.heldout.update(source="twemoji_things", folder=folder)
    defaults.set_emoji_network(config, dim=160, patch_mixer_dim=96, init_std=0.055)
    config.optim.update(
        name="muon", learning_rate=4e-3, warmup_steps=100, decay_steps=STEPS["stage2"],
        final_ratio=0.02, clip_norm=1.0, weight_decay=0.02,
    )  # fmt: skip
    config.ema.update(enabled=True, start_step=100, smoothing=0.996)
    config.train.update(
        steps=STEPS[stage], batch_size=128, mask_ratio=0.75 if stage == "stage1" else 0.0,
        log_every=50, eval_every=500, checkpoint_every=100,
    )  # fmt: skip
    config.eval.update(num_images=118, batch_size=118, draws=8, num_samples=24, guidance_scale=3.0)
    if stage == "stage2":
        config.init_from = "{workdir}/../stage1"
    return config

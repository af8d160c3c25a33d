"""Stage 3 of 4: 512 px, 75 % of the patches masked.

  python train_main.py --config=configs/res_512_pretrain.py --workdir=runs/res_512_pretrain

Continues from: the weights alone of stage 2, runs/res_256_finetune beside the workdir
(--config.init_weights_from; a converted checkpoint will do). Four times the patches; the position
embedding is computed for them and no weight.
Expected: 356.5 GFLOP forward per image, 1.1e20 FLOP in all; 21 hours on 8 H100 at the paper's
average speed. No score is published for this stage alone.

The moving average is on from step 25,000, as the reference's configuration has it; its training
script then leaves it out.
"""

from microdit_jax.training import defaults

STEPS = 50_000


def get_config(variants: str = ""):
    config = defaults.base()
    config.init_weights_from = "{workdir}/../res_256_finetune"
    config.model.options.update(input_size=64, pos_interp_scale=2.0)
    config.edm.update(P_mean=0.0, P_std=0.6)
    config.data.resolution = 512
    config.data.datasets = defaults.latents(
        "datadir/sa1b/mds_latents_sdxl1_dfnclipH14",
        "datadir/cc12m/mds_minres512_latents_sdxl1_dfnclipH14",
        "datadir/textcaps/mds_latents_sdxl1_dfnclipH14",
        "datadir/jdb/mds_latents_sdxl1_dfnclipH14/train",
    )
    config.data.heldout.update(
        source="latents", folder="datadir/coco2014/mds_latents_sdxl1_dfnclipH14"
    )
    config.optim.update(learning_rate=8e-5, warmup_steps=500, clip_norm=0.5)
    config.ema.update(enabled=True, smoothing=0.99975, start_step=25_000)
    config.train.update(
        steps=STEPS, mask_ratio=0.75, micro_batch_size=32, eval_every=2500, checkpoint_every=2500
    )
    return defaults.apply_variants(config, variants)

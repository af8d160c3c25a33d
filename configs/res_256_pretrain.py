"""Stage 1 of 4: 256 px, 75 % of the patches masked, from scratch.

  python train_main.py --config=configs/res_256_pretrain.py --workdir=runs/res_256_pretrain

Continues from: nothing.
Expected: 94.1 GFLOP forward per image, 1.45e20 FLOP in all; 27 hours on 8 H100 at the paper's
average speed (183 TFLOP/s on each). No score is published for this stage alone.
"""

from microdit_jax.training import defaults

STEPS = 250_000


def get_config(variants: str = ""):
    config = defaults.base()
    config.edm.update(P_mean=-0.6, P_std=1.2)
    config.data.resolution = 256
    config.data.datasets = defaults.latents(
        "datadir/sa1b/mds_latents_sdxl1_dfnclipH14",
        "datadir/cc12m/mds_latents_sdxl1_dfnclipH14",
        "datadir/textcaps/mds_latents_sdxl1_dfnclipH14",
        "datadir/jdb/mds_latents_sdxl1_dfnclipH14/train",
        "datadir/diffdb/mds_latents_sdxl1_dfnclipH14",
    )
    config.data.heldout.update(
        source="latents", folder="datadir/coco2014/mds_latents_sdxl1_dfnclipH14"
    )
    config.optim.update(
        learning_rate=2.4e-4, warmup_steps=2500, decay_steps=STEPS, final_ratio=0.33, clip_norm=0.25
    )
    config.train.update(
        steps=STEPS, mask_ratio=0.75, micro_batch_size=256, eval_every=2500, checkpoint_every=2500
    )
    return defaults.apply_variants(config, variants)

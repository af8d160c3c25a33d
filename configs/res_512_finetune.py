"""Stage 4 of 4: 512 px, all patches.

  python train_main.py --config=configs/res_512_finetune.py --workdir=runs/res_512_finetune

Continues from: the full state of stage 3, runs/res_512_pretrain beside the workdir
(--config.init_from), its moving average included, which now forgets ten times as fast.
Expected: 1000.9 GFLOP forward per image, 3.1e19 FLOP in all; 6 hours on 8 H100 at the paper's
average speed. Zero-shot FID-30k on COCO 12.66, GenEval 0.46 (37 M images, the released
checkpoint dit_4_channel_37M_real_and_synthetic_data).
"""

from microdit_jax.training import defaults


def get_config(variants: str = ""):
    config = defaults.config_beside(
        __file__, "res_512_pretrain"
    )  # the same network, data and noise levels
    config.init_weights_from = ""
    config.init_from = "{workdir}/../res_512_pretrain"
    config.optim.update(learning_rate=8e-5, warmup_steps=0, clip_norm=0.5)
    config.ema.update(enabled=True, smoothing=0.9975, start_step=1000)
    config.train.update(
        steps=config.train.steps + 5000, mask_ratio=0.0, micro_batch_size=16, eval_every=500,
        checkpoint_every=500,
    )  # fmt: skip
    return defaults.apply_variants(config, variants)

"""Stage 2 of 4: 256 px, all patches.

  python train_main.py --config=configs/res_256_finetune.py --workdir=runs/res_256_finetune

Continues from: the full state of stage 1, runs/res_256_pretrain beside the workdir
(--config.init_from).
Expected: 238.1 GFLOP forward per image, 4.4e19 FLOP in all; 8 hours on 8 H100 at the paper's
average speed. No score is published for this stage alone.
"""

from microdit_jax.training import defaults


def get_config(variants: str = ""):
    config = defaults.config_beside(__file__, "res_256_pretrain")  # the same data and noise levels
    config.init_from = "{workdir}/../res_256_pretrain"
    config.optim.update(
        learning_rate=8e-5, warmup_steps=0, decay_steps=0, final_ratio=1.0, clip_norm=0.25
    )
    config.train.update(
        steps=config.train.steps + 30_000, mask_ratio=0.0, micro_batch_size=64, eval_every=2500,
        checkpoint_every=2500,
    )  # fmt: skip
    return defaults.apply_variants(config, variants)

"""All four stages, one after the other; the same command again resumes in the right one.

  python train_main.py --config=configs/recipe.py --workdir=runs/all
  python train_main.py --config=configs/recipe.py:runlocal --workdir=runs/small    # on a CPU

Each stage has its folder in the workdir, and its values their stage's name:
--config.res_512_finetune.train.micro_batch_size=8. Variants go to all stages.
Expected: 2.6 days on 8 H100; see the stages' own files.
"""

from microdit_jax.training import defaults

STAGES = ("res_256_pretrain", "res_256_finetune", "res_512_pretrain", "res_512_finetune")


def get_config(variants: str = ""):
    return defaults.stages_beside(__file__, STAGES, variants)

"""All four stages, one after the other; the same command again goes on in the right one.

  python train_main.py --config=configs/recipe.py --workdir=runs/all
  python train_main.py --config=configs/recipe.py:runlocal --workdir=runs/small    # on a CPU

Each stage has its folder in the workdir, and its values their stage's name:
--config.res_512_finetune.train.micro_batch_size=8. Variants (configs/common.py) go to all stages.
Expected: 2.6 days on 8 H100; see the stages' own files.
"""

from configs import (
    common,
    res_256_finetune,
    res_256_pretrain,
    res_512_finetune,
    res_512_pretrain,
)


def get_config(variants: str = ""):
    return common.stages(
        res_256_pretrain=res_256_pretrain.get_config(variants),
        res_256_finetune=res_256_finetune.get_config(variants),
        res_512_pretrain=res_512_pretrain.get_config(variants),
        res_512_finetune=res_512_finetune.get_config(variants),
    )

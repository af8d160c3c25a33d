"""A few-step student of a teacher: one to four evaluations an image, guidance built in.

  python train_main.py --config=configs/distill.py --config.teacher=instant --workdir=out/student
  python train_main.py --config=configs/distill.py --config.teacher=runs/res_512_finetune ...
  python train_main.py --config=configs/distill.py:captions --config.teacher=... ...   data-free

The teacher is anything that sample_main.py takes as --model. The student has its network and starts
as its weights. It learns on the teacher's own data, or those of data.datasets; `captions` takes no
image of them: the teacher makes one from noise for each caption. `python sample_main.py
--model=out/student --prompt=...` samples it in four evaluations. docs/students.md has the method,
what it costs, and figures.
"""

from microdit_jax.training import defaults


def get_config(variants: str = ""):
    chosen = variants.split(",")
    config = defaults.base()
    config.model.arch = "teacher"
    # Of sCM's distillation (arXiv 2410.11081, appendix), for a sigma_data of 0.9
    config.edm.update(P_mean=-0.2, P_std=1.6)
    config.distill.update(guidance_scale=3.0, guidance_interval=(0.05, 1.5), warmup_steps=2000)
    if "captions" in chosen:
        config.distill.trajectory_steps = 8
        chosen.remove("captions")
    if any(variant.startswith("arch=") for variant in chosen):  # to compile without a teacher
        config.data = defaults.config_beside(__file__, "res_256_finetune").data
    config.data.caption_drop = 0.0
    config.optim.update(
        learning_rate=1e-4, warmup_steps=100, decay_steps=20_000, final_ratio=0.1, clip_norm=1.0,
        weight_decay=0.02,
    )  # fmt: skip
    config.ema.update(enabled=True, smoothing=0.995)
    config.train.update(
        steps=20_000, batch_size=64, mask_ratio=0.0, eval_every=1000, checkpoint_every=250
    )
    config.eval.update(
        evaluators=("sample_scores", "sample_grid", "page"), prompts=(), num_samples=16,
        num_inference_steps=4, guidance_scale=3.0,
    )  # fmt: skip
    return defaults.apply_variants(config, ",".join(chosen))

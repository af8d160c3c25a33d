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
    # Trajectories start anywhere from noise alone down to where images have taken shape.
    config.edm.update(P_mean=1.5, P_std=2.0)
    config.distill.update(guidance_scale=3.0, guidance_interval=(0.05, 1.5), trajectory_steps=8)
    if "captions" in chosen:
        config.distill.from_noise = True
        chosen.remove("captions")
    if any(variant.startswith("arch=") for variant in chosen):  # to compile without a teacher
        config.data = defaults.config_beside(__file__, "res_256_finetune").data
    config.data.caption_drop = 0.0
    config.optim.update(
        learning_rate=3e-4, warmup_steps=20, decay_steps=10_000, final_ratio=0.05, clip_norm=1.0,
        weight_decay=0.0,
    )  # fmt: skip
    config.ema.update(enabled=True, smoothing=0.99)
    config.train.update(
        steps=10_000, batch_size=16, mask_ratio=0.0, eval_every=500, checkpoint_every=100
    )
    config.eval.update(
        evaluators=("sample_scores", "sample_grid", "page"), prompts=(), num_samples=16,
        num_inference_steps=4, guidance_scale=3.0,
    )  # fmt: skip
    return defaults.apply_variants(config, ",".join(chosen))

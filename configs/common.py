"""What every run configuration has, with the reference's defaults. Unknown keys are errors."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The full, locked configuration; a config file changes values but cannot add any."""
    return ConfigDict(
        {
            # Continue the full state (weights, optimiser, average, step) of another run's workdir.
            "init_from": "",
            "seed": 18,
            "model": {
                # MicroDiT_XL_2, MicroDiT_Tiny_2, or DiT to set every size by hand.
                "arch": "MicroDiT_XL_2",
                # Fields of microdit_jax.models.dit.DiTConfig over those of the arch.
                "options": ConfigDict(
                    {
                        "input_size": 32,
                        "in_channels": 4,
                        "caption_channels": 1024,
                        "pos_interp_scale": 1.0,
                        "dtype": "bfloat16",
                        "param_dtype": "float32",
                        "attention": "xla",
                        "moe_dispatch": "gather",
                        "remat": "none",
                    },
                    type_safe=False,
                ),
            },
            "edm": {"P_mean": -0.6, "P_std": 1.2, "sigma_data": 0.9},
            "data": {
                "source": "twemoji",
                # Prepared latents; made on the first run.
                "folder": "out/data/twemoji",
                "resolution": 32,
                "patch": 4,
                "channels": 8,
                "text_encoder": "table:width=256,tokens=24,seed=0",
                "caption_drop": 0.1,
            },
            "optim": {
                "learning_rate": 2.4e-4,
                "warmup_steps": 2500,
                # Cosine to final_ratio of the peak at this step; 0 keeps the rate constant.
                "decay_steps": 0,
                "final_ratio": 1.0,
                "weight_decay": 0.1,
                "clip_norm": 0.25,
            },
            "ema": {"enabled": False, "smoothing": 0.99975, "start_step": 0},
            "train": {
                # The run ends at this step, counted from the start of the first stage.
                "steps": 250_000,
                "batch_size": 2048,
                "mask_ratio": 0.75,
                "log_every": 50,
                "checkpoint_every": 1000,
                "eval_every": 2500,
            },
            "eval": {
                # Noise draws for every held-out picture.
                "draws": 8,
                "num_samples": 24,
                "guidance_scale": 5.0,
                "num_inference_steps": 30,
            },
        }
    ).lock()

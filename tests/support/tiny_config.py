"""The demo, shrunk to seconds: --config=tests/support/tiny_config.py:FOLDER_OF_DATA."""

from configs import demo


def get_config(folder: str):
    """The first stage of the demo with a tiny network and a line each step."""
    config = demo.get_config("pretrain")
    config.data.datasets = ({"source": "twemoji", "folder": folder, "weight": 1.0},)
    config.data.heldout.folder = folder
    config.model.options.update(
        dim=16, depth=1, head_dim=8, multiple_of=8, patch_mixer_dim=8, num_experts=2,
        qkv_multipliers=(1.0,), ffn_multipliers=(1.0,), patch_mixer_mlp_ratio=1.0,
    )  # fmt: skip
    config.train.update(batch_size=8, log_every=1, eval_every=1000, keep_last=3)
    config.eval.update(num_images=16, batch_size=16, draws=1, num_samples=0)
    config.ema.update(start_step=5, snapshot_every=20)
    config.log.tensorboard = False
    return config

"""Trains the reference's own LatentDiffusion for two batches under Composer, and saves as it does.

    python composer_run.py plain|compile|ema CHECKOUT FOLDER

CHECKOUT holds micro_diffusion/. FOLDER gets Composer's checkpoints, the network's weights as torch
saves them (expected.pt), its average (expected_ema.pt) and the constructor's arguments.
"""

import json
import sys
from pathlib import Path

import torch
from composer_names import stand_in_for_torchvision

which, checkout, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
stand_in_for_torchvision()
sys.path.insert(0, checkout)

from composer import Trainer  # noqa: E402
from composer.algorithms import EMA  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from micro_diffusion.models import dit as zoo  # noqa: E402
from micro_diffusion.models.model import LatentDiffusion  # noqa: E402

ARGUMENTS = {
    **{"input_size": 8, "patch_size": 2, "in_channels": 4, "dim": 64, "depth": 4, "head_dim": 16},
    **{"multiple_of": 32, "caption_channels": 24, "qkv_multipliers": [0.5, 1.0, 1.0, 1.0]},
    **{"ffn_multipliers": [0.5, 1.5, 2.5, 4.0], "use_patch_mixer": True, "patch_mixer_depth": 2},
    **{"patch_mixer_dim": 32, "patch_mixer_qkv_ratio": 1.0, "patch_mixer_mlp_ratio": 4.0},
    **{"use_bias": True, "num_experts": 4, "expert_capacity": 1, "experts_every_n": 2},
    **{"pos_interp_scale": 1.0, "norm_eps": 1e-6, "depth_init": True},
}


class TextEncoder(torch.nn.Module):
    """Stands for a text encoder, as captions come embedded."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(2, 2)


class Latents(torch.utils.data.Dataset):
    """Two batches of random latents."""

    def __init__(self):
        random = torch.Generator().manual_seed(1)
        self.latents = torch.randn(8, 4, 8, 8, generator=random)
        self.captions = torch.randn(8, 1, 7, 24, generator=random)

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        return {
            "image_latents": self.latents[index],
            "caption_latents": self.captions[index],
            "drop_caption_mask": torch.ones(()),
        }


torch.manual_seed(0)
dit = zoo.DiT(**ARGUMENTS)
with torch.no_grad():
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
model = LatentDiffusion(
    dit, vae, TextEncoder(), object(), dtype="float32", latent_res=8, train_mask_ratio=0.5
)
average = EMA(half_life="1ba", update_interval="1ba")
trainer = Trainer(
    model=model,
    train_dataloader=torch.utils.data.DataLoader(Latents(), batch_size=4),
    optimizers=torch.optim.AdamW(model.dit.parameters(), lr=1e-2),
    max_duration="2ba",
    device="cpu",
    algorithms=[average] if which == "ema" else [],
    save_folder=str(folder),
    save_interval="1ba",
    compile_config={"backend": "eager"} if which == "compile" else None,
    progress_bar=False,
)
trainer.fit()
torch.save(dict(model.dit.state_dict()), folder / "expected.pt")
if which == "ema":
    kept = average.ema_model.named_parameters_dict
    names = {name: value for name, value in kept.items() if name.startswith("dit.")}
    torch.save({n.removeprefix("dit."): v for n, v in names.items()}, folder / "expected_ema.pt")
(folder / "config.json").write_text(json.dumps(ARGUMENTS))

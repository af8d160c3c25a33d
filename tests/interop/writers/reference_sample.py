"""Samples with the reference's own LatentDiffusion from a file of ours, loaded strictly.

python reference_sample.py CHECKOUT FOLDER

FOLDER holds dit.pt, config.json (the constructor's arguments) and inputs.npz (noise, captions,
steps, guidance), and gets sample.npy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from composer_names import stand_in_for_torchvision

stand_in_for_torchvision()
sys.path.insert(0, sys.argv[1])
from diffusers import AutoencoderKL  # noqa: E402
from micro_diffusion.models import dit as zoo  # noqa: E402
from micro_diffusion.models.model import LatentDiffusion  # noqa: E402

folder = Path(sys.argv[2])
dit = zoo.DiT(**json.loads((folder / "config.json").read_text()))
dit.load_state_dict(torch.load(folder / "dit.pt", weights_only=True), strict=True)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
model = LatentDiffusion(dit.eval(), vae, torch.nn.Linear(2, 2), object(), dtype="float32")
inputs = np.load(folder / "inputs.npz")
sample = model.edm_sampler_loop(
    torch.from_numpy(inputs["noise"]),
    torch.from_numpy(inputs["captions"]),
    steps=int(inputs["steps"]),
    cfg=float(inputs["guidance"]),
)
np.save(folder / "sample.npy", sample.numpy())

"""Writes one state dict in all formats, by torch and the safetensors library; scaled float8 too.

python checkpoints.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

folder = Path(sys.argv[1])
torch.manual_seed(0)
state = {
    "weight": torch.randn(6, 4),
    "half": torch.randn(3, 3).half(),
    "brain": torch.randn(3, 3).bfloat16(),
    "e4m3": torch.randn(3, 4).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(3, 4).to(torch.float8_e5m2),
    "strided": torch.randn(4, 6).t(),
}
np.savez(
    folder / "expected.npz", **{name: tensor.float().numpy() for name, tensor in state.items()}
)
torch.save(state, folder / "new.pt")
torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "a.safetensors")
dcp.save(state, checkpoint_id=folder / "distcp")
rows = torch.tensor([[0.5], [2.0], [0.25]])
scaled = {"layer.weight": state["e4m3"], "layer.weight_scale": rows}
scaled["layer.input_scale"] = torch.tensor(1.0)
save_file(scaled, folder / "scaled.safetensors")
np.save(folder / "scaled.npy", (state["e4m3"].float() * rows).numpy())

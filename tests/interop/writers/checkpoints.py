"""Writes one state dict in all formats, by torch and the safetensors library; scaled float8 too.

    python checkpoints.py FOLDER

distcp is by one process, distcp2 by two that hold parts of the same tensors.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

SHARDED = ("weight", "half", "brain", "strided")


def make_state() -> dict[str, torch.Tensor]:
    """Makes the tensors, the same in every process."""
    torch.manual_seed(0)
    return {
        "weight": torch.randn(6, 4),
        "half": torch.randn(3, 3).half(),
        "brain": torch.randn(3, 3).bfloat16(),
        "e4m3": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(3, 4).to(torch.float8_e5m2),
        "strided": torch.randn(4, 6).t(),
    }


def save_part(rank: int, folder: Path) -> None:
    """Saves distcp2 as one of two processes: rows or columns of each matrix."""
    store = f"file://{folder.absolute()}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh, state = init_device_mesh("cpu", (2,)), make_state()
    parts = {
        name: distribute_tensor(state[name].contiguous(), mesh, [Shard(i % 2)])
        for i, name in enumerate(SHARDED)
    }
    dcp.save({"state": {"model": parts}}, checkpoint_id=folder / "distcp2")
    dist.destroy_process_group()


def main() -> None:
    folder, state = Path(sys.argv[1]), make_state()
    np.savez(
        folder / "expected.npz", **{name: tensor.float().numpy() for name, tensor in state.items()}
    )
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, folder / "a.safetensors")
    dcp.save(state, checkpoint_id=folder / "distcp")
    torch.multiprocessing.spawn(save_part, (folder,), nprocs=2)
    rows = torch.tensor([[0.5], [2.0], [0.25]])
    scaled = {"layer.weight": state["e4m3"], "layer.weight_scale": rows}
    scaled["layer.input_scale"] = torch.tensor(1.0)
    save_file(scaled, folder / "scaled.safetensors")
    np.save(folder / "scaled.npy", (state["e4m3"].float() * rows).numpy())


if __name__ == "__main__":
    main()

"""Lets the reference and Composer be imported where torchvision is built for another torch."""

import sys

import torch


def stand_in_for_torchvision() -> None:
    """Declares the operators that its import looks up, if it does not import; none is called."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_kept"] = library  # its operators live as long

"""Writes a small CLIP with OpenCLIP as it publishes models, and what it computes.

    python open_clip_model.py FOLDER

The config leaves out what open_clip has defaults for, the number of heads among them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from composer_names import stand_in_for_torchvision

stand_in_for_torchvision()
import open_clip  # noqa: E402
from open_clip.push_to_hf_hub import save_config_for_hf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

folder, model_cfg = Path(sys.argv[1]), {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "layers": 2},
}  # fmt: skip
(folder / "small.json").write_text(json.dumps(model_cfg))
open_clip.add_model_config(folder / "small.json")
torch.manual_seed(0)
model = open_clip.create_model("small").eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
texts = ["a photograph of a crème brûlée", "two   DOGS &amp; a cat", "", "word " * 100]
ids, pixels = open_clip.get_tokenizer("ViT-B-32")(texts), torch.randn(2, 3, 28, 28)
tokens = []
model.ln_final.register_forward_hook(lambda module, given, output: tokens.append(output))
with torch.no_grad():
    text, image = model.encode_text(ids, normalize=True), model.encode_image(pixels, normalize=True)
np.savez(
    folder / "expected.npz", texts=texts, ids=ids, pixels=pixels, tokens=tokens[0], text=text,
    image=image,
)  # fmt: skip
for name in ("safetensors", "bin"):
    (folder / name).mkdir()
    save_config_for_hf(model, folder / name / "open_clip_config.json", model_cfg)
save_file(model.state_dict(), folder / "safetensors" / "open_clip_model.safetensors")
torch.save(model.state_dict(), folder / "bin" / "open_clip_pytorch_model.bin")

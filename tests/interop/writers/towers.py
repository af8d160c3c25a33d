"""Writes small towers with diffusers and transformers, and what they compute.

python towers.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
from composer_names import stand_in_for_torchvision

stand_in_for_torchvision()
from diffusers import AutoencoderKL  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
)

folder = Path(sys.argv[1])
BLOCKS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BLOCKS |= {"num_attention_heads": 4, "projection_dim": 16}
text = CLIPTextConfig(vocab_size=49408, max_position_embeddings=12, **BLOCKS)
vision = CLIPVisionConfig(image_size=28, patch_size=14, **BLOCKS)
ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407] + [49407] * 5])


def shake(model):
    """Moves all weights from where they are initialised: zeros and ones hide faults."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save(name: str, model, outputs: dict[str, torch.Tensor], **options) -> None:
    model.save_pretrained(folder / name, **options)
    np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in outputs.items()})


def vae(name: str, save_options: dict | None = None, **changes) -> None:
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4}
    sizes |= {"norm_num_groups": 4, "scaling_factor": 1.5305}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2}
    kinds["up_block_types"] = ["UpDecoderBlock2D"] * 2
    model = shake(AutoencoderKL(**sizes, **kinds, **changes))
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    raw, config = model.encode(image).latent_dist.mean, model.config
    if config.latents_mean is not None:
        mean, std = (torch.tensor(v) for v in (config.latents_mean, config.latents_std))
        latent = (raw - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    else:
        latent = raw - (config.shift_factor or 0)
    decoded = model.decode(raw).sample
    outputs = {"image": image, "latent": latent, "decoded": decoded}
    save(name, model, outputs, **(save_options or {}))


with torch.no_grad():
    vae("vae")
    vae("vae_sd3", shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    vae("vae_mean", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 2.0, 1.0])
    shards = {"max_shard_size": "20KB"}
    variant = shards | {"variant": "fp16"}  # the word comes after "index" here, before it there
    vae("vae_variant", variant)
    model = shake(CLIPTextModel(text))
    save("clip_text", model, {"ids": ids, "tokens": model(ids).last_hidden_state})
    for name, options in (("clip_text_shards", shards), ("clip_text_variant", variant)):
        save(name, model, {"ids": ids, "tokens": model(ids).last_hidden_state}, **options)
    whole = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    model, pixels = shake(CLIPModel(whole)), torch.randn(2, 3, 28, 28)
    found = model(input_ids=ids, pixel_values=pixels)
    save("clip", model, {"ids": ids, "pixels": pixels, "text": found.text_embeds,
                         "image": found.image_embeds})  # fmt: skip
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    model = shake(T5EncoderModel(T5Config(num_heads=4, feed_forward_proj="gated-gelu", **sizes)))
    tokens = torch.tensor([[3, 9, 27, 1, 0, 0], [5, 1, 0, 0, 0, 0]])
    mask = (tokens != 0).long()
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    save("t5", model, {"ids": tokens, "mask": mask, "tokens": hidden})
    sizes = {name: size for name, size in BLOCKS.items() if name != "projection_dim"}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 20}
    model = shake(BertModel(BertConfig(**sizes)))
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    save("bert", model, {"ids": tokens, "mask": mask, "tokens": hidden})

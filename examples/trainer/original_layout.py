"""The names that the weights of SD 1.x, SD 2.x and SDXL have in the original layout, which most
one-file checkpoints are in, worked out from the configurations of the parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

# Of each layer inside a block: diffusers' name and the original one.
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {
    "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}  # fmt: skip
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
ADAPTERS = ("lora_", "base_layer", ".processor.")  # in the names of peft's and IP-Adapter's tensors


def inside(ours: str, theirs: str, layers: Mapping[str, str]) -> dict[str, str]:
    """The names of a block's layers: diffusers' to the original ones."""
    return {f"{ours}.{name}": f"{theirs}.{original}" for name, original in layers.items()}


def unet_names(config: Any) -> dict[str, str]:
    """The modules of a UNet: diffusers' names to the original ones."""
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block: {layers}, need one number for all blocks of the UNet")
    names = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        **inside("mid_block.resnets.0", "middle_block.0", UNET_RESNET),
        **inside("mid_block.resnets.1", "middle_block.2", UNET_RESNET),
    }  # fmt: skip
    # The original numbers the layers of each side through all blocks. Before those of the down
    # blocks comes the first convolution, and behind each block one layer that halves; the layer
    # that doubles is the last part of the last layer of an up block, which has one layer more.
    for block in range(len(config.down_block_types)):
        ours, first = f"down_blocks.{block}", 1 + block * (layers + 1)
        for i in range(layers):
            names |= inside(f"{ours}.resnets.{i}", f"input_blocks.{first + i}.0", UNET_RESNET)
            names[f"{ours}.attentions.{i}"] = f"input_blocks.{first + i}.1"
        names[f"{ours}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for block, kind in enumerate(config.up_block_types):
        ours, first = f"up_blocks.{block}", block * (layers + 1)
        for i in range(layers + 1):
            names |= inside(f"{ours}.resnets.{i}", f"output_blocks.{first + i}.0", UNET_RESNET)
            names[f"{ours}.attentions.{i}"] = f"output_blocks.{first + i}.1"
        last = f"output_blocks.{first + layers}.{2 if kind.startswith('CrossAttn') else 1}"
        names[f"{ours}.upsamplers.0.conv"] = f"{last}.conv"
    return names


def vae_names(config: Any) -> dict[str, str]:
    """The modules of a VAE: diffusers' names to the original ones."""
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.{layer}": f"{side}.{layer}" for layer in ("conv_in", "conv_out")}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names |= inside(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
        for i in range(2):
            ours, theirs = f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}"
            names |= inside(ours, theirs, VAE_RESNET)
    for level in range(levels):
        # The original numbers the decoder's blocks, too, from the finest to the coarsest.
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(layers):
            theirs = f"encoder.down.{level}.block.{i}"
            names |= inside(f"{down}.resnets.{i}", theirs, VAE_RESNET)
        for i in range(layers + 1):
            names |= inside(f"{up}.resnets.{i}", f"decoder.up.{level}.block.{i}", VAE_RESNET)
        names[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return names


def renamed(part: str, state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors by their original names; `names` has those of their modules, or of larger ones
    whose inside is named alike."""
    found = {}
    for name, value in state.items():
        head, tail = name, ""
        while head and head not in names:
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}"
        if not head:
            raise ValueError(f"{part}: {name} has no name in the original layout")
        found[names[head] + tail] = value
    return found


def original_vae(vae: Any) -> dict[str, Tensor]:
    """The tensors of a VAE by their original names."""
    found = renamed("vae", vae.state_dict(), vae_names(vae.config))
    return {
        # The original has convolutions in attention, diffusers linear layers.
        name: value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
        for name, value in found.items()
    }


def text_state(encoder: Any) -> dict[str, Tensor]:
    """The tensors of a text encoder without `text_model.`, which not every version of transformers
    has before the names of a CLIPTextModel."""
    return {name.removeprefix("text_model."): v for name, v in encoder.state_dict().items()}


def original_clip(part: str, encoder: Any) -> dict[str, Tensor]:
    """The tensors of a text encoder under the names of transformers 4, which are those of SD 1."""
    names = {n: f"text_model.{n}" for n in ("embeddings", "encoder", "final_layer_norm")}
    found = renamed(part, text_state(encoder), names)
    # No weight, but published files have it, and some programs refuse a file that lacks it.
    positions = torch.arange(encoder.config.max_position_embeddings)
    return found | {"text_model.embeddings.position_ids": positions[None]}


def original_open_clip(part: str, encoder: Any) -> dict[str, Tensor]:
    """The tensors of a text encoder under OpenCLIP's names. Published files also have its
    `logit_scale`, which is for comparing texts with pictures, and in no pipeline."""
    state = text_state(encoder)
    names = {
        "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
        "embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    }  # fmt: skip
    joined = {}
    for layer in range(encoder.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        names |= inside(ours, theirs, OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            three = [state.pop(f"{ours}.self_attn.{each}_proj.{kind}") for each in "qkv"]
            joined[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(three)
    found = renamed(part, state, names) | joined
    if "text_projection" in found:
        found["text_projection"] = found["text_projection"].T
    return found


def to_original(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a pipeline of SD 1.x, SD 2.x or SDXL under their original names."""
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
    if not is_xl and not isinstance(pipeline, StableDiffusionPipeline):
        raise ValueError(
            f"pipeline: {type(pipeline).__name__}, need StableDiffusionPipeline or "
            "StableDiffusionXLPipeline"
        )
    encoders = ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",)
    for name in ("unet", "vae", *encoders):
        if pipeline.components[name] is None:
            raise ValueError(f"pipeline: its {name} is None, need all parts")
        for tensor in pipeline.components[name].state_dict():
            if any(word in tensor for word in ADAPTERS):
                raise ValueError(
                    f"{name}: {tensor} is of an adapter; merge or unload adapters first"
                )
    unet, vae, encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    parts = {UNET: renamed("unet", unet.state_dict(), unet_names(unet.config))}
    parts[VAE] = original_vae(vae)
    if is_xl:
        parts[CLIP_XL] = original_clip("text_encoder", encoder)
        parts[OPEN_CLIP_XL] = original_open_clip("text_encoder_2", pipeline.text_encoder_2)
    elif encoder.config.hidden_act == "gelu":  # OpenCLIP's, in SD 2; OpenAI's have quick_gelu
        parts[OPEN_CLIP] = original_open_clip("text_encoder", encoder)
    else:
        parts[CLIP] = original_clip("text_encoder", encoder)
    return {prefix + name: v for prefix, part in parts.items() for name, v in part.items()}

"""What SD1.5, 2.x and SDXL have in common: CLIP's tokens and a UNet with cross-attention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.families.family import Config

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCKS = ["BasicTransformerBlock", "ResnetBlock2D"]
ATTENTION = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.(.+)")


def check_unet(config: Config) -> None:
    """Raise a ValueError for a denoiser that is no UNet from noisy latents to a prediction."""
    name = config.get("_class_name")
    if name != "UNet2DConditionModel":
        raise ValueError(f"its denoiser is a {name}; need a UNet2DConditionModel")
    channels = config["in_channels"], config["out_channels"]
    if channels[0] != channels[1]:
        raise ValueError(
            f"its UNet takes {channels[0]} channels and predicts {channels[1]}, as for inpainting, "
            "editing or upscaling; need as many of both"
        )


def halvings(config: Config) -> int:
    return len(config["block_out_channels"]) - 1


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str]) -> list[Tensor]:
    """The captions as token ids, padded and cut to each tokenizer's length."""
    return [
        tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt",
            max_length=tokenizer.model_max_length,
        ).input_ids
        for tokenizer in tokenizers
    ]  # fmt: skip


def predict(unet: Any, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Any]) -> Tensor:
    prediction: Tensor = unet(noisy, timesteps, **condition).sample
    return prediction


def original_name(name: str, layers_per_block: int) -> str:
    """The name that a part of an attention block of diffusers' UNet has in the original SDXL."""
    found = ATTENTION.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is in no attention block; its original name is not known")
    side, block, layer, rest = found.groups()
    if side == "mid_block":
        return f"middle_block.1.{rest}"
    # The original numbers all layers of one side. Before a down block's layers comes the first
    # convolution, and behind them a layer that halves; an up block has one layer more.
    index = int(block) * (layers_per_block + 1) + int(layer)
    if side == "down_blocks":
        return f"input_blocks.{index + 1}.1.{rest}"
    return f"output_blocks.{index}.1.{rest}"

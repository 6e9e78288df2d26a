"""Stable Diffusion 1.x and 2.x: a UNet on the last states of one CLIP encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from trainer.families.family import Config, Family, Text, TextPart, named_embeds
from trainer.families.process import DDPM
from trainer.families.unet import BLOCKS, LORA_LAYERS, check_unet, halvings, predict, tokenize


def check(config: Config) -> None:
    """Raise a ValueError for a UNet that takes more than a caption."""
    check_unet(config)
    for name in ("addition_embed_type", "class_embed_type"):
        if config.get(name) is not None:
            raise ValueError(f"its UNet has {name}={config[name]!r}; need one on captions alone "
                             "(train_sdxl.py trains SDXL)")  # fmt: skip


def encode_text(text_encoders: Sequence[Any], input_ids: Sequence[Tensor]) -> Text:
    """The encoder's last states."""
    return {"prompts": text_encoders[0](input_ids[0])[0]}


def condition(text: Text, time_ids: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": text["prompts"]}


def embed_prompt(pipeline: Any, prompt: str, device: Any, guided: bool) -> dict[str, Tensor]:
    embedded = pipeline.encode_prompt(prompt, device, 1, guided)
    return named_embeds(embedded)


def text_layers(encoder: int, config: Any) -> int:
    layers: int = config.num_hidden_layers
    return layers


def kohya_name(name: str, config: Config) -> str:
    """kohya's scripts have diffusers' own names here."""
    return name


def kohya_base(config: Config) -> str:
    """2.x has OpenCLIP's wider states."""
    return "sd_v2" if config["cross_attention_dim"] == 1024 else "sd_v1"


SD15 = Family(
    name="sd15",
    pipeline=StableDiffusionPipeline,
    options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    denoiser="unet",
    model=UNet2DConditionModel,
    texts=(TextPart("text_encoder", CLIPTextModel, "tokenizer"),),
    config="stable-diffusion-v1-5/stable-diffusion-v1-5",
    process=DDPM,
    resolution=512,
    check=check,
    halvings=halvings,
    tokenize=tokenize,
    encode_text=encode_text,
    condition=condition,
    predict=predict,
    embed_prompt=embed_prompt,
    lora_layers=LORA_LAYERS,
    blocks=BLOCKS,
    text_layers=text_layers,
    kohya_name=kohya_name,
    kohya_base=kohya_base,
    tags=("stable-diffusion",),
)
